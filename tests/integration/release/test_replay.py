"""`atom replay` on a real release of atom-smoke: honest releases come out bit for bit, forged ones do not.

python tests/integration/release/test_replay.py RELEASE PHASE FOLDER   (one of two ranks: trains a phase's last steps by tensor parallelism)
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import Artifact, sha256_file
from pipeline.graph import registry
from release import layout
from release.audit.replay import certificate, replay, retraining, text
from release.audit.replay.plan import Plan, select_steps
from release.audit.replay.source import Source
from tests.fixtures.release_fixtures import resum
from tests.fixtures.replay_fixtures import build, validated
from tests.fixtures.run_fixtures import SOAK, at_length

END = "checkpoints/pretrain-step-60"
ORDER = "dataset/order/pretrain/part-00000.parquet"


@pytest.fixture(scope="module")
def release(smoke_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(smoke_home, "atom-smoke", tmp_path_factory.mktemp("home"))


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / release.name))


def statement_of(release: Path, phase: str) -> Path:
    """The file of the statement about a phase."""
    key = json.loads((release / f"evidence/manifests/{phase}.json").read_text())["key"]
    statements = sorted((release / "evidence/statements").glob("*.json"))
    return next(path for path in statements if json.loads(path.read_bytes())["subject"][0]["name"] == key)


def edit(path: Path, change: Any) -> None:
    """Rewrites a JSON file; `change` gets its content."""
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    ("phase", "steps"),
    [
        pytest.param("pretrain", (30, 60), marks=at_length("training", 20)),
        pytest.param("midtrain", (75, 150), marks=at_length("training", 20)),
        ("sft", (0, 40)),
    ],
)
def test_an_honest_phase_comes_out_bit_for_bit(release: Path, phase: str, steps: tuple[int, int]) -> None:
    before, notes = sha256_file(release / layout.ALL_SUMS), []
    result = replay(release, phase, progress=notes.append)
    assert (result.first, result.last) == steps, "the last two checkpoints"
    assert (result.verdict, result.ok, result.tensors, result.different) == ("bitwise", True, 96, {})
    assert (result.state, result.diverges, result.ranks, result.environment) == ((), None, 1, ())
    assert any(line.startswith(f"step {steps[1]} of {steps[1]}, loss ") for line in notes), notes
    assert text(result).splitlines()[1] == "  all 96 tensors (weights and optimizer) are equal bit for bit"
    assert sha256_file(release / layout.ALL_SUMS) == before, "the release is only read"

    body = certificate(result, release)
    predicate = validated(body)
    assert (predicate["result"], predicate["warnedTests"], predicate["failedTests"]) == ("PASSED", [], [])
    assert predicate["passedTests"] == ["token_shards", "state", "tensors_within_tolerance", "tensors_bitwise", "log"]
    subject = {each["name"]: each["digest"]["sha256"] for each in body["subject"]}
    place = f"checkpoints/{phase}-step-{steps[1]}"
    names = (f"{place}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json"))
    assert subject == {name: sha256_file(release / name) for name in names}
    materials = {each["name"]: each["digest"]["sha256"] for each in predicate["configuration"] if "digest" in each}
    first = f"checkpoints/{phase}-step-{steps[0]}/model.safetensors"
    for name in (first, f"dataset/order/{phase}/part-00000.parquet", layout.ALL_SUMS):
        assert materials[name] == sha256_file(release / name)
    manifest = json.loads((release / "evidence/manifests/tokenize.json").read_text())
    shard = next(row for row in manifest["files"] if row["path"] == "train/docstrings/part-00000.bin")
    assert materials[f"{manifest['key']}/train/docstrings/part-00000.bin"] == shard["sha256"]
    assert str(release) not in json.dumps(body) and json.loads(json.dumps(result.to_json()))["verdict"] == "bitwise"


def test_a_forged_weight_and_another_environment_are_named(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / END / "model.safetensors")
    name = "decoder.layers.1.mlp.router.weight"
    weights[name][1, 2] += 0.5
    save_file(weights, copy / END / "model.safetensors", metadata={"format": "pt"})
    edit(copy / END / "state.json", lambda state: state.update(tokens=1))

    def change_environment(body: dict[str, Any]) -> None:
        environment = body["predicate"]["buildDefinition"]["internalParameters"]["environment"]
        environment["python"], environment["packages"]["torch"], environment["device"]["model"] = "3.9.1", "1.0", "Z80"

    edit(statement_of(copy, "pretrain"), change_environment)
    resum(copy)
    result = replay(copy, "pretrain", 30, 60)
    assert (result.verdict, result.ok, list(result.different), result.state) == ("differs", False, [name], ("tokens",))
    largest = float(weights[name].abs().max())
    assert result.largest == pytest.approx(0.5 / largest, rel=1e-4)
    assert [each.split(": ")[0] for each in result.environment] == ["python", "device model", "torch"]
    assert result.environment[0] == f"python: 3.9.1, {sys.version.split()[0]}"
    report = text(result)
    assert (
        "1 of 96 tensors" in report
        and name in report
        and "differs from the training environment: device model: Z80, " in report
    )
    predicate = validated(certificate(result, copy))
    assert predicate["result"] == "FAILED" and predicate["passedTests"] == ["token_shards", "log"]
    assert predicate["failedTests"] == ["state", "tensors_within_tolerance", "tensors_bitwise"]
    notes = predicate["configuration"][0]["annotations"]
    assert notes["environment_differences"] == list(result.environment) and notes["tensors_that_differ"] == 1

    (copy / END / "model.safetensors").write_bytes(b"")
    resum(copy)
    with pytest.raises(CheckFailed, match="is not the one that was replayed"):
        certificate(result, copy)


def test_a_changed_document_does_not_give_the_shards(copy: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = copy / "dataset/kept/docstrings/part-00000.parquet"
    table = pq.read_table(path)
    texts = table["text"].to_pylist()
    number = next(n for n, split in enumerate(table["split"].to_pylist()) if split == "train")
    texts[number] += " And nothing else."
    pq.write_table(table.set_column(table.schema.get_field_index("text"), "text", pa.array(texts)), path)
    resum(copy)
    sentence = r"do not give the token shards that were trained on: train/docstrings/part-00000.bin .* \(2 of 10 shards differ\)"
    with pytest.raises(CheckFailed, match=sentence):
        replay(copy, "pretrain")


@pytest.mark.parametrize(
    ("phase", "steps", "sentence"),
    [
        ("pretrain", (30, 50), "steps 30:50 of pretrain cannot be replayed: .* are of steps 0, 30, 60; give two"),
        ("pretrain", (60, 30), "steps 60:30 of pretrain cannot be replayed"),
        ("sft", (None, 0), "the steps up to 0 of sft cannot be replayed: .* are of steps 0, 40"),
        (
            "longcontext-1",
            (None, None),
            "no checkpoints of longcontext-1; phases that can be replayed: pretrain, midtrain, sft, rlvr",
        ),
        ("rlvr", (4, 8), "steps 4:8 of rlvr cannot be replayed: its published checkpoints are of steps 0, 4; give two"),
    ],
)
def test_one_sentence(release: Path, phase: str, steps: tuple[int | None, int | None], sentence: str) -> None:
    with pytest.raises(AtomError, match=sentence) as error:
        replay(release, phase, *steps)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_what_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AtomError, match="is not a release folder: it has no evidence/SHA256SUMS"):
        replay(tmp_path, "pretrain")


@pytest.mark.parametrize(
    "path", [f"{END}/optimizer.safetensors", ORDER, "dataset/kept/code/part-00000.parquet", layout.ALL_SUMS]
)
def test_a_flipped_byte_is_refused(copy: Path, path: str) -> None:
    content = bytearray((copy / path).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / path).write_bytes(content)
    with pytest.raises(CheckFailed, match=f"{path} is altered") as error:
        replay(copy, "pretrain")
    assert error.value.exit_code == 1


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / ORDER).unlink()
    with pytest.raises(CheckFailed, match=f"{ORDER} is missing"):
        replay(copy, "pretrain")
    resum(copy)
    with pytest.raises(CheckFailed, match=f"{ORDER} is not in the release, and a replay needs it"):
        replay(copy, "pretrain")
    for path in copy.glob("model*/tokenizer.json"):
        path.unlink()
    resum(copy)
    with pytest.raises(
        CheckFailed, match=r"tokenizer.json of tokenizer-\w+ is not in the release, and a replay needs it"
    ):
        replay(copy, "sft")


def test_evidence_that_says_something_else_is_refused(copy: Path) -> None:
    edit(copy / END / "state.json", lambda state: state["config"]["phase"]["optimizer"].update(lr=0.1))
    resum(copy)
    with pytest.raises(CheckFailed, match=r"pretrain-step-60/state.json has another config than the statement"):
        replay(copy, "pretrain")

    def clear_operation(body: dict[str, Any]) -> None:
        body["predicate"]["buildDefinition"]["internalParameters"]["operation"] = {}

    edit(statement_of(copy, "midtrain"), clear_operation)
    resum(copy)
    with pytest.raises(
        CheckFailed, match=r"does not state how midtrain was trained up to step 150 \(KeyError: 'phase'\)"
    ):
        replay(copy, "midtrain")
    statement_of(copy, "sft").unlink()
    resum(copy)
    with pytest.raises(CheckFailed, match=r"the release has no provenance statement about sft-\w+"):
        replay(copy, "sft")


def published_anew(copy: Path, steps: dict[int, Path], settings: dict[str, Any], ranks: int = 1) -> None:
    """Puts other checkpoints of pre-training, and the log beside them, in the place of the published ones."""
    for step, folder in steps.items():
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            shutil.copyfile(folder / name, copy / f"checkpoints/pretrain-step-{step}/{name}")
    log = next(iter(steps.values())).parent.parent / "training.jsonl"
    for target in (copy / "evidence/training/pretrain/training.jsonl", *copy.glob("model*/training/pretrain.jsonl")):
        shutil.copyfile(log, target)

    def restated(body: dict[str, Any]) -> None:
        parameters = body["predicate"]["buildDefinition"]
        parameters["externalParameters"]["config"]["phase"].update(settings)
        parameters["internalParameters"]["operation"]["phase"]["parallelism"]["ranks"] = ranks

    edit(statement_of(copy, "pretrain"), restated)
    edit(copy / "checkpoints/pretrain-step-0/state.json", lambda state: state["config"]["phase"].update(settings))
    resum(copy)


def pack(plan: Plan, tokens: Artifact, folder: Path) -> None:
    """Publishes the order of a phase anew, its rows packed."""
    _, body = plan.source.statement(f"order-{plan.phase}")
    config = body["predicate"]["buildDefinition"]["externalParameters"]["config"] | {"pack": True}
    stage, out = registry.stage("order"), folder / "packed"
    out.mkdir()
    stage.run(stage.config.model_validate(config), {"tokens": tokens}, out, out, retraining.StopAtStep(-1, print))
    for path in plan.order_files:
        shutil.copyfile(out / Path(path).name, plan.source.folder / path)


def trained_anew(copy: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Trains the whole of pre-training with other settings, without a halt, and publishes that."""
    plan = Plan.read(Source(copy), "pretrain", 0, 60)
    phase = type(plan.config.phase).model_validate({**plan.config.phase.model_dump(), **settings})
    plan = dataclasses.replace(plan, config=plan.config.model_copy(update={"phase": phase}))
    tokens = retraining.tokenize(plan, folder)
    if phase.pack:
        pack(plan, tokens, folder)
    retraining.write_work_checkpoint(plan, folder / "work")
    trained = retraining.train(plan, {"tokens": tokens, "order": plan.order()}, folder, lambda note: None)
    published_anew(copy, {60: trained, 30: trained.with_name("step-000030")}, settings)


@pytest.mark.parametrize("settings", [{"pack": True}, {"precision": "bf16"}][: 2 if SOAK else 1], ids=str)
def test_a_phase_of_other_settings_comes_out_bit_for_bit(settings: dict[str, Any], copy: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    before = sha256_file(copy / END / "model.safetensors")
    trained_anew(copy, tmp_path, settings)
    assert sha256_file(copy / END / "model.safetensors") != before
    assert (max(pq.read_table(copy / ORDER)["segment"].to_pylist()) > 0) == ("pack" in settings)
    result = replay(copy, "pretrain", 30, 60)
    assert (result.verdict, result.tensors, result.different, result.state) == ("bitwise", 96, {}, ())
    assert result.diverges is None, "the log is the same too"


@at_length("training", 20)
def test_spikes_are_judged_by_the_log_before_the_checkpoint(copy: Path, tmp_path: Path) -> None:
    """A policy that calls every little rise a spike: right after step 30, by the steps before it."""
    from stages.train.config import Spikes

    spikes = {"action": "skip", "loss_sigmas": 0.2, "norm_factor": 1.05, "window": 8, "max_spikes": 60}
    trained_anew(copy, tmp_path, {"spikes": Spikes.model_validate(spikes).model_dump()})
    log = (copy / "evidence/training/pretrain/training.jsonl").read_text().splitlines()
    skipped = [line["step"] for line in map(json.loads, log) if line.get("skipped")]
    assert any(30 < step <= 38 for step in skipped), skipped
    result = replay(copy, "pretrain", 30, 60)
    assert (result.verdict, result.state, result.diverges) == ("bitwise", (), None)

    # Whoever shortens the history judges otherwise, and is found out.
    forged = [line for line in log if not 5 <= json.loads(line)["step"] <= 25]
    (copy / "evidence/training/pretrain/training.jsonl").write_text("\n".join(forged) + "\n")
    resum(copy)
    with pytest.raises(AtomError, match="does not hold the steps 1 to 30 one by one"):
        replay(copy, "pretrain", 30, 60)


@at_length("training", 10)
def test_a_phase_of_two_ranks_comes_out_within_tolerance(release: Path, copy: Path, tmp_path: Path) -> None:
    from tests.fixtures.layout_fixtures import end, spawn

    codes, logs = end(
        spawn("tests.integration.release.test_replay", [str(release), "pretrain", str(tmp_path)], 2), timeout=120
    )
    assert codes == [0, 0], logs
    checkpoint = Path((tmp_path / "made").read_text())
    published_anew(copy, {60: checkpoint}, {}, ranks=2)
    result = replay(copy, "pretrain", 30, 60)
    assert (result.verdict, result.ok, result.ranks, result.state) == ("within tolerance", True, 2, ())
    assert len(result.different) > 48 and 0 < result.largest < result.tolerance == 1e-5
    assert result.diverges is not None and 30 < result.diverges <= 60
    assert "2 ranks trained the phase and one replayed it" in text(result)
    predicate = validated(certificate(result, copy))
    assert predicate["result"] == "WARNED" and predicate["warnedTests"] == ["tensors_bitwise"]


def _rank(release: Path, phase: str, folder: Path) -> None:
    """Trains the last steps of a phase as one of two tensor-parallel ranks; the first leaves where the checkpoint is."""
    from stages.models.parallel_layout import Layout

    rank_folder = folder / f"rank-{os.environ['RANK']}"
    rank_folder.mkdir()
    plan = Plan.read(Source(release), phase, *select_steps(Source(release), phase, None, None))
    layout_ = {"parallelism": Layout(ranks=2, tp=2), "watchdog_timeout_seconds": 60.0}
    config = plan.config.model_copy(update={"phase": plan.config.phase.model_copy(update=layout_)})
    plan = dataclasses.replace(plan, config=config)
    inputs = {"tokens": retraining.tokenize(plan, rank_folder), "order": plan.order()}
    work = folder / "work"
    if os.environ["RANK"] == "0":
        retraining.write_work_checkpoint(plan, work)
    (folder / "out").mkdir(exist_ok=True)
    try:
        plan.stage.run(plan.config, inputs, work, folder / "out", retraining.StopAtStep(plan.last, print))
    except retraining.StepSealed as reached:
        (folder / "made").write_text(str(reached.folder))
    except AtomError:
        if os.environ["RANK"] == "0":
            raise


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
