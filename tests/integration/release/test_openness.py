"""The twenty questions on openness: answered from the files, and answered otherwise when these are gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.core.errors import AtomError
from pipeline.core.stage import identity
from release.assembly import build_release as builder
from release.audit import openness, show
from release.audit.replay.report import Certificate
from release.layout import SIGNATURE
from release.opened_release import Release
from release.repositories import repositories
from stages.models.registry import parse
from tests.fixtures import release_fixtures, train_fixtures
from tests.fixtures.release_fixtures import resum

MODEL = identity(parse(train_fixtures.MODEL | {"hidden_size": 64}))
SIZES = {"size-1": {"hidden_size": 32}, "size-2": {"hidden_size": 16}}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = release_fixtures.INPUTS | {name: ["tokenize", "order-pretrain"] for name in SIZES}
    phase = {"steps": 2, "release_checkpoint_interval": 2, "optimizer": {}}
    configs = {name: {"model": MODEL | model, "phase": phase, "name": name} for name, model in SIZES.items()}
    configs["pretrain"] = {"model": MODEL, "phase": phase}
    sizes = [{"model": model} for model in SIZES.values()]
    source = release_fixtures.build_input(tmp_path_factory.mktemp("run"), inputs, 3, configs, sizes)
    return builder.build(source, tmp_path_factory.mktemp("home"))


def test_the_command_prints_twenty_rows_with_evidence_that_is_there(release: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(release), "--openness", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["openness"]
    answers = {row["name"]: row["answer"] for row in rows}
    assert len(answers) == len(rows) == 20
    assert [name for name, answer in answers.items() if answer == "N"] == [
        "executable replay of every phase",  # these statements have no config of a phase
        "signatures", "energy and cost",
    ]  # fmt: skip
    assert all((release / path).exists() for row in rows for path in row["evidence"])
    assert all(row["reason"] and (row["evidence"] or row["answer"] == "N") for row in rows)
    assert all(bool(row["for_a_yes"]) == (row["answer"] != "Y") for row in rows), "a maker reads what to add"
    # the claims of a maker alone, which nobody has shown
    assert {name for name, answer in answers.items() if answer == "P"} >= {
        "a license for each document", "bitwise replay", "EU summary of training content", "Model Openness Framework",
    }  # fmt: skip
    text = CliRunner().invoke(app, ["verify", str(release), "--openness"]).stdout
    assert "\nP  Model Openness Framework: " in text and "\n     for a yes: add what is missing for a class" in text
    assert text.splitlines()[-1].startswith("openness: ") and "\nY  order of the data: every step of pretrain" in text


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "every document": (lambda r: shutil.rmtree(r / "dataset/kept/sums"), "P"),
    "order of the data": (lambda r: shutil.rmtree(r / "dataset/order/midtrain"), "P"),
    "checkpoints with optimizer states": (
        lambda r: [path.unlink() for path in r.glob("checkpoints/pretrain-*/optimizer.safetensors")], "P",
    ),
    "logs of training": (lambda r: (r / "evidence/training/pretrain/training.jsonl").unlink(), "P"),
    "outputs of each evaluation item": (
        lambda r: [path.unlink() for path in r.glob("dataset/evaluation/mid/*.parquet")], "P",
    ),
    "Croissant": (
        lambda r: (r / "evidence/gates.json").write_text('{"croissant": {"ok": false, "detail": "an error"}}'), "N",
    ),
    "signatures": (lambda r: (r / "model/model.sig").write_text("x"), "P"),
    "bill of materials": (lambda r: (r / "evidence/standards/bom.spdx3.json").unlink(), "N"),
    "EU summary of training content": (lambda r: (r / "evidence/standards/eu_summary.json").unlink(), "N"),
    "Model Openness Framework": (lambda r: (r / "evidence/gates.json").write_text("{}"), "N"),
    "data browser": (lambda r: shutil.rmtree(r / "site"), "P"),
    "tracing": (lambda r: shutil.rmtree(r / "dataset/tokens"), "P"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_an_answer_follows_from_the_files(release: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(release, tmp_path / "release"))
    change, expected = CHANGES[name]
    change(copy)
    resum(copy)
    before, after = ({row.name: row.answer for row in openness.rows(folder)} for folder in (release, copy))
    assert before[name] != expected == after[name]


def test_what_is_no_whole_release_is_one_sentence(release: Path) -> None:
    with pytest.raises(AtomError, match="dataset is not a whole release"):
        list(openness.rows(release / "dataset"))


def test_sizes_that_cannot_be_trained_again_answer_in_part(release: Path) -> None:
    row = list(openness.rows(release))[-1]
    assert row.answer == "P" and "not all of 2 smaller models can be trained again: size-1 (" in row.reason
    assert row.evidence == ("evidence/training/size-1", "evidence/training/size-2")
    page = (release / "site/index.html").read_text()
    assert "Smaller models of the same recipe" in page and "hidden_size = 16" in page
    assert not (release / "model-base/training/size-1.jsonl").exists()
    assert show.facts_of(Release(release))["checkpoints"][-1] == "midtrain-step-2", "the last one is of the model"


def test_a_model_that_no_laptop_holds_is_not_small(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(release, tmp_path / "release"))
    for name in SIZES:
        shutil.rmtree(copy / "evidence/training" / name)
    for limit, expected in ((10**9, "P"), (1000, "N")):
        monkeypatch.setattr(openness, "SMALL_BYTES", limit)
        assert [row.answer for row in openness.rows(copy)][-1] == expected


def answers(release: Path, name: str, identity: str = "") -> openness.Row:
    return next(row for row in openness.rows(release, identity) if row.name == name)


def test_an_identity_that_nobody_checked_is_a_claim(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can make a bundle with any name in its certificate."""
    copy = Path(shutil.copytree(release, tmp_path / "release"))
    for place in repositories(copy):
        (copy / place.folder / SIGNATURE).write_text("{}")
    monkeypatch.setattr(openness, "recorded_identity", lambda signature: "maker@example.org")
    row = answers(copy, "signatures")
    assert row.answer == "P" and "nothing has checked" in row.reason and "--identity" in row.for_a_yes
    assert answers(copy, "signatures", "maker@example.org").answer == "Y"


def test_certificates_that_anybody_can_write_give_no_yes(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = [{"phase": phase, "tensors_that_differ": 0} for phase in openness.Published(release).phases]
    given = [Certificate("eve", Path("eve.json"), "PASSED", each) for each in notes]
    monkeypatch.setattr(openness, "read_certificates", lambda folder: given)
    row = answers(release, "bitwise replay")
    assert (
        row.answer == "P" and "unsigned certificates say so of pretrain (eve.json), midtrain (eve.json)" in row.reason
    )
    assert "no certificate" not in row.reason and row.for_a_yes.startswith("replay it yourself")
