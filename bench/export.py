"""The memory of an export as the model grows: both of its processes, at models from 10⁷ to 10⁹ parameters.

    .venv/bin/python bench/export.py               # 10⁷ to 2·10⁸ parameters, about a minute
    .venv/bin/python bench/export.py --quick       # two tiny models
    .venv/bin/python bench/export.py --full        # also 10⁹, about two minutes

Each model is a mixture of experts in bf16 whose checkpoint (fp32, weights only) is made tensor by tensor from the
seeded initializer, in its release form. The export stage runs on it with its whole parity gate, and then the load check
of a release. `stage` is the process that writes and runs Megatron's model, `transformers` the fresh interpreter beside
it, `load` that of the load check; peaks are VmHWM, which counts the pages of mapped files too. Models above 1.25·10⁸
parameters are loaded layer by layer by both.

The last line is one JSON object. Its ratio is the limit, 4 GB times the parameters of the largest model in 10⁹ or 2 GB
if that is more, divided by the largest peak: 1 or more holds it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.data_scale import Silent
from stages.models.mixture import Qwen3MoeConfig

LIMIT, LEAST_LIMIT = 4e9, 2e9
"""Bytes of a process at 10⁹ parameters, and at small models."""
PADDED = 32_768
SHARD = 500_000_000
"""Bytes of a file of the checkpoint."""


def model(layers: int, hidden: int, experts: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        layers=layers, hidden_size=hidden, heads=hidden // 64, kv_heads=max(1, hidden // 256), head_dim=64,
        experts=experts, num_experts_per_tok=2, moe_intermediate_size=hidden // 2, context_length=256,
    )  # fmt: skip


SIZES = (model(4, 192, 8), model(8, 384, 16), model(12, 768, 16))
QUICK = (model(2, 64, 4), model(4, 64, 4))
FULL = (model(24, 1024, 24),)


@dataclass(frozen=True)
class Measured:
    """One export. stage, transformers, load: peaks in bytes of its two processes and of the load check; largest: of a
    layer and of a file. load_seconds: of the load check."""

    parameters: int
    seconds: float
    stage: int
    transformers: int
    load: int
    load_seconds: float
    layer: int
    file: int
    delta: float


def peak(process: str) -> int:
    """VmHWM of a process in bytes; 0 if it has ended."""
    try:
        match = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(match[1]) if match else 0


def runs(process: str, script: str) -> bool:
    """Whether a process executes that script; until then it has the memory of the one that started it."""
    try:
        return script.encode() in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def write_checkpoint(folder: Path, config: Qwen3MoeConfig) -> None:
    """A release checkpoint with the initial weights; holds one of its files, which are small here."""
    from stages.mcore.model import Initial
    from stages.train.checkpoint import release_checkpoint

    release_checkpoint.SHARD_BYTES = SHARD
    shapes = config.shapes(PADDED)
    initial = Initial(shapes, config, 0)
    release_checkpoint.write(
        folder / release_checkpoint.name_of(0), shapes, {}, lambda kind, name, shape: initial[name], {"step": 0}
    )


def child(action: str, place: Path, config: Qwen3MoeConfig) -> None:
    """Makes the checkpoint, or exports it and prints both peaks."""
    if action == "checkpoint":
        return write_checkpoint(place / "checkpoint", config)
    from pipeline.core.store import write_manifest
    from release.checks.loading import load_models
    from stages.export import hf
    from tests.fixtures import release_fixtures, train_fixtures

    inputs = {
        "checkpoint": write_manifest(place / "checkpoint", "pretrain-bench"),
        "tokenizer": train_fixtures.tokenizer(place / "tokenizer", PADDED),
    }
    others, ended = {"export/streamed_model.py": 0, "export/load_check.py": 0}, threading.Event()

    def watch() -> None:
        task = Path(f"/proc/self/task/{os.getpid()}/children")
        while not ended.wait(0.02):
            for number in task.read_text().split():
                for script in (script for script in others if runs(number, script)):
                    others[script] = max(others[script], peak(number))

    thread = threading.Thread(target=watch, daemon=True)
    for name in ("out", "work"):
        (place / name).mkdir()
    start = time.monotonic()
    thread.start()
    export = hf.ExportConfig(model=config, padded_vocab_size=PADDED, dtype="bfloat16")
    hf.run(export, inputs, place / "work", place / "out", Silent())  # type: ignore[arg-type]
    seconds = time.monotonic() - start
    release_fixtures.save_tokenizer(place / "out/model")  # with a chat template
    (report,) = load_models([place / "out/model"])
    load_seconds = time.monotonic() - start - seconds
    if report.problems:
        raise SystemExit(f"the load check says: {report.problems[0].text}")
    ended.set()
    thread.join()
    delta = json.loads((place / "out/parity.json").read_text())["max_abs_logit_delta"]
    print(json.dumps({
        "seconds": seconds, "stage": peak("self"), "transformers": others["export/streamed_model.py"], "delta": delta,
        "load": others["export/load_check.py"], "load_seconds": load_seconds,
        "file": max(path.stat().st_size for path in (place / "out/model").glob("*.safetensors")),
    }))  # fmt: skip


def measure(config: Qwen3MoeConfig) -> Measured:
    from stages.models.parallel_layout import Layout

    with tempfile.TemporaryDirectory() as folder:
        for action in ("checkpoint", "export"):
            command = [sys.executable, "-P", __file__, "--child", action, folder, config.model_dump_json()]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if process.returncode:
                raise SystemExit(f"{action} of {config.describe()}:\n{process.stderr[-3000:]}")
        figures: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    layer = max(4 * config.layer_memory(Layout(), n).all for n in range(config.layers))
    row = Measured(config.parameters(PADDED)["total"], **figures, layer=layer)
    print(f"{row.parameters:>13,}{row.seconds:9.1f} s{row.stage / 1e6:8.0f} MB{row.transformers / 1e6:8.0f} MB"
          f"{row.load / 1e6:8.0f} MB{row.load_seconds:9.1f} s"
          f"{row.layer / 1e6:8.0f} MB{row.file / 1e6:8.0f} MB{row.delta:10.1e}", flush=True)  # fmt: skip
    return row


def summarize(rows: list[Measured]) -> dict[str, Any]:
    """Prints how the peaks grow between the largest two models; returns the last line."""
    before, last = rows[-2:]
    grown = last.parameters - before.parameters
    for name in ("stage", "transformers", "load"):
        slope = (getattr(last, name) - getattr(before, name)) / grown
        print(f"{name}: {slope:.2f} bytes a parameter from {before.parameters:,} to {last.parameters:,}")
    largest = max(last.stage, last.transformers, last.load)
    ratio = round(max(LEAST_LIMIT, LIMIT * last.parameters / 1e9) / largest, 4)
    return {
        "name": "export", "ratio": ratio, "low": ratio, "high": ratio, "target": 1.0,
        "unit": f"limit / peak of a process, at {last.parameters / 1e9:.2g} billion parameters",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tiny models")
    parser.add_argument("--full", action="store_true", help="up to 10⁹ parameters: about two minutes")
    parser.add_argument("--child", nargs=3, metavar=("ACTION", "FOLDER", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]), Qwen3MoeConfig.model_validate_json(arguments.child[2]))
    else:
        columns = ("time", "stage", "transf.", "load", "time", "layer", "file")
        print(f"{'parameters':>13}{''.join(f'{name:>11}' for name in columns)}{'delta':>10}")
        chosen = QUICK if arguments.quick else SIZES + FULL * arguments.full
        print(json.dumps(summarize([measure(size) for size in chosen])))
