"""Data recipes: packaged ones load fast and light; what is wrong is reported in one sentence with its fix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.core.errors import RecipeError
from pipeline.core.stage import identity
from stages.data.acquire import AcquireConfig
from stages.data.recipe import load
from stages.data.sources import resolve_tree_digest

JSONL_SOURCE = {
    "name": "notes",
    "kind": "prose",
    "license": "CC-BY-4.0",
    "license_evidence": "see LICENSE beside the file",
    "origin": "https://example.org/notes",
    "reader": {"reader": "jsonl", "path": "notes.jsonl"},
}


def write_recipe(folder: Path, **changes: object) -> Path:
    source = {k: v for k, v in {**JSONL_SOURCE, **changes}.items() if v is not None}
    (folder / "notes.jsonl").write_text(json.dumps({"text": "A note."}) + "\n")
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "description": "test", "sources": [source]}))
    return path


@pytest.mark.parametrize("name", ["tiny", "smoke"])
def test_packaged_recipes_load_and_resolve(name: str) -> None:
    recipe = load(name).resolved()
    assert all(s.tree_digest.startswith("sha256:") and s.license and s.license_evidence for s in recipe.sources)


def test_recipe_and_stage_configs_import_nothing_heavy() -> None:
    code = (
        "import sys, stages.data.recipe as r, stages.data.acquire, stages.evaluation.eval_set, stages.data.filter, stages.data.dedup, "
        "stages.data.tokenizer, stages.data.tokenization, stages.data.order\n"
        "r.load('tiny').resolved()\n"
        "names = {'torch', 'numpy', 'pyarrow', 'datatrove', 'transformers', 'tokenizers', 'mlflow'}\n"
        "heavy = names & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"license": None}, ["notes", "no license", "add `license:`"]),
        ({"license_evidence": ""}, ["notes", "no license_evidence", "add"]),
        ({"license": "do what you like"}, ["notes", "SPDX"]),
        ({"kind": "poetry"}, ["notes", "kind"]),
        ({"colour": "red"}, ["notes", "colour"]),
        ({"name": "items"}, ["items", "choose another name"]),
        ({"steps": [{"step": "gopher_quality", "min_words": 3}]}, ["notes", "min_words"]),
        ({"steps": [{"step": "magic"}]}, ["notes", "magic"]),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_sentence(
    tmp_path: Path, changes: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write_recipe(tmp_path, **changes))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_unknown_names_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean tiny"):
        load("tinny")
    with pytest.raises(RecipeError, match="neither packaged nor a file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(RecipeError, match="line 2 is not valid YAML"):
        load(tmp_path / "bad.yaml")


def test_a_pinned_tree_that_changed_is_refused_with_both_digests(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    digest = resolve_tree_digest(load(path).sources[0])
    pinned = write_recipe(tmp_path, tree_digest=digest)
    assert resolve_tree_digest(load(pinned).sources[0]) == digest
    with open(tmp_path / "notes.jsonl", "a") as f:
        f.write("{}\n")
    with pytest.raises(RecipeError) as caught:
        load(pinned).resolved()
    assert str(caught.value).count("sha256:") == 2


def test_where_the_files_lie_is_not_identity(tmp_path: Path) -> None:
    identities = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        recipe = load(write_recipe(tmp_path / name)).resolved()
        assert Path(recipe.sources[0].reader.path).is_absolute()
        identities.append(identity(AcquireConfig.model_validate(recipe.acquire_config("notes", 0))))
    assert identities[0] == identities[1]


def test_curation_steps_do_not_change_what_is_acquired(tmp_path: Path) -> None:
    plain = load(write_recipe(tmp_path)).acquire_config("notes", 0)
    stepped = load(write_recipe(tmp_path, steps=[{"step": "pii"}], heldout_fraction=0.5)).acquire_config("notes", 0)
    assert plain == stepped
