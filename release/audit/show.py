"""`atom show`: a release on one terminal page. Every figure is read from its files."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

from release import schema, signing
from release.assembly import costs
from release.assembly.checkpoint_facts import read_checkpoints
from release.assembly.data_facts import OrderFacts, read_data_facts
from release.assembly.model_facts import ModelFacts, read_model_facts
from release.assembly.published_tables import read_json
from release.cards import caveats, tables
from release.layout import GATES, PUBLIC_KEY, SIGNATURE
from release.repositories import model_folders
from release.untrusted import cleaned
from stages.evaluation.scores import Figure, pass_at_1

WIDTH = 118
ABOUT = ("name", "version", "title", "description", "license", "commit", "dirty", "stale")


def facts_of(release: Path) -> dict[str, Any]:
    """The content of the page, for `--json`; fields are only ever added.

    corpus: {source: documents in, kept, tokens, licenses}. removed: {rule: documents}. seen: {phase: steps, tokens}.
    models: {folder: {measure: {value, se}}} in the order of training. pass_at_1: of chat models. caveats: the sentences
    at the head of the final model's card. gates: {name: ok}. key: the fingerprint of the key beside the
    signature, unchecked, or None. identity: the one in a signature without a key, unchecked, or None.

    Raises CheckFailed if a file of the release is missing or damaged.
    """
    release_info, data = schema.read_release(release).to_json(), read_data_facts(release / "dataset")
    final_model, *other_models = model_folders(release)
    model_metrics = {folder: read_model_facts(release / folder) for folder in [*other_models, final_model]}
    removed: dict[str, int] = {}
    for row in data.sources.values():
        for rule, count in row.removed.items():
            removed[rule] = removed.get(rule, 0) + count
    final_metrics = model_metrics[final_model]
    return {
        "schema": 1,
        **{name: release_info[name] for name in ABOUT},
        "parameters": asdict(final_metrics.parameters),
        "corpus": {
            name: {
                "documents_in": row.documents_in,
                "kept": row.kept,
                "tokens": sum(row.tokens.values()),
                "licenses": row.licenses,
            }
            for name, row in data.sources.items()
        },
        "removed": dict(sorted(removed.items(), key=lambda item: (-item[1], item[0]))),
        "seen": {phase: _steps_and_tokens(figures) for phase, figures in data.order.items()},
        "models": {folder: _scores(model) for folder, model in model_metrics.items()},
        "caveats": [*caveats.caveat_sentences(final_metrics), *caveats.unread(final_metrics.scores, data.order)],
        "pass_at_1": pass_at_1(data.chat.get("test", {})),
        "checkpoints": [row.branch for row in read_checkpoints(release / "checkpoints")],
        "gates": {name: gate["ok"] for name, gate in sorted(read_json(release / GATES).items())},
        "cost": costs.total(costs.usage_by_stage(release)),
        "key": _key(release),
        "identity": signing.recorded_identity(release / SIGNATURE),
    }  # fmt: skip


def _key(release: Path) -> str | None:
    """The fingerprint of the key beside a signature, unchecked (`atom verify` checks it)."""
    if not ((release / PUBLIC_KEY).is_file() and (release / SIGNATURE).is_file()):
        return None
    try:
        return signing.fingerprint((release / PUBLIC_KEY).read_bytes())
    except ValueError:
        return "which cannot be read"


def _steps_and_tokens(order: OrderFacts) -> dict[str, int]:
    """Steps of a phase, and the tokens that it predicted."""
    parts = [row.tokens for part in order.parts for row in part.by_source.values()]
    return {"steps": order.steps, "tokens": sum(parts)}


def _scores(model: ModelFacts) -> dict[str, Figure]:
    scores = model.own_scores()
    return {"bits_per_byte": scores["bits_per_byte_all"], "accuracy": scores["accuracy_all"]}


def text(facts: dict[str, Any]) -> str:
    """The page; control characters in it are escaped."""
    from rich.console import Console
    from rich.table import Table

    facts, buffer = cleaned(facts), io.StringIO()
    console = Console(file=buffer, width=WIDTH, highlight=False, markup=False)  # a title may contain brackets

    def table(*columns: str) -> Table:
        grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for number, column in enumerate(columns):
            grid.add_column(column, justify="right" if number else "left", no_wrap=True)
        return grid

    console.print(f"{facts['title']} {facts['version']}  {facts['description']}", soft_wrap=False)
    license, size = facts["license"], facts["parameters"]
    console.print(
        f"{size['total']:,} parameters, {size['active']:,} active for one token; weights {license['weights']}, "
        f"code {license['code']}, documents under their own licenses"
    )
    commit = f"commit {facts['commit'][:12]}" if facts["commit"] else "commit unknown"
    console.print(f"code at {commit}{', with uncommitted changes' if facts['dirty'] else ''}\n")

    corpus = table("trained on", "documents in", "kept", "tokens", "licenses")
    for name, row in facts["corpus"].items():
        corpus.add_row(
            name, f"{row['documents_in']:,}", f"{row['kept']:,}", f"{row['tokens']:,}", ", ".join(row["licenses"])
        )
    console.print(corpus)
    removed = ", ".join(f"{rule} {count:,}" for rule, count in facts["removed"].items())
    console.print(f"removed: {removed or 'nothing'}")
    phases = ", ".join(
        f"{name} {row['steps']:,} steps, {row['tokens']:,} tokens" for name, row in facts["seen"].items()
    )
    console.print(f"training: {phases}\n")

    console.print("caveats")
    for sentence in facts["caveats"]:
        console.print(sentence.replace("**", ""))
    console.print()

    quality = table("quality", "bits per byte, all", "exact match, all")
    for folder, scores in facts["models"].items():
        quality.add_row(folder, *(tables.with_error(scores[kind], 3) for kind in ("bits_per_byte", "accuracy")))
    console.print(quality)
    if facts["pass_at_1"]:
        pass_rates = ", ".join(f"{name} {tables.with_error(row, 3)}" for name, row in facts["pass_at_1"].items())
        console.print(f"pass@1 on test problems, in conversation: {pass_rates}")

    gates, cost = facts["gates"], facts["cost"]
    failed = [name for name, ok in gates.items() if not ok]
    console.print(f"\nchecks: {len(gates)} gates, {'failed: ' + ', '.join(failed) if failed else 'all passed'}")
    console.print(f"checkpoints: {', '.join(facts['checkpoints'])}")
    signer = f"the key {facts['key']}" if facts["key"] else facts["identity"] and f"the identity {facts['identity']}"
    console.print(f"signed, unchecked, with {signer}; atom verify checks it" if signer else "not signed")
    console.print(
        f"cost, failed attempts counted: {cost['attempts']:.0f} attempts ({cost['failed']:.0f} failed), "
        f"{cost['core_hours']:.3g} core hours, {cost['gpu_hours']:.3g} GPU hours, about {cost['energy_wh']:.3g} Wh"
    )
    return buffer.getvalue().rstrip()
