"""A prediction is sealed once, before training; the release carries it, and compares it with the result."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core import provenance
from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact, Store
from pipeline.graph import dag
from pipeline.launch.attempt import prediction_key
from release.assembly import build_release as builder
from release.audit import verify as audit
from release.checks import learning as check_of_prediction
from release.facts import forecast
from release.facts.forecast import FILE, FOLDER, Point, RunSize
from release.opened_release import Release
from release.prediction import sealing
from tests.fixtures import release_fixtures
from tests.fixtures.prediction_fixtures import SIZES, graph, recipe, seal_run
from tests.fixtures.run_fixtures import DATA, at_length, atom, copy_sealed


@pytest.fixture
def ladder(tmp_path: Path) -> tuple[Store, dag.Graph, list[dag.Graph]]:
    """A home with three runs and the recipe of a larger one."""
    store = Store(tmp_path / "home")
    graphs = [graph(recipe(tmp_path, name), store.home) for name in SIZES]
    for number, smaller in enumerate(graphs):
        seal_run(store, smaller, 5.0 - number / 2)
    return store, graph("atom-smoke", store.home), graphs


def test_a_prediction_is_sealed_with_its_statement(ladder: tuple[Store, dag.Graph, list[dag.Graph]]) -> None:
    store, target, graphs = ladder
    artifact, sealed = sealing.seal(target, graphs, store)
    assert artifact.key == prediction_key(target.nodes["pretrain"].key) and forecast.read(artifact / FILE) == sealed
    assert sealed.target.flops > sealed.points[-1].flops and [p.recipe for p in sealed.points] == list(SIZES)
    config: Any = target.nodes["pretrain"].config
    per_token = config.model.flops_per_token(config.padded_vocab_size, 64)
    assert sealed.target.tokens == 60 * 1536 and sealed.target.flops == 60 * 1536 * per_token
    ((_, body),) = provenance.read(store.ledger, artifact.key)
    assert len(provenance.materials_of(body)) == 6 and provenance.outcome(body) == "sealed"
    with pytest.raises(AtomError, match="a run is predicted once"):
        sealing.seal(target, graphs, store)


def test_what_can_not_be_predicted_costs_a_sentence(
    ladder: tuple[Store, dag.Graph, list[dag.Graph]], tmp_path: Path
) -> None:
    store, target, graphs = ladder
    other = recipe(tmp_path, "s3", tokenizer={"vocab_size": 380})
    longer = recipe(tmp_path, "s2", pretrain={"sequence_length": 128})
    items = recipe(tmp_path, "s1", evaluation={"max_new_tokens": 48})
    for others, reason in (
        ([graph(other, store.home)], "s3 has other data than atom-smoke: its tokenize has another key"),
        ([graph(longer, store.home)], "s2 has pretrain.sequence_length = 128, and atom-smoke has 64"),
        ([graph(items, store.home)], "s1 is evaluated in another way than atom-smoke"),
        ([graph("atom-smoke", store.home)], "pretrain of atom-smoke is not sealed; run it first"),
        (graphs[:2], "the runs have 2 amounts of compute, and a law needs 3"),
    ):
        with pytest.raises(AtomError, match=reason):
            sealing.seal(target, others, store)
    with pytest.raises(AtomError, match="not fewer than s2"):
        sealing.seal(graph(recipe(tmp_path / ".", "s2", pretrain={"steps": 61}), store.home), graphs, store)
    start = {"repo": "local/base", "digest": f"sha256:{'1' * 64}", "license": "MIT"}
    body = yaml.safe_load(Path(recipe(tmp_path, "s1")).read_text()) | {"start_from": start, "pretrain": None}
    (tmp_path / "begun.yaml").write_text(yaml.safe_dump(body))
    without = graph(str(tmp_path / "begun.yaml"), store.home)
    for refused in (lambda: sealing.seal(without, graphs, store), lambda: sealing.size_of(without)):
        with pytest.raises(AtomError, match="s1 has no pre-training; give another recipe"):
            refused()
    store.work(target.nodes["pretrain"].key).mkdir(parents=True)
    with pytest.raises(AtomError, match="pretrain of atom-smoke has begun .* a prediction is sealed before that"):
        sealing.seal(target, graphs, store)
    assert not list(store.artifacts.glob("prediction-*")) and not list(store.home.glob("work/.prediction-*"))


def point(number: int, artifact: Artifact) -> Point:
    flops = 10.0 ** (8 + number)
    loss = 30 * flops**-0.1
    key, digest = artifact.key, artifact.digest
    return Point(f"r{number}", key, flops, 10, 10, digest, key, digest, loss, loss / 2, 0.1, 20)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> builder.BuildInput:
    """A release whose pre-training was predicted. Its runs are any artifacts."""
    source = release_fixtures.build_input(tmp_path_factory.mktemp("run"))
    home = Store(tmp_path_factory.mktemp("store"))
    trained, run = source.artifacts["pretrain"], source.artifacts["evaluate-init"]
    sealed = forecast.predict(RunSize("tiny", trained.key, 1e13, 100, 100), [point(n, run) for n in (1, 2, 3)])
    key = prediction_key(trained.key)
    artifact = sealing.write(sealed, {"r/evaluate": run}, home, key, "tiny")
    ((statement, _),) = provenance.read(home.ledger, key)
    (path,) = (p for p in source.statements if p.parent.name == trained.key)
    body = json.loads(path.read_text())
    start = {"start": 1, "startedOn": "2126-01-01T00:00:00Z", "prediction": artifact.digest}
    (starts,) = (each for each in body["predicate"]["runDetails"]["byproducts"] if each["name"] == provenance.STARTS)
    starts["annotations"]["starts"] = [each | start for each in starts["annotations"]["starts"]]
    path.unlink()
    stated = provenance.write(path.parent.parent, trained.key, body)
    statements = [*(p for p in source.statements if p != path), stated]
    return dataclasses.replace(source, statements=statements, prediction=(artifact, statement))


@pytest.fixture(scope="module")
def release(source: builder.BuildInput, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builder.build(source, tmp_path_factory.mktemp("home"))


def test_the_card_compares_prediction_and_result(release: Path) -> None:
    card = (release / "model-base/README.md").read_text()
    section = card.split("## Prediction and result")[1].split("\n## ")[0]
    sealed = forecast.read(release / FOLDER / FILE)
    for row in sealed.forecasts:
        (line,) = (line for line in section.splitlines() if line.startswith(f"| {forecast.NAMES[row.figure]} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"{row.value:.4f}" and cells[2] == f"{row.low:.4f} to {row.high:.4f}"
        assert cells[4] == ("yes" if row.low <= float(cells[3]) <= row.high else "no")
    assert "Prediction and result" not in (release / "model/README.md").read_text()
    assert (release / "model-base" / FILE).read_bytes() == (release / FOLDER / FILE).read_bytes()
    gates = json.loads((release / "evidence/gates.json").read_text())
    assert gates["prediction"]["ok"]


def test_the_page_shows_the_prediction_and_the_result(release: Path) -> None:
    page = (release / "site/index.html").read_text()
    section = page[page.index("Prediction and result") :]
    for row in forecast.read(release / FOLDER / FILE).forecasts:
        assert f"{row.value:.4f}" in section
    assert "evidence/prediction/prediction.json" in page


def test_verify_checks_the_chain(release: Path, tmp_path: Path) -> None:
    verdict = audit.verify(release)
    (check,) = (check for check in verdict.checks if check.name == "prediction")
    assert verdict.ok and check.ok and "by the maker's own clock" in check.detail

    def change(path: str, old: str, new: str) -> list[str]:
        copy = Path(shutil.copytree(release, tmp_path / "copy"))
        content = (copy / path).read_text()
        assert old in content, path
        (copy / path).write_text(content.replace(old, new))
        problems = check_of_prediction.prediction(Release(copy)).problems
        shutil.rmtree(copy)
        return problems

    sealed = forecast.read(release / FOLDER / FILE)
    (trained,) = (p for p in (release / "evidence/statements").glob("*.json") if "2126-01-01" in p.read_text())
    statement = trained.relative_to(release).as_posix()
    for path, old, new, reason in (
        (f"{FOLDER}/{FILE}", repr(sealed.forecasts[0].low), "0.001", "its forecast does not follow from its runs"),
        (f"{FOLDER}/{FILE}", repr(sealed.forecasts[0].low), "0.001", "is not the file of its manifest"),
        (
            f"{FOLDER}/{FILE}",
            repr(sealed.forecasts[0].low),
            "0.001",
            "model-base/prediction.json is not the prediction",
        ),
        (f"{FOLDER}/{FILE}", sealed.target.key, "pretrain-000000000000", "and pretrain of this release is"),
        (statement, "2126-01-01", "2020-01-01", "began at 2020-01-01T00:00:00Z, before the prediction was sealed at"),
        (statement, '"prediction":"', '"prediction":"x', "does not name the prediction"),
        (statement, '"name":"starts"', '"name":"other"', "records a start, so none names the prediction"),
        (f"{FOLDER}/statement.json", sealed.points[0].digest, "0" * 64, "r1 is no material of its statement"),
    ):
        assert any(reason in problem for problem in change(path, old, new)), reason


@at_length("release", 400)
def test_a_ladder_predicts_the_run_that_follows(smoke_home: Path, tmp_path: Path) -> None:
    """Real runs: three smaller models are trained, the next size is predicted, trained and released."""
    home = tmp_path / "home"
    copy_sealed(smoke_home, home, *DATA)
    names = [recipe(tmp_path, name) for name in SIZES]
    for name in names:
        atom(home, "run", name, "--until", "evaluate-base")
    ladder_options = [option for name in names for option in ("--from", name)]
    sealed = json.loads(atom(home, "predict", "atom-smoke", *ladder_options, "--json").stdout)
    atom(home, "run", "atom-smoke", timeout=1500)
    atom(home, "build", "atom-smoke")
    release = home / "releases/atom-smoke-0.1.0"
    body = json.loads(atom(home, "verify", str(release), "--json").stdout)
    assert next(check for check in body["checks"] if check["name"] == "prediction")["ok"] is True
    assert json.loads((release / FOLDER / FILE).read_text())["target"]["key"] == sealed["target"]["key"]
    assert "## Prediction and result" in (release / "model-base/README.md").read_text()
    assert "a run is predicted once" in atom(home, "predict", "atom-smoke", *ladder_options, code=2).stderr
