"""`python -m benchmarks` runs all of them; with a name and its options, one."""

from __future__ import annotations

import click

from benchmarks import load, python_models, scaling, upsert, verify


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Ratios measured in one run, medians of three."""
    if context.invoked_subcommand is None:
        for command in main.commands.values():
            context.invoke(command)


main.add_command(load.main, "load")
main.add_command(upsert.main, "upsert")
main.add_command(python_models.main, "python")
main.add_command(scaling.main, "scaling")
main.add_command(verify.main, "verify")

if __name__ == "__main__":
    main()
