"""The part of a graph after fine-tuning: reinforcement learning, and what only models that converse are measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Add = Callable[..., None]
"""add(name, stage, config, external, /, **inputs): puts a node into the graph."""


def replays(c: Any) -> dict[str, Mapping[str, float]]:
    """The mixes of earlier data that phases of post-training replay, by where they stand in the recipe."""
    found = {"rlvr": c.rlvr, "rlhf.online": c.rlhf and c.rlhf.online}
    return {f"{where}.replay": phase.replay.mix for where, phase in found.items() if phase and phase.replay}


def phases(c: Any, model: Any, previous: dict[str, str], add: Add) -> dict[str, tuple[Any, str]]:
    """Adds the phases of `rlvr` and `rlhf`. previous: the role and node of the phase before. Returns of each phase the
    model and the type of its weights."""
    trained_as: dict[str, tuple[Any, str]] = {}

    def train(name: str, stage: str, phase: Any, asked: Any = (), more: Any = (), /, **given: str) -> None:
        """A phase with its tasks and the order of what it replays."""
        trained_as[name] = (model, "float32" if phase.precision == "fp32" else "bfloat16")
        config = {"model": model, "phase": phase, "padded_vocab_size": c.tokenizer.padded_vocab_size, "seed": c.seed}
        if asked:
            add(f"tasks-{name}", "tasks", {"sources": asked, "seed": c.seed}, items="items")
            given |= {"tasks": f"tasks-{name}", "items": "items"}
        if replay := getattr(phase, "replay", None):
            order = {"phase": name, "mix": replay.mix, "sequence_length": replay.sequence_length, "seed": c.seed}
            add(f"order-{name}", "order", order | {"steps": phase.steps, "rows": replay.rows}, tokens="tokenize")
            given |= {"tokens": "tokenize", "order": f"order-{name}"}
        add(name, stage, config | dict(more), tokenizer="tokenizer", **given)

    if c.rlvr:
        train("rlvr", "rlvr", c.rlvr, c.rlvr.tasks, {"name": "rlvr"}, **previous)
        previous = {"init": "rlvr"}
    if c.rlhf:
        dpo, online = c.rlhf.dpo, c.rlhf.online
        train(
            "rlhf", "rlhf", dpo, (*dpo.preferences.tasks, *(dpo.sft_tasks.tasks if dpo.sft_tasks else ())), **previous
        )
        if online:
            train("reward", "reward", c.rlhf.reward, pairs="rlhf", **previous)
            made, dtype = trained_as["reward"]
            export = {"model": made, "padded_vocab_size": c.tokenizer.padded_vocab_size, "dtype": dtype}
            add("judge", "export", export, tokenizer="tokenizer", checkpoint="reward")
            judge = {"reward": "reward", "judge": "judge"}
            train("online", "rlvr", online, online.tasks, {"name": "online"}, init="rlhf", **judge)
    return trained_as


def evaluation(c: Any, models: list[str], nodes: Mapping[str, Any], add: Add) -> None:
    """Adds what models that converse are measured on: problems, the fresh set, preferences, contamination. models: all
    that are exported, in the order of training."""
    if c.evaluation.chat is None or c.sft is None:
        return
    chatty = models[models.index("sft") :]
    asked = {name: name for name in nodes if nodes[name].stage.name == "tasks"}
    orders = {name: name for name in nodes if nodes[name].stage.name == "order"}
    read = [nodes[name].config.model_dump() for name in orders]
    mixes = {order["phase"]: sorted(order["mix"]) for order in read}
    given = {"model": f"export-{chatty[-1]}", "curate": "curate", "items": "items"}
    add("fresh", "fresh", {"problems": c.evaluation.problems, "phases": mixes}, **given, **asked)
    part = {"max_new_tokens": c.evaluation.chat.max_new_tokens, "seed": c.seed}
    for n, which in enumerate(chatty):
        solving = part | {"num_samples": c.evaluation.chat.num_samples}
        for name, source in ((f"solve-{which}", "items"), (f"fresh-solve-{which}", "fresh")):
            add(name, "solve", solving, model=f"export-{which}", items=source)
        if n and c.evaluation.chat.items.courtesies > 1:
            # each is compared with the one before it, what learnt from preferences with the last one that had not
            before = chatty[n - 1] if which != "online" else chatty[n - 2]
            pair = {"model": f"export-{which}", "before": f"export-{before}", "items": "items"}
            add(f"prefer-{which}", "prefer", part | {"model": which, "before": before}, **pair)
    tables = {name: name for name in nodes if nodes[name].stage.name in ("evaluate", "solve")}
    given = {"curate": "curate", "items": "items", "fresh": "fresh"}
    add("contamination", "contamination", {"seed": c.seed}, **given, **orders, **asked, **tables)
