"""Checks that the fresh problems are drawn from the digest of the weights."""

from __future__ import annotations

import json

from release.assembly.published_tables import read_json
from release.checks.check import BuildContext, Subject
from release.checks.findings import Absent, Findings

META = "dataset/evaluation/fresh/meta.json"


def fresh_set(subject: Subject) -> Findings:
    """Checks that the fresh set follows from the published weights: it is drawn from their digest, without the removed
    problems."""
    from stages.data.table import read_jsonl
    from stages.evaluation import generated_eval

    folder = subject.folder
    if not (folder / META).exists():
        return Findings(["evaluation/fresh/meta.json is missing: no item is known to be newer than the weights"])
    meta = read_json(folder / META)
    if (folder / "model").is_dir() and (digest := generated_eval.digest_of(folder / "model")) != meta["digest"]:
        text = f"evaluation/fresh/meta.json was drawn from the weights {meta['digest']}, and these are {digest}"
        return Findings([text])
    if (drawn_by := str(meta.get("generator", generated_eval.FIRST_GENERATOR))) != generated_eval.GENERATOR:
        raise Absent(
            f"skipped: drawn by version {drawn_by} of the generator, and this atom has {generated_eval.GENERATOR}"
        )
    removed_ids = {row["id"] for row in meta["removed"]}
    expected = [row for row in generated_eval.draw(meta["digest"], meta["problems"]) if row["id"] not in removed_ids]
    drawn = read_jsonl((folder / META).with_name("chat.jsonl")) == json.loads(json.dumps(expected))
    problems = [] if drawn else ["evaluation/fresh/chat.jsonl is not what the digest of the weights gives"]
    return Findings(problems, summary=f"{meta['kept']} items drawn from the digest of the weights")


def fresh_set_of_conversations(build: BuildContext) -> Findings | None:
    """Checks that a release with chat models has a fresh set."""
    if not build.data.chat:
        return None
    missing = not (build.folder / META).parent.is_dir()
    text = "evaluation/fresh is missing: no item is known to be newer than the weights"
    return Findings([text] if missing else [])
