"""A summary changes what the status of a run costs, never what it says."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pipeline.core.events import LINE, FileReport, Tail
from pipeline.core.json_files import DamagedFile
from pipeline.core.log_summary import POINTS, Curves, EventSummary, LogSummary
from pipeline.core.store import sha256_file

NUMBER = st.integers(0, 500)
EVENT = st.one_of(
    st.fixed_dictionaries({"event": st.just("attempt"), "job": st.just("7")}),
    st.fixed_dictionaries({"event": st.just("start"), "pid": NUMBER, "ranks": NUMBER}),
    st.fixed_dictionaries({"event": st.just("progress"), "done": NUMBER, "total": NUMBER, "unit": st.just("steps")}),
    st.fixed_dictionaries({"event": st.just("note"), "text": st.text(max_size=5)}),
    st.fixed_dictionaries({"event": st.just("usage"), "wall_seconds": st.floats(0, 1e6)}),
    st.fixed_dictionaries({"event": st.just("end"), "outcome": st.just("sealed")}),
    st.fixed_dictionaries({"event": st.sampled_from(["rank_times", "x"]), "slowest": NUMBER}),
    st.just({"no": "event"}),
)


def write(path: Path, rows: list[dict[str, Any]], mode: str = "a") -> None:
    with open(path, mode) as file:
        file.writelines(json.dumps({"time": float(n), **row}) + "\n" for n, row in enumerate(rows))


def without_summary(kind: type[LogSummary[Any]], folder: Path) -> Any:
    saved = folder / kind.log.replace(".jsonl", ".summary.json")
    content = saved.read_bytes() if saved.exists() else None
    saved.unlink(missing_ok=True)
    state = kind(folder).state
    if content is not None:
        saved.write_bytes(content)
    return state


@pytest.mark.filterwarnings("ignore::pipeline.core.json_files.DamagedFile")
@given(batches=st.lists(st.lists(EVENT, max_size=12), min_size=1, max_size=4), cut=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_a_log_with_summary_reads_as_without(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[dict[str, Any]]], cut: int
) -> None:
    """Whatever is appended after the summary was written, also half a line."""
    folder = tmp_path_factory.mktemp("node")
    for batch in batches:
        EventSummary(folder).save()
        write(folder / "events.jsonl", batch)
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"time": 1.0, "event": "note", "text": "half"}'[:cut])
    assert EventSummary(folder).state == without_summary(EventSummary, folder)
    assert EventSummary(folder).tail.cut == (cut > 0)


def test_a_summary_of_another_log_does_not_count(tmp_path: Path) -> None:
    log, saved = tmp_path / "events.jsonl", tmp_path / "events.summary.json"
    write(log, [{"event": "start", "pid": 1, "ranks": 2}] * 3)
    EventSummary(tmp_path).save()
    body = saved.read_text()
    assert EventSummary(tmp_path).state["starts"] == 3
    write(log, [{"event": "note", "text": "x" * 500}], mode="w")
    assert EventSummary(tmp_path).state["starts"] == 0, "rewritten"
    log.write_bytes(b"")
    assert EventSummary(tmp_path).state["starts"] == 0, "emptied"
    log.unlink()
    assert EventSummary(tmp_path).state["starts"] == 0, "removed"
    write(log, [{"event": "start", "pid": 1, "ranks": 2}] * 3)
    for damaged in (body[: len(body) // 2], "[]", json.dumps({**json.loads(body), "state": {}}), "\0"):
        saved.write_text(damaged)
        with pytest.warns(UserWarning, match=r"events.summary.json is damaged .* is read whole"):
            assert EventSummary(tmp_path).state["starts"] == 3


def test_the_state_is_what_the_events_say(tmp_path: Path) -> None:
    report = FileReport(tmp_path)
    report.event("attempt", job="1")
    report.event("start", pid=1, ranks=2, gpus=8)
    for step in range(1, 4):
        report.event("progress", done=step, total=10, unit="steps", loss=4.0 - step)
    report.event("rank_times", slowest=3, seconds=1.5)
    report.close()
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows):
        row["time"] = 100.0 + 2 * n
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = EventSummary(tmp_path)
    assert summary.eta() == 14.0 and summary.step_seconds() == 2.0
    assert summary.state["attempts"] == summary.state["starts"] == 1
    assert summary.state["start"] and summary.state["start"]["gpus"] == 8
    assert summary.state["last"] == summary.state["progress"] == rows[4]
    write(tmp_path / "events.jsonl", [{"event": "start", "pid": 2, "ranks": 2}])
    summary.read()
    assert summary.eta() is None and summary.step_seconds() is None, "a new attempt has a pace of its own"


def test_a_curve_has_a_bounded_size_and_keeps_extremes(tmp_path: Path) -> None:
    numbers, rows = random.Random(0), []
    for step in range(1, 20_001):
        rows.append({"step": step, "loss": 100.0 if step == 7777 else 2 + numbers.random(), "nan": math.nan})
    write(tmp_path / "metrics.jsonl", rows)
    curves = Curves(tmp_path)
    points = curves.points("loss")
    assert POINTS // 2 <= len(points) <= POINTS and curves.count("loss") == 20_000
    assert max(high for _, _, _, high in points) == 100.0 and min(low for _, _, low, _ in points) < 2.01
    mean = sum(row["loss"] for row in rows) / 20_000
    total = sum(bucket[2] for bucket in curves.state["curves"]["loss"]["buckets"])
    assert total / 20_000 == pytest.approx(mean, rel=1e-5)
    assert curves.points("nan") == []
    curves.save()
    assert (tmp_path / "metrics.summary.json").stat().st_size < 12_000


def test_steps_that_are_trained_again_replace_the_former_ones(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [{"step": step, "loss": 9.0} for step in range(1, 401)])
    Curves(tmp_path).save()
    write(tmp_path / "metrics.jsonl", [{"step": step, "loss": 1.0} for step in range(201, 301)])
    curves = Curves(tmp_path)
    assert curves.state == without_summary(Curves, tmp_path)
    points = curves.points("loss")
    assert points[-1][0] <= 300 and points[-1][1] == 1.0 and points[0][1] == 9.0


def test_a_failed_write_leaves_the_former_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "events.jsonl", [{"event": "attempt"}])
    EventSummary(tmp_path).save()
    before = (tmp_path / "events.summary.json").read_bytes()
    write(tmp_path / "events.jsonl", [{"event": "attempt"}])
    summary = EventSummary(tmp_path)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.core.atomic_files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        summary.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "events.summary.json"]
    assert (tmp_path / "events.summary.json").read_bytes() == before


def test_metrics_end_with_the_digest_that_the_statement_names(tmp_path: Path) -> None:
    """A thread that still writes a checkpoint would else make another file of them."""
    report = FileReport(tmp_path)
    report.metric(1, loss=2.0)
    digest = report.end_metrics()
    report.metric(2, loss=1.0)
    report.close()
    assert digest == sha256_file(tmp_path / "metrics.jsonl")
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_a_log_that_vanishes_has_no_more_lines(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n' * 3)
    tail = Tail(log, TypeAdapter(dict[str, Any]), chunk=1)
    assert tail.read() == [{"step": 1}] and tail.has_more
    log.unlink()
    assert tail.read() == [] and not tail.has_more, "whoever asks while there are more would never end"


def test_a_line_longer_than_a_chunk_hides_no_later_line(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("x" * (2 * LINE) + '\n{"step": 1}\n')
    tail = Tail(log, TypeAdapter(dict[str, Any]), chunk=LINE)
    with pytest.warns(DamagedFile, match="too long|no JSON"):
        rows = tail.read()
        while tail.has_more:
            rows += tail.read()
    assert rows == [{"step": 1}]
