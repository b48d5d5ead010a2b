"""A language model in plain transformers, in fp32 on one thread: the default of evaluations, and their oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from stages.formats.tokenizer import END
from stages.generation.engine import LanguageModel

# Logits in memory together, of rows that are read at once.
LOGITS = 1 << 24
# Positions whose logits are in memory together: all logits of a long document over a large vocabulary would not fit.
SLICE = 512


class TransformersModel(LanguageModel):
    """A transformers model in evaluation mode."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.context = model, model.config.max_position_embeddings
        self.end, self.pad = tokenizer.convert_tokens_to_ids(END), tokenizer.pad_token_id

    @classmethod
    def load(cls, folder: Path, tokenizer: Any) -> Self:
        # One thread and deterministic kernels: sums have one order, and results repeat bit for bit. This call sets what
        # `use_deterministic_algorithms` sets, which also imports torch's compiler, for a second.
        torch.set_num_threads(1)
        torch.set_deterministic_debug_mode("error")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        return cls(model, tokenizer)

    @cached_property
    def first_token_bits(self) -> torch.Tensor:
        """The bits of every token after a lone end-of-document token, [vocabulary]."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([[self.end]])).logits[0, -1]
        return -torch.log_softmax(logits.double(), -1) / math.log(2)

    def bits(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[float]:
        return [self._bits(list(ids), start) for ids, start in rows]

    def _bits(self, ids: list[int], start: int) -> float:
        bits = float(self.first_token_bits[ids[0]]) if ids and start == 0 else 0.0
        start = max(start, 1)
        if len(ids) > start:
            tokens = torch.tensor([ids])
            with torch.inference_mode():
                # The logits at a position are of the token after it.
                logits = self.model(tokens).logits[0, start - 1 : -1]
            log_probs = torch.log_softmax(logits.double(), -1).gather(1, tokens[0, start:, None])
            bits -= float(log_probs.sum()) / math.log(2)
        return bits

    def continue_greedily(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Returns the likeliest continuation of each prompt. All prompts are one batch, padded on the left."""
        width = max(map(len, prompts))
        tokens = torch.tensor([[self.pad] * (width - len(row)) + list(row) for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        greedy = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=self.end, pad_token_id=self.pad
        )
        with torch.inference_mode():
            generated = self.model.generate(tokens, attention_mask=mask, generation_config=greedy)[:, width:]
        return [row[: row.index(self.end)] if self.end in row else row for row in generated.tolist()]

    def likeliest(self, ids: Sequence[int], count: int) -> list[int]:
        with torch.inference_mode():
            # The logits at a position are of the next token, so those after the last token are dropped.
            logits = self.model(torch.tensor([list(ids)]), logits_to_keep=count + 1).logits[0, :-1]
        tokens: list[int] = logits.argmax(-1).tolist()
        return tokens

    def token_bits(self, ids: Sequence[int]) -> torch.Tensor:
        tokens = torch.tensor([list(ids)])
        parts = []
        with torch.inference_mode():
            # The output layer is applied to slices, so that never all logits are in memory.
            hidden = self.model.get_decoder()(tokens).last_hidden_state[0, :-1]
            for states, targets in zip(hidden.split(SLICE), tokens[0, 1:].split(SLICE), strict=True):
                logits = self.model.get_output_embeddings()(states).double()
                parts.append(-torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0] / math.log(2))
        return torch.cat(parts)

    def log_probabilities(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yields log-probabilities of the token after each position, in fp64: slices of (positions, vocab) in order."""
        with torch.inference_mode():
            hidden = self.model.get_decoder()(torch.tensor([list(ids)])).last_hidden_state[0]
        for states in hidden.split(max(1, LOGITS // self.model.config.vocab_size)):
            with torch.inference_mode():  # not around the yield: a reader that stops early would leave the mode on
                part = torch.log_softmax(self.model.get_output_embeddings()(states).double(), -1)
            yield part
