"""The sampler that decodes with vLLM servers, which load the policy's weights before every step.

Requests and responses contain token ids, with the log-probability of each under the distribution from which it was
drawn. A reload that keeps old weights would bias training without an error of vLLM, so every reload is verified: see
`load`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError, MachineError
from pipeline.core.stage import ServerSearch
from pipeline.run_secret import atom_secret
from stages.generation import server_jobs
from stages.generation.protocols import Completion, Prompt, Sampler, SamplerContext
from stages.generation.server_jobs import Announced
from stages.generation.vllm_server import IN_FLIGHT, Server, ServerLost, in_parallel, interpreter
from stages.generation.weights import Broadcast, Weights

# Seconds in which a server to which a broadcast failed may say why.
REASON_SECONDS = 5.0
# Times that the servers of a step may all be lost before the stage ends.
REVIVALS = 3

T = TypeVar("T")


class VllmServer(Sampler):
    """Draws with one server of its own on this machine, with those at `urls`, or with those that announce themselves.

    Several threads may draw and another one load weights: a server finishes running answers with the new ones.

    With equal seeds it draws equal tokens only up to the rounding of a batched matrix product: the batches of requests
    depend on time. Drawn answers are kept, so this only matters for a repetition from scratch.
    """

    serves_many = True

    def __init__(self, context: SamplerContext, temperature: float = 1.0, search: ServerSearch | None = None) -> None:
        """Starts a server, or finds those of others.

        Args:
            context: The model and the settings. All servers see its folder, which is emptied.
            temperature: Temperature of sampling.
            search: Place where servers in jobs of their own announce themselves.

        Raises:
            AtomError: There is no vLLM to start, or the secret is unusable.
        """
        settings = context.settings
        self.config, self.stops, self.folder = dict(context.config), frozenset(context.stops), context.folder.absolute()
        self.max_new_tokens, self.temperature = settings.max_new_tokens, temperature
        # Servers that the recipe names come first, so nothing is searched then.
        self.note, self.search = context.note, None if settings.url else search
        self.weights: Weights | None = None
        # The servers that have the weights; the others are new or lost.
        self.serving: list[Server] = []
        self.lost: dict[Server, ServerLost] = {}
        # The digests of all policies that were loaded, in order.
        self.handed_over: list[str] = []
        self.renewing = threading.RLock()
        # Its files are those of an earlier attempt.
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        self.servers: list[Server] = []
        self.announced: dict[Announced, Server] = {}
        if settings.url:
            self.servers = [Server(url, Path(str(settings.secret))) for url in settings.url]
        elif self.search is not None:
            place = Path(self.search.folder)
            place.mkdir(parents=True, exist_ok=True)
            atom_secret.make(place / server_jobs.SECRET)
            atomic_files.write(place / "config.json", json.dumps(self.config))  # which the servers wait for
        else:
            log = self.folder / "server.log"
            gpus = None
            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                gpus = torch.cuda.device_count(), free / total
            self.servers = [Server.start(interpreter(), self.folder, log, settings.options, gpus)]

    @classmethod
    def create(cls, context: SamplerContext) -> Self:
        return cls(context, search=ServerSearch.of_environment())

    def load(self, weights: Weights) -> None:
        """Loads the weights into every server, by a folder or by broadcast, under the policy's digest as their version.

        A server checks each tensor before it loads it; one that refuses or fails stays paused. Every later answer
        states the weights that drew it, and each step compares its log-probabilities with the trainer's.

        A lost server is started anew, or taken back if it answers again.

        Raises:
            AtomError: One refuses.
            ServerLost: All are lost and none comes back.
            MachineError: None comes within the time of the search.
        """
        with self.renewing:
            if self.weights is not None and weights.digest == self.weights.digest:
                return
            self.weights, was_alone = weights, not self.serving
            # Before a server has them: an answer under way may end with the new weights.
            self.handed_over.append(weights.digest)
            try:
                try:
                    self._renew()
                except ServerLost:
                    if was_alone:
                        raise
                    self._renew()  # all were lost just now: one is waited for
            except BaseException:
                self.weights = None
                self.handed_over.pop()
                raise

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        """Returns one completion for each prompt, in order.

        What a lost server did not answer is drawn by the others, or by itself once it is back: each answer has a seed
        of its own.

        Raises:
            ServerLost: All servers are lost again and again.
        """
        if self.weights is None:
            raise ValueError("weights are loaded before anything is drawn")
        answers: dict[int, Completion] = {}
        revivals = 0
        while missing := [number for number in range(len(prompts)) if number not in answers]:
            with self.renewing:  # another thread may renew them
                if not self.serving:
                    revivals += 1
                    # A broadcast needs the other ranks, which do not send now.
                    if revivals > REVIVALS or self.weights.sender is not None:
                        raise next(iter(self.lost.values()))
                    self._renew()

            # Neighbors are often answers to one question, so that one server keeps its cache.
            servers = list(self.serving)
            dealt = [(servers[n * len(servers) // len(missing)], number) for n, number in enumerate(missing)]

            def draw(server: Server, number: int) -> None:
                if server in self.serving:
                    answers[number] = self._draw(server, prompts[number], greedy)

            self._attempt(draw, dealt)
        return [answers[number] for number in range(len(prompts))]

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def _attempt(self, request: Callable[[Server, T], None], items: Sequence[tuple[Server, T]]) -> list[Server]:
        """Sends requests at the same time; the first error ends all. Returns the servers that no request lost."""

        def attempt(item: tuple[Server, T]) -> bool:
            server = item[0]
            try:
                request(*item)
            except ServerLost as error:
                if server not in self.lost:
                    self.lost[server] = error
                    self.note(f"left out until it is back: {error}")
                # Another request may have removed it already.
                with contextlib.suppress(ValueError):
                    self.serving.remove(server)
                return False
            return True

        # As many requests at once as all servers together decode.
        kept = in_parallel(attempt, items, IN_FLIGHT * len(self.servers))
        return [server for (server, _), done in zip(items, kept, strict=True) if done]

    def _each(self, request: Callable[[Server], None], servers: Sequence[Server]) -> list[Server]:
        """Sends a request to each server. Returns those that it did not lose."""
        return self._attempt(lambda server, _: request(server), [(server, None) for server in servers])

    def _draw(self, server: Server, prompt: Prompt, greedy: bool) -> Completion:
        sampling = {
            "temperature": 0.0 if greedy else self.temperature,
            "seed": prompt.seed % 2**63,
            "max_tokens": self.max_new_tokens,
            "stop_token_ids": sorted(self.stops),
        }
        # An answer may begin with the weights of now, and end with any that come while it is drawn.
        first = len(self.handed_over) - 1
        answer = server.generate(prompt.ids, sampling)
        try:
            is_complete = [entry["token_id"] for entry in answer.choice["logprobs"]["content"]] == list(answer.ids)
            lengths = [(span["version"], span["end"] - span["start"]) for span in answer.choice["weight_versions"]]
        except (KeyError, TypeError):
            is_complete, lengths = False, []
        if not is_complete:
            raise server.incomplete(answer.choice)
        versions = tuple((version, tokens) for version, tokens in lengths if tokens)
        served, given = {digest for digest, _ in versions}, self.handed_over[first:]
        if not served or not served <= set(given) or sum(tokens for _, tokens in versions) != len(answer.ids):
            raise ServerLost(
                f"the vLLM server at {server.url} answered with the weights {', '.join(sorted(map(str, served)))} "
                f"instead of {' or '.join(given)}; it started anew, or somebody else uses it: run again"
            )
        return Completion(answer.ids, answer.logprobs, answer.ids[-1] in self.stops, versions=versions)

    def _renew(self) -> None:
        """Gives the weights to all servers that are there. One that fails is left out, and breaks nothing else."""
        assert self.weights is not None
        is_alone = not self.serving  # nobody could go on meanwhile, so those that are lost are waited for
        self._find(is_alone)
        sender, digest = self.weights.sender, self.weights.digest
        content = {"folder": str(self.weights.folder)} if sender is None else sender.content
        # What a server is told of the trainer's model: the numbers of its config.
        model = {"sizes": {name: value for name, value in self.config.items() if type(value) in (int, float)}}
        invitations: dict[Server, dict[str, Any]] = {}

        def greet(server: Server) -> None:
            if server in self.serving and (sender is None or sender.has_group(server.url)):
                return
            self._greet(server, is_alone)
            if sender is None:
                server.post("/init_weight_transfer_engine", {"init_info": model})
                return
            try:
                invitations[server] = sender.invite(server.url, server.key)
            except OSError as error:
                raise server.lost(str(error)) from None

        def update(server: Server) -> None:
            server.post("/start_weight_update", attempts=1)
            # Running answers wait, and go on with the new weights, which read their tokens again.
            server.post("/pause?mode=keep")
            server.post("/update_weights", {"update_info": {"digest": digest, **content}}, attempts=1)

        def finish(server: Server) -> None:
            server.post("/finish_weight_update", {"weight_version": digest}, attempts=1)
            server.post("/resume")

        present = self._each(greet, self.servers)
        if sender is None:
            taken = self._each(update, present)
        else:
            present = self._invite(sender, model, invitations, present)
            taken = self._beside(update, present, lambda: sender.send([server.url for server in present]))
        self.serving = []
        self.serving = self._each(finish, taken)
        for server in self.serving:
            self.lost.pop(server, None)
        if not self.serving:
            raise next(iter(self.lost.values()))

    def _invite(
        self,
        sender: Broadcast,
        model: Mapping[str, Any],
        invitations: Mapping[Server, dict[str, Any]],
        present: Sequence[Server],
    ) -> list[Server]:
        """Has invited servers enter their groups. Returns the servers that are in one."""

        def enter(server: Server) -> None:
            invitation = invitations[server]
            try:
                server.post("/init_weight_transfer_engine", {"init_info": {**model, **invitation}}, attempts=1)
            except BaseException:
                sender.give_up(server.url, invitation)
                raise

        joined: list[Server] = []
        if invitations:
            # The group forms while the servers enter it: each side waits for the other.
            by_url = {server.url: invitation for server, invitation in invitations.items()}
            joined = self._beside(enter, list(invitations), lambda: sender.join(by_url))
        return [server for server in present if server not in invitations or server in joined]

    def _find(self, is_alone: bool) -> None:
        """Makes `servers` those that are announced now, and those that serve.

        Args:
            is_alone: Waits for one that answers.

        Raises:
            MachineError: None comes within the time of the search.
        """
        if self.search is None:
            return
        end, is_noted = time.monotonic() + self.search.seconds, False
        while True:
            announced = server_jobs.read(Path(self.search.folder), self.search.run)
            # One that was started again is another server, at the same address or not.
            secret = Path(self.search.folder) / server_jobs.SECRET
            self.announced = {server: self.announced.get(server) or Server(server.url, secret) for server in announced}
            present = list(self.announced.values())
            urls = {server.url for server in present}
            self.serving = [server for server in self.serving if server in present or server.url not in urls]
            self.servers = [*present, *(server for server in self.serving if server not in present)]
            self.lost = {server: error for server, error in self.lost.items() if server in self.servers}
            if not is_alone or any(map(_answers, present)):
                return

            if time.monotonic() > end:
                raise MachineError(
                    f"no vLLM server in a job of its own answers after {self.search.seconds / 60:.0f} min "
                    f"(slurm.servers.wait_minutes); {len(present)} have announced themselves in {self.search.folder}; "
                    "see their jobs' logs beside it, and run again to go on"
                )
            if not is_noted:
                self.note(f"waits for a vLLM server, at most {self.search.seconds / 60:.0f} min")
                is_noted = True
            time.sleep(server_jobs.POLL_SECONDS)

    def _greet(self, server: Server, is_alone: bool) -> None:
        """Makes a server that does not serve ready for an update."""
        if server in self.lost:
            server.launch()
        is_waited_for = server.run or (is_alone and self.search is None)
        server.wait(None if is_waited_for else 0)
        if server.run is None:  # an earlier user may have left an update open
            with contextlib.suppress(AtomError):
                server.post("/finish_weight_update", attempts=1)

    def _beside(
        self, request: Callable[[Server], None], servers: Sequence[Server], act: Callable[[], set[str]]
    ) -> list[Server]:
        """Sends a request to each server while the trainer's ranks act.

        Returns the servers that answered, and with which `act` succeeded. Of the others the reason is awaited for a
        moment, since a server that hangs may never answer.
        """
        results: dict[Server, Future[None]] = {server: Future() for server in servers}

        def run(server: Server) -> None:
            try:
                request(server)
                results[server].set_result(None)
            except BaseException as error:
                results[server].set_exception(error)

        def confirm(server: Server) -> None:
            with contextlib.suppress(TimeoutError):
                results[server].result(None if server.url in succeeded else REASON_SECONDS)
            if server.url not in succeeded:
                raise server.lost(
                    "its weights did not come through in time; see whether it and the ranks reach each other, and what "
                    "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names"
                )

        for server in servers:
            # A daemon, since a server that hangs must not keep the stage from ending.
            threading.Thread(target=run, args=(server,), name="request", daemon=True).start()
        succeeded = act()
        return [server for server in servers if self._each(confirm, [server])]


def _answers(server: Server) -> bool:
    """Returns True if a server answers, and no other at its address."""
    try:
        return server.problem() is None
    except ServerLost:
        return False
