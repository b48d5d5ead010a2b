"""The server of a reward model, on GPUs of its own, and the client with which the verifier `reward-model` scores.

    python -P -m stages.rl.rewards.reward_server FOLDER KEY HOST PORT

A cluster runs it in jobs beside those of vLLM's servers (`serve`): the first `verifiers.reward-model.servers` of
`slurm.servers`. They announce themselves below the folder of the others, and the stage writes there which model they
load (`model.json`). Without such jobs the stage starts one server on its own machine.

It answers requests as vLLM's servers do, through the same guard: signed with the secret of the run.

    GET  /health
    POST /atom/model {}                     {key, dtype, longest, rows}
    POST /atom/score {rows, pad, end}       the same, and scores: a log-probability for each row of token ids
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError, MachineError
from pipeline.core.stage import ServerPlace, ServerSearch
from pipeline.run_secret import atom_secret
from stages.generation import server_jobs, vllm_server
from stages.generation.server_jobs import Announced
from stages.generation.vllm_server import Server, ServerLost, in_parallel
from stages.rl.protocols import VerifierFailed
from stages.rl.rewards.reward_scorer import RewardScorer, batches

# In the folder where vLLM's servers announce themselves: the folder of these, and its file with the model to serve.
FOLDER, MODEL = "reward", "model.json"
WHAT = "server of the reward model"
# Bytes of a piece of a request that is read at once.
PIECE = 1 << 20


def main() -> None:
    """Loads the model, and answers until the process ends."""
    # Found by PYTHONPATH, as in vLLM's processes.
    from atom_guard import Guard  # type: ignore[import-not-found]

    folder, key, host, port = sys.argv[1:]
    scorer, lock = RewardScorer(Path(folder)), threading.Lock()
    facts = {"key": key, "dtype": scorer.dtype, "longest": scorer.longest, "rows": scorer.rows}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        content = dict(facts)
        if scope["path"] == "/atom/score":
            request = json.loads((await receive())["body"])
            with lock:  # one batch at a time; /health is answered meanwhile
                content["scores"] = scorer.scores(request["rows"], request["pad"], request["end"])
        body = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    guard = Guard(app)

    class Handler(BaseHTTPRequestHandler):
        """Passes a request to the guard."""

        # Seconds of silence after which a connection ends: nobody can hold threads before the signature is read.
        timeout = 60

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            headers = [
                (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()
            ]
            scope = {"type": "http", "method": self.command, "path": path, "raw_path": path.encode("latin-1")}
            scope |= {"query_string": query.encode("latin-1"), "headers": headers}
            left = int(self.headers.get("Content-Length") or 0)

            async def receive() -> dict[str, Any]:
                nonlocal left
                piece = self.rfile.read(min(left, PIECE))
                left -= len(piece)
                return {"type": "http.request", "body": piece, "more_body": bool(piece) and left > 0}

            async def send(message: dict[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    self.send_response(message["status"])
                    for name, value in message["headers"]:
                        self.send_header(name.decode("latin-1"), value.decode("latin-1"))
                    self.end_headers()
                else:
                    self.wfile.write(message["body"])

            asyncio.run(guard(scope, receive, send))

        do_POST = do_GET

    class HttpServer(ThreadingHTTPServer):
        daemon_threads = True
        address_family = vllm_server.family(host)

    HttpServer((host.strip("[]"), int(port)), Handler).serve_forever()


def start(folder: Path, key: str, work: Path, log: Path, secret: Path | None = None) -> Server:
    """Starts a server on this machine.

    Args:
        folder: Folder of the exported reward model.
        key: Key of its artifact, which each answer states.
        work: Folder in which it starts.
        log: File for its output.
        secret: File of the secret, for a server that other nodes reach; see `Server.local`.
    """
    import torch

    root = Path(__file__).parents[3]
    variables = {"PYTHONPATH": os.pathsep.join([vllm_server.environment()["PYTHONPATH"], str(root)])}
    if not torch.cuda.is_available():
        # As many threads as this process has, so that both compute the same.
        variables["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    elif secret is None:
        # A GPU that no rank uses, if there is one.
        variables |= vllm_server.place(os.environ, torch.cuda.device_count(), 1.0)[0]

    def command(host: str, port: int) -> list[str]:
        return [sys.executable, "-P", "-m", __name__, str(folder.absolute()), key, host, str(port)]

    return Server.local(command, work, log, variables, secret, WHAT)


def serve(place: ServerPlace) -> None:
    """Runs a server for a stage and announces it until the stage has ended.

    Raises:
        MachineError: The server dies or no longer answers.
    """
    folder = place.folder / FOLDER
    while not (folder / MODEL).exists():  # the stage writes it
        if place.ended():
            return
        time.sleep(server_jobs.POLL_SECONDS)
    model = json.loads((folder / MODEL).read_text())
    server = start(Path(model["folder"]), model["key"], place.launch, place.log, folder / server_jobs.SECRET)
    server_jobs.run(server, place, folder)


class ServedScorer:
    """The scores of a reward model by its servers."""

    def __init__(self, folder: Path, key: str) -> None:
        """Finds the servers of the stage, or starts one, and waits for an answer.

        Args:
            folder: Folder of the exported reward model.
            key: Key of its artifact.

        Raises:
            MachineError: No server answers in time.
        """
        self.key, self.search = key, ServerSearch.of_environment()
        self.local: Server | None = None
        self.work: Path | None = None
        self.announced: dict[Announced, Server] = {}
        if self.search is None:
            self.work = Path(tempfile.mkdtemp(prefix="atom-reward-"))
            self.local = start(folder, key, self.work, self.work / "server.log")
        else:
            self.folder = Path(self.search.folder) / FOLDER
            self.folder.mkdir(parents=True, exist_ok=True)
            atom_secret.make(self.folder / server_jobs.SECRET)
            # The servers wait for it.
            atomic_files.write(self.folder / MODEL, json.dumps({"folder": str(folder.absolute()), "key": key}))
        try:
            facts = self._checked(self._present()[0].post("/atom/model"))
        except BaseException:
            self.close()
            raise
        self.longest, self.rows, self.dtype = int(facts["longest"]), int(facts["rows"]), str(facts["dtype"])

    def scores(self, rows: Sequence[Sequence[int]], pad: int, end: int) -> list[float | None]:
        """Returns the score of each row; None for one that is longer than the context.

        Raises:
            VerifierFailed: A server is lost, so that some rows have no score. The next call asks those that are there.
        """
        parts = list(batches(rows, self.longest, self.rows))
        scores: list[float | None] = [None] * len(rows)
        try:
            servers = self._present()

            def score(item: tuple[Server, list[int]]) -> list[float]:
                server, part = item
                answer = self._checked(server.post("/atom/score", _request(rows, part, pad, end)))
                if len(answer["scores"]) != len(part) or answer["dtype"] != self.dtype:
                    raise VerifierFailed(f"the {WHAT} at {server.url} gave no score for each answer; see its log")
                return [float(value) for value in answer["scores"]]

            # In turn, so that each has short rows and long ones.
            dealt = [(servers[n % len(servers)], part) for n, part in enumerate(parts)]
            for part, values in zip(parts, in_parallel(score, dealt, len(servers)), strict=True):
                for number, value in zip(part, values, strict=True):
                    scores[number] = value
        except VerifierFailed:
            raise
        except (ServerLost, MachineError) as error:
            raise VerifierFailed(f"verifier reward-model: {error}") from None
        return scores

    def close(self) -> None:
        if self.local is not None:
            self.local.close()
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)

    def _present(self) -> list[Server]:
        """Returns the servers that answer; one is waited for.

        Raises:
            MachineError: None answers in time.
        """
        if self.local is not None:
            if self.local.process is None or self.local.process.poll() is not None:
                self.local.launch()
            self.local.wait()
            return [self.local]
        assert self.search is not None
        end = time.monotonic() + self.search.seconds
        while True:
            present = []
            for announced in server_jobs.read(self.folder, self.search.run):
                server = self.announced.setdefault(
                    announced, Server(announced.url, self.folder / server_jobs.SECRET, what=WHAT)
                )
                try:
                    if server.problem() is None:
                        present.append(server)
                except ServerLost:  # another process has its address by now
                    continue
            if present:
                return present
            if time.monotonic() > end:
                raise MachineError(
                    f"no {WHAT} has answered for {self.search.seconds:.0f} s; see the logs of the jobs of "
                    "slurm.servers, of which verifiers.reward-model.servers score, and run again to go on"
                )
            time.sleep(server_jobs.POLL_SECONDS)

    def _checked(self, answer: Any) -> dict[str, Any]:
        """Returns an answer of a server. Raises AtomError if it serves another model."""
        if not isinstance(answer, dict) or answer.get("key") != self.key:
            raise AtomError(
                f"a {WHAT} has {answer.get('key') if isinstance(answer, dict) else answer}, and the phase asks for "
                f"{self.key}; end it, and run again"
            )
        return answer


def _request(rows: Sequence[Sequence[int]], part: Sequence[int], pad: int, end: int) -> dict[str, Any]:
    return {"rows": [list(rows[number]) for number in part], "pad": pad, "end": end}


if __name__ == "__main__":
    main()
