"""Runs the local Hub.

    python -m release.hub.local.server --root runs/hub --port 8765 --token local=hf_local

The real client uses it with `HF_ENDPOINT=http://127.0.0.1:8765 HF_TOKEN=hf_local` and without Xet transfers
(`HF_HUB_DISABLE_XET=1`, which `atom publish` and `atom verify` set). It listens on the loopback device only.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import AtomError

LOCAL_TOKEN = "hf_local"
# Seconds for which an idle connection stays open. Clients keep one for a shorter time, so none sends its next request
# on a connection that the server is about to close.
IDLE_SECONDS = 75


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m release.hub.local.server", description="a local Hugging Face Hub")
    parser.add_argument("--root", type=Path, required=True, help="folder that keeps the repositories")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one, which the first line names")
    parser.add_argument("--token", action="append", default=[], metavar="USER=TOKEN", help="may be repeated")
    parser.add_argument("--lfs-bytes", type=int, default=10 << 20, help="files of this size and more go through LFS")
    parser.add_argument("--commits-per-hour", type=int, default=128, help="commits to one repository")
    parser.add_argument("--log", type=Path, help="file that gets a line for each request: its method and its path")
    options = parser.parse_args(argv)

    import uvicorn

    from release.hub.local.app import make_app

    pairs = [pair.partition("=") for pair in options.token or [f"local={LOCAL_TOKEN}"]]
    # A token without a user belongs to `local`.
    tokens = {token if mark else user: user if mark else "local" for user, mark, token in pairs}
    app = make_app(options.root, tokens, options.lfs_bytes, options.commits_per_hour, options.log)
    config = uvicorn.Config(
        app, "127.0.0.1", options.port, log_level="warning", access_log=False, timeout_keep_alive=IDLE_SECONDS
    )

    class Server(uvicorn.Server):
        """A server that prints a line once it listens."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                port = self.servers[0].sockets[0].getsockname()[1]
                user = tokens.get(LOCAL_TOKEN)
                token = f", and HF_TOKEN={LOCAL_TOKEN} for the user {user}" if user else ""
                print(f"the local Hub is up: set HF_ENDPOINT=http://127.0.0.1:{port}{token}", flush=True)

    Server(config).run()


@contextmanager
def running(
    root: Path, user: str = "local", token: str = LOCAL_TOKEN, *extra: str, seconds: float = 60
) -> Iterator[str]:
    """Runs a local Hub in a process of its own until the end of the block, and yields its endpoint.

    Args:
        root: The folder that keeps its repositories.
        user: The owner of the repositories.
        token: The access token of the user.
        extra: Further options of the command.
        seconds: How long it may take to answer.

    Raises:
        AtomError: If it does not answer in time.
    """
    command = [sys.executable, "-m", "release.hub.local.server", "--root", str(root), "--port", "0"]
    command += ["--token", f"{user}={token}", *extra]
    # The caller may have found this package by its own search path, which a new process does not inherit.
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        limit = threading.Timer(seconds, server.kill)  # it imports its libraries first: seconds on a loaded machine
        limit.start()
        try:
            assert server.stdout is not None
            if not (address := re.search(r"HF_ENDPOINT=(http://[\w.:]+)", server.stdout.readline())):
                raise AtomError(
                    f"the local Hub ended before it was up, or took {seconds:g} s; are starlette and uvicorn installed?"
                )
            limit.cancel()
            yield address[1]
        finally:
            limit.cancel()
            server.terminate()


if __name__ == "__main__":
    main()
