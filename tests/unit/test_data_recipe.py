"""Data recipes: packaged ones load fast and light; what is wrong is reported in one sentence with its fix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import RecipeError
from pipeline.core.stage import identity
from pipeline.core.store import sha256_file
from stages.data.acquire import acquire_stage
from stages.data.acquire.acquire_stage import AcquireConfig
from stages.data.acquire.sources import resolve_tree_digest
from stages.data.recipe import load
from stages.formats import file_digests
from tests.fixtures.block_fixtures import apply

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


def test_every_text_of_open_has_a_license_and_those_of_open_web_state_that_they_have_none() -> None:
    licensed, web = load("open"), load("open-web")
    unknown = {source.name for source in web.sources if source.license == "LicenseRef-unknown-web"}
    assert unknown == {"web_edu", "web_dclm", "pdfs"} and web.notice is not None and licensed.notice is None
    assert not any("unknown-web" in source.license for source in licensed.sources)
    # By reference, each text must follow from its own document.
    assert not any(step.name == "repeated_lines" for source in web.sources for step in source.steps)
    kinds = {source.pipeline for source in licensed.sources}
    assert {"web", "scans", "papers", "code", "conversations"} <= kinds == {source.pipeline for source in web.sources}


@pytest.mark.parametrize(
    ("source", "kept", "removed"),
    [
        ("math_forum", r"Prove $\frac{1}{2} + \sum_i x_i = \sqrt{2}$.", r"Only $\frac{1}{2}$ is here."),
        (
            "explained_forum",
            "How?\nimport os\nx = {};\n    return x\nThanks.",
            "If you import it\nfrom there, it works;\n",
        ),
        ("explained_code", "# this comment explains the next line of code\nx = 1\n" * 8, "# short\nx = 1\n" * 9),
    ],
)
def test_a_rule_finds_mathematics_and_explained_code(source: str, kept: str, removed: str) -> None:
    (row,) = (each for each in load("open").sources if each.name == source)
    (rule,) = (step for step in row.steps if step.name == "RegexFilter")
    function = rule.function()
    assert apply(function, kept) == kept
    assert not isinstance(apply(function, removed), str)


def test_recipe_and_stage_configs_import_nothing_heavy() -> None:
    code = (
        "import sys, stages.data.recipe as r, stages.data.acquire.acquire_stage, stages.tasks.eval_set, stages.data.curate.filter_stage, stages.data.curate.duplicates_stage, stages.data.curate.representatives_stage, stages.data.curate.dedup_stage, "
        "stages.formats.tokenizer, stages.data.order.tokenize_stage, stages.data.order.order_stage\n"
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
        ({"steps": [{"step": "code_shape", "min_words": 3}]}, ["notes", "min_words"]),
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


def test_a_pinned_tree_that_changed_is_refused_with_both_digests(tmp_path: Path, run_stage: Any) -> None:
    """Planning reads no file of a pinned source; acquiring compares."""
    path = write_recipe(tmp_path)
    digest = resolve_tree_digest(load(path).sources[0])
    pinned = write_recipe(tmp_path, tree_digest=digest)
    assert resolve_tree_digest(load(pinned).sources[0]) == digest
    with open(tmp_path / "notes.jsonl", "a") as f:
        f.write("{}\n")
    recipe = load(pinned).resolved()
    assert recipe.sources[0].tree_digest == digest
    with pytest.raises(RecipeError) as caught:
        run_stage(acquire_stage.STAGE, recipe.acquire_config("notes", 0), {})
    assert str(caught.value).count("sha256:") == 2


def test_planning_reads_each_version_of_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(file_digests, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    recipe = load(write_recipe(tmp_path))
    first, second = recipe.resolved(), recipe.resolved()
    assert first == second and len(hashed) == 1
    (tmp_path / "notes.jsonl").write_text("another text\n")
    assert recipe.resolved() != first and len(hashed) == 2


def test_the_number_of_parts_is_checked(tmp_path: Path) -> None:
    """One part is the default, and then no key knows of parts."""
    plain, one, two = (load(write_recipe(tmp_path, parts=parts)) for parts in (None, 1, 2))
    keys = [identity(AcquireConfig.model_validate(r.acquire_config("notes", 0))) for r in (plain, one, two)]
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(RecipeError, match="source notes: parts = 2, but its reader finds 1 files; use no more parts"):
        two.resolved()
    assert two.filter_config(0)["sources"][0]["parts"] == two.dedup_config()["sources"][0]["parts"] == 2
    assert two.duplicates_config()["sources"][0]["parts"] == 2
    assert two.tokenize_config()["parts"] == {"notes": 2}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"reader": {"reader": "stdlib-source"}},
            "notes.parts = 2, but reader stdlib-source reads no files of yours; use 1",
        ),
        (
            {"reader": {**JSONL_SOURCE["reader"], "limit": 3}},  # type: ignore[dict-item]
            "notes.parts = 2, but reader.limit selects from the whole source; leave one out",
        ),
    ],
)
def test_what_has_one_part_only(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError, match=f"data recipe mine: sources.{sentence}"):
        load(write_recipe(tmp_path, parts=2, **changes))


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
    stepped = load(write_recipe(tmp_path, steps=[{"step": "python_syntax"}], heldout_fraction=0.5)).acquire_config(
        "notes", 0
    )
    assert plain == stepped
