"""The metrics for Prometheus, read back by the parser of prometheus_client if it is here, and by the grammar of the
format."""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import json_files
from pipeline.core.lease import Lease
from pipeline.operations.prometheus import exposition
from pipeline.tracking import snapshot
from tests.fixtures.live_fixtures import RUN, append, make_run

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
ODD = 'a "quoted" \\ name\nof two lines'


def parse(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The samples by the grammar of the text format 0.0.4. Raises AssertionError where the text breaks it."""
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    current, ended = "", set[str]()
    assert text.endswith("\n") and "\r" not in text
    lines = text.split("\n")[:-1]
    for n, line in enumerate(lines):
        if match := re.fullmatch(rf"# HELP ({NAME}) (\S.*)", line):
            assert match[1] not in ended, "the lines of a metric stand together"
            ended.add(current)
            current = match[1]
            assert lines[n + 1] == f"# TYPE {current} gauge"
            continue
        if line.startswith("# TYPE"):
            continue
        match = re.fullmatch(rf"({NAME})\{{(.*)\}} (\S+)", line)
        assert match is not None and match[1] == current, line
        labels, rest = [], match[2]
        while rest:
            label = LABEL.match(rest)
            assert label is not None, line
            labels.append((label[1], re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), label[2])))
            rest = rest[label.end() :]
        key = (match[1], tuple(sorted(labels)))
        assert key not in samples and math.isfinite(float(match[3])), line
        samples[key] = float(match[3])
    return samples


@pytest.fixture
def text(tmp_path: Path) -> str:
    run, store = make_run(tmp_path, 200, budget={"gpu_hours": 20.0, "core_hours": None})
    append(run.node_folder("pretrain") / "metrics.jsonl", {"time": 1.0, "step": 200, ODD: 0.5, "reward": 0.41})
    lease = Lease.take(store.work("pretrain-0123456789ab"))
    assert lease is not None
    result = exposition(snapshot.take(run, store))
    lease.release()
    return result


def test_the_text_follows_the_grammar_and_has_the_figures(text: str) -> None:
    samples = parse(text)

    def value(metric: str, **labels: str) -> float:
        labels |= {"run": RUN, "recipe": "tiny"}
        return samples[metric, tuple(sorted(labels.items()))]

    assert value("atom_stage_info", stage="pretrain", state="running") == 1
    assert value("atom_stage_info", stage="evaluate", state="waiting") == 1
    assert (value("atom_stage_done", stage="pretrain"), value("atom_stage_total", stage="pretrain")) == (200, 1000)
    assert value("atom_stage_step_seconds", stage="pretrain") == pytest.approx(2.0)
    assert value("atom_stage_remaining_seconds", stage="pretrain") == pytest.approx(1600, rel=0.01)
    assert value("atom_stage_metric", stage="pretrain", name="reward") == 0.41
    assert value("atom_stage_metric", stage="pretrain", name=ODD) == 0.5
    assert value("atom_run_budget_hours", resource="gpu_hours") == 20
    assert value("atom_run_used_hours", resource="gpu_hours") == pytest.approx(16 * 400 / 3600, rel=0.05)


def test_the_client_of_prometheus_reads_it(text: str) -> None:
    try:
        parser = importlib.import_module("prometheus_client.parser")
    except ImportError:
        pytest.skip("there is no prometheus_client here; the grammar alone was checked")
    families = list(parser.text_string_to_metric_families(text))
    assert {family.type for family in families} == {"gauge"}
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}
    assert samples == parse(text)


def test_a_snapshot_reads_each_log_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, store = make_run(tmp_path, 20)
    opened, open_file = Counter[str](), json_files.open_file

    def count(path: Path, *arguments: Any) -> Any:
        opened[str(path.relative_to(run.folder))] += 1
        return open_file(path, *arguments)

    monkeypatch.setattr(json_files, "open_file", count)
    snapshot.take(run, store)
    logs = {name: number for name, number in opened.items() if name.endswith(".jsonl") and "/" in name}
    assert "pretrain/events.jsonl" in logs and set(logs.values()) == {1}, logs
