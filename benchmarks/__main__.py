"""`python -m benchmarks` runs all of them; with a name and its options, one."""

from __future__ import annotations

import compileall

import click

from benchmarks import capture, load, python_models, rows, scaling, upsert, verify
from benchmarks.contestants import ROOT


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Ratios measured in one run, medians of three."""
    compileall.compile_dir(ROOT / "exporter", quiet=1)  # as an installation of the package does
    if context.invoked_subcommand is None:
        for command in main.commands.values():
            context.invoke(command)


main.add_command(load.main, "load")
main.add_command(upsert.main, "upsert")
main.add_command(python_models.main, "python")
main.add_command(scaling.main, "scaling")
main.add_command(verify.main, "verify")
main.add_command(capture.main, "changes")
main.add_command(rows.main, "rows")

if __name__ == "__main__":
    main()
