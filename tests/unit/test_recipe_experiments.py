"""`atom init`, `validate` and `diff`: recipes of one's own, every mistake with its line, and what a change runs again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Store, sha256_file
from pipeline.graph import dag, flat_fields
from pipeline.graph import recipe as recipes
from pipeline.launch import cluster_profile
from pipeline.operations import comparison, recipe_check
from tests.fixtures import home_fixtures

SMOKE = recipes.find("atom-smoke", "pipeline.recipes", "recipe")
PACKAGED = sorted(path.stem for path in SMOKE.parent.glob("*.yaml"))


def write(path: Path, **replaced: str) -> str:
    """A copy of atom-smoke in which some lines are replaced, each by the text before its colon and comment."""
    lines = SMOKE.read_text().split("\n")
    for number, line in enumerate(lines):
        for old, new in replaced.items():
            if line.strip().startswith(old.replace("__", ": ")):
                lines[number] = line[: len(line) - len(line.lstrip())] + new
    path.write_text("\n".join(lines))
    return str(path)


def line_of(path: str, text: str) -> int:
    return next(n for n, line in enumerate(Path(path).read_text().split("\n"), 1) if text in line)


ADAPTER = "atom-smoke-adapter"
"""The packaged recipe that begins with a published model."""


def published(release: Path, dtype: str = "float32", license: str = "license: mit") -> Path:
    """The files of a release that state a model of its, without weights."""
    model = release / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"dtype": dtype}))
    (model / "README.md").write_text(f"---\n{license}\n---\n\n# A model\n")
    (model / "SHA256SUMS").write_text(f"{sha256_file(model / 'config.json')}  config.json\n")
    (release / "evidence").mkdir()
    (release / "evidence/release.json").write_text(json.dumps({"namespace": "us", "name": "base"}))
    return model


@pytest.mark.parametrize("source", PACKAGED)
def test_a_recipe_of_ones_own_is_valid_and_differs_by_its_name_alone(tmp_path: Path, source: str) -> None:
    model = str(published(tmp_path / "release")) if source == ADAPTER else None
    path = recipe_check.write_recipe("my-model", source, tmp_path, model)
    findings = recipe_check.check(str(path), Store(tmp_path / "home"))
    assert findings.problems == ()
    before, after = (dict(flat_fields.flat(recipes.load(name).config)) for name in (source, str(path)))
    changes = {change.field: change.after for change in comparison.field_changes(before, after)}
    begin = {} if model is None else {
        "digest": f"sha256:{sha256_file(Path(model) / 'SHA256SUMS')}", "repo": "us/base", "license": "MIT", "folder": model,
    }  # fmt: skip
    assert changes == {"name": "my-model"} | {f"start_from.{field}": value for field, value in begin.items()}
    comments = {line.partition(" #")[2] for line in (SMOKE.parent / f"{source}.yaml").read_text().split("\n")}
    assert comments <= {line.partition(" #")[2] for line in path.read_text().split("\n")}, "comments are kept"


def test_a_model_with_which_no_recipe_begins_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "release")
    (tmp_path / "release/dataset").mkdir()
    (published(tmp_path / "other") / "SHA256SUMS").unlink()
    published(tmp_path / "odd", license="license: other\nlicense_name: of our house")
    published(tmp_path / "broken", license="license: {")
    for source, model, sentence in (
        (ADAPTER, None, "atom-smoke-adapter begins with a published model; name it: --start-from RELEASE/model"),
        ("atom-smoke", "release/model", "atom-smoke begins with random weights; leave --start-from out"),
        (ADAPTER, "release", "release is no model's folder of a release, such as RELEASE/model"),
        (ADAPTER, "release/dataset", "release/dataset is no model's folder of a release, such as RELEASE/model"),
        (ADAPTER, "releases/a/model", "'releases/a/model' is neither a folder here nor a repository of the Hub"),
        (ADAPTER, "other/model", "other/model has no SHA256SUMS"),
        (ADAPTER, "odd/model", "the card of us/base states no license that SPDX knows: of our house"),
        (ADAPTER, "broken/model", "the card of us/base states no license that SPDX knows: None"),
    ):
        with pytest.raises(AtomError, match=sentence):
            recipe_check.write_recipe("mine", source, Path(), model)
    assert not Path("mine.yaml").exists()


def test_what_no_release_could_have_of_a_published_model_is_refused_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another precision than its own, and the name of a folder of this machine: also by `plan` and `run`."""
    home = tmp_path / "home"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATOM_HOME", str(home))
    model = published(home / "releases/base")
    path = recipe_check.write_recipe("mine", ADAPTER, Path(), str(model))
    text, store = path.read_text(), Store(home)
    assert 'folder: "home/releases/base/model"' in text, "a folder of the home is named from here"
    graph = dag.compose(recipes.load(str(path)), store)
    assert graph.nodes["import"].config.folder == str(model), "jobs of Slurm begin in another folder"  # type: ignore[attr-defined]

    def refused(content: str, sentence: str, field: str) -> None:
        path.write_text(content)
        (problem,) = recipe_check.check(str(path), store).problems
        assert (problem.field, problem.line) == (field, line_of(str(path), f"{field.split('.')[-1]}:"))
        assert problem.text == sentence
        with pytest.raises(RecipeError, match=re.escape(f"recipe mine: {sentence}")):
            dag.compose(recipes.load(str(path)), store)

    def precision(published: str, trained: str, remedy: str) -> str:
        return (
            f"start_from: us/base is published in {published}, and after the first phase of this recipe models are "
            f"published in {trained}, while a release holds the model that it begins with bit for bit; set the "
            f"precision of that phase to {remedy}"
        )

    refused(
        text.replace("  lora:", "  precision: bf16\n  lora:"), precision("float32", "bfloat16", "fp32"), "start_from"
    )
    refused(
        text.replace('"home/', f'"{home}/'),
        f"start_from.folder = {model} names {home} of this machine, and a recipe is published as it is written; write "
        "it from the folder of the recipe: home/releases/base/model",
        "start_from.folder",
    )
    (model / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    refused(text, precision("bfloat16", "float32", "bf16"), "start_from")
    shutil.copytree(model, home / "models" / sha256_file(model / "SHA256SUMS"))  # as it is pulled
    without = "".join(line for line in text.splitlines(True) if "folder:" not in line)
    refused(without, precision("bfloat16", "float32", "bf16"), "start_from")
    assert not recipe_check.check(str(path), Store(tmp_path / "elsewhere")).problems, "it is not known before a pull"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = recipe_check.write_recipe("my-model", "atom-smoke", tmp_path)
    path.write_text("mine")
    for name, source, sentence in (
        ("my-model", "atom-smoke", "my-model.yaml exists, and is not overwritten"),
        ("My Model", "atom-smoke", "is no name of lower-case letters"),
        ("../up", "atom-smoke", "is no name of lower-case letters"),
        ("atom-tiny", "atom-smoke", "is the name of a packaged recipe"),
        ("other", "atom-smok", "did you mean atom-smoke"),
        ("other", str(path), "is no packaged recipe"),
    ):
        with pytest.raises(AtomError, match=sentence):
            recipe_check.write_recipe(name, source, tmp_path)
    assert path.read_text() == "mine" and {p.name for p in tmp_path.iterdir()} == {"my-model.yaml"}


def test_every_mistake_of_the_fields_has_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.yaml", steps__60="stepz: 60", layers="layers: two", data="data: nowhere",
        validation__every="validation: {every: 0, rows: 24}", problems="problems: {add: 40, sort: x}",
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(
        Path(path).read_text().replace("validation: {every: 30,", "validation: {every: 0,")
    )
    problems = recipe_check.check(path, Store(tmp_path)).problems
    rows = {(problem.field, problem.line) for problem in problems}
    assert {
        ("model.layers", line_of(path, "layers: two")),
        ("pretrain.stepz", line_of(path, "stepz")),
        ("pretrain.steps", line_of(path, "pretrain:")),
        ("pretrain.validation.every", line_of(path, "every: 0")),
        ("evaluation.problems.sort", line_of(path, "sort: x")),
        ("data", line_of(path, "data: nowhere")),
    } <= rows
    for problem in problems:
        assert "\n" not in problem.text and str(problem).startswith(f"{path}:{problem.line}: ")


def test_every_contradiction_between_sections_is_listed(tmp_path: Path) -> None:
    text = (
        SMOKE.read_text()
        .replace("docstrings: 0.55", "docs: 0.5")
        .replace("sequence_length: 128", "sequence_length: 512")
    )
    (tmp_path / "r.yaml").write_text(text)
    problems = recipe_check.check(str(tmp_path / "r.yaml"), Store(tmp_path)).problems
    assert [problem.field for problem in problems] == [
        "pretrain.mix", "pretrain.mix", "midtrain.sequence_length", "sft.sequence_length",
    ]  # fmt: skip
    assert all(problem.line for problem in problems)


def test_mistakes_of_all_files_come_together(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("name: d\nheldout_fraction: 2\nsources: [{name: A}]\n")
    (tmp_path / "p.yaml").write_text("name: p\nlocal: {jobs: 0}\n")
    path = write(tmp_path / "r.yaml", data="data: d.yaml", layers="layers: 0")
    problems = recipe_check.check(path, Store(tmp_path), str(tmp_path / "p.yaml")).problems
    files = {Path(problem.file).name: problem.field for problem in problems}
    assert files.keys() == {"r.yaml", "d.yaml", "p.yaml"}
    fields = {problem.field for problem in problems}
    assert {"model.layers", "heldout_fraction", "local.jobs", "power"} <= fields


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: [1", "r.yaml:2: line 2 is not valid YAML"),
        (b"- 1", "must be a mapping of sections"),
        (b"\xff", "is not UTF-8"),
        (None, "there is no recipe "),
    ],
)
def test_what_is_no_recipe_is_one_mistake(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    (problem,) = recipe_check.check(str(path), Store(tmp_path)).problems
    assert sentence in str(problem)


def test_what_a_plan_refuses_is_a_mistake_too(tmp_path: Path) -> None:
    """A checkpoint that is not sealed, and stages that do not fit the profile."""
    text = SMOKE.read_text().replace("steps: 150", "steps: 150\n  continue_from: midtrain@75")
    (tmp_path / "r.yaml").write_text(text)
    (problem,) = recipe_check.check(str(tmp_path / "r.yaml"), Store(tmp_path)).problems
    assert problem.field == "midtrain.continue_from" and problem.line == line_of(str(tmp_path / "r.yaml"), "continue_")
    profile = tmp_path / "p.yaml"
    profile.write_text("name: p\nlocal: {memory_gb: 0.01}\npower: {watts_per_core: 1}\nstorage: {home_files: 3}\n")
    problems = recipe_check.check("atom-smoke", Store(tmp_path), str(profile)).problems
    assert any("of memory, and this machine has" in p.text for p in problems)
    assert any("storage.home_files" in p.text for p in problems)


def test_the_command_prints_json_and_exits_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "home"))
    path = write(tmp_path / "r.yaml", layers="layers: 0")
    result = CliRunner().invoke(app, ["validate", path, "--json"])
    body = json.loads(result.stdout)
    assert result.exit_code == 2 and [p["field"] for p in body["problems"]] == ["model.layers"]
    fine = CliRunner().invoke(app, ["validate", "atom-smoke"])
    *notes, summary = fine.stdout.splitlines()
    assert fine.exit_code == 0 and summary == "atom-smoke: no mistake"
    filters = "note: block datatrove.pipeline.filters."
    assert notes == [
        f"{filters}GopherQualityFilter: accelerated (docstrings)",
        f"{filters}GopherRepetitionFilter: accelerated (docstrings, code)",
        f"{filters}RegexFilter: stock (docstrings)",
        f"{filters}FineWebQualityFilter: stock (docstrings)",
        "note: block datatrove.pipeline.formatters.PIIFormatter: accelerated (docstrings, code)",
    ]
    assert not (tmp_path / "home").exists()


def test_a_difference_states_fields_keys_reasons_and_cost(tmp_path: Path) -> None:
    store, profile = Store(tmp_path / "home"), cluster_profile.load("local")
    text = SMOKE.read_text().replace("name: atom-smoke", "name: mine").replace("steps: 40\n", "steps: 50\n")
    (tmp_path / "r.yaml").write_text(text.replace("checkpoint_interval: 20\n\nrlvr", "checkpoint_interval: 10\n\nrlvr"))
    first, second = (dag.compose(recipes.load(name), store) for name in ("atom-smoke", str(tmp_path / "r.yaml")))
    difference = comparison.compare(first, second, store, profile)
    assert {(c.field, c.before, c.after, c.operational) for c in difference.fields} == {
        ("name", "atom-smoke", "mine", True),
        ("sft.steps", 40, 50, False),
        ("sft.checkpoint_interval", 20, 10, True),
    }
    changed = {name for name in first.nodes if first.nodes[name].key != second.nodes[name].key}
    stages = {stage.name: stage for stage in difference.stages}
    assert stages.keys() == changed and difference.unchanged == len(second.nodes) - len(changed)
    assert stages["sft"].settings == ("phase.steps",) and stages["sft"].inputs == ("order-sft",)
    assert stages["rlvr"].because == "input sft"
    assert {use.name for use in difference.costs.uses} == changed and difference.costs.total.core_hours > 0
    run = home_fixtures.start(store, second, second.select("order-sft", None))
    assert run.body["nodes"]
    again = comparison.compare(first, second, store, profile)
    assert next(s for s in again.stages if s.name == "order-sft").state in ("sealed", "stale")
    assert "order-sft" not in {use.name for use in again.costs.uses}
    assert comparison.compare(second, second, store, profile).stages == ()


def test_a_new_and_a_removed_stage_are_told_apart(tmp_path: Path) -> None:
    store, profile = Store(tmp_path), cluster_profile.load("local")
    (tmp_path / "r.yaml").write_text(SMOKE.read_text().replace("\nrelease:\n", "\nrelease:\n  variants: [fp8]\n"))
    first, second = (dag.compose(recipes.load(name), store) for name in (str(tmp_path / "r.yaml"), "atom-smoke"))
    assert comparison.compare(first, second, store, profile).removed == ("variant-fp8",)
    (stage,) = comparison.compare(second, first, store, profile).stages
    assert (stage.name, stage.because, stage.before) == ("variant-fp8", "new", None)


def test_what_this_machine_lacks_is_no_note_where_jobs_have_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATOM_VLLM_PYTHON", raising=False)
    notes = {
        cluster: [
            note for note in recipe_check.check("atom-1b-a300m", Store(tmp_path), cluster).notes if "vLLM" in note
        ]
        for cluster in ("dev", "h100-modules", "h100-pyxis")
    }
    assert notes["dev"] and all(note.startswith("on this machine: ") for note in notes["dev"])
    assert not notes["h100-modules"] and not notes["h100-pyxis"]


def test_another_training_seed_keeps_the_data(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    first, second = (
        dag.compose(recipes.load(write(tmp_path / f"{seed}.yaml", seed__0=f"seed: 0\ntraining_seed: {seed}")), store)
        for seed in (0, 1)
    )

    same = {name for name, node in first.nodes.items() if node.key == second.nodes[name].key}

    assert {"tokenize", "items"} <= same
    assert not same & {"order-pretrain", "pretrain", "export-init", "sft", "rlvr"}
    evaluation = [graph.nodes["evaluate-sft"].config.model_dump() for graph in (first, second)]
    assert evaluation[0] == evaluation[1]
    packaged = dag.compose(recipes.load("atom-smoke"), store)
    assert packaged.nodes["pretrain"].key == first.nodes["pretrain"].key
