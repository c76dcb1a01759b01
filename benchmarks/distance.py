"""A server that is further away: what passes between it and its clients is late.

`python -m benchmarks.distance SECONDS SOCKET…` prints the ports at which each server is that far.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from benchmarks.contestants import ROOT

_CHUNK = 2**16


@contextlib.contextmanager
def further_away(*urls: str, seconds: float) -> Iterator[list[str]]:
    """Give URLs of the same databases by which every message takes so long, either way.

    The loop waits whole milliseconds: what it really is has to be measured.
    """
    parts = [conninfo_to_dict(url) for url in urls]
    sockets = [f"{one['host']}/.s.PGSQL.{one.get('port', 5432)}" for one in parts]
    words = [sys.executable, "-m", "benchmarks.distance", str(seconds), *sockets]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ports = process.stdout.readline().split()
            yield [
                make_conninfo(
                    "", **{**one, "host": "127.0.0.1", "port": port, "sslmode": "disable"}
                )
                for one, port in zip(parts, ports, strict=True)
            ]
        finally:
            process.kill()


async def _serve(late: float, *sockets: str) -> None:
    servers = [await _relay(one, late) for one in sockets]
    print(*(one.sockets[0].getsockname()[1] for one in servers), flush=True)
    await asyncio.gather(*(one.serve_forever() for one in servers))


async def _relay(socket: str, late: float) -> asyncio.Server:
    async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(socket)
        await asyncio.gather(_pass(reader, server_writer, late), _pass(server_reader, writer, late))

    return await asyncio.start_server(met, "127.0.0.1", 0)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late: float) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(_CHUNK):
            loop.call_later(late, writer.write, chunk)
            await writer.drain()
    loop.call_later(late, writer.close)


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1]), *sys.argv[2:]))
