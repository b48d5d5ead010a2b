"""`atom show`: a release on one terminal page. Every figure is read from its files."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

from release import signing
from release.cards import baseline_tables, caveats, tables
from release.facts import run_facts
from release.facts.data_facts import OrderFacts
from release.facts.model_facts import ModelFacts
from release.facts.published_tables import read_json
from release.layout import GATES, PUBLIC_KEY, SIGNATURE, model_name
from release.opened_release import Release
from release.untrusted import cleaned
from stages.confidence import Figure
from stages.evaluation.scores import pass_at_1

WIDTH, WIDEST = 80, 110
"""Columns of the page where there is no terminal, and at most."""
MOST_ROWS, MOST_RULES, MOST_CAVEATS, MOST_BASELINES = 8, 5, 4, 6
"""Sources, rules, caveats and sources of baselines that the page names; it counts the others."""
ABOUT = ("name", "version", "title", "description", "license", "commit", "dirty", "stale")


def facts_of(release: Release) -> dict[str, Any]:
    """Returns the content of the page, for `--json`; fields are only ever added.

    Returns:
        base: Repository, digest and license of the published model that training began with, or None.
        corpus: {source: documents in, kept, tokens, licenses}
        removed: {rule: documents}
        seen: {phase: steps, tokens}
        models: {folder: {measure: {value, se}}} in the order of training.
        pass_at_1: Of chat models.
        caveats: The sentences at the head of the final model's card.
        baselines: A sentence for each source on the final model beside its baselines.
        rehearsals: {phase: what its rehearsal measured}, null if no statement has it.
        gates: {name: ok}, null if there was nothing to judge.
        key: Fingerprint of the key beside the signature, unchecked, or None.
        identity: The one in a signature without a key, unchecked, or None.

    Raises:
        CheckFailed: A file of the release is missing or damaged.
    """
    info, data = release.info.to_json(), release.data
    final_name, *other_names = release.model_names
    models = {name: release.models[name] for name in (*other_names, final_name)}
    removed: dict[str, int] = {}
    for row in data.sources.values():
        for rule, count in row.removed.items():
            removed[rule] = removed.get(rule, 0) + count
    final = release.models[final_name]
    return {
        "schema": 1,
        **{name: info[name] for name in ABOUT},
        "base": final.base and {name: final.base[name] for name in ("repo", "digest", "license")},
        "parameters": asdict(final.parameters),
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
        "models": {folder: _scores(model) for folder, model in models.items()},
        "caveats": caveats.caveat_sentences(final),
        "baselines": list(baseline_tables.in_words(final)),
        "pass_at_1": pass_at_1(data.chat.get("test", {})),
        "checkpoints": [row.branch for row in release.checkpoints],
        "rehearsals": {row.phase: row.measured for row in release.rehearsals},
        "gates": {name: gate["ok"] for name, gate in sorted(read_json(release.root / GATES).items())},
        "cost": run_facts.total_cost(release.costs),
        "key": _key(release.root),
        "identity": signing.recorded_identity(release.root / SIGNATURE),
    }


def _key(folder: Path) -> str | None:
    """Returns the fingerprint of the key beside a signature, unchecked (`atom verify` checks it)."""
    # A key without a signature signs nothing.
    if not ((folder / PUBLIC_KEY).is_file() and (folder / SIGNATURE).is_file()):
        return None
    try:
        return signing.fingerprint((folder / PUBLIC_KEY).read_bytes())
    except ValueError:
        return "which cannot be read"


def _steps_and_tokens(order: OrderFacts) -> dict[str, int]:
    """Returns steps of a phase, and the tokens that it predicted."""
    parts = [row.tokens for part in order.parts for row in part.by_source.values()]
    return {"steps": order.steps, "tokens": sum(parts)}


def _scores(model: ModelFacts) -> dict[str, Figure]:
    scores = model.own_scores()
    return {"bits_per_byte": scores["bits_per_byte_all"], "accuracy": scores["accuracy_all"]}


def text(facts: dict[str, Any], width: int = WIDTH) -> str:
    """Returns the page, `width` columns wide; control characters in it are escaped."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    # A terminal obeys control characters, and the texts are those of whoever made the release.
    facts, buffer = cleaned(facts), io.StringIO()
    console = Console(file=buffer, width=min(width, WIDEST), highlight=False, markup=False)  # a title may have brackets

    def table(*columns: str) -> Table:
        grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for number, column in enumerate(columns):
            grid.add_column(column, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
        return grid

    def item(name: str, content: str) -> None:
        rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        rows.add_column(width=12)
        rows.add_column(overflow="fold")
        rows.add_row(name, content)
        console.print(rows)

    # The model and its origin.
    console.print(f"{facts['title']} {facts['version']}")
    if facts["description"]:
        console.print(Padding(facts["description"], (0, 0, 0, 2)))
    license, size, commit = facts["license"], facts["parameters"], facts["commit"]
    console.print()
    item("size", f"{size['total']:,} parameters, {size['active']:,} active for one token")
    if base := facts["base"]:
        item("trained from", f"{base['repo']}, {base['license']}, {base['digest']}")
    item("licenses", f"weights {license['weights']}, code {license['code']}, documents under their own")
    changed = ", with uncommitted changes" if facts["dirty"] else ""
    item("code", f"commit {commit[:12] if commit else 'unknown'}{changed}")

    # The corpus, its largest sources first.
    console.print()
    corpus = table("trained on", "documents", "kept", "tokens")
    rows = sorted(facts["corpus"].items(), key=lambda pair: -pair[1]["tokens"])
    for name, row in rows[:MOST_ROWS]:
        corpus.add_row(name, f"{row['documents_in']:,}", f"{row['kept']:,}", f"{row['tokens']:,}")
    if others := [row for _, row in rows[MOST_ROWS:]]:
        totals = [sum(row[key] for row in others) for key in ("documents_in", "kept", "tokens")]
        corpus.add_row(f"{len(others)} others", *(f"{number:,}" for number in totals))
    console.print(corpus)
    # The rules that removed the most, and the training.
    console.print()
    removed = list(facts["removed"].items())
    named = [f"{rule} {count:,}" for rule, count in removed[:MOST_RULES]]
    if hidden := removed[MOST_RULES:]:
        named.append(f"{len(hidden)} other rules {sum(count for _, count in hidden):,}")
    item("removed", ", ".join(named) or "nothing")
    phases = [
        f"{tables.title(name, tables.PHASES)} {row['steps']:,} ({row['tokens']:,} tokens)"
        for name, row in facts["seen"].items()
    ]
    item("steps", ", ".join(phases))

    # The first caveats of the final model's card, before the figures that they qualify.
    console.print("\nknow before any figure")
    for sentence in facts["caveats"][:MOST_CAVEATS]:
        console.print(Padding(sentence.replace("**", ""), (0, 0, 0, 2)))
    if hidden := facts["caveats"][MOST_CAVEATS:]:
        console.print(f"  - {len(hidden)} more: they begin model/README.md")

    # The scores of each model, with conversations where any model was asked in them.
    console.print()
    chat = facts["pass_at_1"]
    quality = table("quality", "bits per byte", "right, plain text", *(["right, chat"] if chat else []))
    for folder, scores in facts["models"].items():
        figures = [tables.with_error(scores[kind], 3) for kind in ("bits_per_byte", "accuracy")]
        drawn = chat.get(model_name(folder, list(chat)[-1])) if chat else None
        figures += [tables.with_error(drawn, 3) if drawn else ""] if chat else []
        quality.add_row(folder, *figures)
    console.print(quality)

    # The final model beside its baselines.
    if lines := facts["baselines"]:
        console.print("\nbits per byte beside baselines that know the training text")
        for sentence in lines[:MOST_BASELINES]:
            console.print(Padding(sentence, (0, 0, 0, 2)))
        if len(lines) > MOST_BASELINES:
            console.print(f"  {len(lines) - MOST_BASELINES} more sources: on the model card")

    # The evidence: gates, checkpoints, signature and cost.
    console.print()
    gates, cost = facts["gates"], facts["cost"]
    failed = [name for name, ok in gates.items() if ok is False]
    skipped = sum(ok is None for ok in gates.values())
    judged = f"{len(gates) - skipped} gates{f' and {skipped} not judged' if skipped else ''}"
    item("checks", f"{judged}, {'failed: ' + ', '.join(failed) if failed else 'all passed'}")
    branches = facts["checkpoints"]
    item("checkpoints", f"{len(branches)}, the last is {branches[-1]}" if branches else "none")
    signer = f"the key {facts['key']}" if facts["key"] else facts["identity"] and f"the identity {facts['identity']}"
    item("signed", f"with {signer}; unchecked, atom verify checks it" if signer else "no")
    item(
        "cost",
        f"{cost['core_hours']:.3g} core hours, {cost['gpu_hours']:.3g} GPU hours, about {cost['energy_wh']:.3g} Wh; "
        f"{cost['attempts']:.0f} attempts, {cost['failed']:.0f} failed",
    )
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).rstrip()
