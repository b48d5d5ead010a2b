"""`atom status` counts the tasks of the array of a stage's servers by their states."""

from __future__ import annotations

import pytest

from pipeline.graph.run import JobRow
from pipeline.launch.slurm_client import Job
from pipeline.tracking import status


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ({}, None),
        ({"7_[0-3,5]": "PENDING"}, "5 pending"),
        ({"7_[0-3,5,...]": "PENDING"}, "5 pending"),
        ({"7_[2]": "PENDING", "7_0": "RUNNING", "7_1": "RUNNING"}, "1 pending, 2 running"),
        ({"7_[2-9%4]": "PENDING", "7_0": "CANCELLED", "7_1": "COMPLETED"}, "1 cancelled, 1 completed, 8 pending"),
        ({"7_0": "RUNNING", "9_[1-3]": "PENDING"}, "3 pending, 1 running"),
        ({"71_0": "RUNNING", "7": "RUNNING", "8_7": "RUNNING"}, None),
    ],
)
def test_the_servers_of_a_stage_are_counted(ids: dict[str, str], shown: str | None) -> None:
    row: JobRow = {"node": "rlvr", "job": "6", "attached": False, "servers": ["7", "9"]}
    assert status._servers(row, {id: Job(id, state) for id, state in ids.items()}) == shown
    assert status._servers({"node": "rlvr", "job": "6", "attached": False}, {"7_0": Job("7_0", "RUNNING")}) is None
