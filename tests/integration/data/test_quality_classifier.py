"""Classifiers trained on sources, the step that uses them, and steps by language."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact, write_manifest
from stages.data.curate import classifier_stage, filter_stage
from stages.data.curate.classifier_stage import _auc, as_line
from stages.data.curate.filters.classifier import Classifier
from stages.data.curate.filters.language import ByLanguage, identify
from stages.data.recipe import load
from stages.formats.table import DOCUMENTS, content_hash, sources_of, write_rows
from tests.fixtures.block_fixtures import PII, QUALITY, apply, document
from tests.fixtures.opt_out_fixtures import Text, no_items
from tests.fixtures.opt_out_fixtures import acquired as acquire_texts

GOOD = ["theorem", "proof", "lemma", "integral", "converges", "bounded", "function", "therefore", "continuous", "limit"]
OTHER = ["buy", "cheap", "click", "sale", "offer", "free", "shipping", "discount", "today", "best", "price", "deal"]
SETTINGS: dict[str, Any] = {
    "name": "quality",
    "positive": ["good"],
    "negative": ["other"],
    "buckets": 1000,
    "dimension": 8,
}
GERMAN = "Der Vertrag ist nach den Regeln des Landes geschlossen worden, und alle haben ihn unterschrieben."
ENGLISH = "The contract was made under the rules of this country, and everybody has signed it since then."


def documents(words: list[str], count: int, seed: int) -> list[str]:
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(words, k=40)) for _ in range(count)]


def acquired(folder: Path, name: str, texts: list[str], parts: int) -> Artifact:
    for part in range(parts):
        rows = [
            {"id": f"{name}/{part}/{n}", "text": text, "source": name, "license": "CC0-1.0", "origin": "test",
             "content_hash": content_hash(text), "prompt_chars": 0}
            for n, text in enumerate(texts[part::parts])
        ]  # fmt: skip
        write_rows(folder / name / f"documents/part-{part:05d}.parquet", DOCUMENTS, rows)
    return write_manifest(folder / name, name)


def examples(folder: Path, count: int = 80, parts: int = 2) -> dict[str, Artifact]:
    texts = {"good": documents(GOOD, count, 0), "other": documents(OTHER, count, 1)}
    return {name: acquired(folder, name, each, parts) for name, each in texts.items()}


@pytest.fixture
def trained(tmp_path: Path, run_stage: Any) -> Artifact:
    artifact: Artifact = run_stage(classifier_stage.STAGE, {"classifier": SETTINGS, "seed": 0}, examples(tmp_path))
    return artifact


def test_the_same_examples_give_the_same_bytes(tmp_path: Path, run_stage: Any, trained: Artifact) -> None:
    again = run_stage(classifier_stage.STAGE, {"classifier": SETTINGS, "seed": 0}, examples(tmp_path))
    assert again.digest == trained.digest
    other = run_stage(classifier_stage.STAGE, {"classifier": SETTINGS, "seed": 1}, examples(tmp_path))
    assert (other / "model.bin").read_bytes() != (trained / "model.bin").read_bytes()


def test_the_classifier_is_measured_on_documents_that_it_did_not_see(trained: Artifact) -> None:
    meta = trained.json("meta.json")
    assert meta["heldout"]["auc"] == 1.0 and meta["heldout"]["accuracy"] == 1.0
    assert all(sum(counts.values()) == 80 and counts["heldout"] for counts in meta["examples"].values())
    assert meta["heldout"]["examples"] == sum(counts["heldout"] for counts in meta["examples"].values())


def test_the_number_of_examples_is_limited(tmp_path: Path, run_stage: Any) -> None:
    limited = {**SETTINGS, "documents": 30, "heldout_fraction": 0.2}
    artifact = run_stage(classifier_stage.STAGE, {"classifier": limited, "seed": 0}, examples(tmp_path))
    assert [sum(counts.values()) for counts in artifact.json("meta.json")["examples"].values()] == [30, 30]


def test_the_step_keeps_what_is_like_the_positive_examples(trained: Artifact) -> None:
    step = Classifier(step="classifier", classifier="quality", min_score=0.5)
    judge = step.with_inputs({"classifier-quality": trained}).function()
    (good,), (other,) = documents(GOOD, 1, 5), documents(OTHER, 1, 6)
    assert apply(judge, good) == good
    removal = apply(judge, other)
    assert not isinstance(removal, str)
    assert (removal.reason, removal.threshold) == ("quality/score", 0.5) and removal.value < 0.5
    with pytest.raises(AtomError, match="quality is not among the inputs"):
        step.function()


def test_without_examples_of_a_label_training_stops(tmp_path: Path, run_stage: Any) -> None:
    inputs = examples(tmp_path) | {"other": acquired(tmp_path / "empty", "other", [], 1)}
    with pytest.raises(AtomError, match=r"classifier quality has no negative example in the split train \(other\)"):
        run_stage(classifier_stage.STAGE, {"classifier": SETTINGS, "seed": 0}, inputs)


def test_a_training_that_fails_is_one_sentence(tmp_path: Path, run_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier_stage, "MODEL", "no such folder/model.bin")
    with pytest.raises(AtomError, match="classifier quality cannot be trained .*cannot be opened for saving"):
        run_stage(classifier_stage.STAGE, {"classifier": SETTINGS, "seed": 0}, examples(tmp_path))


def test_a_document_is_one_line_without_labels() -> None:
    assert as_line("A\n__label__negative  B\t") == "a negative b"


@pytest.mark.parametrize(
    "positive, negative, auc", [([1], [0], 1.0), ([0], [1], 0.0), ([1, 1], [1], 0.5), ([2, 0], [1], 0.5)]
)
def test_auc(positive: list[float], negative: list[float], auc: float) -> None:
    import numpy as np

    assert _auc(np.array(positive), np.array(negative)) == auc


def test_each_language_has_its_steps() -> None:
    long = {"block": QUALITY, "words": "atom", "min_doc_words": 1000}
    rules = {"en": [long], "de": []}
    judge = ByLanguage.model_validate({"step": "by_language", "rules": rules, "language_threshold": 0.3}).function()
    assert apply(judge, GERMAN) == GERMAN
    removal = apply(judge, ENGLISH)
    assert not isinstance(removal, str) and removal.reason == "en/GopherQualityFilter/gopher_short_doc"
    french = "Le contrat a été conclu selon les règles du pays, et tous les participants l'ont signé depuis."
    assert identify(french)[1] == "fr"
    removal = apply(judge, french)
    assert not isinstance(removal, str) and removal.reason == "other" and removal.threshold == 0.3
    keep = ByLanguage.model_validate({"step": "by_language", "rules": {"de": []}, "others": "keep"})
    assert apply(keep.function(), french) == french


def test_filter_records_languages_and_scores_of_the_documents_that_pass(
    tmp_path: Path, run_stage: Any, trained: Artifact
) -> None:
    texts = [
        ENGLISH,
        GERMAN,
        "Le contrat a été conclu selon les règles du pays, et tous l'ont signé.",
        *documents(GOOD, 1, 7),
    ]
    parts = [{str(number): Text(text) for number, text in enumerate(texts)}]
    inputs = {name: acquire_texts(tmp_path / "texts", name, parts) for name in ("routed", "english", "plain")}
    scored = {"step": "classifier", "classifier": "quality", "min_score": 0.0}
    routed = {"step": "by_language", "rules": {"en": [scored], "de": []}, "language_threshold": 0.1}
    steps = {"routed": [routed], "english": [{"step": "language", "language_threshold": 0.1}], "plain": []}
    sources = [{"name": name, "kind": "prose", "steps": each} for name, each in steps.items()]
    config = {"sources": sources, "curation": {"minhash": None, "decontamination": {}}, "seed": 0}
    items = no_items(tmp_path)
    artifact = run_stage(filter_stage.STAGE, config, {**inputs, "items": items, "classifier-quality": trained})
    tables = {
        name: pq.read_table(artifact / f"measures/{name}/part-00000.parquet").to_pylist()
        for name in sources_of(artifact / "measures")
    }
    assert list(tables) == ["english", "routed"], "no step of plain measures"
    for name, rows in tables.items():
        kept = pq.read_table(artifact / f"kept/{name}/part-00000.parquet")["id"].to_pylist()
        assert [row["id"] for row in rows] == kept, "one row for each document that passes, in their order"
    score = classifier_stage.scorer(trained / "model.bin")
    by_id = {row["id"]: row for row in tables["routed"]}
    assert by_id["routed/0"]["language"] == "en" and by_id["routed/1"]["language"] == "de"
    assert by_id["routed/0"]["language_score"] == pytest.approx(identify(ENGLISH)[0])
    assert by_id["routed/0"]["score_quality"] == pytest.approx(score(ENGLISH))
    assert by_id["routed/1"]["score_quality"] is None, "no classifier reads German texts, nor is the last score left"
    assert {row["language"] for row in tables["english"]} == {"en"} and tables["english"][0]["id"] == "english/0"


def write_recipe(folder: Path, classifiers: list[dict[str, Any]], step: dict[str, Any]) -> Path:
    fixed = {"kind": "prose", "license": "CC0-1.0", "license_evidence": "test", "origin": "test"}
    sources = [{"name": name, **fixed, "reader": {"reader": "jsonl", "path": "."}} for name in ("good", "other", "web")]
    sources[2]["steps"] = [step]
    path = folder / "data.yaml"
    recipe = {"name": "data", "description": "Test.", "sources": sources, "classifiers": classifiers}
    path.write_text(yaml.safe_dump(recipe))
    return path


USED = {"step": "classifier", "classifier": "quality"}


def test_a_step_inside_a_language_finds_its_classifier(tmp_path: Path, trained: Artifact) -> None:
    recipe = load(write_recipe(tmp_path, [SETTINGS], {"step": "by_language", "rules": {"en": [USED]}}))
    (step,) = recipe.sources[2].steps
    assert step.classifiers == ("quality",)
    config = recipe.filter_config(0)["sources"][2]["steps"][0]
    assert config["rules"]["en"] == ({**USED, "min_score": 0.5},)
    step = ByLanguage.model_validate({**config, "language_threshold": 0.0, "rules": {"en": config["rules"]["en"]}})
    removal = step.with_inputs({"classifier-quality": trained}).function()(
        document("click here for the best free offer today")
    )
    assert not isinstance(removal, str) and removal.reason == "en/classifier/quality/score"


@pytest.mark.parametrize(
    "classifiers, step, sentence",
    [
        ([], USED, "uses the classifier quality, which `classifiers` does not have; add it"),
        ([SETTINGS], PII, "classifier quality is used by no step; remove it"),
        ([{**SETTINGS, "positive": ["wiki"]}], USED, "classifier quality has examples of wiki, which is no source"),
        ([{**SETTINGS, "negative": ["good"]}], USED, "classifier quality names good twice; a source is one label"),
    ],
)  # fmt: skip
def test_classifiers_and_steps_fit(
    tmp_path: Path, classifiers: list[dict[str, Any]], step: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load(write_recipe(tmp_path, classifiers, step))
