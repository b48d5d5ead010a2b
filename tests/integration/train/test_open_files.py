"""Files and sockets that the groups of a rank take: counted with real ranks, and by the same rule for cluster recipes.

python -m tests.integration.train.test_open_files LAYOUT.json    # RANK and WORLD_SIZE as usual; prints JSON
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from pipeline.launch import preflight
from stages.mcore.megatron_imports import parallel_state
from stages.models.parallel_layout import Layout
from stages.train import parallel
from tests.fixtures import layout_fixtures

LAYOUT = {"ranks": 4, "tp": 2, "ep": 2}
OF_A_GROUP = 3
"""Files of a group of gloo beside its connections and the socket that listens for them."""


@contextmanager
def recorded_groups() -> Iterator[list[tuple[str | None, list[int]]]]:
    """Yields a list that gets the backend and the ranks of each new group that has this rank."""
    groups: list[tuple[str | None, list[int]]] = []
    create = dist.new_group

    def new_group(ranks: list[int] | None = None, *args: Any, backend: str | None = None, **options: Any) -> Any:
        ranks = list(range(dist.get_world_size())) if ranks is None else ranks
        if dist.get_rank() in ranks:
            groups.append((backend, ranks))
        return create(ranks, *args, backend=None if dist.get_backend() == "fake" else backend, **options)

    # Megatron's `torch` is not PyTorch's where there is no GPU
    of_megatron = sys.modules[parallel_state.__name__].torch.distributed  # type: ignore[attr-defined]
    with mock.patch.object(dist, "new_group", new_group), mock.patch.object(of_megatron, "new_group", new_group):
        yield groups


def files_of(groups: list[tuple[str | None, list[int]]], default: str) -> int:
    """The open files of a rank for its groups: one for each rank of a group of gloo, itself included, and three. NCCL
    opens none before the first collective."""
    return sum(len(ranks) + OF_A_GROUP for backend, ranks in groups if (backend or default) == "gloo")


def main(layout: Layout) -> None:
    dist.init_process_group("gloo")
    with recorded_groups() as groups:
        before = len(os.listdir("/proc/self/fd"))
        parallel.create_groups(layout, 60.0, on_gpu=False)
        opened = len(os.listdir("/proc/self/fd")) - before
    dist.barrier()
    print(json.dumps({"opened": opened, "expected": files_of(groups, "gloo"), "groups": len(groups)}))


def test_the_rule_holds_for_real_ranks() -> None:
    processes = layout_fixtures.spawn("tests.integration.train.test_open_files", [json.dumps(LAYOUT)], 4)
    codes, logs = layout_fixtures.end(processes)
    assert not any(codes), logs
    for log in logs:
        counted = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
        assert counted["groups"] > 10 and counted["opened"] == counted["expected"], counted


def layouts(name: str) -> set[Layout]:
    graph = dag.compose(recipes.load(name), Store(Path("none")), without_data=True)
    return {graph.nodes[phase.node].config.phase.parallelism for phase in graph.recipe.config.text_phases}


@pytest.mark.parametrize(("name", "ranks"), [("atom-1b-a300m", 64), ("atom-30b-a3b", 256), ("atom-235b-a22b", 512)])
def test_a_rank_of_a_cluster_recipe_opens_few_files(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With GPUs, one group of gloo with all ranks; every other group is of NCCL."""
    largest = 0
    for layout in layouts(name):
        for rank in {0, layout.ranks - 1}:
            dist.init_process_group("fake", rank=rank, world_size=layout.ranks, store=FakeStore())
            try:
                with recorded_groups() as groups:
                    parallel.create_groups(layout, 60.0, on_gpu=True)
            finally:
                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()
            of_gloo = [group for backend, group in groups if backend is not None]
            assert of_gloo == [list(range(layout.ranks))] and len(groups) > 10
            files = files_of(groups, "nccl") + layout.ranks  # rank 0 is the meeting point, too
            assert files < preflight.least_open_files(layout.ranks)
            largest = max(largest, files)
    assert largest == 2 * ranks + OF_A_GROUP, "the recipe has other layouts now: correct docs/gpu.md"


if __name__ == "__main__":
    main(Layout.model_validate(json.loads(sys.argv[1])))
