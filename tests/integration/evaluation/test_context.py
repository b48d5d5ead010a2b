"""What is said of long contexts: exact lengths and depths, scores that a known reader earns, losses against a slow way."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import identity
from release.facts.score_facts import compute_scores
from stages.evaluation import long_context, model_evaluation
from stages.evaluation.estimates import compute
from stages.evaluation.long_context import ContextSection
from stages.tasks.synthetic import passkeys
from tests.fixtures import release_fixtures
from tests.fixtures.long_context_fixtures import CONFIG, SECTION, inputs, loaded, long_documents  # noqa: F401

pytestmark = pytest.mark.numeric


def test_scores_are_recomputed_from_the_tables_alone(run_stage: Any, inputs: Any, tmp_path: Path) -> None:
    config = {**CONFIG, "context": SECTION}
    first = run_stage(model_evaluation.STAGE, config, inputs, tmp_path / "work")
    (tmp_path / "work/passkey-150.json").unlink()
    assert run_stage(model_evaluation.STAGE, config, inputs, tmp_path / "work").digest == first.digest
    scores = first.json("scores.json")
    assert compute_scores(first.path) == scores
    assert {n: row["n"] for n, row in scores["passkey"].items()} == {"60": 6, "150": 6, "300": 6}
    assert scores["passkey_by_depth"]["150"]["0.3"]["n"] == 2
    assert {n: row["tokens"] for n, row in scores["loss_by_position"].items()} == {
        "0-63": 3 * 63, "64-127": 3 * 64, "128-255": 3 * 128, "256-299": 3 * 44,
    }  # fmt: skip
    rows = pq.read_table(first / "positions.parquet").to_pylist()
    assert len({row["id"] for row in rows}) == 3 and {row["source"] for row in rows} == {"prose"}
    assert "prose/0" not in {row["id"] for row in rows}  # too short for the last position


def test_a_recipe_without_the_section_keeps_its_key_and_its_bytes(run_stage: Any, inputs: Any) -> None:
    assert identity(model_evaluation.EvaluateConfig(**CONFIG)) == CONFIG
    artifact = run_stage(model_evaluation.STAGE, CONFIG, inputs)
    assert sorted(p.name for p in artifact.path.iterdir()) == [
        "documents.parquet", "items.parquet", "manifest.json", "scores.json",
    ]  # fmt: skip
    assert set(artifact.json("scores.json")) == {"bits_per_byte", "bits_per_byte_all", "accuracy", "accuracy_all"}


def test_items_have_the_length_and_the_depth_that_they_say(loaded: Any) -> None:
    section = ContextSection(**SECTION)
    filler = loaded.encode("abcdefghij" * 100)
    for length in section.lengths:
        items = list(long_context.items(section, length, loaded.encode, filler))
        assert items == list(long_context.items(section, length, loaded.encode, filler)) and len(items) == 6
        for name, depth, key, ids, answer in items:
            text = loaded.tokenizer.decode(ids)
            assert len(ids) == length and name.startswith(f"{length}/{depth:g}/")
            assert text.endswith(f"{passkeys.QUESTION} {key}") and ids[-len(answer) :] == answer == loaded.encode(
                f" {key}"
            )
            assert passkeys.is_for_evaluation(key)
            room = length - passkeys.min_characters(4)
            assert text.index(passkeys.STATEMENT.format(key)) == round(depth * room)


class Reader:
    """A reader of known reach: repeats the last number stated within so many tokens before the answer, else zeros."""

    config: Any

    def __init__(self, tokenizer: Any, reach: int) -> None:
        self.tokenizer, self.reach = tokenizer, reach

    def __call__(self, ids: Any, logits_to_keep: int) -> Any:
        import torch

        text, tokens = self.tokenizer.decode(ids[0]), []
        for place in range(len(text) - logits_to_keep, len(text)):
            stated = text[max(0, place + 1 - self.reach) : place + 1].split("key is ")
            digits = next((part[:4] for part in reversed(stated[1:-1]) if part[:4].isdigit()), "0000")
            written = place + 1 - text.rindex("The pass key is ") - len("The pass key is ") if place > 0 else 0
            tokens.append(f" {digits}."[max(0, written + 1)])
        vocabulary = [self.tokenizer.convert_tokens_to_ids("Ġ" if token == " " else token) for token in tokens]
        return SimpleNamespace(
            logits=torch.nn.functional.one_hot(torch.tensor([vocabulary]), release_fixtures.VOCAB).float()
        )


def test_a_reader_of_known_reach_earns_what_it_should(loaded: Any, tmp_path: Path) -> None:
    """All keys within its reach are found and none beyond, so accuracy falls with length and rises with depth."""
    section = ContextSection(**{**SECTION, "depths": [0, 0.5, 1], "per_cell": 3})
    documents = long_documents()
    model = Reader(loaded.tokenizer, reach=110)
    model.config = loaded.model.config
    model.get_decoder, model.get_output_embeddings = loaded.model.get_decoder, loaded.model.get_output_embeddings
    from stages.generation.transformers_model import TransformersModel
    from tests.fixtures.run_fixtures import RecordingReport

    report = RecordingReport()
    pieces = long_context.pieces(section, loaded.tokenizer, loaded.encode, lambda: documents)
    *by_length, positions = compute(pieces, tmp_path, lambda: TransformersModel(model, loaded.tokenizer))
    keys = [row for rows in by_length for row in rows]
    long_context.report_passkeys(keys, report)
    assert {n: row["value"] for n, row in long_context.summary(keys, positions)["passkey"].items()} == {
        "60": 1.0, "150": 2 / 3, "300": 1 / 3,
    }  # fmt: skip
    cells = long_context.summary(keys, positions)["passkey_by_depth"]["150"]
    assert {d: row["value"] for d, row in cells.items()} == {"0": 0.0, "0.5": 1.0, "1": 1.0}
    right, wrong = (next(row for row in keys if row["score"] == score) for score in (1, 0))
    assert right["output"] == f" {right['expected']}" and wrong["output"] == " 0000"
    assert report.notes[0] == "passkey in 60 tokens: 9 of 9 found"


def test_greedy_decoding_gives_the_same_output(loaded: Any) -> None:
    """What counts as found by one forward pass is what generation writes. The model is random: outputs are wrong, and
    equal up to the first wrong token."""
    import torch

    [(_, _, _, ids, answer)] = long_context.items(
        ContextSection(lengths=[100], depths=[0.5], per_cell=1, documents=2),
        100,
        loaded.encode,
        loaded.encode("x " * 99),
    )
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids]), logits_to_keep=len(answer) + 1).logits[0, :-1]
        generated = loaded.model.generate(torch.tensor([ids[: -len(answer)]]), max_new_tokens=1, do_sample=False)
    assert logits.shape[0] == len(answer) and int(logits[0].argmax()) == int(generated[0, -1])


def test_losses_beyond_the_context_are_the_models_own(loaded: Any) -> None:
    """Each token scored alone in its whole context, up to three times the length that the model was made for."""
    import torch

    ids = loaded.encode(long_documents()[1]["text"])[: 3 * release_fixtures.CONTEXT]
    assert loaded.model.config.max_position_embeddings == release_fixtures.CONTEXT < len(ids)
    bits = loaded.oracle.token_bits(ids)
    assert bits.shape == (len(ids) - 1,) and bool(torch.isfinite(bits).all())
    for n in (1, 63, 64, 150, len(ids) - 1):
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([ids[:n]])).logits[0, -1]
        slow = -float(torch.log_softmax(logits.double(), -1)[ids[n]]) / math.log(2)
        assert float(bits[n - 1]) == pytest.approx(slow, rel=1e-4)


def test_logits_are_held_by_slices(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from stages.generation import transformers_model

    ids = loaded.encode(long_documents()[1]["text"])[:200]
    unsliced = loaded.oracle.token_bits(ids)
    monkeypatch.setattr(transformers_model, "SLICE", 7)
    assert torch.allclose(loaded.oracle.token_bits(ids), unsliced, rtol=1e-5)


def test_buckets_double_and_cover_each_position_once() -> None:
    assert long_context.buckets(64) == [(0, 63)]
    assert long_context.buckets(300) == [(0, 63), (64, 127), (128, 255), (256, 299)]
    covered = [n for first, last in long_context.buckets(4096) for n in range(first, last + 1)]
    assert covered == list(range(4096))


def test_what_cannot_be_measured_is_one_sentence(loaded: Any, tmp_path: Path) -> None:
    def measure(documents: list[dict[str, Any]], **changes: Any) -> None:
        section = ContextSection(**{**SECTION, **changes})
        pieces = long_context.pieces(section, loaded.tokenizer, loaded.encode, lambda: documents)
        list(compute(pieces, tmp_path, lambda: loaded.oracle))

    with pytest.raises(AtomError, match="names 20 tokens, but key and question alone take 44"):
        measure(long_documents(), lengths=[20])
    with pytest.raises(AtomError, match=r"names 9000 tokens, but all held-out text has \d+"):
        measure(long_documents(), lengths=[9000])
    with pytest.raises(AtomError, match=r"1 held-out documents have 300 tokens \(the longest has 300\)"):
        measure(long_documents()[:2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": [512, 128]}, "lengths = [512, 128] are not increasing"),
        ({"depths": [0, 0]}, "depths = [0.0, 0.0] are not increasing"),
        ({"depths": [0, 1.5]}, "evaluation.context.depths.1 = 1.5: input should be less than or equal to 1"),
        ({"per_cell": 0}, "per_cell = 0"),
    ],
)
def test_a_wrong_section_is_one_sentence(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    import yaml

    from pipeline.graph import recipe

    packaged = Path(recipe.__file__).parents[1] / "recipes/atom-tiny.yaml"
    raw = yaml.safe_load(packaged.read_text())
    raw["evaluation"]["context"] = {**SECTION, **changes}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(RecipeError) as caught:
        recipe.load(str(tmp_path / "r.yaml"))
    assert words in str(caught.value) and "\n" not in str(caught.value)
