"""A tiny finished run in contract format: every artifact that a release is built from, made by hand in seconds.

The models are real `Qwen3MoeForCausalLM` with random weights and the tokenizer is a real byte-level one, so that
loading, generating, publishing and verifying are the real thing; only the training is missing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.core.store import Artifact, write_manifest

SPECIAL = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SOURCES = {"prose": "PSF-2.0", "sums": "CC0-1.0"}
VOCAB, CONTEXT = 320, 64


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def save_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary without merges: 6 special tokens, then the 256 bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def save_model(folder: Path, seed: int, context: int = CONTEXT) -> None:
    """A random two-layer mixture of experts with its tokenizer and a generation config that stops; a context longer
    than CONTEXT is YaRN's."""
    import torch
    from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": context / CONTEXT}
    yarn |= {"original_max_position_embeddings": CONTEXT, "beta_fast": 32.0, "beta_slow": 1.0}
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=context, rope_parameters=yarn if context > CONTEXT else None, tie_word_embeddings=True, norm_topk_prob=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[1, 3], pad_token_id=0, do_sample=False)
    model.save_pretrained(folder)
    # transformers 5 itself writes `num_local_experts`; the export writes the name that every reader knows.
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_local_experts"', '"num_experts"'))
    save_tokenizer(folder)


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def corpus() -> dict[str, list[dict[str, Any]]]:
    """Documents by source, each with its fate: enough held-out ones for an error bar, one removed by each rule."""
    fates: dict[str, list[dict[str, Any]]] = {}
    for source, license in SOURCES.items():
        rows = []
        for n in range(12):
            text = f"{source} {n}: " + ("the quick brown fox jumps" if source == "prose" else f"{n}+{n}={2 * n}") * (
                1 + n % 3
            )
            rule = {3: "exact_duplicate", 7: "gopher_short"}.get(n)
            rows.append(
                {
                    "id": f"{source}/{n:03d}", "text": text, "source": source, "license": license,
                    "origin": f"https://example.org/{source}/{n}", "content_hash": sha(text), "prompt_chars": 0,
                    "split": None if rule else ("heldout" if n % 4 == 0 else "train"), "rule": rule,
                }
            )  # fmt: skip
        fates[source] = rows
    return fates


def make_dedup(out: Path) -> None:
    fates, dispositions = corpus(), []
    summary: dict[str, Any] = {"sources": {}}
    for source, rows in fates.items():
        kept_rows = [{k: v for k, v in row.items() if k != "rule"} for row in rows if row["rule"] is None]
        table(out / "kept" / f"{source}.parquet", kept_rows)
        for row in rows:
            dispositions.append(
                {
                    "id": row["id"], "source": source, "license": row["license"], "content_hash": row["content_hash"],
                    "bytes": len(row["text"].encode()), "disposition": "removed" if row["rule"] else "kept",
                    "kept_hash": None if row["rule"] else row["content_hash"],
                    "split": row["split"], "rule": row["rule"], "value": 1.0 if row["rule"] else None,
                    "threshold": 2.0 if row["rule"] else None, "duplicate_of": None, "match": None,
                }
            )  # fmt: skip
        summary["sources"][source] = {"documents_in": len(rows), "kept": len(kept_rows)}
    table(out / "dispositions.parquet", dispositions)
    write_json(out / "summary.json", summary)


def make_evaluation(out: Path, bits: float, right: int) -> None:
    """Evaluation tables with a chosen result, and the scores that follow from them."""
    from stages.evaluation.bits_per_byte import _write_tables, summary
    from stages.scorers import digest

    documents = [
        {
            "source": source,
            "id": f"{source}/{n:03d}",
            "bytes": 40 + n,
            "tokens": 40,
            "nll_bits": bits * (40 + n) + 0.5 * n,
        }
        for source in SOURCES
        for n in (0, 4, 8)
    ]
    items = [
        {"id": f"add/{n}", "task": "add", "prompt": f"{n}+1:", "expected": str(n + 1), "output": f"1:{answer}",
         "answer": answer, "score": int(n < right), "code_digest": digest("problems", "1"), "verifier": "problems",
         "verifier_version": "1"}
        for n in range(20)
        for answer in [str(n + 1) if n < right else "x"]
    ]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    _write_tables(out, documents, items)
    write_json(out / "scores.json", summary(documents, items))


def make_training(out: Path, phase: str, steps: list[int]) -> None:
    import torch
    from safetensors.torch import save_file

    for step in steps:
        folder = out / f"step-{step:06d}"
        folder.mkdir(parents=True)
        weight = {"decoder.layers.0.mlp.router.weight": torch.full((4, 8), float(step))}
        save_file(weight, folder / "model.safetensors")
        save_file({f"exp_avg.{k}": v for k, v in weight.items()}, folder / "optimizer.safetensors")
        write_json(
            folder / "state.json",
            {"step": step, "phase": phase, "tokens": step * 128, "data_position": step, "seed": 0,
             "config": {"model": {"context_length": context_of(phase)}}},
        )  # fmt: skip
    lines = training_lines(phase, steps[-1])
    (out / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(
        out / "summary.json",
        {"parameters": {"total": 40000, "active": 30000}, "steps": steps[-1], "tokens": steps[-1] * 128,
         "spikes": [{"step": x["step"], **x["spike"]} for x in lines if "spike" in x]},
    )  # fmt: skip


def context_of(name: str) -> int:
    """Of a phase or a model: the first long-context phase doubles the context, the next one again."""
    number = name.rpartition("-")[2]
    return CONTEXT * 2 ** int(number) if number.isdigit() else CONTEXT


def training_lines(phase: str, last: int) -> list[dict[str, Any]]:
    """The log of a phase. In `longcontext-2` step 1 spikes, step 2 is left out by the recipe, and an expert is dead."""
    bad = phase == "longcontext-2"
    share = [[0.25, 0.25, 0.25, 0.25], [0.004, 0.396, 0.4, 0.2] if bad else [0.1, 0.4, 0.3, 0.2]]
    experts = {"layers": [0, 1], "share": share, "entropy": [1.2, 0.9], "dropped": 0, "dead": [[1, 0]] if bad else []}
    lines: list[dict[str, Any]] = [{"step": 0, "heldout_loss": 5.0}]
    for step in range(1, last + 1):
        line = {"step": step, "tokens": step * 128, "loss": 5.0 - step / 10, "aux_loss": 2.0, "grad_norm": 1.0,
                "lr": 1e-3, "expert_max_violation": 0.6 / step, "router_entropy": 1.0 + step / 10}  # fmt: skip
        lines.append({**line, "skipped": True} if bad and step == 1 else line)
        if bad and step == 1:
            spike = {"reason": "the loss is 9.1, above 6.2 (median 5 of 64 steps)", "action": "skip", "excluded": [1],
                     "loss": 9.1, "grad_norm": 30.0, "documents": ["prose/001", "sums/001"], "experts": experts,
                     "gradient_norms": {"embedding": 3.0}}  # fmt: skip
            lines.append({"step": step, "spike": spike})
    if bad:
        lines.append({"step": last + 1, "tokens": last * 128, "lr": 1e-3, "excluded": True})
    return [*lines, {"step": last, "experts": experts}]


def shard(source: str, split: str) -> list[dict[str, Any]]:
    """The documents of one shard, in their order."""
    return [row for row in corpus()[source] if row["split"] == split]


def make_order(out: Path, phase: str) -> None:
    """One document a row; in a long-context phase one of each source, and the long ones are too few."""
    if phase.startswith("longcontext"):
        return make_packed_order(out, phase)
    rows = [
        {"step": step, "row": row, "segment": 0, "source": source, "ordinal": step,
         "id": shard(source, "train")[step]["id"], "offset": 0, "length": 10, "loss_from": 0}
        for step in (1, 2) for row, source in enumerate(SOURCES)
    ]  # fmt: skip
    table(out / "order.parquet", rows)
    tokens = {source: 20 for source in SOURCES}
    write_json(out / "meta.json", {"phase": phase, "steps": 2, "rows": 2, "sequence_length": 64, "tokens": tokens})


def make_packed_order(out: Path, phase: str) -> None:
    rows = [
        {"step": step, "row": row, "segment": segment, "source": source, "ordinal": step,
         "id": shard(source, "train")[step]["id"], "offset": 0, "length": 11 + segment, "loss_from": 0}
        for step in (1, 2) for row in (0, 1) for segment, source in enumerate(SOURCES)
    ]  # fmt: skip
    table(out / "order.parquet", rows)
    long = {"over": 64, "chunks": 3, "available_tokens": 300, "wanted_tokens": 2000, "missing_tokens": 800}
    write_json(
        out / "meta.json",
        {"phase": phase, "steps": 2, "rows": 2, "sequence_length": 32, "pack": True, "fill": 0.65625, "tokens": 84,
         "sources": {"prose": {"rows": 4, "long": long}, "sums": {"rows": 4}}},
    )  # fmt: skip


INPUTS = {
    "acquire-prose": [], "acquire-sums": [], "items": [], "filter": ["acquire-prose", "acquire-sums", "items"],
    "dedup": ["filter"],
    "tokenizer": ["dedup"], "tokenize": ["dedup", "tokenizer"], "order-pretrain": ["tokenize"],
    "order-midtrain": ["tokenize"],
    "pretrain": ["tokenize", "order-pretrain"], "midtrain": ["tokenize", "order-midtrain", "pretrain"],
    "export-init": ["pretrain", "tokenizer"], "export-base": ["pretrain", "tokenizer"],
    "export-mid": ["midtrain", "tokenizer"],
    "evaluate-init": ["export-init", "dedup", "items"], "evaluate-base": ["export-base", "dedup", "items"],
    "evaluate-mid": ["export-mid", "dedup", "items"],
}  # fmt: skip
SCORES = {"init": (8.0, 0), "base": (3.0, 4), "mid": (3.02, 15), "long-1": (3.03, 15), "long-2": (3.04, 15)}


def inputs_with_long_context() -> dict[str, list[str]]:
    """The graph of a run with two long-context phases."""
    inputs = dict(INPUTS)
    for number, before in ((1, "midtrain"), (2, "longcontext-1")):
        inputs |= {
            f"order-longcontext-{number}": ["tokenize"],
            f"longcontext-{number}": ["tokenize", f"order-longcontext-{number}", before],
            f"export-long-{number}": [f"longcontext-{number}", "tokenizer"],
            f"evaluate-long-{number}": [f"export-long-{number}", "dedup", "items"],
        }
    return inputs


def make_node(name: str, out: Path) -> None:
    """The files of one node's artifact."""
    kind, _, suffix = name.partition("-")
    out.mkdir(parents=True)
    if kind == "acquire":
        rows = [{k: v for k, v in row.items() if k not in ("split", "rule")} for row in corpus()[suffix]]
        table(out / "documents.parquet", rows)
        license = SOURCES[suffix]
        evidence = f"https://example.org/{suffix}/LICENSE"
        about = {"name": suffix, "license": license, "license_evidence": evidence, "documents": len(rows)}
        write_json(out / "source.json", {**about, "origin": f"https://example.org/{suffix}"})
    elif kind == "items":
        rows = [
            {"id": f"add/{n}", "task": "add", "prompt": f"{n}+1:", "answer": str(n + 1), "text": f"{n}+1"}
            for n in range(20)
        ]
        table(out / "items.parquet", rows)
    elif kind == "filter":
        write_json(out / "edits.json", {})
    elif kind == "dedup":
        make_dedup(out)
    elif kind == "tokenizer":
        save_tokenizer(out)
        write_json(out / "stats.json", {"bytes_per_token": {source: 1.0 for source in SOURCES}})
    elif kind == "tokenize":
        rows = [
            {"source": r["source"], "split": r["split"], "ordinal": n, "id": r["id"], "content_hash": r["content_hash"],
             "license": r["license"], "bytes": len(r["text"]), "tokens": len(r["text"]) + 1, "loss_from": 0}
            for source in SOURCES for split in ("train", "heldout") for n, r in enumerate(shard(source, split))
        ]  # fmt: skip
        table(out / "documents.parquet", rows)
        tokens = {
            "train": {s: sum(r["tokens"] for r in rows if r["source"] == s and r["split"] == "train") for s in SOURCES}
        }
        write_json(out / "meta.json", {"vocab_size": VOCAB, "pad_id": 0, "eod_id": 1, "tokens": tokens})
    elif kind == "order":
        make_order(out, suffix)
    elif kind in ("pretrain", "midtrain", "longcontext"):
        make_training(out, name, [0, 2])
    elif kind == "export":
        save_model(out / "model", list(SCORES).index(suffix), context_of(suffix))
        write_json(out / "parity.json", {"max_abs_logit_delta": 2.5e-6, "tolerance": 1e-4, "tokens": 64, "tensors": 27})
    elif kind == "evaluate":
        make_evaluation(out, *SCORES[suffix])


def write_statement(folder: Path, artifact: Artifact, materials: list[Artifact]) -> Path:
    """A statement as the ledger writes it: canonical JSON in a file named by its digest."""
    from pipeline.core import provenance

    body = provenance.statement(
        operations=[{}],
        subject={artifact.key: artifact.digest}, stage="stage", version=1, node="node", key=artifact.key, config={},
        materials={m.key: m for m in materials}, code={}, environment={}, invocation="test", started=0, finished=1,
        usage={}, outcome="sealed", product=artifact,
    )  # fmt: skip
    return provenance.write(folder / "ledger", artifact.key, body)


def make_run(home: Path, inputs: dict[str, list[str]] = INPUTS) -> tuple[dict[str, Artifact], list[Path]]:
    """All artifacts of a run under `home`, and their statements."""
    artifacts: dict[str, Artifact] = {}
    statements = []
    for name, parents in inputs.items():
        key = f"{name}-{sha(name)[:12]}"
        out = home / "artifacts" / key
        make_node(name, out)
        artifacts[name] = write_manifest(out, key)
        statements.append(write_statement(home, artifacts[name], [artifacts[p] for p in parents]))
    return artifacts, statements


def make_code(root: Path) -> Path:
    """A checkout small enough to flip every byte of; the real one changes under the feet of a test."""
    for package in ("pipeline", "stages", "release", "data_recipes"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text(f'"""{package}"""\n')
    (root / "release" / "assembly").mkdir()
    (root / "release" / "assembly" / "build_release.py").write_text("x = 1\n")
    (root / "pipeline" / "__pycache__").mkdir()
    (root / "pipeline" / "__pycache__" / "a.pyc").write_text("no")
    (root / "LICENSE").write_text("The license.\n")
    return root


def build_input(home: Path, inputs: dict[str, list[str]] = INPUTS, **changes: Any) -> Any:
    """What the engine would hand to `release.assembly.build_release`."""
    from release.assembly.build_release import BuildInput

    artifacts, statements = make_run(home, inputs)
    metrics = home / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 5.0}\n')
    recipe = {
        "name": "tiny",
        "description": "A test.",
        "evaluation": {"problems": {"add": 20}, "heldout_documents": 3, "max_new_tokens": 8},
        "release": {
            "license": {"weights": "Apache-2.0", "data_compilation": "CC-BY-4.0", "code": "Apache-2.0"},
            "languages": ["en"],
        },
    }
    return BuildInput(
        name="tiny", version="0.1.0", recipe=recipe, recipe_files={"recipes/tiny.yaml": b"name: tiny\n"},
        artifacts=artifacts, statements=statements, metrics={"pretrain": metrics}, environment={"python": "3.11"},
        code_roots=[make_code(home / "checkout")], **changes,
    )  # fmt: skip
