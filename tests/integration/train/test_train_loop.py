"""The training loop on a tiny Megatron model: the same bytes however often it is killed, and plain words at its end."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import signal
import time
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.core.environment import cpu_model
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact, write_manifest
from tests.fixtures import train_fixtures
from tests.fixtures.run_fixtures import SOAK
from tests.fixtures.train_fixtures import fresh, losses

# The first five losses of train_fixtures.config() on this corpus. A change of ours that should not move numbers leaves them as
# they are, to the last bit, where they were pinned: on that processor with these versions. Elsewhere libraries may add
# in another order.
FIRST = [4.2126617431640625, 4.118559837341309, 3.9561610221862793, 3.6554815769195557, 3.4153716564178467]
PINNED = {("AMD EPYC", "AVX512", "2.13.0", "0.16.1"), ("AMD EPYC", "AVX512", "2.13.0", "0.19.2")}


@pytest.mark.numeric
def test_product_and_learning(undisturbed: Path) -> None:
    assert sorted(p.name for p in undisturbed.iterdir()) == [
        "step-000000", "step-000006", "step-000012", "summary.json", "training.jsonl",
    ]  # fmt: skip
    assert len(losses(undisturbed)) == 12 and len(losses(undisturbed, "heldout_loss")) == 4
    heldout = losses(undisturbed, "heldout_loss")
    assert heldout[-1] < heldout[0] - 0.5  # by 1.5
    state = json.loads((undisturbed / "step-000012" / "state.json").read_text())
    assert state["step"] == state["optimizer_step"] == 12 and state["phase"] == "pretrain"
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["heldout_loss"]["first"] == heldout[0] and summary["tokens"] == state["tokens"]


def test_sealed_tensors_are_whole_and_globally_named(undisturbed: Path) -> None:
    from stages.models.mixture import Qwen3MoeConfig
    from stages.train.checkpoint import release_checkpoint

    shapes = Qwen3MoeConfig(**train_fixtures.MODEL).shapes(train_fixtures.VOCAB)
    for step in (0, 6, 12):
        tensors = release_checkpoint.Tensors(undisturbed / release_checkpoint.name_of(step))
        assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
    moments = release_checkpoint.Tensors(undisturbed / "step-000012", release_checkpoint.OPTIMIZER)
    assert {n: tuple(t.shape) for n, t in moments.items()} == {
        f"{key}.{name}": shape for key in ("exp_avg", "exp_avg_sq") for name, shape in shapes.items()
    }
    assert all(t.abs().sum() > 0 for t in moments.values())


@pytest.mark.numeric
def test_pinned_losses(undisturbed: Path) -> None:
    import torch

    torch_version, megatron = torch.__version__.split("+")[0], version("megatron-core")
    machine = cpu_model(), torch.backends.cpu.get_cpu_capability(), torch_version, megatron
    assert losses(undisturbed)[:5] == (FIRST if machine in PINNED else pytest.approx(FIRST, rel=1e-6)), machine


def test_two_fresh_interpreters_give_the_same_bytes(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = fresh(corpus, tmp_path)
    assert run.wait() == 0, run.stderr.read()
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(undisturbed)


@pytest.mark.parametrize("steps", [(5, 11), *([(1,)] if SOAK else [])])
def test_killed_runs_end_in_the_same_bytes(
    corpus: Path, undisturbed: Path, tmp_path: Path, steps: tuple[int, ...]
) -> None:
    for step in steps:
        assert fresh(corpus, tmp_path, step, signal.SIGKILL).wait() == -signal.SIGKILL
        assert not list((tmp_path / "out").iterdir())
    run = fresh(corpus, tmp_path)
    assert run.wait() == 0, run.stderr.read()
    newest = "[68]" if steps[-1] > 4 else "none"  # the checkpoint of step 8 may still have been on its way
    assert bool(re.search(f"going on after step {newest}", run.stdout.read())) == (steps[-1] > 4)
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(undisturbed)


def test_a_request_to_stop_saves_first(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    from pipeline.core.errors import Interrupted

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped after step 7"):
        train_fixtures.pretrain(
            corpus,
            tmp_path / "work",
            tmp_path / "out",
            train_fixtures.config(),
            train_fixtures.Reporter(7, signal.SIGTERM),
        )
    assert signal.getsignal(signal.SIGTERM) is before
    report = train_fixtures.Reporter()
    train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", train_fixtures.config(), report)
    assert report.notes[0] == "pretrain: going on after step 7"
    assert re.fullmatch(
        r"pretrain: 5 steps in \d+\.\d s, of which it waited \d\.\d\d s for data and \d\.\d\d s for work checkpoints",
        report.notes[1],
    )
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(undisturbed)


def diverging() -> object:
    """A config whose first step gives no numbers: its rate is one that no recipe may have, so it is put in afterwards."""
    from stages.train.config import TrainConfig

    config = TrainConfig.model_validate(
        train_fixtures.config(optimizer={**train_fixtures.PHASE["optimizer"], "warmup_steps": 0})
    )
    optimizer = config.phase.optimizer.model_copy(update={"lr": 1e30, "final_lr": 1e3})
    return config.model_copy(update={"phase": config.phase.model_copy(update={"optimizer": optimizer})})


def threads_left(at_most: float) -> int:
    """The number of this process's threads, once it is `at_most` or a minute is over: a thread ends when it gets to."""
    deadline = time.monotonic() + 60
    while True:
        gc.collect()
        if (count := len(os.listdir("/proc/self/task"))) <= at_most or time.monotonic() > deadline:
            return count
        time.sleep(0.1)


def test_a_phase_leaves_no_threads(corpus: Path, tmp_path: Path) -> None:
    """A group of ranks that something of Megatron's still holds keeps three threads, which wake all the time."""
    threads = []
    for name in ("first", "second", "third"):
        train_fixtures.pretrain(corpus, tmp_path / name / "work", tmp_path / name / "out", train_fixtures.config())
        threads.append(threads_left(at_most=threads[0] + 2 if threads else math.inf))
    # A thread of an earlier test may end or a pool may start one meanwhile; a group that is held adds three a run.
    assert threads[2] - threads[0] < 3, threads
    settings = diverging()
    for name in ("fourth", "fifth"):
        with pytest.raises(AtomError, match="the gradient norm is nan"):
            train_fixtures.pretrain(corpus, tmp_path / name / "work", tmp_path / name / "out", settings)
        threads.append(threads_left(at_most=threads[2] + 2))
    assert threads[4] - threads[2] < 3, threads


@pytest.fixture
def later_half(corpus: Path, undisturbed: Path, tmp_path: Path) -> dict[str, Artifact]:
    """Inputs of a phase that continues from the checkpoint of step 6: the tokens, and the order of what is left."""
    order = tmp_path / "order"
    order.mkdir()
    table = pq.read_table(corpus / "order" / "part-00000.parquet")
    later = table.filter(pc.field("step") > 6)
    pq.write_table(later, order / "part-00000.parquet")
    rows = {count["values"]: count["counts"] for count in later["source"].value_counts().to_pylist()}
    meta = json.loads((corpus / "order" / "meta.json").read_text())
    place = json.loads((undisturbed / "step-000006" / "state.json").read_text())["data_position"]
    start = {name: place[name] for name in ("rows", "chunks")}
    meta |= {"first_step": 7, "start": start, "walk": place["order"]["walk"]}
    meta["parts"] = [{"first_step": 7, "last_step": 12, "rows": rows}]
    (order / "meta.json").write_text(json.dumps(meta))
    shutil.copytree(undisturbed / "step-000006", tmp_path / "continue")
    return {
        "tokens": Artifact.open(corpus / "tokens"),
        "order": write_manifest(order, "order-later"),
        "continue": write_manifest(tmp_path / "continue", "pretrain@6-test"),
    }


def test_a_phase_continues_from_a_release_checkpoint(
    undisturbed: Path, later_half: dict[str, Artifact], run_stage
) -> None:
    from stages.train.pretrain import STAGE

    same = run_stage(STAGE, train_fixtures.config(), later_half)
    assert losses(same.path) == losses(undisturbed)[6:]
    assert losses(same.path, "heldout_loss")[1:] == losses(undisturbed, "heldout_loss")[2:]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (same / f"step-000012/{name}").read_bytes() == (undisturbed / "step-000012" / name).read_bytes()
    one, other = same.json("step-000012/state.json"), json.loads((undisturbed / "step-000012/state.json").read_text())
    assert one == other and one["data_position"]["next_step"] == 13
    assert one["data_position"]["rows"] == {"sums": 48, "text": 48}

    slower = train_fixtures.config(optimizer={**train_fixtures.PHASE["optimizer"], "lr": 1.5e-3})
    changed = run_stage(STAGE, slower, later_half)
    assert losses(changed.path)[0] == losses(undisturbed)[6] and losses(changed.path)[1] != losses(undisturbed)[7]


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("layers", 3, "pretrain@6-test is of another model: its model.layers is 2, not 3"),
        ("rope_theta", 5e5, "pretrain@6-test is of another model: its model.rope_theta is 10000.0, not 500000.0"),
        ("tokenizer", "other", "pretrain@6-test was trained on another tokenizer's tokens"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    later_half: dict[str, Artifact], tmp_path: Path, run_stage, field: str, value: object, sentence: str
) -> None:
    from stages.train.pretrain import STAGE

    settings = train_fixtures.config()
    if field == "tokenizer":
        path = tmp_path / "continue" / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": value}))
        later_half["continue"] = write_manifest(path.parent, "pretrain@6-test")
    else:
        settings["model"] = {**settings["model"], field: value}
    with pytest.raises(AtomError, match=re.escape(sentence)):
        run_stage(STAGE, settings, later_half)


def test_a_loss_that_is_not_a_number_stops_the_phase(corpus: Path, tmp_path: Path) -> None:
    settings = diverging()
    with pytest.raises(
        AtomError, match=r"pretrain: the (loss|gradient norm) is (nan|inf) at step \d+, on documents sums/"
    ):
        train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", settings)
    assert not list((tmp_path / "out").iterdir())


def test_missing_and_truncated_shards(corpus: Path, tmp_path: Path) -> None:
    from stages.train.data import Segment, Shards

    train_fixtures.make(tmp_path)
    tokens = Artifact.open(tmp_path / "tokens")
    path = tmp_path / "tokens" / "train" / "sums" / "part-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(AtomError, match=r"part-00000.bin has \d+ bytes instead of \d+; remove"):
        Shards(tokens, "train").read(Segment("sums", "sums/0", 0, 0, 7, 0))
    path.unlink()
    with pytest.raises(AtomError, match="part-00000.bin is missing; remove"):
        Shards(tokens, "train").read(Segment("sums", "sums/0", 0, 0, 7, 0))
    with pytest.raises(AtomError, match="does not hold"):
        Shards(tokens, "train").read(Segment("text", "text/0", 0, 0, 700, 0))
    with pytest.raises(RecipeError, match="padded_vocab_size = 32 is less than the 64 tokens"):
        train_fixtures.pretrain(
            corpus, tmp_path / "work", tmp_path / "out", {**train_fixtures.config(), "padded_vocab_size": 32}
        )


def test_rows_become_shifted_padded_batches(corpus: Path) -> None:
    from stages.train import parallel
    from stages.train.data import RankBatch, Row, Segment, Shards

    shards = Shards(Artifact.open(corpus / "tokens"), "train")
    rows = [Row((Segment("sums", "sums/train-0", 0, 0, 7, 3),)), Row((Segment("text", "text/train-0", 0, 4, 9, 0),))]
    with parallel.session(0) as ranks:
        share = RankBatch.read(rows, shards, 2, ranks)
    (batch,) = share.micro
    assert share.width == 8 and share.targets == 3 + 8
    assert batch.ids.shape == (2, 8) and rows[0].targets == 3
    tokens = shards.read(rows[0].segments[0]).tolist()
    assert batch.ids[0].tolist() == [*tokens[:-1], 0, 0] and batch.labels[0].tolist() == [*tokens[1:], 0, 0]
    assert batch.loss_mask[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert batch.padding[0].tolist() == [False] * 6 + [True] * 2
    assert batch.ids[1, 0] == shards.shard("text", 0).get(0)[4]


@pytest.mark.numeric
def test_norms_are_not_decayed(corpus: Path) -> None:
    from stages.train import parallel
    from stages.train.config import TrainConfig
    from stages.train.engine import Engine

    with parallel.session(0) as ranks:
        engine = Engine(TrainConfig.model_validate(train_fixtures.config()), ranks, train_fixtures.VOCAB)
        engine._set_rates(0.1)
        decay = {g["weight_decay"]: sum(p.numel() for p in g["params"]) for g in engine.optimizer.param_groups}
        parameters = list(engine.chunks[0].parameters())
        norms = sum(p.numel() for p in parameters if p.ndim == 1)
        assert decay[0.0] == norms and decay[0.05] == sum(p.numel() for p in parameters) - norms


def test_midtrain_continues_the_weights_with_a_fresh_optimizer(
    corpus: Path, undisturbed: Path, tmp_path: Path, run_stage
) -> None:
    from stages.train.pretrain import MIDTRAIN

    shutil.copytree(corpus / "order", tmp_path / "order")
    meta = json.loads((tmp_path / "order/meta.json").read_text())
    (tmp_path / "order/meta.json").write_text(json.dumps({**meta, "phase": "midtrain"}))
    inputs = {"tokens": Artifact.open(corpus / "tokens"), "order": write_manifest(tmp_path / "order", "order-test")}
    shutil.copytree(undisturbed, tmp_path / "init")
    init = write_manifest(tmp_path / "init", "pretrain-test")
    artifact = run_stage(MIDTRAIN, train_fixtures.config(), {**inputs, "init": init})
    assert losses(artifact.path, "heldout_loss")[0] == losses(undisturbed, "heldout_loss")[-1]
    state = artifact.json("step-000012/state.json")
    assert state["phase"] == "midtrain" and state["optimizer_step"] == 12

    other = train_fixtures.config()
    other["model"] = {**other["model"], "layers": 3}
    with pytest.raises(
        AtomError, match=r"pretrain-test does not fit .*decoder.layers.2.input_layernorm.weight is None"
    ):
        run_stage(MIDTRAIN, other, {**inputs, "init": init})


def test_an_order_of_many_row_groups_reads_as_one(corpus: Path, tmp_path: Path) -> None:
    """Steps lie across the bounds of row groups, and are asked for in any order."""
    from stages.train.config import TrainConfig
    from stages.train.data import Order

    table = pq.read_table(corpus / "order" / "part-00000.parquet")
    shutil.copytree(corpus / "order", tmp_path / "order")
    pq.write_table(table, tmp_path / "order" / "part-00000.parquet", row_group_size=13)
    phase = TrainConfig.model_validate(train_fixtures.config()).phase
    order, rows_by_step = Order(Artifact("order-test", "", tmp_path / "order", ()), phase), {}
    for step in (1, 2, 5, 12, 4, 3):
        rows = table.filter(pc.field("step") == step).to_pylist()
        assert [(s.id, s.offset, s.length) for r in order.rows(step) for s in r.segments] == [
            (r["id"], r["offset"], r["length"]) for r in rows
        ]
        rows_by_step[step] = order.consumed(step)
    assert rows_by_step == {step: {"sums": 4 * step, "text": 4 * step} for step in rows_by_step}

    pq.write_table(table.slice(1), tmp_path / "order" / "part-00000.parquet")
    with pytest.raises(AtomError, match="order artifact order-test does not hold the rows that each of its steps"):
        Order(Artifact("order-test", "", tmp_path / "order", ()), phase)
    pq.write_table(pa.concat_tables([table.slice(1), table.slice(0, 1)]), tmp_path / "order" / "part-00000.parquet")
    with pytest.raises(AtomError, match="does not hold the rows"):
        Order(Artifact("order-test", "", tmp_path / "order", ()), phase).rows(1)
