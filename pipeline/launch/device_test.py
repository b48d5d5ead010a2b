"""A short test of GPUs and network before training: a product of matrices and a collective, whose results are known.

    python -m pipeline.launch.device_test RANK RANKS LOCAL_RANK HOST PORT LEAST FOLDER

Each rank runs it in a process of its own, which frees the GPU at its end, leaves the stage's libraries unused and can
be killed. LEAST is the FLOP/s that the product must reach, or 0 for any. FOLDER is that of the launch, to which the
ranks write their reports. Without a GPU it runs on the CPU, with gloo. Prints one line of JSON: null, or the problem
and the bad rank. Rank 0 speaks for all; another rank reports only the reason why it cannot take part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from pipeline.core.environment import node_name, own_address
from pipeline.core.errors import Failure
from pipeline.launch.rendezvous import Ranks, free_port, polls, read, write

if TYPE_CHECKING:
    import torch

# The time that the ranks may differ at each part of the test.
SECONDS = 60.0
# The time after which the process of a rank is killed.
LIMIT = 300.0
# Rows and columns of the matrices, and products that are timed.
GPU_SIZE, CPU_SIZE, REPEATS = 8192, 256, 10
# Numbers that each rank sends to all others.
ROW = 1 << 18
PLACE = "device-test.json"


def check(ranks: Ranks, least: float) -> Failure | None:
    """Returns the problem of a node of this launch; None without one.

    On a rank other than 0, it is the reason why it could not take part.

    Args:
        ranks: The ranks of the launch.
        least: FLOP/s that the product of matrices must reach on each GPU; 0: any.
    """
    place = {"host": address()[1].strip("[]"), "port": free_port()} if ranks.rank == 0 else None
    if place is None:
        place = next((there for _ in polls(time.monotonic() + SECONDS) if (there := read(ranks.folder / PLACE))), None)
    elif ranks.size > 1:
        write(ranks.folder / PLACE, place)
    name = node_name()
    if place is None:
        return Failure(f"node {name} got no address for the test of devices within {SECONDS:.0f} s")
    numbers = (ranks.rank, ranks.size, ranks.local_rank, place["host"], place["port"], least, ranks.folder.absolute())
    command = [sys.executable, "-m", __spec__.name, *map(str, numbers)]
    with (
        tempfile.TemporaryFile("w+") as output,  # of any length, as with NCCL_DEBUG: a pipe would fill
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=output, stderr=errors) as process,
    ):
        for _ in polls(time.monotonic() + LIMIT):
            if process.poll() is not None:
                break
            if (failure := ranks.failure()) is not None:
                process.kill()
                return failure
        else:
            process.kill()
            return Failure(f"node {name} did not end the test of devices within {LIMIT:.0f} s", bad_node=name)
        output.seek(0)
        errors.seek(0)
        lines, messages = output.read().splitlines(), errors.read().strip().splitlines()
    if process.returncode:
        why = (messages or [f"exit code {process.returncode}"])[-1][:300]
        return Failure(f"node {name} failed the test of devices ({why}); have its GPUs checked", bad_node=name)
    problem = json.loads(lines[-1])
    if problem is None or problem["rank"] is None:
        return None if problem is None else Failure(f"node {name}: {problem['text']}")
    node = (ranks.folder / f"started-{problem['rank']}").read_text().strip() if ranks.size > 1 else name
    return Failure(f"rank {problem['rank']} on node {node}: {problem['text']}", bad_node=node)


class Problem(TypedDict):
    rank: int | None
    text: str


@dataclass(frozen=True)
class Reports:
    """The reports of the ranks, in the folder of the launch."""

    folder: Path
    size: int

    def write(self, rank: int, name: str, value: object) -> None:
        write(self.folder / f"device-{name}-{rank}.json", {"value": value})

    def get(self, rank: int, name: str) -> dict[str, Any] | None:
        """Returns {"value": the report}; None if it has not come."""
        return read(self.folder / f"device-{name}-{rank}.json")

    def read(self, name: str) -> dict[int, Any]:
        """Returns the reports of that name by rank, as far as they came within SECONDS."""
        reports, deadline = dict[int, Any](), time.monotonic() + SECONDS
        for _ in polls(deadline):
            for rank in set(range(self.size)) - set(reports):
                if (report := self.get(rank, name)) is not None:
                    reports[rank] = report["value"]
            if len(reports) == self.size:
                break
        return reports


def main(rank: int, size: int, local_rank: int, host: str, port: int, least: float, folder: Path) -> Problem | None:
    """Returns the problem, and the bad rank, if it is known. Raises RuntimeError if the device of this rank fails."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    product = product_problem(device, least)
    if size == 1:
        return None if product is None else _of_product(0, product)
    reports, patience = Reports(folder, size), timedelta(seconds=SECONDS)
    reports.write(rank, "product", product)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # else NCCL's watchdog would end a process that waits too long
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        # Rank 0 does not wait for the others here, so that it can name those that do not come.
        store = dist.TCPStore(host, port, size, rank == 0, patience, wait_for_workers=False)
    except dist.DistError as error:
        return {"rank": None, "text": f"rank 0 at {host}:{port} cannot be reached ({str(error).splitlines()[0][:300]})"}
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        reports.write(rank, "wrong", wrong_senders(device, size, rank))
    except RuntimeError as error:  # rank 0 names the ranks that did not come so far
        reports.write(rank, "error", str(error).splitlines()[0][:300])
    if rank:
        with suppress(dist.DistError):  # rank 0 has ended already
            store.wait(["over"], timedelta(seconds=3 * SECONDS))
        return None
    problem = verdict(reports)
    store.set("over", "")
    return problem


def address() -> tuple[str, str]:
    """Returns the address on which this node listens, and the host under which other nodes of the job reach it.

    A job on one node uses the loopback.
    """
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    return own_address() if nodes > 1 else ("127.0.0.1", "127.0.0.1")


def product_problem(device: torch.device, least: float) -> str | None:
    """Returns the problem of a product of matrices on a device; None without one.

    Args:
        device: The device.
        least: FLOP/s that it must reach; 0: any.
    """
    import torch

    size, dtype = (GPU_SIZE, torch.bfloat16) if device.type == "cuda" else (CPU_SIZE, torch.float32)
    powers = 2.0 ** (torch.arange(size, device=device) % 4).to(dtype)  # each sum is a power of two, so it is exact
    left, right = powers[:, None].expand(size, size).contiguous(), powers[None, :].expand(size, size).contiguous()
    product = left @ right
    if not torch.equal(product, size * powers[:, None] * powers[None, :]):
        return "a product of matrices has a wrong result"
    if not least:
        return None
    wait: Callable[[], object] = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    # A GPU works on after the call returns, so the clock starts and stops only when it has caught up.
    wait()
    began = time.perf_counter()
    for _ in range(REPEATS):
        torch.mm(left, right, out=product)
    wait()
    speed = REPEATS * 2 * size**3 / (time.perf_counter() - began)
    if speed < least:
        return f"a product of matrices reaches {speed / 1e12:.3g} TFLOP/s, and {least / 1e12:.3g} are the least"
    return None


def wrong_senders(device: torch.device, size: int, rank: int) -> list[int]:
    """Returns the ranks from which this one receives wrong numbers when each sends its own to all."""
    import torch
    import torch.distributed as dist

    rows = [torch.empty(ROW, device=device) for _ in range(size)]
    dist.all_gather(rows, row_of(rank, device))
    return [sender for sender, received in enumerate(rows) if not torch.equal(received, row_of(sender, device))]


def row_of(rank: int, device: torch.device) -> torch.Tensor:
    """Returns the numbers that a rank sends, (ROW,)."""
    import torch

    return torch.arange(rank, rank + ROW, dtype=torch.float32, device=device)


def _of_product(rank: int, text: str) -> Problem:
    return {"rank": rank, "text": f"{text}; have its GPU checked"}


def verdict(reports: Reports) -> Problem | None:
    """Returns the first problem by the reports of all ranks."""
    products = reports.read("product")
    for rank in range(reports.size):
        text = products.get(rank, f"a product of matrices did not end within {SECONDS:.0f} s")
        if text is not None:
            return _of_product(rank, text)
    received = reports.read("wrong")
    pairs = [(sender, receiver) for receiver, senders in received.items() for sender in senders]
    if pairs:
        # A rank with a bad link is in more of the wrong pairs than any other.
        (rank, count), *_ = Counter(rank for pair in pairs for rank in set(pair)).most_common()
        return {"rank": rank, "text": f"numbers to or from {count} ranks arrived wrong; have its network checked"}
    if silent := sorted(set(range(reports.size)) - set(received)):
        errors = (reports.get(rank, "error") for rank in silent)
        why = next((f" ({error['value']})" for error in errors if error is not None), "")
        if len(silent) == 1:
            return {"rank": silent[0], "text": f"a collective did not end{why}; have its network checked"}
        listed = ", ".join(map(str, silent[:8]))
        text = f"a collective did not end on {len(silent)} of {reports.size} ranks, {listed}{why}"
        return {"rank": None, "text": f"{text}; see the network, and the interfaces that the profile names"}
    return None


if __name__ == "__main__":
    rank, size, local_rank, host, port, least, folder = sys.argv[1:]
    problem = main(int(rank), int(size), int(local_rank), host, int(port), float(least), Path(folder))
    print(json.dumps(problem), flush=True)
    os._exit(0)  # NCCL would wait for ranks that are lost
