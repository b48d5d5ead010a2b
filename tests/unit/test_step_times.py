"""Which rank is slow, which did not arrive, and how a status says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli.tables import status_table
from pipeline.core.events import FileReport
from pipeline.core.lease import Lease
from pipeline.core.store import Store
from pipeline.graph.run import NodeStatus, Run, node_status
from pipeline.tracking.status import Snapshot, StageView
from stages.train.step_times import Place, RankTime, first_missing, slow_rank


def ranks(*rows: tuple[float, float], data: tuple[float, ...] = (), positions: tuple[int, ...] = ()) -> list[RankTime]:
    """Ranks by (seconds of a step, of those waiting for others)."""
    return [
        RankTime(n, f"n{n}", positions[n] if positions else 0, wall, data[n] if data else 0.0, waited)
        for n, (wall, waited) in enumerate(rows)
    ]


def test_the_rank_for_which_the_others_wait_is_named() -> None:
    times = ranks((1.0, 0.5), (1.0, 0.48), (1.0, 0.02), (1.0, 0.5))
    slow = slow_rank(times)
    assert slow is not None
    assert slow.sentence(11) == "rank 2 on n2 computes 2.0 times as long as its peers since step 11"


def test_a_rank_that_waits_for_data_is_named_so() -> None:
    slow = slow_rank(ranks((1.0, 0.5), (1.0, 0.0), data=(0.01, 0.5)))
    assert slow is not None and slow.sentence(6).startswith("rank 1 on n1 waits for data 2.0 times as long")


@pytest.mark.parametrize(
    "times",
    [
        ranks((1.0, 0.1), (1.0, 0.05), (1.0, 0.1)),  # nearly alike
        ranks((1.0, 0.98), (1.0, 0.95), (1.0, 0.97)),  # 2.5 times as busy, which costs 3 % of a step
        ranks((1.0, 0.6), (1.0, 0.1), positions=(0, 1)),  # another part of the model
        ranks((1.0, 0.0)),
    ],
    ids=["alike", "cheap", "stages", "alone"],
)
def test_no_rank_is_slow(times: list[RankTime]) -> None:
    assert slow_rank(times) is None


def test_the_rank_that_did_not_arrive_is_named() -> None:
    waiting, outside = Place(0, "a", True, 9, 60.0), Place(3, "b", False, 8, 61.2)
    late = Place(2, "c", False, 8, 1.0)
    assert first_missing([waiting, late, outside]).startswith("rank 3 on b did not arrive: it left")
    assert "rank 1 on d in the earliest (4)" in first_missing([waiting, Place(1, "d", True, 4, 60.0)])


def test_status_names_the_slow_rank_while_it_is_slow(tmp_path: Path) -> None:
    store, key = Store(tmp_path), "pretrain-0123456789ab"
    run = Run("r", tmp_path / "logs/r", {})
    report, lease = FileReport(run.node_folder("pretrain")), Lease.take(store.work(key))
    assert lease is not None
    row = {"name": "pretrain", "key": key}
    (run.folder / "run.json").write_text("{}")  # its owner is the run's

    def slow() -> str | None:
        status = node_status(run, store, row)  # type: ignore[arg-type]
        assert isinstance(status, NodeStatus) and status.state == "running"
        current = Snapshot(run, 0.0, (StageView(status, None),), None, {"gpu_hours": 0.0, "core_hours": 0.0})
        (cell,) = status_table(current).columns[-1].cells
        assert (status.slow or "") in str(cell)
        return status.slow

    report.event("start", pid=1, ranks=2)
    assert slow() is None
    report.slow_rank("rank 1 on n2 computes 2.0 times as long")
    assert slow() == "rank 1 on n2 computes 2.0 times as long"
    report.slow_rank(None)
    assert slow() is None
    report.slow_rank("rank 1 on n2 computes 2.0 times as long")
    report.event("start", pid=2, ranks=2)  # another attempt
    assert slow() is None
    report.close()
    lease.release()
