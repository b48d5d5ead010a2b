"""What a long context is worth: the same tokens scored with both contexts, against a model whose bits are known."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.core.errors import AtomError
from release.cards.tables import context_gain
from stages.evaluation import long_context
from stages.evaluation.estimates import compute
from stages.evaluation.long_context import ContextSection
from stages.formats.table import content_hash

SECTION: dict[str, Any] = {"lengths": [60, 90], "depths": [0], "per_cell": 2, "documents": 3, "short": 16}


class Reader:
    """A model that needs fewer bits for a token the more tokens stand before it, up to `reach` of them."""

    context = 1000

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def bits_after(self, tokens: int) -> float:
        return 8 - min(tokens, self.reach) / 16

    def token_bits(self, ids: list[int]) -> Any:
        import torch

        return torch.tensor([self.bits_after(tokens) for tokens in range(1, len(ids))], dtype=torch.float64)

    def likeliest(self, ids: list[int], count: int) -> list[int]:
        return [0] * count


class Tokenizer:
    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return "".join(map(chr, ids))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        # Every token stands for two bytes.
        return ["ab"] * len(ids)


def rows_of(reader: Reader, tmp_path: Any, lengths: tuple[int, ...] = (100, 95, 20, 90, 200)) -> dict[str, Any]:
    documents = [
        {"id": str(n), "text": "x" * length, "source": "prose", "content_hash": content_hash(str(n)),
         "split": "heldout", "prompt_chars": 0}
        for n, length in enumerate(lengths)
    ]  # fmt: skip
    encode = lambda text: [ord(letter) for letter in text]  # noqa: E731
    pieces = long_context.pieces(ContextSection(**SECTION), Tokenizer(), encode, lambda: documents)  # type: ignore[arg-type, return-value]
    results = compute(pieces, tmp_path, lambda: reader)  # type: ignore[arg-type, return-value]
    return {piece.name.partition("-")[0]: rows for piece, rows in zip(pieces, results, strict=True)}


def test_both_contexts_score_the_same_tokens(tmp_path: Any) -> None:
    reader = Reader(reach=60)

    rows = rows_of(reader, tmp_path)["contexts"]

    # The first three documents of 90 tokens, from position 16 on: 74 tokens of two bytes.
    assert [row["id"] for row in rows] == ["0", "1", "3"] and {row["bytes"] for row in rows} == {148}
    assert rows[0]["nll_bits"] == pytest.approx(sum(reader.bits_after(place) for place in range(16, 90)))
    # Windows of 16 tokens advance by eight: 8 to 15 tokens before each, and in the last window 14 and 15.
    in_windows = [8 + (place - 16) % 8 for place in range(16, 88)] + [14, 15]
    assert rows[0]["short_nll_bits"] == pytest.approx(sum(map(reader.bits_after, in_windows)))


@pytest.mark.parametrize(("reach", "gains"), [(8, False), (60, True)])
def test_a_gain_is_what_lies_beyond_the_short_context(tmp_path: Any, reach: int, gains: bool) -> None:
    rows = rows_of(Reader(reach), tmp_path)

    scores = long_context.summary(rows["passkey"], rows["positions"], rows["contexts"])

    context = scores["context"]
    assert (context["gain"]["value"] > 0.5) == gains and context["gain"]["documents"] == 3
    assert context["short"]["value"] - context["long"]["value"] == pytest.approx(context["gain"]["value"])
    # Documents differ in nothing, so the paired difference has no error.
    assert context["gain"]["se"] == pytest.approx(0) and (context["short_tokens"], context["tokens"]) == (16, 90)
    (sentence, _, _, _, line) = context_gain({"base": {}, "long-1": scores})  # type: ignore[dict-item, typeddict-item]
    assert "after at most 15 tokens" in sentence and line.count("±") == 3
    assert "context" not in long_context.summary(rows["passkey"], rows["positions"])


def test_too_short_a_text_and_too_long_a_window_are_refused(tmp_path: Any) -> None:
    with pytest.raises(AtomError, match=r"1 held-out documents have 90 tokens \(the longest has 90\)"):
        rows_of(Reader(8), tmp_path, (90, 89, 88))
    with pytest.raises(ValidationError, match="short = 90 leaves no token of 90"):
        ContextSection(**{**SECTION, "short": 90})
