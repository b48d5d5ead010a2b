"""The kit itself: each point has a test, a section that passed is not run again, and the report says what ran."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.fixtures import gpu_fixtures, layout_fixtures
from tests.gpu import __main__ as kit
from tests.gpu import pack

HERE = {"machine": {"device": "a"}, "sources": "s"}
LINE = {"point": 1, "name": "n", "figure": "f", "criterion": "c", "holds": True}


def command(line: dict[str, object], end: str = "pass") -> list[str]:
    """A process that appends a line to the results."""
    return [sys.executable, "-c", f"import os, sys, time\nopen(os.environ['{gpu_fixtures.RESULTS}'], 'a').write('''{json.dumps(line)}\\n''')\n{end}"]  # fmt: skip


def test_each_point_has_a_test() -> None:
    folder = Path(kit.__file__).parent
    texts = {path.stem.removeprefix("test_"): path.read_text() for path in folder.glob("test_*.py")}
    assert set(texts) == {*kit.SECTIONS, "kit"}
    numbers = {int(n) for name in kit.SECTIONS for n in re.findall(r"@pytest.mark.point\((\d+)\)", texts[name])}
    assert numbers == set(kit.POINTS)


def test_a_section_that_passed_is_not_run_again(tmp_path: Path) -> None:
    result = kit.run_section("device", command(LINE), tmp_path, HERE)
    assert result["passed"] and result["lines"] == [LINE]
    assert kit.run_section("device", ["false"], tmp_path, HERE) == result
    elsewhere = {**HERE, "sources": "t"}
    result = kit.run_section("device", command({**LINE, "holds": False}, "sys.exit(1)"), tmp_path, elsewhere)
    assert not result["passed"] and kit.read_sections(tmp_path, HERE) == {}
    text = kit.page(kit.read_sections(tmp_path, elsewhere), elsewhere, on_gpu=True)
    assert "| 1 | n | f | c | **no** |" in text and kit.ON_CPU not in text
    assert kit.run_section("device", command(LINE), tmp_path, elsewhere)["passed"], "one that failed is run again"


def test_a_section_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    result = kit.run_section("device", command({**LINE, "figure": "f"}, "print(flush=True); time.sleep(60)"), tmp_path, HERE, limit=1)  # fmt: skip
    assert not result["passed"] and result["ended"] and result["seconds"] < 30
    long = {**result, "lines": [{**LINE, "figure": "x" * 200}]}
    assert f"| {'x' * (kit.CELL - 1)}… |" in kit.page({"device": long}, HERE, on_gpu=True)
    assert "section device: ended" in kit.page({"device": result}, HERE, on_gpu=True)


def test_the_report_has_every_point() -> None:
    text = kit.page({}, HERE, on_gpu=False)
    assert kit.ON_CPU in text and all(f"| {number} | {name} |  |  | not run |" in text for number, name in kit.POINTS.items())  # fmt: skip
    assert kit.ON_CPU not in kit.page({}, HERE, on_gpu=True)


def test_a_figure_that_does_not_hold_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu_fixtures.RESULTS, str(tmp_path / "lines.jsonl"))
    with pytest.raises(AssertionError, match=r"point 1, .PU: n: f \(criterion: c\): DOES NOT HOLD"):
        gpu_fixtures.report(1, "n", "f", "c", False)
    assert json.loads((tmp_path / "lines.jsonl").read_text()) == {**LINE, "holds": False}


def test_phases_of_a_gpu_are_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its sizes, also those that only a GPU trains: CUDA graphs, which a model with experts cannot have."""
    monkeypatch.setattr(gpu_fixtures, "ON_GPU", True)
    for dense, changes in ((False, {}), (True, {}), (True, {"pack": False, "parallelism": {"cuda_graphs": True}})):
        config = gpu_fixtures.phase(dense=dense, **changes)
        assert (config.model.architecture, config.model.layers) == ("qwen3" if dense else "qwen3_moe", 4)


def test_wheels_that_are_too_many_are_one_sentence(tmp_path: Path) -> None:
    for name, size in (("small", 1), ("large", 3 * 2**20)):
        (tmp_path / f"{name}.whl").write_bytes(b"0" * size)
    assert pack.check_size(tmp_path) == "2 wheels, 3.0 MiB"
    with pytest.raises(SystemExit, match=r"the wheels take 3.0 MiB, more than 2; the largest is large.whl"):
        pack.check_size(tmp_path, 2 * 2**20)


def test_peak_bytes() -> None:
    import torch

    from stages.mcore import gpu

    x = torch.ones(2**20, device=gpu.device())
    with gpu_fixtures.peak_bytes() as peak:
        y = (x + 1) + 1
    assert peak == [pytest.approx(2**23, rel=0.05)] and y.numel() == 2**20, "two tensors of 4 MiB"


@gpu_fixtures.at_length(40)
def test_the_measure_of_a_node(tmp_path: Path) -> None:
    """Two ranks on the CPU train like one."""
    wide = {"hidden_size": 256, "heads": 8, "kv_heads": 2, "head_dim": 32, "moe_intermediate_size": 128, "experts": 8}
    sizes = ["--layers", "2", "--length", "256", "--micro-batches", "2", "--steps", "2", "--model", json.dumps(wide)]
    common = ["atom-smoke", "--precision", "fp32", *sizes]
    runs = {1: ["--losses", f"{tmp_path}/one.json"],
            2: ["--layout", '{"ep": 2}', "--like", f"{tmp_path}/one.json", "--tolerance", "1e-5"]}  # fmt: skip
    for ranks, options in runs.items():
        processes = layout_fixtures.spawn("tests.gpu.node", [*common, *options], ranks, {"CUDA_VISIBLE_DEVICES": ""})
        codes, logs = layout_fixtures.end(processes)
        assert not any(codes), logs
    assert "losses against" in logs[0] and "EP2" in logs[0] and "DOES NOT HOLD" not in logs[0]
    assert "point node" not in logs[1], "rank 0 prints"
