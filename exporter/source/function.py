"""The function that yields rows: found, called, and what goes wrong in it told by its own place."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from exporter.config import Function, SourceTable
from exporter.errors import DefinitionError, SourceError, UsageError, nearest
from exporter.terminal import signals

_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.I)
_IN_ADDRESS = re.compile(
    r"(?<=//)[^/@\s]+(?=@)|(?<=[?&])([\w-]*(?:key|token|secret|pass)\w*=)[^&\s]+"
)


class Call:
    """A function that is being called. Rows come in its thread, at the caller's pace.

    Raises DefinitionError where there is no such function, SourceError for what it raises.
    """

    def __init__(self, declared: SourceTable, key: str) -> None:
        assert declared.rows is not None
        self._declared = declared
        self._named: Function = declared.rows
        self._key = key
        self._rows: Iterator[Any] = iter(())
        self.taken = 0

    @contextlib.contextmanager
    def importing(self) -> Iterator[None]:
        """Let the project's modules be imported, which a function may do whenever it runs."""
        sys.path.insert(0, self._named.folder)
        try:
            yield
        finally:
            self._close()
            sys.path.remove(self._named.folder)

    def begin(self, since: Any, until: Any = None) -> None:
        """Call the function. Raises UsageError where it takes no ``until``, and that is given."""
        function = self._find()
        given = {} if until is None else {"until": until}
        self._check(function, since, given)
        try:
            rows = function(since, **given)
            if inspect.iscoroutine(rows):
                rows.close()  # else Python complains that nobody waits for it
            if isinstance(rows, (dict, str, bytes)) or not hasattr(rows, "__iter__"):
                self._fail(f"returned a {type(rows).__name__}: it has to yield dicts, or a list")
            self._rows = iter(rows)
        except (KeyboardInterrupt, DefinitionError):
            raise
        except BaseException as error:  # noqa: BLE001  whatever it raises is its own
            raise self._failure(error, self.taken) from None

    def take(self, most: int) -> list[Any]:
        """Return the next rows, so many at most; fewer only where there are no more."""
        rows: list[Any] = []
        try:
            for row in self._rows:
                if stop := signals.stopping():  # reaches the main thread alone
                    raise stop
                # Who yields one dict again and again, changed, means what was in it each time.
                rows.append(row.copy() if type(row) is dict else row)
                if len(rows) >= most:
                    break
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  whatever it raises is its own
            raise self._failure(error, self.taken + len(rows)) from None
        self.taken += len(rows)
        return rows

    def _close(self) -> None:
        """End it where it is, as ``finally`` in it expects. What it says then is said too late."""
        close = getattr(self._rows, "close", None)
        if close is not None:
            with contextlib.suppress(Exception):
                close()

    def _find(self) -> Callable[..., Any]:
        module = self._module()
        found = getattr(module, self._named.name, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
        if found is not None:
            self._fail(f"is a {type(found).__name__}, and no function")
        names = [name for name, one in vars(module).items() if inspect.isfunction(one)]
        hint = nearest(self._named.name, names)
        return self._fail(f"there is no function {self._named.name}", hint)

    def _module(self) -> ModuleType:
        name, folder = self._named.module, Path(self._named.folder)
        _forget_namesake(name, folder)
        importlib.invalidate_caches()  # a file of a moment ago
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and f"{name}.".startswith(f"{error.name}."):
                self._fail(
                    f"there is no module {error.name}",
                    f"it is looked for in {folder}, and among what is installed here",
                )
            raise self._failure(error) from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  a module may raise anything
            raise self._failure(error) from None

    def _check(self, function: Callable[..., Any], since: Any, given: dict[str, Any]) -> None:
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # one of C may not tell
            return
        name = self._named.name
        try:
            signature.bind(since)
        except TypeError:
            self._fail("has to take the position alone", f"def {name}(since): …")
        try:
            signature.bind(since, **given)
        except TypeError:
            raise UsageError(
                f"{self._declared.where}: --until is handed to the function, and {self._named} does"
                " not take it",
                hint=f"def {name}(since, until=None): …; or leave out --until",
            ) from None

    def _fail(self, problem: str, hint: str | None = None) -> NoReturn:
        place = f"{self._declared.where}: exporter.source.rows: {self._named}"
        raise DefinitionError(f"{place}: {problem}", hint=hint)

    def _failure(self, error: BaseException, rows: int | None = None) -> SourceError:
        """Return the error for an exception of the function, or of its module's import."""
        when = "while it was imported"
        if rows is not None:
            when = f"after {rows:,} row{'' if rows == 1 else 's'}"
        return SourceError(
            f"{self._key}: {self._named} ({self._declared.where}) failed {when}:"
            f" {described(error, self._named.folder)}",
            hint=f"what had landed before is kept; exporter load {self._key} goes on from there",
        )


def described(error: BaseException, folder: str) -> str:
    """Return an exception in one line, with the last line of the project that led to it.

    Without that, with the last line of all. Secrets of the environment are left out.
    """
    frames = [
        (Path(one.filename), one.lineno)
        for one in traceback.extract_tb(error.__traceback__)
        if not one.filename.startswith("<") and Path(one.filename) != Path(__file__)
    ]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((Path(error.filename), error.lineno))
    own = [one for one in frames if _is_own(one[0], Path(folder))]
    place = ""
    if own or frames:
        file, line = (own or frames)[-1]
        shown = file.relative_to(folder) if file.is_relative_to(folder) else file
        place = f"{shown}:{line}: "
    said = str(error.msg if isinstance(error, SyntaxError) else error).strip()
    first = said.splitlines()[0] if said else ""
    return f"{place}{type(error).__name__}{f': {_masked(first)}' if first else ''}"


def _is_own(file: Path, folder: Path) -> bool:
    """Whether a file is the project's, and not of an environment that lies in its folder."""
    return file.is_relative_to(folder) and "site-packages" not in file.parts


def _masked(said: str) -> str:
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) > 5:
            said = said.replace(value, "***")
    return _IN_ADDRESS.sub(lambda found: f"{found[1] or ''}***", said)


def _forget_namesake(name: str, folder: Path) -> None:
    """Let a module of this project be imported where one of another project has its name."""
    known = sys.modules.get(name)
    path = folder.joinpath(*name.split("."))
    ours = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    if known is None or not ours or known.__file__ == str(ours[0]):
        return
    top = name.partition(".")[0]
    for other in [one for one in sys.modules if one == top or one.startswith(f"{top}.")]:
        del sys.modules[other]
