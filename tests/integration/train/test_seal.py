"""Sealing a release checkpoint: all ranks write it, a long seal is no hang, and a killed one goes on where it was."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.core import store
from pipeline.core.store import sha256_file, write_manifest
from pipeline.graph import recipe
from stages.mcore.optimizer import Adam
from stages.train.checkpoint import release_checkpoint, tensor_file, work_checkpoint
from tests.fixtures import layout_fixtures, train_fixtures
from tests.fixtures.run_fixtures import at_length
from tests.fixtures.train_fixtures import damage, fresh

LIMIT = 10.0
"""Seconds of the watchdog. No pause of a loaded machine between two tensors is as long."""
TENSOR_SECONDS = 0.12
"""Seconds that a tensor of a release checkpoint takes: the 96 of one with moments take longer than the limit."""
SHARD_BYTES = 12_000
"""So that a release checkpoint has many files."""


def in_many_files(**variables: str) -> dict[str, str]:
    return {"TEST_SHARD_BYTES": str(SHARD_BYTES), **variables}


@pytest.fixture(scope="module")
def in_shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product of a run that nobody disturbed, in many files."""
    folder = tmp_path_factory.mktemp("shards")
    run = fresh(corpus, folder, env=in_many_files())
    assert run.wait() == 0, run.stderr.read()
    assert len(list((folder / "out" / "step-000012").glob("*.safetensors"))) > 12
    return folder / "out"


@at_length("training", 30)
def test_a_seal_that_takes_longer_than_the_watchdog_waits_is_no_hang(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    slow = f"{TENSOR_SECONDS} 0 0 -"
    run = fresh(corpus, tmp_path, env={"TEST_SEAL": slow}, watchdog_timeout_seconds=LIMIT, checkpoint_interval=100)
    stdout, stderr = run.communicate(timeout=600)
    assert run.returncode == 0, stdout + stderr
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(undisturbed)


@at_length("training", 50)
def test_a_rank_is_alive_while_another_one_seals(corpus: Path, tmp_path: Path) -> None:
    """The checkpoint of step 0 is one file, that of step 12 two of different size: a rank waits longer than its limit."""
    settings = layout_fixtures.settings_of({}, 2, watchdog_timeout_seconds=LIMIT, release_checkpoint_interval=100)
    slow = f"{3 * TENSOR_SECONDS} 0 0 -"  # 32 tensors more than the other rank has
    layout_fixtures.run(corpus, tmp_path, settings, TEST_SEAL=slow)
    assert sorted(p.name for p in (tmp_path / "out").glob("step-*")) == ["step-000000", "step-000012"]


@at_length("training", 40)
def test_a_seal_that_hangs_is_found(corpus: Path, tmp_path: Path) -> None:
    """On a rank whose files the others wait for: none of them makes progress."""
    settings = layout_fixtures.settings_of({}, 2, watchdog_timeout_seconds=LIMIT, release_checkpoint_interval=100)
    stuck = in_many_files(TEST_SEAL="0.05 1 40 sleep")  # in the checkpoint of step 12; that of step 0 has fewer tensors
    codes, logs = layout_fixtures.end(layout_fixtures.start(corpus, tmp_path, settings, **stuck))
    assert codes == [1, 1], logs
    assert f"abandoned: pretrain: no step was finished for {LIMIT:g} s" in logs[0]
    assert "rank 1 stands here" in logs[0] and "in read_slowly" in logs[0]


@at_length("training", 25)
def test_a_seal_that_is_killed_again_and_again_comes_to_its_end(corpus: Path, in_shards: Path, tmp_path: Path) -> None:
    """An attempt dies at the fortieth tensor of a checkpoint of 96 (32 at step 0), so none can seal it from the start."""
    ends = []
    while not ends or ends[-1] == -signal.SIGKILL:
        run = fresh(corpus, tmp_path, env=in_many_files(TEST_SEAL="0 0 40 SIGKILL"), checkpoint_interval=100)
        run.communicate(timeout=300)
        ends.append(run.returncode)
        assert len(ends) < 12, "no attempt gets further than the one before"
    assert ends[-1] == 0 and len(ends) > 4, ends
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(in_shards)


@at_length("training", 40)
def test_a_seal_goes_on_in_another_layout_with_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    """Two ranks begin the last checkpoint, one of them dies, and a single rank completes it."""
    two = layout_fixtures.settings_of({}, 2, release_checkpoint_interval=100)
    layout_fixtures.run(corpus, tmp_path / "calm", two, **in_many_files())
    killed = in_many_files(TEST_SEAL="0.02 1 60 SIGKILL")
    codes, logs = layout_fixtures.end(layout_fixtures.start(corpus, tmp_path / "killed", two, **killed))
    assert codes == [1, -signal.SIGKILL], logs
    (parts,) = (tmp_path / "killed" / "work").glob("attempt-*/checkpoints/step-000000012/release-*")
    written = {path.stem for path in parts.glob("*.safetensors.json")}
    assert written
    (one,) = layout_fixtures.run(
        corpus,
        tmp_path / "killed",
        layout_fixtures.settings_of({}, 1, release_checkpoint_interval=100),
        **in_many_files(),
    )
    assert "going on after step 12" in one
    calm, resumed = (tmp_path / name / "out" / "step-000012" for name in ("calm", "killed"))
    assert len(written) < len(list(calm.glob("*.safetensors")))
    assert train_fixtures.digest(resumed) == train_fixtures.digest(calm)


def test_nothing_that_was_sealed_is_read_again(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a resumed attempt, nor for the manifest; a file that was touched is hashed, and accepted."""
    work, out, hashed = tmp_path / "work", tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(corpus, work, out, train_fixtures.config(), train_fixtures.Reporter(9, signal.SIGTERM))
    touched = work / "attempt-0001" / "sealed" / "step-000006" / "optimizer.safetensors"
    os.utime(touched, ns=(1, 1))

    def record(path: Path, *progress: store.Progress) -> str:
        hashed.append("/".join(path.parts[-2:]))
        return sha256_file(path, *progress)

    monkeypatch.setattr(store, "sha256_file", record)
    monkeypatch.setattr(work_checkpoint, "sha256_file", record)
    monkeypatch.setattr(release_checkpoint, "sha256_file", record)
    train_fixtures.pretrain(corpus, work, out, train_fixtures.config())
    resumed = ["step-000000009/rank-00000.safetensors", "step-000006/optimizer.safetensors"]
    assert hashed == [*resumed, "step-000012/state.json"]
    hashed.clear()
    artifact = write_manifest(out, "pretrain-test")
    assert sorted(hashed) == ["out/summary.json", "out/training.jsonl"]
    monkeypatch.undo()
    artifact.verify()


def test_a_damaged_part_is_written_again(corpus: Path, in_shards: Path, tmp_path: Path) -> None:
    """A file of a seal that was killed: changed, cut, missing, or with a record that was cut. The others are kept."""
    run = fresh(corpus, tmp_path, env=in_many_files(TEST_SEAL="0 0 90 SIGKILL"), checkpoint_interval=100)
    run.communicate(timeout=300)
    (parts,) = (tmp_path / "work").glob("attempt-0001/checkpoints/step-000000006/release-*")
    changed, cut, missing, unrecorded, *kept = sorted(parts.glob("*.safetensors"))
    assert run.returncode == -signal.SIGKILL and len(kept) > 3
    inodes = {path.name: path.stat().st_ino for path in kept}
    damage(changed)
    cut.write_bytes(cut.read_bytes()[:-1])
    missing.unlink()
    record = unrecorded.with_name(f"{unrecorded.name}.json")
    record.write_text(record.read_text()[:-5])
    run = fresh(corpus, tmp_path, env=in_many_files(), checkpoint_interval=100)
    assert run.wait() == 0, run.stderr.read()
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(in_shards)
    assert inodes == {name: (tmp_path / "out" / "step-000006" / name).stat().st_ino for name in inodes}


def test_a_file_has_the_bytes_of_the_library(tmp_path: Path) -> None:
    """Of every type, of several together, and of tensors without dimensions, without values, and of other strides."""
    shapes = {"scalar": (), "empty": (0, 4), "matrix": (300, 7), "vector": (5,)}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in tensor_file.TYPES:
        for name, shape in shapes.items():
            values = torch.randint(0, 2, shape, generator=generator).to(dtype)
            tensors[f"{name}.{dtype}"] = values
    tensors['names "in" UTF-8: ä\n'] = torch.arange(12.0).view(3, 4).t()
    for names in (list(tensors), list(tensors)[:1], []):
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        chosen = {name: tensors[name] for name in names}
        save_file({name: tensor.contiguous() for name, tensor in chosen.items()}, theirs, {"format": "pt"})
        written: list[int] = []
        described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in chosen.items()}
        size, sha256 = tensor_file.write(ours, described, chosen.__getitem__, written.append, durable=True)
        assert ours.read_bytes() == theirs.read_bytes()
        assert size == sum(written) == ours.stat().st_size and sha256 == sha256_file(theirs)


def test_the_largest_checkpoint_is_divided_evenly() -> None:
    """Into the files of a model of 235 billion parameters, of which each rank of its recipe writes at most two."""
    model = recipe.load("atom-235b-a22b").config.model
    shapes = model.shapes(151_936)
    files = release_checkpoint.plan(shapes, Adam.state_shapes(shapes))
    sizes = [4 * sum(math.prod(shape) for _, _, shape in file.tensors.values()) for file in files]
    assert sum(sizes) == 12 * model.parameters(151_936)["total"] > 2.8e12 and max(sizes) <= 5e9
    assert max(sum(sizes[rank::512]) for rank in range(512)) <= 1e10
