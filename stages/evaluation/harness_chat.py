"""A model of lm-evaluation-harness in conversation: its questions go through the model's own chat template.

The harness makes the messages (`apply_chat_template`, `fewshot_as_multiturn`: each example is a turn of the user and
one of the assistant), and the exported template the text. What stands in `<think>` and `</think>` is no part of an
answer. The harness cuts at its stop strings while a model still thinks, and scores thinking that was cut off as an
answer (`think_end_token`), so answers are drawn and read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from pipeline.core.errors import AtomError
from stages.formats.chat import MARK, SPECIAL
from stages.formats.tokenizer import END, STOPS, THINK_END, THINK_START

# Tokens of an answer to a task that states no number, as the harness has it for transformers.
MAX_NEW_TOKENS = 256


class CutOff(str):
    """The answer of a model that was cut off in its thinking: an empty one."""


class Drawing(Protocol):
    """A model of the harness that draws answers to token ids.

    Attributes:
        tokenizer: Its tokenizer, which reads the names of special tokens in a text as text.
        max_length: Tokens of its context.
    """

    tokenizer: Any
    max_length: int

    def draw(
        self, rows: Sequence[Sequence[int]], room: int, stops: Sequence[int], settings: Mapping[str, Any]
    ) -> list[list[int]]:
        """Returns the ids of an answer to each row.

        Args:
            rows: Ids of the questions.
            room: Most tokens of an answer.
            stops: Ids of the tokens that end one.
            settings: The harness's settings of generation, such as `do_sample` and `temperature`.
        """


class InConversation(TemplateLM):  # type: ignore[misc, unused-ignore]
    """The same model, asked in its chat template.

    Args:
        model: The model.
        max_new_tokens: Most tokens of an answer, its thinking included, in place of a task's own number; None: as the
            task has it.
    """

    def __init__(self, model: Drawing, max_new_tokens: int | None) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer, self.max_new_tokens = model.tokenizer, max_new_tokens
        self.ids = {
            token: int(self.tokenizer.convert_tokens_to_ids(token)) for token in (*STOPS, THINK_START, THINK_END)
        }

    @property
    def eot_token_id(self) -> int:
        return self.ids[END]

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns messages in the template. Names of special tokens in a message get a MARK, so that they stay text."""
        marked = [
            {**message, "content": SPECIAL.sub(lambda name: name[0][0] + MARK + name[0][1:], message["content"])}
            for message in chat_history
        ]
        text: str = self.tokenizer.apply_chat_template(
            marked,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(SPECIAL.split(string)):
            # Every second piece is a special token of the template.
            if number % 2:
                ids.append(int(self.tokenizer.convert_tokens_to_ids(piece)))
            elif piece:
                ids += self.tokenizer.encode(piece.replace(MARK, ""), add_special_tokens=False)
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any) -> Any:
        return self.model._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        # A text alone is no question, and has no conversation.
        return self.model.loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers, groups = dict[int, str](), dict[str, list[int]]()
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for numbers in groups.values():
            settings = normalize_gen_kwargs(dict(requests[numbers[0]].args[1]), MAX_NEW_TOKENS)
            until = handle_stop_sequences(settings.pop("until", None), eos=END)
            room = int(settings.pop("max_gen_toks"))
            room = self.max_new_tokens or room
            require_room(room, self.model.max_length)
            rows = [self.tok_encode(requests[n].args[0])[-(self.model.max_length - room) :] for n in numbers]
            drawn = self.model.draw(rows, room, [self.ids[token] for token in STOPS], settings)
            answers |= {n: self.answer(ids, until) for n, ids in zip(numbers, drawn, strict=True)}
        return [answers[number] for number in range(len(requests))]

    def answer(self, ids: Sequence[int], until: Sequence[str]) -> str:
        """Returns the answer in what a model drew: after its thinking, and before a string that ends it."""
        end = next((n for n, token in enumerate(ids) if token in (self.ids[t] for t in STOPS)), len(ids))
        ids = list(ids[:end])
        if self.ids[THINK_END] in ids:
            # As the harness has it: after the last one.
            ids = ids[len(ids) - ids[::-1].index(self.ids[THINK_END]) :]
        elif self.ids[THINK_START] in ids:
            return CutOff()
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).lstrip()
        return str(postprocess_generated_text(generation=text, stop=list(until), think_end_token=None))


def require_room(room: int, context: int) -> None:
    """Raises AtomError if an answer of so many tokens leaves no room for a question."""
    if room >= context:
        raise AtomError(
            f"a task asks for answers of {room} tokens, and the model's context has {context}; set "
            "evaluation.harness.max_new_tokens, or leave the task out of evaluation.harness"
        )
