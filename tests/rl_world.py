"""A policy of random weights with tasks that it may pass by chance: all that a stage of post-training is given.

The tasks ask for an answer that holds the letter e. A random policy of 48 tokens does so now and then, and ends now and
then, so groups differ in reward and there is something to learn.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_world as world

from pipeline.core.errors import AtomError, Interrupted
from pipeline.core.store import Artifact, write_manifest

PADDED = 48
MODEL = {**world.MODEL, "context_length": 64}
OPTIMIZER = dict(lr=5e-3, final_lr=5e-3, warmup_steps=1, weight_decay=0.0, beta2=0.99)
PHASE: dict[str, Any] = dict(
    tasks=[{"source": "problems", "task": "add", "levels": [0], "count": 1}],  # the artifact below is what counts
    prompts_per_step=4,
    num_generations=8,
    steps=8,
    sampling={"max_new_tokens": 12},
    micro_batches=4,
    optimizer=OPTIMIZER,
    validate_every=4,
    release_checkpoint_interval=4,
    checkpoint_interval=2,
    max_resample_rounds=1,
)


def config(**phase: Any) -> dict[str, Any]:
    return {"model": MODEL, "phase": {**PHASE, **phase}, "padded_vocab_size": PADDED, "seed": 0}


def tokenizer(folder: Path) -> Artifact:
    """Single characters and the six special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    from stages.data.tokenizer import SPECIAL_TOKENS

    names = [*SPECIAL_TOKENS, *"abcdefghijklmnopqrstuvwxyz0123456789 \n.+:,"]
    word_level = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="."))
    word_level.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    word_level.decoder = decoders.Fuse()
    word_level.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    folder.mkdir(parents=True)
    word_level.save(str(folder / "tokenizer.json"))
    return write_manifest(folder, "tokenizer-test")


def row(id: str, kind: str, level: int, ask: str, letter: str = "e", **fields: Any) -> dict[str, Any]:
    from stages.rl.protocols import to_row

    arguments = {"letter": letter, "let_frequency": 1, "let_relation": "at least"}
    instruction = {"instruction_id_list": ["keywords:letter_frequency"], "kwargs": [arguments]}
    return dict(to_row(id, ask, "instructions", kind, level, **instruction, **fields))


def make(folder: Path) -> dict[str, Artifact]:
    """init, tasks, items and tokenizer under `folder`."""
    from stages.data.table import ITEMS, write_jsonl, write_rows
    from stages.mcore.weight_init import full_tensor
    from stages.models.qwen3_moe.config import ModelConfig
    from stages.train.checkpoint import release_checkpoint

    model = ModelConfig.model_validate(MODEL)
    shapes = model.shapes(PADDED)
    release_checkpoint.write(
        folder / "init" / release_checkpoint.name_of(3), shapes, (), lambda kind, name, shape: full_tensor(name, shape, model, 0),
        {"step": 3, "optimizer_step": 0},
    )  # fmt: skip
    (folder / "tasks").mkdir()
    rows = [row(f"letter/{level}/{n}", "letter", level, f"say {n}", "ex"[level]) for level in (0, 1) for n in range(12)]
    write_jsonl(folder / "tasks" / "tasks.jsonl", rows)
    (folder / "items").mkdir()
    write_rows(folder / "items" / "items.parquet", ITEMS, [])
    validation_rows = [row(f"validation/{n}", "letter", 0, f"tell {n}", split="validation") for n in range(6)]
    write_jsonl(folder / "items" / "chat.jsonl", validation_rows)
    artifacts = {name: write_manifest(folder / name, f"{name}-test") for name in ("init", "tasks", "items")}
    return artifacts | {"tokenizer": tokenizer(folder / "tokenizer")}


def open_inputs(folder: Path) -> dict[str, Artifact]:
    return {name: Artifact.open(folder / name) for name in ("init", "tasks", "items", "tokenizer")}


def rlvr(folder: Path, work: Path, out: Path, settings: dict[str, Any], report: Any = None, **inputs: Artifact) -> None:
    """Runs the stage on what `make` left in `folder`."""
    from stages.rl.rlvr import STAGE

    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    STAGE.run(
        STAGE.config.model_validate(settings), {**open_inputs(folder), **inputs}, work, out, report or world.Reporter()
    )


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


if __name__ == "__main__":  # python tests/rl_world.py FOLDER WORK OUT CONFIG.json [AT_STEP SIGNAL]
    if "TEST_DISTURB" in os.environ:
        rank_, step_, action_ = os.environ["TEST_DISTURB"].split()
        world.disturb(int(rank_), int(step_), action_)
    try:
        rlvr(
            *map(Path, sys.argv[1:4]),
            json.loads(Path(sys.argv[4]).read_text()),
            world.Reporter(*map(int, sys.argv[5:])),
        )
    except (AtomError, Interrupted) as error:
        sys.exit(str(error))
