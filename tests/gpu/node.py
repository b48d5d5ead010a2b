"""Steps of a packaged recipe's model in a layout, on random tokens: speed, losses, memory and a checkpoint's stall.

    torchrun --nproc-per-node 8 -m tests.gpu.node atom-30b-a3b --layers 8 --layout '{"ep": 8}' --tflops 135

docs/gpu.md lists what to run on a node of eight. Each figure is a line with its criterion, as in the kit for one GPU;
exits with 1 if one does not hold. The step's tokens are the same in every layout, so `--losses FILE` keeps the losses of
one for `--like FILE` of another.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from pipeline.core.errors import AtomError
from stages.mcore import gpu_environment
from stages.mcore.megatron_imports import parallel_state
from stages.models.base import Rows
from stages.models.parallel_layout import Layout
from stages.train.checkpoint.work_checkpoint import Checkpoints
from stages.train.engine import Engine
from stages.train.estimate import layout_label, owned_bytes, rank_memory
from stages.train.parallel import rank_and_world
from stages.train.trainer import full_memory
from tests.fixtures import gpu_fixtures, train_fixtures

WARM = 2
"""Steps before those that are timed."""
GPU_CRITERION = "" if gpu_fixtures.ON_GPU else ", asked of a GPU"
"""The end of a criterion that a CPU's figure does not decide."""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.node", description=__doc__)
    parser.add_argument("recipe", help="a packaged one, whose model is taken")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument(
        "--layout", type=json.loads, default={}, help="the recipe's `parallelism` without ranks, as JSON"
    )
    parser.add_argument("--model", type=json.loads, default={}, help="changes to the recipe's `model`, as JSON")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--plain", action="store_true", help="each row is one document")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--micro-rows", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step, over all ranks")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tflops", type=float, default=0.0, help="at least so many TFLOP/s of each rank")
    parser.add_argument("--losses", type=Path, help="a file for the losses of the steps")
    parser.add_argument("--like", type=Path, help="such a file, whose losses these are to be")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference from them")
    return parser.parse_args()


def run(options: argparse.Namespace) -> bool:
    """Whether everything holds on this rank; rank 0 prints."""
    rank, world = rank_and_world()
    model, vocabulary = gpu_fixtures.cut_recipe(options.recipe, options.layers)
    config = gpu_fixtures.phase_of(
        type(model).model_validate({**model.model_dump(), **options.model}), vocabulary, options.length,
        options.micro_rows, options.micro_batches, precision=options.precision, pack=not options.plain,
        parallelism={"ranks": world, **options.layout},
    )  # fmt: skip
    layout = config.phase.parallelism
    held: list[bool] = []

    def report(name: str, figure: str, criterion: str, holds: bool) -> None:
        held.append(holds)
        if rank == 0:
            gpu_fixtures.print_line("node", name, figure, criterion, holds)

    with ExitStack() as stack:
        with gpu_fixtures.peak_bytes() as peak:
            engine = stack.enter_context(gpu_fixtures.engine(config))
            stack.enter_context(full_memory("node", engine.ranks))
            batch = gpu_fixtures.random_batch(config, engine.ranks)
            losses = [gpu_fixtures.train_step(engine, batch) for _ in range(WARM)]
            began = time.perf_counter()
            losses += [gpu_fixtures.train_step(engine, batch) for _ in range(options.steps)]
            seconds = (time.perf_counter() - began) / options.steps
        name = f"{options.recipe}, {options.layers} layers, {layout_label(layout)}, {options.precision}"
        tokens = options.micro_batches * options.micro_rows * options.length
        rate = config.model.flops_per_token(vocabulary, options.length) * tokens / seconds / world / 1e12
        report(f"speed, {name}", f"{rate:.3g} TFLOP/s a rank, {tokens / seconds:,.0f} tokens/s", f"at least {options.tflops:g}", rate >= options.tflops)  # fmt: skip
        rows = Rows(config.phase.micro_rows, config.phase.sequence_length, config.phase.pack)
        share, state, activations = rank_memory(config, rows, parallel_state.get_pipeline_model_parallel_rank())
        worst = max(engine.ranks.gather(peak[0] / (state + activations)), key=lambda ratio: abs(ratio - 1))
        figure, is_near = f"{worst - 1:+.1%}", not gpu_fixtures.ON_GPU or abs(worst - 1) < 0.1
        report("peak memory, the rank furthest from its plan", figure, f"within 10 %{GPU_CRITERION}", is_near)
        if options.losses and rank == 0:
            options.losses.write_text(json.dumps(losses))
        if options.like:
            pairs = zip(losses, json.loads(options.like.read_text()), strict=True)
            difference = max(abs(a - b) / b for a, b in pairs)
            report(f"losses against {options.like}", f"relative difference {difference:.1e}", f"< {options.tolerance:g}", difference < options.tolerance)  # fmt: skip
        stall = longest_stall(engine)
        bytes_of_a_rank = max(engine.ranks.gather(owned_bytes(share, layout, config.phase.optimizer)))
        figure = f"{stall:.3f} s for {bytes_of_a_rank / 1e9:.2f} GB of a rank"
        report(
            "stall of a checkpoint",
            figure,
            f"> 10 GB/s{GPU_CRITERION}",
            not gpu_fixtures.ON_GPU or stall < bytes_of_a_rank / 1e10,
        )
        with gpu_fixtures.peak_bytes() as peak:
            for _ in engine.full_tensors().values():
                pass
        grown = max(engine.ranks.gather(peak[0])) / 2**30
        report("growth of a rank while the ranks hand the weights over", f"{grown:.2f} GiB", f"< 1 GiB{GPU_CRITERION}", not gpu_fixtures.ON_GPU or grown < 1)  # fmt: skip
    return all(held)


def longest_stall(engine: Engine) -> float:
    """Of all ranks, in seconds, of a second checkpoint: the first also allocates the copies."""
    ranks = engine.ranks
    folder = Path(ranks.from_first(tempfile.mkdtemp(prefix="atom-node-") if ranks.first else ""))
    checkpoints = Checkpoints(folder, 1, engine, train_fixtures.Reporter())
    if ranks.first:
        (checkpoints.folder / "training.jsonl").touch()
    stall = 0.0
    for step in (1, 2):
        stall = checkpoints.save(step, {"step": step, "optimizer_step": engine.step_done}, seal=False)
        checkpoints.wait()
    longest = max(ranks.gather(stall))
    if ranks.first:
        shutil.rmtree(folder)
    return longest


def restart_with_variables(options: argparse.Namespace) -> None:
    """Restarts this process with the variables of its GPU, as a launcher would have started it."""
    layout = Layout.model_validate({"ranks": rank_and_world()[1], **options.layout})
    if gpu_fixtures.ON_GPU and (missing := gpu_environment.missing(layout)):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


if __name__ == "__main__":
    restart_with_variables(parsed())
    try:
        sys.exit(0 if run(parsed()) else 1)
    except AtomError as error:  # as the worker does: the sentence, no traceback
        sys.exit(str(error))
