"""What it takes to hand a policy's weights to samplers as the model grows: bytes, seconds, and the memory of a rank.

    .venv/bin/python bench/transfer.py               # 10⁷ to 2·10⁸ parameters, about a minute
    .venv/bin/python bench/transfer.py --quick       # two tiny models
    .venv/bin/python bench/transfer.py --full        # also 10⁹, about three minutes

Each model is a mixture of experts in bf16 on two expert-parallel ranks, with initial weights and no optimizer. `write`
is the transfer by the folder up to the sealed index, with all digests; `growth` the most that a rank's memory grew
meanwhile; `check` what one server reads before it loads, in one process. Peaks are VmHWM, which counts the pages of
mapped files too.

Beneath the table stand transfers at two larger sizes, computed from the measured rate of a rank or server, and from a
stated bandwidth of the shared folder; a server's own loading is not in them.

The last line is one JSON object. Its ratio is the limit, twice the bytes of a file and of the largest tensor, divided
by the largest growth: 1 or more holds it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.export import FULL, PADDED, QUICK, SIZES
from pipeline.launch.rendezvous import free_port
from stages.models.qwen3_moe.config import Qwen3MoeConfig

RANKS = 2
FOLDER_BANDWIDTH = 20e9
"""Bytes a second of a shared file system, for the computed sizes."""
COMPUTED = (("30B", 30.5e9, 64, 8, 4), ("235B", 235e9, 512, 16, 8))
"""(name, parameters, ranks of the trainer, servers, tensor ranks of a server)."""


@dataclass(frozen=True)
class Measured:
    """One transfer. growth: the most that a rank's memory grew; read_growth: a server's while it checks."""

    parameters: int
    bytes: int
    write: float
    check: float
    held: int
    growth: int
    read_growth: int
    tensor: int


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    match = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


class Growth:
    """The most that this process's memory grew in a block, in `bytes`."""

    def __enter__(self) -> Growth:
        gc.collect()
        self.before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        return self

    def __exit__(self, *args: Any) -> None:
        self.bytes = memory("VmHWM") - self.before


def child(folder: Path, config: Qwen3MoeConfig) -> None:
    """A rank: makes its part of the model, hands it over; rank 0 reads as a server and prints."""
    import torch

    from stages.mcore.model import build, named_tensors
    from stages.mcore.parallel_layout import Layout
    from stages.mcore.tensor_sharding import boxes, cut
    from stages.mcore.weight_init import Initial
    from stages.rl import weights
    from stages.rl.samplers.vllm_worker import atom_index
    from stages.train import parallel
    from stages.train.full_tensors import FullTensors

    shapes, layout = config.shapes(PADDED), Layout(ranks=RANKS, ep=RANKS)
    initial = Initial(shapes, config, 0)
    with parallel.session(0, layout) as ranks:
        local: dict[str, torch.Tensor] = {}
        for name, parameter in named_tensors(build(config, PADDED, layout, "bf16", on_meta=True)):
            local[name] = cut(initial[name], boxes(name, shapes[name])).bfloat16()
            assert local[name].shape == parameter.shape
        ranks.barrier()
        start = time.monotonic()
        with Growth() as written:
            full = FullTensors(local, shapes, config.tie_embeddings)
            digest, place = weights.write(weights.hf_tensors(full, config, PADDED), ranks, folder)
        seconds = time.monotonic() - start
        held = sum(tensor.nbytes for tensor in local.values())
        growth, held = (max(ranks.gather(n)) for n in (written.bytes, held))
        if ranks.first:
            start = time.monotonic()
            with Growth() as read:
                atom_index.check(place, digest, 0, 1)
            tensor = max(2 * int(torch.Size(shape).numel()) for shape in shapes.values())
            total = sum(path.stat().st_size for path in place.iterdir())
            check = time.monotonic() - start
            row = Measured(config.parameters(PADDED)["total"], total, seconds, check, held, growth, read.bytes, tensor)
            print(json.dumps(asdict(row)))


def run_ranks(world: int, config: Qwen3MoeConfig, kind: str, *arguments: str) -> Any:
    """What rank 0 prints last, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(free_port())}  # fmt: skip
        command = [sys.executable, "-P", __file__, kind, folder, *arguments, config.model_dump_json()]
        processes = [
            subprocess.Popen(
                command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            ) for rank in range(world)
        ]  # fmt: skip
        outputs = [process.communicate() for process in processes]
        for process, (_, errors) in zip(processes, outputs, strict=True):
            if process.returncode:
                raise SystemExit(f"{config.describe()}:\n{errors[-3000:]}")
    return json.loads(outputs[0][0].splitlines()[-1])


def measure(config: Qwen3MoeConfig) -> Measured:
    row = Measured(**run_ranks(RANKS, config, "--child"))
    sizes = (row.bytes, row.held, row.growth, row.read_growth, row.tensor)
    print(f"{row.parameters:>13,}{row.write:8.2f} s{row.check:8.2f} s"
          + "".join(f"{size / 1e6:9.0f} MB" for size in sizes), flush=True)  # fmt: skip
    return row


def summarize(rows: list[Measured]) -> dict[str, Any]:
    """Prints the computed sizes; returns the last line."""
    from stages.rl.weights import FILE_BYTES

    last = rows[-1]
    wrote, checked = last.bytes / RANKS / last.write, last.bytes / last.check
    print(f"a rank wrote {wrote / 1e9:.2f} GB/s, a server checked {checked / 1e9:.2f} GB/s; with a folder of "
          f"{FOLDER_BANDWIDTH / 1e9:.0f} GB/s:")  # fmt: skip
    for name, parameters, ranks, servers, tensor_ranks in COMPUTED:
        total = 2 * parameters
        write = max(total / ranks / wrote, total / FOLDER_BANDWIDTH)
        check = max(total / tensor_ranks / checked, servers * total / FOLDER_BANDWIDTH)
        print(f"{name}: {total / 1e9:.0f} GB; {ranks} ranks write for {write:.1f} s, {servers} servers of "
              f"{tensor_ranks} ranks check for {check:.1f} s")  # fmt: skip
    ratio = round(min(2 * (FILE_BYTES + row.tensor) / row.growth for row in rows), 4)
    return {
        "name": "transfer", "ratio": ratio, "low": ratio, "high": ratio, "target": 1.0,
        "unit": f"limit / growth of a rank, up to {last.parameters / 1e9:.2g} billion parameters",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tiny models")
    parser.add_argument("--full", action="store_true", help="up to 10⁹ parameters: about three minutes")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), Qwen3MoeConfig.model_validate_json(arguments.child[1]))
    else:
        heads = ("bytes", "held", "growth", "reader", "tensor")
        print(f"{'parameters':>13}{'write':>10}{'check':>10}" + "".join(f"{head:>12}" for head in heads))
        chosen = QUICK if arguments.quick else SIZES + FULL * arguments.full
        print(json.dumps(summarize([measure(size) for size in chosen])))
