"""The same issues by a resource of dlt, which knows many web services."""

import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from dlt.sources.rest_api import rest_api_source


def issues(since: datetime | None) -> Iterator[dict[str, Any]]:
    """Yield the issues that were changed at this time or later."""
    asked = {"per_page": 100, "changed_since": since.isoformat() if since else ""}
    source = rest_api_source(
        {
            "client": {
                "base_url": os.environ["TRACKER_URL"],
                "auth": {"type": "bearer", "token": os.environ["TRACKER_TOKEN"]},
                "paginator": "header_link",
            },
            "resources": [{"name": "issues", "endpoint": {"path": "issues", "params": asked}}],
        }
    )
    yield from source.resources["issues"]
