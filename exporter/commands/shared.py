"""The command line itself, and what its commands share: options, output, exit statuses."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import click

from exporter.errors import EXIT_STATUSES, ExporterError, UsageError, nearest
from exporter.load import MOST_DELETES
from exporter.terminal import Console

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from exporter.config import Definition

CORE, ANALYTICS = "DATABASE_URL_CORE", "DATABASE_URL_ANALYTICS"
# In the order of the help.
_COMMANDS = (
    "init",
    "new",
    "load",
    "check",
    "status",
    "verify",
    "state",
    "slots",
    "db",
    "docs",
    "demo",
)
ENVIRONMENT = {
    CORE: "the source: postgresql://user:password@host/database",
    "DATABASE_URL_NAME": "another source, of definitions with source.database: NAME",
    ANALYTICS: "the destination; without it, the dbt profile's target",
    "BATCH_SIZE": "overrides batch_rows of every definition",
    "DBT_PROJECT_DIR": "a folder in the dbt project, as for dbt; --project-dir wins",
    "DBT_PROFILES_DIR": "the folder of profiles.yml, as for dbt",
    "DBT_PROFILE": "the profile, instead of the one that dbt_project.yml names",
    "DBT_TARGET": "the profile's target, instead of its default",
    "DBT_TARGET_PATH": "the folder that dbt writes to, as for dbt",
    "NO_COLOR": "no colours if it is set, whatever its value",
    "SLACK_WEBHOOK_URL": "a Slack webhook, for a message after each load",
    "SLACK_TOKEN": "or a Slack token with chat:write, for …",
    "SLACK_CRON_CHANNEL_ID": "… this channel",
    "SLACK_API_URL": "Slack's address, where it is not https://slack.com/api/",
    "SENTRY_DSN": "where failures go: pip install 'dbt-exporter[sentry]'",
    "SENTRY_RELEASE": "Sentry's release, instead of dbt-exporter's version",
    "HEALTHCHECK_URL": "pinged as URL/start, then URL or URL/fail",
    "EXPORTER_PG_BIN": "the folder of the server programs that the demo and the tests run",
}


class Group(click.Group):
    """Answers a mistyped command with the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments name. Raises click.UsageError."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            advice = f"{error.message.rstrip('.')}: {nearest(args[0], self.list_commands(ctx))}"
            raise click.UsageError(advice, ctx) from None


class _Main(Group):
    """Imports a command when it is called, and turns an ExporterError into an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"exporter.commands.{cmd_name}")
        return cast(click.Command, module.command)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, rows in (("Environment", ENVIRONMENT), ("Exit status", EXIT_STATUSES)):
            with formatter.section(title):
                formatter.write_dl([(str(name), meaning) for name, meaning in rows.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ExporterError as error:
            self._exit(ctx, error)
        except (KeyboardInterrupt, click.Abort) as stop:
            if isinstance(stop.__context__, EOFError):  # no answer at a prompt
                raise
            from exporter.terminal import signals

            interrupt = signals.behind(stop) or KeyboardInterrupt()
            self._exit(ctx, signals.reason(interrupt, "interrupted"))

    @staticmethod
    def _exit(ctx: click.Context, error: ExporterError) -> NoReturn:
        (ctx.obj or Console()).error(error)
        ctx.exit(error.exit_status)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dbt-exporter")
def main() -> None:
    """PostgreSQL to PostgreSQL, incrementally, for teams that standardize on dbt."""


class Call(NamedTuple):
    """A call of a command: the values of the shared options."""

    project_dir: Path
    environment: str | None
    console: Console

    def root(self, *variables: str) -> Path:
        """Read the project's environment, check these variables, and return the project's folder.

        Raises ProjectError and SettingError.
        """
        from exporter.config import environment, project

        root = project.find(self.project_dir)
        environment.load_environment(root, self.environment)
        environment.require(root, *variables)
        return root

    def definitions(
        self, words: tuple[str, ...], *, source: bool = True, destination: bool = True
    ) -> list[Definition]:
        """Return the definitions that the words name; without words, all. Raises UsageError.

        Where their ``source`` or ``destination`` is needed, its variable is checked.
        """
        from exporter.config import choice, environment, project

        root = self.root()
        chosen = choice.choose(project.definitions(root), words)
        environment.require(root, *([ANALYTICS] if destination else []))
        environment.require_sources(chosen if source else ())
        return chosen

    def definition(self, key: str, *, source: bool = True) -> Definition:
        """Return the definition with this very key. Raises UsageError."""
        from exporter.config import choice, environment, project

        root = self.root()
        found = choice.one(project.definitions(root), key)
        environment.require(root, ANALYTICS)
        environment.require_sources([found] if source else ())
        return found


def refuse_function(definition: Definition, what: str, hint: str) -> None:
    """Raise UsageError where a function yields the rows, for what needs a source to look at."""
    if definition.source.rows:
        raise UsageError(
            f"{definition.where}: {what} has nothing to do for {definition.key}: a function,"
            f" {definition.source.rows}, yields its rows",
            hint=hint,
        )


class Key(click.types.StringParamType):
    """The key of a definition, or where several may be given, a pattern of keys or a tag.

    A shell completes it from those of the project.
    """

    name = "key"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the keys that begin like that; none where the project cannot be read."""
        from click.shell_completion import CompletionItem

        from exporter.config import choice, environment, project

        try:
            root = project.find(ctx.params.get("project_dir") or Path())
            environment.load_environment(root, ctx.params.get("environment"))
            found = project.declared(root)
        except Exception:  # noqa: BLE001  a message would end up in the prompt
            return []
        given = tuple(ctx.params.get(param.name or "") or ())
        # bash takes tag:nightly for three words, and completes the last of them.
        parted = given[-2:] == ("tag", ":") or (*given[-1:], incomplete) == ("tag", ":")
        typed = choice.TAG + incomplete.lstrip(":") if parted else incomplete
        names = {one.key: str(one.destination) for one in found}
        if param.nargs != 1:
            names |= {choice.TAG + tag: "a tag" for one in found for tag in one.tags}
        return [
            CompletionItem(name.removeprefix(choice.TAG) if parted else name, help=about)
            for name, about in names.items()
            if name.startswith(typed) and name not in given
        ]


KEY = Key()


def examples(*lines: str) -> str:
    """Return the end of a command's help: examples of what to type."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def out(*lines: str) -> None:
    """Print lines of the result, in colour only on a terminal and without NO_COLOR."""
    for line in lines:
        click.echo(line, color=False if os.environ.get("NO_COLOR") else None)


def shared(function: Callable[..., None]) -> Callable[..., None]:
    """Add the shared options to a command; its function gets them as one ``Call``."""

    @click.option(
        "--project-dir",
        type=click.Path(path_type=Path, file_okay=False),
        default=".",
        envvar="DBT_PROJECT_DIR",
        help="A folder in the dbt project.",
    )
    @click.option("--env", "environment", metavar="NAME", help="Read .env.NAME instead of .env.")
    @click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        help="json: standard error gets one JSON object a line.",
    )
    @click.option("-q", "--quiet", is_flag=True, help="Report errors only.")
    @click.option("-v", "--verbose", is_flag=True, help="Report details, the SQL included.")
    @functools.wraps(function)
    def command(
        project_dir: Path,
        environment: str | None,
        log_format: str,
        quiet: bool,
        verbose: bool,
        **arguments: Any,
    ) -> None:
        if quiet and verbose:
            raise UsageError("-q and -v exclude one another")
        level = "error" if quiet else "debug" if verbose else "info"
        console = Console(as_json=log_format == "json", level=level)
        click.get_current_context().find_root().obj = console  # for the error that ends it
        try:
            function(Call(project_dir, environment, console), **arguments)
        finally:
            console.close()

    return command


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Let Ctrl-C and SIGTERM end the command in order; within 5 s, whatever the servers do."""
    from exporter.terminal import signals
    from exporter.wire import sever_all

    return signals.interruptible(sever_all)


max_deletes = click.option(
    "--max-deletes",
    type=click.FloatRange(0, 100),
    default=None,
    metavar="PERCENT",
    help=f"Delete no row if more than PERCENT of raw's would go; default {MOST_DELETES}.",
)


def most_deletes(given: float | None, flag: str, *, on: bool) -> float:
    """Return --max-deletes or its default. Raises UsageError where it lacks its ``flag``."""
    if given is not None and not on:
        raise UsageError(f"--max-deletes goes with {flag}, without which nothing is deleted")
    return MOST_DELETES if given is None else given


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
