"""The product's own dbt project: its macros, and the example that the demo runs."""

from __future__ import annotations

from pathlib import Path


def project() -> Path:
    """Return the folder that holds it: within an installed package, else the repository's."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "project"
    return installed if installed.is_dir() else package.parent
