"""A tiny corpus in the exact form of the tokenize and order artifacts, made without the data stages."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.core.errors import AtomError, Interrupted
from pipeline.core.store import Artifact, digest_of, rows_of, write_manifest

VOCAB, EOD = 64, 1
MODEL: dict[str, Any] = dict(
    layers=2, hidden_size=32, heads=4, kv_heads=2, head_dim=8, experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    context_length=64, aux_loss=6.67e-3, init_std=0.08,
)  # fmt: skip
PHASE: dict[str, Any] = dict(
    mix={"text": 0.5, "sums": 0.5},
    sequence_length=32,
    batch=dict(global_tokens=256, micro_tokens=128),
    steps=12,
    optimizer=dict(lr=3e-3, final_lr=1e-3, warmup_steps=3, weight_decay=0.05),
    validation=dict(every=4, rows=8),
    release_checkpoint_interval=6,
    checkpoint_interval=4,
)


def config(seed: int = 0, **phase: Any) -> dict[str, Any]:
    return {"model": MODEL, "phase": {**PHASE, **phase}, "padded_vocab_size": VOCAB, "seed": seed}


def documents(source: str, count: int, rng: random.Random) -> list[tuple[list[int], int]]:
    """(tokens, loss_from): `sums` are short with a prompt that carries no loss, `text` runs through a fixed cycle."""
    if source == "sums":
        texts = []
        for _ in range(count):
            a, b = rng.randrange(10), rng.randrange(10)
            texts.append(([10 + a, 20, 10 + b, 21, 10 + (a + b) // 10, 10 + (a + b) % 10, EOD], 4))
        return texts
    return [([30 + (k * s + t) % 31 for t in range(rng.randrange(20, 90))] + [EOD], 0)
            for s in range(count) for k in [rng.randrange(1, 4)]]  # fmt: skip


def make(folder: Path, phase: dict[str, Any] | None = None) -> dict[str, Artifact]:
    """{"tokens", "order"} under `folder`, for a phase like PHASE."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from stages.mcore.megatron_imports import IndexedDatasetBuilder

    phase = {**PHASE, **(phase or {})}
    tokens, order = folder / "tokens", folder / "order"
    order.mkdir(parents=True)
    rng, rows, heldout = random.Random(0), [], {}
    for split, count in (("train", 40), ("heldout", 6)):
        (tokens / split).mkdir(parents=True)
        for source in sorted(phase["mix"]):
            builder = IndexedDatasetBuilder(str(tokens / split / f"{source}.bin"), dtype=np.uint16)
            for ordinal, (ids, loss_from) in enumerate(documents(source, count, rng)):
                builder.add_document(torch.tensor(ids), [len(ids)])
                about = {
                    "content_hash": "",
                    "license": "",
                    "bytes": len(ids),
                    "tokens": len(ids),
                    "loss_from": loss_from,
                }
                name = f"{source}/{split}-{ordinal}"
                rows.append({"source": source, "split": split, "ordinal": ordinal, "id": name, **about})
                heldout.setdefault((split, source), []).append((len(ids), loss_from))
            builder.finalize(str(tokens / split / f"{source}.idx"))
    pq.write_table(pa.Table.from_pylist(rows), tokens / "documents.parquet")
    (tokens / "meta.json").write_text(json.dumps({"vocab_size": VOCAB, "pad_id": 0, "eod_id": EOD}))

    length, per_step = phase["sequence_length"], phase["batch"]["global_tokens"] // phase["sequence_length"]
    picked, sources = [], sorted(phase["mix"])
    for step in range(1, phase["steps"] + 1):
        for row in range(per_step):
            source = sources[row % len(sources)]
            ordinal = rng.randrange(40)
            size, loss_from = heldout["train", source][ordinal]
            place = {"step": step, "row": row, "segment": 0, "source": source, "ordinal": ordinal}
            span = {"offset": 0, "length": min(size, length + 1), "loss_from": max(0, loss_from - 1)}
            picked.append({**place, "id": f"{source}/train-{ordinal}", **span})
    pq.write_table(pa.Table.from_pylist(picked), order / "order.parquet")
    meta = {"phase": "pretrain", "steps": phase["steps"], "rows": per_step, "sequence_length": length}
    meta |= {"mix": phase["mix"], "seed": 0, "sources": {source: {"chunks": 40} for source in sources}}
    (order / "meta.json").write_text(json.dumps(meta))
    return {"tokens": write_manifest(tokens, "tokenize-test"), "order": write_manifest(order, "order-test")}


def pack(folder: Path, phase: dict[str, Any]) -> Artifact:
    """Packs what `make` left in `folder` by the order stage, into `packed`."""
    from stages.data.order import STAGE
    from stages.train.config import PhaseConfig

    p = PhaseConfig.model_validate({**PHASE, **phase, "pack": True})
    config = {"phase": "pretrain", "mix": p.mix, "sequence_length": p.sequence_length, "rows": p.rows_of(p.steps)}
    config |= {"steps": p.steps, "seed": 0, "pack": True, "ramp": p.row_ramp, "long_documents": p.long_documents}
    out = folder / "packed" / "order"
    out.mkdir(parents=True)
    STAGE.run(STAGE.config.model_validate(config), {"tokens": Artifact.open(folder / "tokens")}, out, out, Reporter())
    (folder / "packed" / "tokens").symlink_to(folder / "tokens")
    return write_manifest(out, "order-test")


def tokenizer(folder: Path) -> Artifact:
    """A tokenizer artifact of VOCAB tokens: the six special ones and single characters."""
    from tokenizers import AddedToken, Tokenizer, models

    special = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    names = special + [chr(0x21 + n) for n in range(VOCAB - len(special))]
    word_level = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="!"))
    word_level.add_special_tokens([AddedToken(name, special=True) for name in special])
    folder.mkdir(parents=True)
    word_level.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return write_manifest(folder, "tokenizer-test")


class Reporter:
    """A report that may have its own process killed at a step, or ask it to stop, as a machine would."""

    def __init__(self, at: int = 0, number: int = 0) -> None:
        self.at, self.number = at, number
        self.notes: list[str] = []
        self.products: list[str] = []

    def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None:
        if self.at == done:
            os.kill(os.getpid(), self.number)

    def metric(self, step: int, **values: float) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def product(self, name: str, folder: Path) -> None:
        self.products.append(name)

    def abandon(self, text: str) -> NoReturn:
        print(f"abandoned: {text}", flush=True)
        os._exit(1)


def pretrain(folder: Path, work: Path, out: Path, settings: dict[str, Any], report: Reporter | None = None) -> None:
    """Runs the pretrain stage on the artifacts that `make` left in `folder`."""
    from stages.train.pretrain import STAGE

    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    inputs = {role: Artifact.open(folder / role) for role in ("tokens", "order")}
    STAGE.run(STAGE.config.model_validate(settings), inputs, work, out, report or Reporter())


def digest(out: Path) -> str:
    """One hash of every byte of a stage's product."""
    return digest_of(rows_of(out))


def fresh(corpus: Path, folder: Path, at: int = 0, number: int = 0, env: dict[str, str] | None = None, **phase: object):
    """Runs the stage in an interpreter of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(**phase)))
    places = [str(p) for p in (corpus, folder / "work", folder / "out", folder / "config.json")]
    command = [sys.executable, __file__, *places, str(at), str(number)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )


def checkpoints(work: Path) -> list[Path]:
    return sorted(p.parent for p in work.glob("attempt-*/checkpoints/step-*/complete.json"))


def damage(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def losses(out: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def disturb(rank: int, step: int, action: str) -> None:
    """Has this process be killed, stopped or put to sleep before its so-and-so-manieth step, if it is that rank."""
    from stages.train.engine import Engine

    if os.environ.get("RANK", "0") != str(rank):
        return
    compute, count = Engine.step, [0]

    def step_or_not(*args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == step and action == "sleep":
            time.sleep(3600)
        elif count[0] == step:
            os.kill(os.getpid(), getattr(signal, action))
        return compute(*args, **options)

    Engine.step = step_or_not  # type: ignore[method-assign]


def record_reads(folder: Path) -> None:
    """Keeps what this rank reads of the training shards in `<folder>/<rank>.jsonl`: [step, [source, ordinal, ...]]."""
    from stages.train.data import Prefetcher, Segment, Shards

    read_step, read_row, current = Prefetcher._read, Shards.read, [0]
    folder.mkdir(exist_ok=True)
    file = open(folder / f"{os.environ.get('RANK', '0')}.jsonl", "a", buffering=1)  # noqa: SIM115 (to the end)

    def step(self: Prefetcher, due: int) -> Any:
        current[0] = due
        return read_step(self, due)

    def row(self: Shards, row: Segment) -> Any:
        if self.split == "train":
            file.write(json.dumps([current[0], [row.source, row.ordinal, row.offset, row.length]]) + "\n")
        return read_row(self, row)

    Prefetcher._read, Shards.read = step, row  # type: ignore[method-assign]


if __name__ == "__main__":  # python tests/train_world.py FOLDER WORK OUT CONFIG.json [AT_STEP SIGNAL]
    if "TEST_READS" in os.environ:
        record_reads(Path(os.environ["TEST_READS"]))
    if "TEST_DISTURB" in os.environ:
        rank_, step_, action_ = os.environ["TEST_DISTURB"].split()
        disturb(int(rank_), int(step_), action_)
    try:
        pretrain(
            *map(Path, sys.argv[1:4]), json.loads(Path(sys.argv[4]).read_text()), Reporter(*map(int, sys.argv[5:]))
        )
    except (AtomError, Interrupted) as error:  # as the worker does: the sentence, no traceback
        sys.exit(str(error))
