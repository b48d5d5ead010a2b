"""The process of the sampler `subprocess`: the in-process sampler behind a pipe.

Each line of its input is one request as JSON, and each line of its output one reply. It reads requests while it draws,
so that new weights come in the middle of an answer. It ends when its input does, so it does not outlive its parent.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stages.rl.protocols import Completion, Prompt
from stages.rl.samplers.generate import InProcess
from stages.rl.samplers.vllm_worker import atom_index

Reply = Callable[..., None]


class Decoding(InProcess):
    """The in-process sampler, whose weights may change between two tokens. Its answers state their policies."""

    drawn_by: list[tuple[int, str]]
    """The policies of the answers that are drawn: (index of the first token, digest)."""
    digest = ""
    next_weights: tuple[str, Mapping[str, torch.Tensor]] | None = None
    """The latest policy, until its weights are loaded. Another thread sets it."""

    def _draw(self, prompts: list[Prompt], greedy: bool) -> list[Completion]:
        self._load_next()
        self.drawn_by = [(0, self.digest)]
        return [replace(c, versions=self._versions(len(c.ids))) for c in super()._draw(prompts, greedy)]

    def _renew(self, drawn: int) -> bool:
        if self.routes or not self._load_next():  # experts are recorded of one policy
            return False
        self.drawn_by.append((drawn, self.digest))
        return True

    def _load_next(self) -> bool:
        if (received := self.next_weights) is None:
            return False
        self.next_weights = None
        self.digest, tensors = received
        self.load(tensors)
        return True

    def _versions(self, tokens: int) -> tuple[tuple[str, int], ...]:
        starts = [(start, digest) for start, digest in self.drawn_by if start < tokens]
        ends = [start for start, _ in starts[1:]] + [tokens]
        return tuple((digest, end - start) for (start, digest), end in zip(starts, ends, strict=True))


def read_weights(folder: Path, digest: str) -> dict[str, torch.Tensor]:
    """The tensors, in memory. Raises Refused if they are not those of the policy."""
    atom_index.check(folder, digest, 0, 1)
    return {name: tensor.clone() for name, tensor in atom_index.tensors(folder)}


def reply_to(requests: queue.SimpleQueue[dict[str, Any]], sampler: Decoding, reply: Reply) -> None:
    """Draws what is requested, one call after the other. An error ends the process."""
    try:
        while True:
            request = requests.get()
            prompts = [Prompt(tuple(ids), seed) for ids, seed in request["prompts"]]
            drawn = sampler.generate(prompts, request["greedy"])
            completions = [
                [c.ids, c.logprobs, c.finished, None if c.routes is None else c.routes.hex(), c.versions] for c in drawn
            ]
            reply(id=request["id"], completions=completions)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


def main() -> None:
    # what libraries print goes to the log, and not between the replies
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    writing = threading.Lock()

    def reply(**values: Any) -> None:
        with writing:
            print(json.dumps(values), file=out, flush=True)

    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    torch.use_deterministic_algorithms(settings["deterministic"])
    sampler = Decoding(settings["config"], settings["stops"], settings["max_new_tokens"], routes=settings["routes"])
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=reply_to, args=(requests, sampler, reply), daemon=True).start()
    for line in sys.stdin:
        request = json.loads(line)
        if "prompts" in request:
            requests.put(request)
            continue
        try:
            tensors = read_weights(Path(request["folder"]), request["digest"])
        except atom_index.Refused as error:
            reply(id=request["id"], refused=str(error).strip("[]"))
            continue
        sampler.next_weights = request["digest"], tensors
        reply(id=request["id"])
    os._exit(0)  # also in the middle of an answer


if __name__ == "__main__":
    main()
