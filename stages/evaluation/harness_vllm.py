"""The model of a vLLM server for lm-evaluation-harness.

Log-probabilities are those of the given tokens; answers are cut at the harness's stop strings after they were drawn,
because the server knows tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from stages.evaluation.harness_chat import MAX_NEW_TOKENS, require_room
from stages.formats.tokenizer import END, without_special
from stages.generation.engine import Engine
from stages.generation.vllm_model import Client, context_of, has_scaled_rope

SAMPLING = ("temperature", "top_p", "top_k")


def served_model(engine: Engine, folder: Path, work: Path) -> Served:
    """Returns the harness's model of a server, which `close` ends."""
    from transformers import AutoTokenizer

    tokenizer = without_special(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    # A scaled rotary embedding ends with the context, so no longer row can be read.
    longest = 0 if has_scaled_rope(folder) else context_of(folder) + 1
    return Served(Client.start(engine, folder, work, longest), tokenizer)


class Served(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model that tokenizes and truncates as the harness's model in transformers does (`HFLM`).

    A row that is cut has one token less where the rotary embedding is scaled. Answers end like those of the release's
    evaluation: at the end of a document, with all tokens in the text.
    """

    def __init__(self, client: Client, tokenizer: Any) -> None:
        super().__init__()
        self.client, self.tokenizer = client, tokenizer
        self.end = int(tokenizer.convert_tokens_to_ids(END))
        # Tokens of the longest row, one more than the context: nothing is predicted after the last token.
        self.longest = min(client.context + 1, client.longest)

    def close(self) -> None:
        self.client.close()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def max_length(self) -> int:
        return self.client.context

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **settings)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        def score(request: tuple[Any, list[int], list[int]]) -> tuple[float, bool]:
            _, context, continuation = request
            # A row that is too long loses its beginning, so that the whole continuation is scored.
            row = [*context, *continuation][-self.longest :]
            reads = self.client.read(row)[-len(continuation) :]
            is_greedy = all(read.rank == 1 for read in reads)
            return sum(read.logprob for read in reads), is_greedy

        return self.client.map(score, requests)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        def windows(text: str) -> list[tuple[None, list[int], list[int]]]:
            ids = self.tok_encode(text)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.longest - 1, 1)
            return [(None, *make_disjoint_window(window)) for window in rolling]

        return [sum(value for value, _ in self._loglikelihood_tokens(windows(*request.args))) for request in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        def answer(numbered_request: tuple[int, Any]) -> str:
            number, request = numbered_request
            text, task_settings = request.args
            settings = normalize_gen_kwargs(dict(task_settings), MAX_NEW_TOKENS)
            until = handle_stop_sequences(settings.get("until"), eos=self.tokenizer.decode([self.eot_token_id]))
            room = int(settings["max_gen_toks"])
            require_room(room, self.max_length)
            # As in `HFLM`, a question that does not fit with its answer loses its beginning.
            ids = self.tok_encode(text)[-(self.max_length - room) :]
            drawn = self._draw(number, ids, room, [self.end], settings)
            output = self.tokenizer.decode(drawn, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return str(postprocess_generated_text(generation=output, stop=until, think_end_token=None))

        return self.client.map(answer, list(enumerate(requests)))

    def draw(
        self, rows: Sequence[Sequence[int]], room: int, stops: Sequence[int], settings: Mapping[str, Any]
    ) -> list[list[int]]:
        """Returns the ids of an answer to each row, for `InConversation`."""
        return self.client.map(lambda row: list(self._draw(row[0], row[1], room, stops, settings)), enumerate(rows))

    def _draw(
        self, number: int, ids: Sequence[int], room: int, stops: Sequence[int], settings: Mapping[str, Any]
    ) -> Sequence[int]:
        # The number of the request is its seed, so that drawn answers repeat.
        seed = number if settings.get("do_sample") else None
        sampling = {name: settings[name] for name in SAMPLING if seed is not None and name in settings}
        return self.client.draw(ids, room, stops, seed, **sampling).ids
