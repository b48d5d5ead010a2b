"""`atom show`: a release on one terminal page, every figure from its files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from release import schema
from release.assembly import costs, metrics
from release.cards import caveats, tables
from release.layout import GATES, PUBLIC_KEY, SIGNATURE, model_folders
from release.signing import keyless, sign
from release.untrusted import cleaned

WIDTH = 118
ABOUT = ("name", "version", "title", "description", "licence", "commit", "dirty", "stale")


def facts_of(release: Path) -> dict[str, Any]:
    """What the page tells, for `--json`; fields are only ever added.

    corpus: by source, documents in, kept and tokens; removed: by rule. models: in the order of training, parameters and
    scores {measure: {value, se}}; of those that converse, pass_at_1. caveats: the sentences that the final model's card
    opens with. gates: {name: ok}. key: the fingerprint of the key
    that is said to have signed it, unchecked, or None.
    """
    about, data = schema.read_release(release), metrics.data_facts(release / "dataset")
    final, *others = model_folders(release)
    known = {folder: metrics.model_facts(release / folder) for folder in [*others, final]}
    removed: dict[str, int] = {}
    for row in data["sources"].values():
        for rule, count in row["removed"].items():
            removed[rule] = removed.get(rule, 0) + count
    chat = data["chat"].get("test", {})
    return {
        "schema": 1,
        **{name: about[name] for name in ABOUT},
        "parameters": known[final]["parameters"],
        "corpus": {
            name: {
                "documents_in": row["documents_in"],
                "kept": row["kept"],
                "tokens": sum(row["tokens"].values()),
                "licences": row["licences"],
            }
            for name, row in data["sources"].items()
        },
        "removed": dict(sorted(removed.items(), key=lambda item: (-item[1], item[0]))),
        "seen": {phase: _seen(found) for phase, found in data["order"].items()},
        "models": {folder: _scores(model) for folder, model in known.items()},
        "caveats": [*caveats.of(known[final]), *caveats.unread(known[final]["scores"], data["order"])],
        "pass_at_1": {name: found["problems_all"]["samples"]["accuracy"] for name, found in chat.items()},
        "checkpoints": [row["branch"] for row in metrics.checkpoint_facts(release / "checkpoints")],
        "gates": {name: gate["ok"] for name, gate in sorted(metrics.read_json(release / GATES).items())},
        "cost": costs.total(costs.of(release)),
        "key": _key(release),
        "identity": keyless.identity(release / SIGNATURE),
    }  # fmt: skip


def _key(release: Path) -> str | None:
    """The fingerprint of the key beside a signature; whether that holds is the question of `atom verify`."""
    if not ((release / PUBLIC_KEY).is_file() and (release / SIGNATURE).is_file()):
        return None
    try:
        return sign.fingerprint((release / PUBLIC_KEY).read_bytes())
    except ValueError:
        return "which cannot be read"


def _seen(order: dict[str, Any]) -> dict[str, int]:
    """Steps of a phase, and the tokens that it predicted."""
    parts = [row["tokens"] for part in order["parts"] for row in part["by_source"].values()]
    return {"steps": order["steps"], "tokens": sum(parts)}


def _scores(model: dict[str, Any]) -> dict[str, Any]:
    own = list(model["scores"].values())[-1]
    return {kind: own[f"{kind}_all"] for kind in ("bits_per_byte", "accuracy")}


def text(found: dict[str, Any]) -> str:
    """The page; what a terminal would obey is shown in escapes."""
    from rich.console import Console
    from rich.table import Table

    found, out = cleaned(found), io.StringIO()
    console = Console(file=out, width=WIDTH, highlight=False, markup=False)  # a title may hold brackets

    def table(*columns: str) -> Table:
        made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for number, column in enumerate(columns):
            made.add_column(column, justify="right" if number else "left", no_wrap=True)
        return made

    console.print(f"{found['title']} {found['version']}  {found['description']}", soft_wrap=False)
    licence, size = found["licence"], found["parameters"]
    console.print(
        f"{size['total']:,} parameters, {size['active']:,} active for one token; weights {licence['weights']}, "
        f"code {licence['code']}, documents under their own licences"
    )
    commit = f"commit {found['commit'][:12]}" if found["commit"] else "no commit known"
    console.print(f"code at {commit}{', with uncommitted changes' if found['dirty'] else ''}\n")

    corpus = table("trained on", "documents in", "kept", "tokens", "licences")
    for name, row in found["corpus"].items():
        corpus.add_row(
            name, f"{row['documents_in']:,}", f"{row['kept']:,}", f"{row['tokens']:,}", ", ".join(row["licences"])
        )
    console.print(corpus)
    removed = ", ".join(f"{rule} {count:,}" for rule, count in found["removed"].items())
    console.print(f"removed: {removed or 'nothing'}")
    seen = ", ".join(f"{name} {row['steps']:,} steps, {row['tokens']:,} tokens" for name, row in found["seen"].items())
    console.print(f"seen: {seen}\n")

    console.print("read first")
    for sentence in found["caveats"]:
        console.print(sentence.replace("**", ""))
    console.print()

    quality = table("how good", "bits per byte, all", "exact match, all")
    for folder, scores in found["models"].items():
        quality.add_row(folder, *(tables.with_error(scores[kind], 3) for kind in ("bits_per_byte", "accuracy")))
    console.print(quality)
    if found["pass_at_1"]:
        asked = ", ".join(f"{name} {tables.with_error(row, 3)}" for name, row in found["pass_at_1"].items())
        console.print(f"pass@1 on test problems, in conversation: {asked}")

    gates, cost = found["gates"], found["cost"]
    failed = [name for name, ok in gates.items() if not ok]
    console.print(f"\nhow checked: {len(gates)} gates, {'failed: ' + ', '.join(failed) if failed else 'all passed'}")
    console.print(f"checkpoints: {', '.join(found['checkpoints'])}")
    signer = f"the key {found['key']}" if found["key"] else found["identity"] and f"the name {found['identity']}"
    console.print(f"carries signatures and {signer}; atom verify checks" if signer else "not signed")
    console.print(
        f"cost, failed attempts counted: {cost['attempts']:.0f} attempts ({cost['failed']:.0f} failed), "
        f"{cost['core_hours']:.3g} core hours, {cost['gpu_hours']:.3g} GPU hours, about {cost['energy_wh']:.3g} Wh"
    )
    return out.getvalue().rstrip()
