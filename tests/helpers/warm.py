"""Commands in processes of their own, without the time that their imports take.

A server imports dbt and the exporter once. For each command it forks: the child has the caller's
folder, environment and files for its output, and ends with the command's exit status. What a
command changes in its process, it changes in its own alone.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

_LENGTH = struct.Struct("!i")
# A command that ends leaves its semaphores to a process that it shares with the others.
_QUIET = ("-W", "ignore:resource_tracker")


class Warm:
    """A server that is running. ``run`` is ``subprocess.run`` for what it has imported."""

    def __init__(self, root: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._address = f"{self._folder.name}/socket"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self._address)
            listening.listen()
            self._process = subprocess.Popen(
                [sys.executable, *_QUIET, "-m", "tests.helpers.warm", str(listening.fileno())],
                cwd=root,
                env={**os.environ, "PYTHONPATH": str(root)},
                pass_fds=[listening.fileno()],
                stdin=subprocess.PIPE,  # its end tells that this process is gone
            )

    def close(self) -> None:
        """End the server."""
        self._process.communicate()
        self._folder.cleanup()

    def run(
        self, program: str, words: list[str], folder: Path, env: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run ``exporter`` or ``dbt``. Raises TimeoutError."""
        with (
            tempfile.TemporaryFile("w+") as out,
            tempfile.TemporaryFile("w+") as err,
            socket.socket(socket.AF_UNIX) as server,
        ):
            server.settimeout(timeout)
            server.connect(self._address)
            asked = json.dumps([program, words, str(folder), env]).encode()
            fds = [out.fileno(), err.fileno()]
            socket.send_fds(server, [_LENGTH.pack(len(asked))], fds)
            server.sendall(asked)
            answer = server.recv(_LENGTH.size)
            status = _LENGTH.unpack(answer)[0] if answer else -9
            out.seek(0)
            err.seek(0)
            command = [program, *words]
            return subprocess.CompletedProcess(command, status, out.read(), err.read())


def _serve(listening: socket.socket) -> None:
    import select

    import dbt.adapters.postgres
    import dbt.cli.main
    import dbt.task.build  # noqa: F401

    import exporter.commands.load
    import exporter.load.one
    import exporter.monitoring.notify  # noqa: F401

    _parse_a_project()
    gc.freeze()  # no child looks through what was imported
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno())
    waiting: dict[int, socket.socket] = {}  # by the process that it waits for
    while True:
        ready, _, _ = select.select([listening, sys.stdin, woken], [], [])
        if sys.stdin in ready:
            return
        if listening in ready:
            client, _ = listening.accept()
            waiting[_started(client)] = client
        if woken in ready:
            woken.recv(4096)
            for child in [*waiting]:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    with waiting.pop(child) as client, contextlib.suppress(OSError):
                        client.sendall(_LENGTH.pack(os.waitstatus_to_exitcode(status)))


def _parse_a_project() -> None:
    """Let dbt make what it makes once in a process, which is half of what a command takes."""
    from dbt.cli.main import dbtRunner

    with tempfile.TemporaryDirectory() as folder:
        target = (
            "{type: postgres, host: nowhere, user: u, password: p, port: 1, dbname: d, schema: s}"
        )
        for name, text in {
            "dbt_project.yml": "name: warm\nprofile: warm\n",
            "profiles.yml": f"warm: {{target: t, outputs: {{t: {target}}}}}\n",
        }.items():
            Path(folder, name).write_text(text)
        place = ["--project-dir", folder, "--profiles-dir", folder, "--log-path", folder]
        done = dbtRunner().invoke(["-q", "--no-send-anonymous-usage-stats", "parse", *place])
    assert done.success, done.exception


def _started(client: socket.socket) -> int:
    """Start the command that a client asks for; return its process."""
    head, fds, _, _ = socket.recv_fds(client, _LENGTH.size, 2)
    size = _LENGTH.unpack(head)[0]
    asked = b""
    while len(asked) < size:
        asked += client.recv(size - len(asked))
    program, words, folder, env = json.loads(asked)
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        client.close()
        _command(program, words, folder, env, fds)
    for fd in fds:
        os.close(fd)
    return child


def _command(
    program: str, words: list[str], folder: str, env: dict[str, str], fds: list[int]
) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, fd in zip((1, 2), fds, strict=True):
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [program, *words]
    sys.modules["__main__"].__package__ = ""  # click would show it as the program's name
    sys.path[0] = folder  # as `python -m` has it
    logging.root.handlers.clear()  # dbt's
    status: object = 0
    try:
        if program == "dbt":
            from dbt.cli.main import cli as main
        else:
            from exporter.__main__ import main
        main()
    except SystemExit as end:
        status = end.code
    except BaseException:  # noqa: BLE001  as the interpreter's own end tells it
        traceback.print_exc()
        status = 1
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
