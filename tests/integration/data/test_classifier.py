"""Classifiers trained on sources, the step that uses them, and the pipelines that sources name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact, write_manifest
from release.cards import document_tables
from release.facts.data_facts import DataFacts
from stages.data.curate import classifier_stage, filter_stage
from stages.data.curate.classifier_stage import as_line, scorer
from stages.data.curate.filters.own import Classifier
from stages.data.recipe import load
from stages.formats.table import DOCUMENTS, FAILED, content_hash, write_rows
from tests.fixtures.block_fixtures import PII, apply
from tests.fixtures.opt_out_fixtures import no_items

GOOD = ["theorem", "proof", "lemma", "integral", "converges", "bounded", "function", "therefore", "continuous", "limit"]
OTHER = ["buy", "cheap", "click", "sale", "offer", "free", "shipping", "discount", "today", "best", "price", "deal"]
SETTINGS: dict[str, Any] = {
    "name": "quality",
    "positive": ["good"],
    "negative": ["other"],
    "keep": 0.2,
    "heldout_fraction": 0.3,
}
USED = {"step": "classifier", "classifier": "quality"}


def texts_of(words: list[str], count: int, seed: int) -> list[str]:
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(words, k=40)) for _ in range(count)]


def acquired(folder: Path, name: str, texts: list[str], parts: int = 2) -> Artifact:
    for part in range(parts):
        rows = [
            {
                "id": f"{name}/{part}/{number}",
                "text": text,
                "source": name,
                "license": "CC0-1.0",
                "origin": "test",
                "content_hash": content_hash(text),
                "prompt_chars": 0,
            }
            for number, text in enumerate(texts[part::parts])
        ]
        write_rows(folder / name / f"documents/part-{part:05d}.parquet", DOCUMENTS, rows)
        write_rows(folder / name / f"failed/part-{part:05d}.parquet", FAILED, [])
    return write_manifest(folder / name, name)


def examples(folder: Path, parts: int = 2) -> dict[str, Artifact]:
    texts = {"good": texts_of(GOOD, 80, 0), "other": texts_of(OTHER, 80, 1)}
    return {name: acquired(folder / str(parts), name, each, parts) for name, each in texts.items()}


def train(run_stage: Any, inputs: dict[str, Artifact], **settings: Any) -> Artifact:
    config = {"classifier": {**SETTINGS, **settings}, "seed": 0}
    artifact: Artifact = run_stage(classifier_stage.STAGE, config, inputs)
    return artifact


def test_a_classifier_is_measured_on_held_out_documents(tmp_path: Path, run_stage: Any) -> None:
    inputs = examples(tmp_path)
    artifact = train(run_stage, inputs)
    again = train(run_stage, inputs)
    assert again.digest == artifact.digest, "the same examples give the same bytes"
    meta = artifact.json("meta.json")
    counts, held_out = meta["examples"], meta["examples"]["negative_heldout"]
    assert counts["positive_train"] + counts["positive_heldout"] == 80 == counts["negative_train"] + held_out
    # The words are disjoint, so all positive examples score above all negative ones.
    assert meta["recall"] == 1.0
    kept = int(0.2 * held_out)
    assert meta["precision"] == counts["positive_heldout"] / (counts["positive_heldout"] + kept)
    score = scorer(artifact / "model.bin")
    assert score(texts_of(GOOD, 1, 5)[0]) > meta["threshold"] > 0


def test_the_step_keeps_what_scores_above_the_threshold(tmp_path: Path, run_stage: Any) -> None:
    artifact = train(run_stage, examples(tmp_path))
    step = Classifier.model_validate(USED)
    judge = step.prepared({"classifier-quality": artifact}, tmp_path).function()
    (good,), (other,) = texts_of(GOOD, 1, 5), texts_of(OTHER, 1, 6)
    assert apply(judge, good) == good
    removal = apply(judge, f"{other} {other}")
    assert not isinstance(removal, str) and removal.reason == "quality_score"
    assert removal.value is not None and removal.value <= artifact.json("meta.json")["threshold"] == removal.threshold


def test_a_pattern_divides_one_source_and_is_not_learned(tmp_path: Path, run_stage: Any) -> None:
    mixed = [rf"{text} \frac{{1}}{{2}}" for text in texts_of(GOOD, 80, 0)] + texts_of(OTHER, 80, 1)
    inputs = {"mixed": acquired(tmp_path, "mixed", mixed)}
    artifact = train(run_stage, inputs, positive=["mixed"], negative=["mixed"], pattern=r"\\frac\S*")
    counts = artifact.json("meta.json")["examples"]
    assert counts["positive_train"] + counts["positive_heldout"] == 80
    assert b"frac" not in (artifact / "model.bin").read_bytes(), "the pattern is no word of the model"
    assert scorer(artifact / "model.bin")(texts_of(GOOD, 1, 5)[0]) > artifact.json("meta.json")["threshold"]


def test_what_keeps_nothing_stops_in_one_sentence(tmp_path: Path, run_stage: Any) -> None:
    inputs = examples(tmp_path)
    with pytest.raises(
        AtomError, match=r"classifier quality keeps nothing: keep = 0.001 of \d+ .*; raise keep"
    ) as raised:
        train(run_stage, inputs, keep=0.001)
    assert raised.value.exit_code == 2
    empty = inputs | {"other": acquired(tmp_path / "empty", "other", [])}
    with pytest.raises(AtomError, match="classifier quality has no negative example in the split heldout"):
        train(run_stage, empty)
    equal = {name: acquired(tmp_path / "equal", name, texts_of(GOOD, 1, 2) * 80) for name in ("good", "other")}
    with pytest.raises(AtomError, match="classifier quality (keeps nothing|has no)"):
        train(run_stage, equal)


def test_a_document_is_one_line_without_labels() -> None:
    assert as_line("A\n__label__negative  B\t") == "a negative b"


def test_filtering_states_its_pipelines_and_classifiers(tmp_path: Path, run_stage: Any) -> None:
    inputs = examples(tmp_path)
    classifier = train(run_stage, inputs)
    sources = [
        {"name": "good", "kind": "prose", "parts": 2, "pipeline": "web", "steps": [PII, USED]},
        {"name": "other", "kind": "prose", "parts": 2, "steps": [USED], "acknowledged_removals": {"classifier": 1.0}},
    ]
    config = {"sources": sources, "curation": {"minhash": None}, "seed": 0, "notice": "Web pages\nof many owners."}
    roles = {**inputs, "items": no_items(tmp_path), "classifier-quality": classifier}
    artifact = run_stage(filter_stage.STAGE, config, roles)
    stated = artifact.json("curation.json")
    meta = classifier.json("meta.json")
    assert stated["classifiers"] == {"classifier-quality": meta}
    data = DataFacts(curation=stated)
    assert document_tables.notice(data) == ["Web pages of many owners."]
    pipelines = "\n".join(document_tables.pipelines(data))
    assert "- **web** (good): `PIIFormatter` (email_replacement email@example.com" in pipelines
    assert "- **no pipeline** (other): `classifier` (classifier quality)." in pipelines
    row = document_tables.classifiers(data)[-1]
    assert f"| {meta['threshold']:.3f} | {meta['precision']:.3f} | {meta['recall']:.3f} |" in row
    plain = {**config, "notice": None, "sources": [{**sources[1], "steps": []}]}
    without = run_stage(filter_stage.STAGE, plain, {"other": inputs["other"], "items": roles["items"]})
    assert not (without / "curation.json").exists(), "a recipe without pipelines keeps its bytes"
    assert document_tables.pipelines(DataFacts()) == document_tables.classifiers(DataFacts()) == []


def write_recipe(folder: Path, **changes: Any) -> Path:
    fixed = {"kind": "prose", "license": "CC0-1.0", "license_evidence": "test", "origin": "test"}
    sources: list[dict[str, Any]] = [
        {"name": name, **fixed, "reader": {"reader": "jsonl", "path": "."}} for name in ("good", "other", "web")
    ]
    sources[2] |= {"pipeline": "web", "steps": [USED], "acknowledged_removals": {"classifier": 0.9, "PIIFormatter": 0}}
    recipe = {
        "name": "data",
        "description": "Test.",
        "sources": sources,
        "classifiers": [SETTINGS],
        "pipelines": {"web": [PII]},
    }
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}))
    return path


def test_the_steps_of_a_pipeline_come_before_those_of_the_source(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path))
    assert [step.name for step in recipe.sources[2].steps] == ["PIIFormatter", "classifier"]
    config = recipe.filter_config(0)["sources"][2]
    assert config["pipeline"] == "web" and json.dumps(config["steps"][1]) == json.dumps(USED)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"classifiers": []}, "classifier-quality must be in `classifiers` and be used by a step"),
        ({"classifiers": [SETTINGS, {**SETTINGS, "name": "spare"}]}, "classifier-spare must be in `classifiers`"),
        ({"classifiers": [SETTINGS, {**SETTINGS, "keep": 0.5}]}, "two classifiers are named quality"),
        ({"classifiers": [{**SETTINGS, "positive": ["wiki"]}]}, "quality has examples of wiki, which is no source"),
        ({"classifiers": [{**SETTINGS, "negative": ["good"]}]}, "good is both positive and negative; give `pattern`"),
        ({"classifiers": [{**SETTINGS, "pattern": "("}]}, "is no regular expression"),
        ({"classifiers": [{**SETTINGS, "keep": 0}]}, "keep = 0"),
        ({"pipelines": {"scans": [PII]}}, "source web names the pipeline web; `pipelines` has scans"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load(write_recipe(tmp_path, **changes))
