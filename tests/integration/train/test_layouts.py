"""Any layout trains the same model, and a work checkpoint of one goes on in another.

The aux loss is that of a micro-batch, of a row, or of a whole step under the load of the step before. A micro-batch's
size stands in the recipe and layouts only deal whole ones to their ranks, so it is the same sum in each of them and is
compared like the rest.
"""

from __future__ import annotations

import re
import signal
import socket
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch

from stages.generation.vllm_worker import atom_index
from stages.mcore.hf_mapping import to_hf
from stages.mcore.model import Initial
from stages.models.mixture import Qwen3MoeConfig
from stages.train.checkpoint import release_checkpoint
from tests.fixtures import layout_fixtures, train_fixtures
from tests.fixtures.run_fixtures import SOAK, at_length

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    train_fixtures.make(folder, {"batch": layout_fixtures.BATCH})
    return folder


BALANCED: dict[int, dict[str, dict]] = {
    2: {"DP2": {}, "TP2, selective": {"tp": 2, "recompute": "selective"}},
    4: {"EP2xDP2, recomputed": {"ep": 2, "recompute": "layer"}, "TP2xCP2": {"tp": 2, "cp": 2}},
}
"""Layouts that also train with the balance loss over a step, by number of ranks."""


def runs_of(corpus: Path, ranks: int, layouts: dict, balanced: dict) -> dict[str, tuple[Path, dict]]:
    """Runs of the model, and under names that begin with "global" those with the balance loss over a step."""
    settings = layout_fixtures.settings_of({}, 1)
    by_step = {**settings, "model": {**settings["model"], "balance": "global"}}
    runs = {name: layout_fixtures.in_layout(settings, layout, ranks) for name, layout in layouts.items()}
    runs |= {f"global {name}": layout_fixtures.in_layout(by_step, layout, ranks) for name, layout in balanced.items()}
    return {name: (corpus, run) for name, run in runs.items()}


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    out = tmp_path_factory.mktemp("one") / "out.json"
    return layout_fixtures.compare_runs(runs_of(corpus, 1, {"one": {}}, {"one": {}}), 1, out)


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [
        pytest.param(2, layout_fixtures.TWO, id="two", marks=at_length("training", 21)),
        pytest.param(4, layout_fixtures.FOUR if SOAK else layout_fixtures.FOUR_IN_EVERY_RUN, id="four"),
    ],
)
def test_every_layout_trains_like_one_process(
    corpus: Path, one: dict[str, list[dict[str, float]]], tmp_path: Path, ranks: int, chosen: dict
) -> None:
    runs = runs_of(corpus, ranks, chosen, BALANCED[ranks])
    curves = layout_fixtures.compare_runs(runs, ranks, tmp_path / "out.json")
    assert set(curves) == set(runs)
    model = Qwen3MoeConfig(**layout_fixtures.MODEL)
    initial = Initial(model.shapes(train_fixtures.VOCAB), model, 0)
    exported = dict(to_hf(initial, model, train_fixtures.VOCAB))
    pairs = zip(one["one"][1:5], one["global one"][1:5], strict=True)
    assert all(a["aux_loss"] != pytest.approx(b["aux_loss"], rel=1e-4) for a, b in pairs), "the scopes differ"
    for name, steps in curves.items():
        assert len(steps) == 6
        reference = one["global one" if name.startswith("global") else "one"]
        layout_fixtures.agree(steps, reference, TOLERANCE, name)
        # each rank wrote some of a sampler's weights, which are together those of the export
        (folder,) = (tmp_path / f"weights of {name}").iterdir()
        assert len(list(atom_index.tensors(folder, steps[-1]["policy"]))) >= len(exported)
        assert len({path.name[:10] for path in folder.glob("rank-*")}) == ranks, name
        given = release_checkpoint.Tensors(folder)
        assert given.keys() == exported.keys() and all(torch.equal(given[n], t) for n, t in exported.items()), name


FEATURES: dict[str, tuple[dict, dict, float]] = {
    "dense and sequences": (
        {"dense_layers": 1, "intermediate_size": 32, "balance": "sequence"},
        {"precision": "fp32"},
        TOLERANCE,
    ),
    "biases, padded vocabulary": (
        {**train_fixtures.SIGMOID, "layers": 4, "router_bias_update_rate": 0.05},
        {"spikes": {"action": "skip"}},
        TOLERANCE,
    ),
    "packed, padded vocabulary, sliced loss": (
        {"yarn": {"factor": 4.0, "original_length": 16}, "balance": "global"},
        {"pack": True},
        TOLERANCE,
    ),
    # a rank's own sums are rounded to eight bits where another adds whole; and each tensor or context rank's z-loss is the
    # mean over its own tokens, of which padding takes unevenly
    "bf16 and z-loss": ({"z_loss": 1e-3}, {"precision": "bf16"}, 5e-3),
}
FOR_FEATURES = ("TP2+SP", "PP2 interleaved", "EP2", "CP2")


@at_length("training", 25)
@pytest.mark.numeric
@pytest.mark.parametrize("feature", FEATURES if SOAK else ("packed, padded vocabulary, sliced loss",))
def test_every_feature_trains_alike_in_every_layout(corpus: Path, tmp_path: Path, feature: str) -> None:
    model, phase, tolerance = FEATURES[feature]
    packed = phase.get("pack", False)
    if packed:  # and a batch that grows
        phase = {**phase, "batch": {**layout_fixtures.BATCH, "ramp": [{"until_step": 2, "global_tokens": 128}]}}
    settings = layout_fixtures.settings_of({}, 1, **phase)
    settings["model"] = {**layout_fixtures.MODEL, **model}
    if "padded vocabulary" in feature:  # two tensor ranks: the first pads a part of its ids, the second all of them
        settings["padded_vocab_size"] = 5 * train_fixtures.VOCAB // 2
    place = corpus
    if packed:
        train_fixtures.make(tmp_path / "corpus", {"batch": layout_fixtures.BATCH})
        train_fixtures.pack(tmp_path / "corpus", settings["phase"])
        place = tmp_path / "corpus" / "packed"
    one = layout_fixtures.compare(place, {"one": {}}, 1, settings, tmp_path / "one.json")["one"]
    assert all(step["dropped"] == 0 for step in one[:-1]) and one[4]["loss"] < one[0]["loss"]
    chosen = {name: layout_fixtures.TWO[name] for name in FOR_FEATURES} | {"DP2, recomputed": {"recompute": "layer"}}
    loss_slice = 24 if "sliced loss" in feature else 0  # of the 32 or 64 tokens that a rank has; "one" has all logits
    curves = layout_fixtures.compare(place, chosen, 2, settings, tmp_path / "two.json", loss_slice=loss_slice)
    for name, steps in curves.items():
        if tolerance > TOLERANCE:  # which expert a token prefers is decided by less than bf16 keeps
            figures = ("loss", "heldout_loss")
            layout_fixtures.agree(
                *([{k: x[k] for k in x if k in figures} for x in run] for run in (steps, one)), tolerance, name
            )
            zs = [[x["z_loss"] for x in run if "z_loss" in x] for run in (steps, one)]
            assert min(zs[1]) > 0 and zs[0] == pytest.approx(zs[1], rel=5e-2)
        else:
            layout_fixtures.agree(steps, one, tolerance, name)


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
def test_modules_that_are_computed_again_train_alike(corpus: Path, tmp_path: Path, pack: bool) -> None:
    """All that there are: a layer with a dense SwiGLU, others with experts and a shared one. The gradients of a tensor that
    several modules read may be added in another order."""
    settings = layout_fixtures.settings_of({}, 1, pack=pack)
    settings["model"] = {**train_fixtures.SIGMOID, "layers": 3, "dense_layers": 1, "intermediate_size": 32}
    place = corpus
    if pack:
        train_fixtures.make(tmp_path / "corpus", {"batch": layout_fixtures.BATCH})
        train_fixtures.pack(tmp_path / "corpus", settings["phase"])
        place = tmp_path / "corpus" / "packed"
    modules = ["layernorm", "moe_act", "mlp", "shared_experts"]
    runs = {"kept": {}, "again": {"recompute": "selective", "recompute_modules": modules}}
    curves = layout_fixtures.compare(place, runs, 1, settings, tmp_path / "out.json")
    layout_fixtures.agree(curves["again"], curves["kept"], TOLERANCE, "again")
    assert curves["again"][0]["loss"] == curves["kept"][0]["loss"] > curves["kept"][4]["loss"]


@pytest.mark.numeric
def test_gradients_summed_in_bf16_train_alike(corpus: Path, tmp_path: Path) -> None:
    """On two ranks over gloo, with two micro-batches each: other sums from the first step on, the same course, and the same
    bits whether collectives run beside the backward and forward passes or after them."""
    settings = layout_fixtures.settings_of({}, 2, precision="bf16")
    short = {**settings, "phase": {**settings["phase"], "gradient_precision": "bf16"}}
    runs = {"fp32": settings, "bf16": short}
    layouts = {"overlapped": {"overlap_gradients": True}, "weights too": {"overlap_weights": True}, "EP2": {"ep": 2}}
    runs |= {name: layout_fixtures.in_layout(short, layout, 2) for name, layout in layouts.items()}
    named = {name: (corpus, run) for name, run in runs.items()}
    curves = layout_fixtures.compare_runs(named, 2, tmp_path / "out.json")
    norms = {name: [step["grad_norm"] for step in curve[:5]] for name, curve in curves.items()}
    losses = {name: [step["loss"] for step in curve[:5]] for name, curve in curves.items()}
    assert losses["bf16"][0] == losses["fp32"][0] and norms["bf16"][0] != norms["fp32"][0]
    assert norms["bf16"][0] == pytest.approx(norms["fp32"][0], rel=2**-8)
    for name in ("bf16", "EP2"):
        assert losses[name] == pytest.approx(losses["fp32"], rel=5e-3), name
    assert curves["overlapped"] == curves["bf16"] == curves["weights too"]


PAIRS = [("EP2", "one"), ("TP2+SP", "PP2")] if SOAK else [("TP2+SP", "PP2")]
"""Of all, which `make soak PART=checkpoints` runs."""


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    layout_fixtures.run(corpus, folder, layout_fixtures.settings_of({}, 1))
    return folder / "out"


@at_length("training", 25)
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_work_checkpoint_goes_on_in_another_layout(
    corpus: Path, undisturbed: Path, tmp_path: Path, before: str, after: str
) -> None:
    codes, logs = layout_fixtures.end(
        layout_fixtures.start(corpus, tmp_path, layout_fixtures.settings_named(before), at=7, number=signal.SIGTERM)
    )
    assert all(codes) and "stopped after step 7" in logs[0], logs
    logs = layout_fixtures.run(corpus, tmp_path, layout_fixtures.settings_named(after))
    assert "going on after step 7" in logs[0]
    assert layout_fixtures.figures(tmp_path / "out") == pytest.approx(
        layout_fixtures.figures(undisturbed), rel=TOLERANCE
    )


UNEVEN: dict[str, dict] = {
    "dealt": {"pp": 2},
    "few at first": {"pp": 2, "pp_layers": [1, 4]},
    "interleaved": {"pp": 2, "vpp": 2, "pp_layers": [1, 2, 1, 1]},
}


@pytest.mark.numeric
def test_stages_of_unequally_many_layers_train_like_one_process(corpus: Path, tmp_path: Path) -> None:
    """Of five layers."""
    settings = layout_fixtures.settings_of({}, 1)
    settings["model"] = {**settings["model"], "layers": 5}
    one = layout_fixtures.compare(corpus, {"one": {}}, 1, settings, tmp_path / "one.json")["one"]
    for name, steps in layout_fixtures.compare(corpus, UNEVEN, 2, settings, tmp_path / "two.json").items():
        layout_fixtures.agree(steps, one, TOLERANCE, name)


@at_length("training", 30)
def test_a_work_checkpoint_goes_on_with_other_layers_on_a_stage(corpus: Path, tmp_path: Path) -> None:
    """Stages of three and two layers, then of one and four, then one process, as if undisturbed."""

    def settings_in(layout: dict, ranks: int) -> dict:
        settings = layout_fixtures.settings_of(layout, ranks)
        return {**settings, "model": {**settings["model"], "layers": 5}}

    layout_fixtures.run(corpus, tmp_path / "calm", settings_in({}, 1))
    for layout, at in (("dealt", 5), ("few at first", 8)):
        settings = settings_in(UNEVEN[layout], 2)
        ranks = layout_fixtures.start(corpus, tmp_path / "moved", settings, at=at, number=signal.SIGTERM)
        codes, logs = layout_fixtures.end(ranks)
        assert all(codes) and f"stopped after step {at}" in logs[0], logs
    logs = layout_fixtures.run(corpus, tmp_path / "moved", settings_in({}, 1))
    assert "going on after step 8" in logs[0]
    outs = (layout_fixtures.figures(tmp_path / name / "out") for name in ("moved", "calm"))
    assert next(outs) == pytest.approx(next(outs), rel=TOLERANCE)


@at_length("training", 20)
def test_a_killed_rank_changes_no_byte(corpus: Path, tmp_path: Path) -> None:
    """Same layout: bit for bit, whichever rank dies."""
    settings = layout_fixtures.settings_named("EP2")
    layout_fixtures.run(corpus, tmp_path / "calm", settings)
    codes, logs = layout_fixtures.end(
        layout_fixtures.start(corpus, tmp_path / "killed", settings, TEST_DISTURB="1 7 SIGKILL")
    )
    assert codes == [1, -signal.SIGKILL] and "rank 0 lost touch with another rank" in logs[0], (codes, logs)
    # the checkpoint of step 6 was being written when the rank died
    assert re.search("going on after step [46]", layout_fixtures.run(corpus, tmp_path / "killed", settings)[0])
    assert train_fixtures.digest(tmp_path / "killed" / "out") == train_fixtures.digest(tmp_path / "calm" / "out")


@at_length("training", 12)
def test_ranks_read_what_the_order_says(corpus: Path, tmp_path: Path) -> None:
    """The rows that ranks really read, by step, are those of the order index, each by one data-parallel rank."""
    from stages.formats.table import order_files, read_table

    settings = layout_fixtures.settings_of({"ep": 2}, 2, steps=12)
    layout_fixtures.run(corpus, tmp_path, settings, TEST_READS=str(tmp_path / "reads"))
    read = layout_fixtures.reads(tmp_path / "reads")
    assert set(read) == set(range(1, 13))
    for step, by_rank in read.items():
        columns = ["source", "ordinal", "offset", "length"]
        tables = [read_table(file, columns, [("step", "=", step)]) for file in order_files(corpus / "order")]
        index = [row for table in tables for row in table.to_pylist()]
        assert Counter(chain(*by_rank.values())) == Counter(tuple(row.values()) for row in index)
        assert {rank: len(rows) for rank, rows in by_rank.items()} == {0: 4, 1: 4}


@at_length("training", 30)
def test_a_rank_that_hangs_is_found(corpus: Path, tmp_path: Path) -> None:
    """One rank sleeps in C: both say where they stand, and the attempt ends."""
    settings = layout_fixtures.settings_of({"ep": 2}, 2, watchdog_timeout_seconds=8.0)
    codes, logs = layout_fixtures.end(layout_fixtures.start(corpus, tmp_path, settings, TEST_DISTURB="1 7 sleep"))
    assert codes == [1, 1], logs
    place = f"; the stacks of all ranks are in the log; rank 1 on {socket.gethostname()} did not arrive: it left"
    assert f"abandoned: pretrain: no step was finished for 8 s{place}" in logs[0]
    assert "rank 1 stands here" in logs[0] and "in step_or_not" in logs[0] and "distributed_c10d.py" in logs[0]


@at_length("training", 20)
def test_a_rank_that_gives_no_sign_is_named(corpus: Path, tmp_path: Path) -> None:
    settings = layout_fixtures.settings_of({}, 2, watchdog_timeout_seconds=8.0)
    processes = layout_fixtures.start(corpus, tmp_path, settings, TEST_DISTURB="1 7 SIGSTOP")
    log = processes[0].communicate(timeout=120)[0]
    processes[1].kill()
    processes[1].wait()
    assert "no step was finished for 8 s; no sign of rank 1; the stacks of the others are in the log; run again" in log
