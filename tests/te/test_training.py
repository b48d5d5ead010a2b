"""Training with Transformer Engine's layers is training with ours: losses, gradient norms, router figures and weights, in
each precision, packed or not, and in each layout.

The layers, quantizers and optimizer are TE's own code, on kernels that `tests.te.stand_ins` replaces. In FP8 the layers
of this project round as `atom simulate-precision` does: an independent account of what TE multiplies in which format.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.train.checkpoint import release_checkpoint
from tests.fixtures import layout_fixtures, train_fixtures
from tests.fixtures.run_fixtures import at_length
from tests.te.conftest import Spawn, spawn_on

FEATURES: dict[str, Any] = {
    "dense_layers": 1,
    "intermediate_size": 32,
    "z_loss": 1e-3,
}
WIDE: dict[str, Any] = {
    "hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 128, "intermediate_size": 256,
}  # fmt: skip
"""Sizes that FP8 needs: whole blocks."""
DEVICES = {"mxfp8": "blackwell"}
"""Where TE has the recipe; the others are on Hopper."""
BOUNDS = {"fp32": 1e-5, "bf16": 5e-3, "fp8-tensorwise": 0.1, "fp8-blockwise": 0.1, "mxfp8": 0.1}
"""Largest relative difference of a loss in five steps, in which it falls to a sixth. In less than fp32, rounding decides
which expert a token takes; and the last bit of a bf16 number decides to which FP8 number it is rounded, so that two exact
accounts of FP8 soon round different numbers. That they round alike is tested layer by layer (test_stand_ins.py)."""
FP8 = [precision for precision in BOUNDS if "fp8" in precision]
LAYOUTS = {
    **{name: layout for name, layout in layout_fixtures.TWO.items() if name != "CP2"},
    "DP2, recomputed": {"recompute": "layer"},
    "DP2, norms and activations recomputed": {"recompute": "selective"},
}
PACKED_LAYOUTS = {name: layout_fixtures.TWO[name] for name in ("TP2+SP", "EP2", "CP2")}


def settings_of(precision: str, packed: bool = False) -> dict[str, Any]:
    settings = layout_fixtures.settings_of({}, 1, precision=precision, pack=packed)
    settings["model"] = {**layout_fixtures.MODEL, **FEATURES, **(WIDE if precision in FP8 else {})}
    return settings


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The corpus, by whether its rows are packed."""
    folder = tmp_path_factory.mktemp("corpus")
    train_fixtures.make(folder, {"batch": layout_fixtures.BATCH})
    train_fixtures.pack(folder, settings_of("fp32", packed=True)["phase"])
    return {False: folder, True: folder / "packed"}


def losses(curve: list[dict[str, Any]]) -> list[float]:
    return [step.get("loss", step.get("heldout_loss")) for step in curve]


Curves = dict[str, list[dict[str, Any]]]


def without_z_loss(settings: dict[str, Any]) -> dict[str, Any]:
    """For layouts: the z-loss is the mean over each tensor rank's tokens."""
    return {**settings, "model": {**settings["model"], "z_loss": 0.0}}


@pytest.fixture(scope="module")
def one_process(corpora: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Curves]:
    """one_process(DEVICE): the curves of every precision there, plain and packed, and, with TE, those that layouts are
    compared with. A process of TE takes longer to start than to train one of them."""
    kinds = [(precision, packed) for precision in BOUNDS for packed in corpora]
    places: dict[str, list[tuple[str, bool]]] = {"local": kinds}
    for precision, packed in kinds:
        places.setdefault(DEVICES.get(precision, "hopper"), []).append((precision, packed))

    @cache
    def curves(place: str) -> Curves:
        runs = {name_of(*kind): (corpora[kind[1]], settings_of(*kind)) for kind in places[place]}
        if place != "local":
            plain = [kind for kind in places[place] if not kind[1] or kind[0] == "fp32"]
            runs |= {f"{name_of(*x)}, no z": (corpora[x[1]], without_z_loss(settings_of(*x))) for x in plain}
        with pytest.MonkeyPatch.context() as patch:
            spawn_on(patch, place)
            return layout_fixtures.compare_runs(runs, 1, tmp_path_factory.mktemp(place) / "one.json")

    return curves


def name_of(precision: str, packed: bool) -> str:
    return f"{precision}, packed" if packed else precision


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("precision", BOUNDS)
def test_one_process_trains_alike(one_process: Callable[[str], Curves], precision: str, packed: bool) -> None:
    places = DEVICES.get(precision, "hopper"), "local"
    te, ours = (one_process(place)[name_of(precision, packed)] for place in places)
    print(precision, packed, max(abs(a / b - 1) for a, b in zip(losses(te), losses(ours), strict=True)))
    if precision == "fp32":
        layout_fixtures.agree(te, ours, BOUNDS[precision], precision)
    assert losses(te) == pytest.approx(losses(ours), rel=BOUNDS[precision])
    assert losses(te)[4] < 0.8 * losses(te)[0]


Compare = Callable[..., None]


@pytest.fixture
def compare_layouts(
    corpora: dict[bool, Path], one_process: Callable[[str], Curves], tmp_path: Path, device: Spawn
) -> Compare:
    """Layouts against one process, all with TE, without the z-loss."""

    def compare(precision: str, layouts: dict[str, Any], ranks: int, bound: float, packed: bool = False) -> None:
        device(place := DEVICES.get(precision, "hopper"))
        settings = without_z_loss(settings_of(precision, packed))
        curves = layout_fixtures.compare(corpora[packed], layouts, ranks, settings, tmp_path / "out.json")
        one = one_process(place)[f"{name_of(precision, packed)}, no z"]
        assert set(curves) == set(layouts)
        for name, curve in curves.items():
            print(name, max(abs(a / b - 1) for a, b in zip(losses(curve), losses(one), strict=True)))
            assert losses(curve) == pytest.approx(losses(one), rel=bound), name
            norms = [[step["grad_norm"] for step in run[:-1]] for run in (curve, one)]
            assert norms[0] == pytest.approx(norms[1], rel=min(10 * bound, 0.5)), name

    return compare


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_every_layout_of_two_trains_like_one_process(compare_layouts: Compare, precision: str, bound: float) -> None:
    compare_layouts(precision, LAYOUTS, 2, bound)


def test_packed_layouts_train_like_one_process(compare_layouts: Compare) -> None:
    compare_layouts("fp32", PACKED_LAYOUTS, 2, 1e-5, packed=True)


@pytest.mark.parametrize("precision", FP8)
def test_layouts_in_fp8_train_like_one_process(compare_layouts: Compare, precision: str) -> None:
    """A tensor rank scales its own part of a weight, and an expert's tokens come from several ranks: not the same
    numbers are rounded together. Recomputation is left out: in FP8 it is TE's, which keeps CUDA's generators. So is TP
    in MXFP8: TE gathers the sequence in a way that fails over gloo."""
    names = ["DP2 overlap", "PP2 interleaved", "EP2", *(["TP2+SP"] if precision != "mxfp8" else [])]
    compare_layouts(precision, {n: LAYOUTS[n] for n in names}, 2, 0.25)


@at_length("te", 200)
def test_every_layout_of_four_trains_like_one_process(compare_layouts: Compare) -> None:
    compare_layouts("fp32", {name: x for name, x in layout_fixtures.FOUR.items() if "CP2" not in name}, 4, 1e-5)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of the last sealed checkpoint."""
    return dict(release_checkpoint.Tensors(max(out.glob("step-*"))))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8-tensorwise"])
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(
    corpora: dict[bool, Path], tmp_path: Path, device: Spawn, precision: str
) -> None:
    """The pretrain stage with TE writes the same bytes when it is stopped and resumed, and, by name, shape and value,
    the tensors that it writes without TE; from whose work checkpoint it also goes on."""
    settings, corpus = settings_of(precision), corpora[False]
    device("hopper")
    layout_fixtures.run(corpus, tmp_path / "calm", settings)
    layout_fixtures.end(layout_fixtures.start(corpus, tmp_path / "stopped", settings, at=7, number=signal.SIGTERM))
    assert "going on after step 7" in layout_fixtures.run(corpus, tmp_path / "stopped", settings)[0]
    assert train_fixtures.digest(tmp_path / "stopped/out") == train_fixtures.digest(tmp_path / "calm/out")
    if precision in FP8:
        return
    device("local")
    layout_fixtures.run(corpus, tmp_path / "local", settings)
    te, ours = weights(tmp_path / "calm/out"), weights(tmp_path / "local/out")
    assert {name: t.shape for name, t in te.items()} == {name: t.shape for name, t in ours.items()}
    bound = 1e-3 if precision == "fp32" else 0.2  # Adam's first steps are as long for a gradient of rounding alone
    distances = {
        name: float((te[name] - t).norm() / t.norm().clamp_min(1e-3)) for name, t in ours.items() if t.ndim > 1
    }
    print(precision, max(distances.values()))
    assert max(distances.values()) < bound, max(distances, key=lambda name: distances[name])
    (tmp_path / "local/work").rename(tmp_path / "moved-work")
    layout_fixtures.end(layout_fixtures.start(corpus, tmp_path / "local", settings, at=7, number=signal.SIGTERM))
    device("hopper")
    assert "going on after step 7" in layout_fixtures.run(corpus, tmp_path / "local", settings)[0]
    figures = [layout_fixtures.figures(tmp_path / name / "out", ("loss",)) for name in ("local", "calm")]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4 if precision == "fp32" else 2e-2)
