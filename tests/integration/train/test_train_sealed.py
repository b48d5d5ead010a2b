"""Sealed checkpoints: the same tensors in one file or in many, and a damaged one is never trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core import store
from pipeline.core.errors import AtomError
from pipeline.core.stage import identity
from pipeline.core.store import Artifact, sha256_file, write_manifest
from stages.mcore.optimizer import Adam
from stages.models.mixture import Qwen3MoeConfig
from stages.train.checkpoint import release_checkpoint
from stages.train.config import TrainConfig
from tests.fixtures import train_fixtures

SHAPES = Qwen3MoeConfig(**train_fixtures.MODEL).shapes(train_fixtures.VOCAB)


def read(kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    size = math.prod(shape)
    return torch.arange(size).view(shape) / size + len(kind + name)


def write(folder: Path) -> Path:
    state = {
        "step": 3,
        "tokens": 0,
        "config": identity(TrainConfig.model_validate(train_fixtures.config())),
        "tokenizer": "",
    }
    release_checkpoint.write(folder, SHAPES, Adam.state_shapes(SHAPES), read, state)
    return folder


def test_many_files_hold_what_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "one")
    assert sorted(p.name for p in one.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    monkeypatch.setattr(release_checkpoint, "SHARD_BYTES", 20_000)
    many, second = write(tmp_path / "many"), write(tmp_path / "again")
    assert train_fixtures.digest(many) == train_fixtures.digest(second)
    for stem in (release_checkpoint.MODEL, release_checkpoint.OPTIMIZER):
        index = json.loads((many / f"{stem}.safetensors.index.json").read_text())
        files = sorted(many.glob(f"{stem}-*.safetensors"))
        assert len(files) > 2 and all(p.stat().st_size < 25_000 for p in files)
        assert [p.name for p in files] == [
            f"{stem}-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
        ]
        expected = load_file(one / f"{stem}.safetensors")
        assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in expected.values())
        for name, file in index["weight_map"].items():
            assert name in load_file(many / file)
        for folder in (one, many):
            tensors = release_checkpoint.Tensors(folder, stem)
            assert set(tensors) == set(expected) and tensors.shapes() == {
                n: tuple(t.shape) for n, t in expected.items()
            }
            assert all(torch.equal(tensors[name], t) for name, t in expected.items())


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_checkpoint, "SHARD_BYTES", 20_000)
    folder = write(tmp_path / "many")
    sorted(folder.glob("model-*"))[1].unlink()
    with pytest.raises(
        AtomError, match=r"checkpoint .*many cannot be read \(.*model-00002-of-.*\); remove its artifact"
    ):
        release_checkpoint.Tensors(folder)


def test_what_a_phase_begins_with_is_hashed_and_no_more(
    tmp_path: Path, run_stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last checkpoint of the phase before, without its moments; the watchdog is told of each byte."""
    from stages.train.pretrain import MIDTRAIN
    from stages.train.watchdog import Watchdog

    train_fixtures.make(tmp_path / "corpus")
    for step in (6, 12):
        write(tmp_path / "made" / f"step-{step:06d}")
    artifact = write_manifest(tmp_path / "made", "pretrain-test")
    inputs = {role: Artifact.open(tmp_path / "corpus" / role) for role in ("tokens", "order")} | {"init": artifact}
    hashed: list[str] = []
    progress: list[int] = []

    def record(path: Path, *reports: store.Progress) -> str:
        hashed.append(path.relative_to(tmp_path).as_posix())
        return sha256_file(path, *reports)

    monkeypatch.setattr(store, "sha256_file", record)
    monkeypatch.setattr(Watchdog, "progress", lambda self, size: progress.append(size))
    run_stage(MIDTRAIN, train_fixtures.config(), inputs)
    made = [path for path in hashed if path.startswith("made/")]
    assert sorted(made) == ["made/step-000012/model.safetensors", "made/step-000012/state.json"]
    tensors = 4 * sum(map(math.prod, SHAPES.values()))
    assert sum(progress) >= 2 * tensors, "hashed, and read"


@pytest.mark.parametrize(
    ("phase", "file"),
    [("pretrain", "model.safetensors"), ("pretrain", "state.json"), ("midtrain", "model.safetensors")],
)
def test_no_phase_begins_from_a_flipped_byte(tmp_path: Path, phase: str, file: str, run_stage) -> None:
    from stages.train.pretrain import MIDTRAIN, STAGE

    stage = MIDTRAIN if phase == "midtrain" else STAGE
    train_fixtures.make(tmp_path / "corpus")
    inputs = {role: Artifact.open(tmp_path / "corpus" / role) for role in ("tokens", "order")}
    place = tmp_path / "made" / ("step-000012" if phase == "midtrain" else "")
    write(place)
    artifact = write_manifest(tmp_path / "made", "pretrain-test")
    content = bytearray((place / file).read_bytes())
    content[-3] ^= 1
    (place / file).write_bytes(content)
    if phase == "pretrain":
        inputs["continue"] = artifact
    else:
        inputs["init"] = artifact
    with pytest.raises(AtomError, match="artifact pretrain-test: .*is not what its manifest says; take it from a copy"):
        run_stage(stage, train_fixtures.config(), inputs)
