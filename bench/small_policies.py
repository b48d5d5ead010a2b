"""What benchmarks of reinforcement learning with a small policy share: artifacts of its inputs, fine-tuning from
initial weights, and one process a seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipeline.core.store import Artifact, write_manifest
from stages.formats.table import ITEMS, write_jsonl, write_rows
from stages.formats.tokenizer import END, PAD, bpe_trainer, untrained
from stages.mcore.tensor_sharding import cut
from stages.rl.algorithms.grpo import GrpoTrainer
from stages.rl.config import RlTrainConfig
from stages.rl.rollout.batches import Example, build_rank_batch
from stages.tasks import Row
from stages.train.data import Batch
from stages.train.engine import Engine, Piece

OPTIMIZER = dict(lr=2e-4, final_lr=2e-4, warmup_steps=0, weight_decay=0.0, beta1=0.9, beta2=0.99, clip=1.0)
TUNING_RATE, TUNING_WARMUP = 3e-3, 20
"""Of fine-tuning: its rate, and the steps in which that rises."""

Encode = Callable[[str], list[int]]


def configuration(size: Any, seed: int, task: Mapping[str, Any], name: str = "rlvr", **settings: Any) -> RlTrainConfig:
    """The config of a phase without an end. size: with model, vocab, prompts, generations and new; task: the source."""
    phase = dict(
        tasks=[task], steps=10**6, prompts_per_step=size.prompts, num_generations=size.generations,
        sampling={"max_new_tokens": size.new}, micro_batches=2, optimizer=OPTIMIZER, validate_every=10**6,
        release_checkpoint_interval=10**6, max_resample_rounds=0, **settings,
    )  # fmt: skip
    config = dict(model=size.model, phase=phase, padded_vocab_size=size.vocab, seed=seed, name=name)
    return RlTrainConfig.model_validate(config)


def write_inputs(
    folder: Path, texts: Sequence[str], vocab: int, tasks: Mapping[str, Sequence[Row]], items: Sequence[Row] = ()
) -> tuple[dict[str, Artifact], dict[str, Artifact]]:
    """A tokenizer that is trained on `texts` and the items of evaluation, by role; and the tasks of each arm."""
    bpe = untrained()
    bpe.train_from_iterator(texts, bpe_trainer(vocab))
    arms = {arm: folder / f"tasks-{arm}" for arm in tasks}
    for path in (folder / "tokenizer", folder / "items", *arms.values()):
        path.mkdir(parents=True)
    bpe.save(str(folder / "tokenizer" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    write_rows(folder / "items" / "items.parquet", ITEMS, [])
    write_jsonl(folder / "items" / "chat.jsonl", items)
    for arm, path in arms.items():
        write_jsonl(path / "tasks.jsonl", tasks[arm])
    shared = {name: write_manifest(folder / name, f"{name}-bench") for name in ("tokenizer", "items")}
    return shared, {arm: write_manifest(path, f"{path.name}-bench") for arm, path in arms.items()}


def example_of(encode: Encode, text: str, start: int) -> Example:
    """A turn to learn from: the answer begins at the character `start`."""
    prompt = encode(text[:start])
    return Example([*prompt, *encode(text[start:])], len(prompt))


def fine_tune(
    trainer: GrpoTrainer, most_steps: int, draw: Callable[[Encode], list[Example]], check_every: int,
    is_enough: Callable[[int], bool], decay: int = 0,
) -> int:  # fmt: skip
    """Trains on the examples that `draw` gives for each step, until `is_enough` holds after a step that `check_every`
    divides. decay: of `most_steps`, the last ones, in which the rate falls to 0. Returns the number of steps."""
    engine, policy_chat = trainer.engine, trainer.policy.chat

    def encode(text: str) -> list[int]:
        ids: list[int] = policy_chat.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def objective(losses: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (losses * batch.loss_mask).sum(), {}

    for step in range(1, most_steps + 1):
        examples = draw(encode)
        targets = sum(len(example.ids) - example.start for example in examples)
        examples += examples[: len(examples) % 2]
        batch = build_rank_batch([[example] for example in examples], 2, engine.ranks, policy_chat.pad, targets)
        rate = TUNING_RATE * min(1.0, step / TUNING_WARMUP, (most_steps + 1 - step) / max(1, decay))
        engine.step(batch, rate, lambda loss, norm: None, objective=objective)
        if step % check_every == 0 and is_enough(step):
            break
    return step


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    """A copy of the engine's weights."""
    full = engine.full_tensors()
    return {name: full[name].clone() for name in engine.shapes}


def load(engine: Engine, weights: Mapping[str, torch.Tensor]) -> None:
    """Puts weights into the engine, with an optimizer that has made no update."""

    def read(kind: str, piece: Piece) -> torch.Tensor:
        return cut(weights[piece.name], piece.boxes).flatten()[piece.start : piece.stop]

    engine.load_state(read, 0)


def prepare_process() -> None:
    """One thread, and no messages of libraries."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def run_seeds(run_seed: Callable[[Any, int], dict[str, Any]], size: Any, seeds: int, processes: int) -> list[Any]:
    """The results of seeds 0, 1, …, each in one of the processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(run_seed, [size] * seeds, range(seeds)))


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the options that these benchmarks share."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed; the figures mean nothing")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6), help="number of seeds, from 0 on")
    return parser
