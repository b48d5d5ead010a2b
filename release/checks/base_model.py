"""Checks that the base of a release is the published model on which it was trained."""

from __future__ import annotations

from pipeline.core.text import escaped
from release import schema
from release.assembly.published_tables import read_json
from release.checks.check import Subject
from release.checks.findings import Findings
from release.layout import BASE
from stages.train.imported_weights import NAME, TOKENIZER


def published_base(subject: Subject) -> Findings:
    """Checks that the weights and the tokenizer of `model-base` have the digests of the published model, which
    `evidence/base.json` states. Nothing to compare if pre-training began with it."""
    folder, base = subject.folder, read_json(subject.folder / "evidence" / NAME)
    if "pretrain" in schema.read_nodes(folder):
        reason = f"pre-training changed the weights of {escaped(base['repo'])}"
        return Findings(detail=reason, compared=False, summary=reason)
    stated = {path: digest for path, digest in base["files"].items() if path == TOKENIZER or path.startswith("model")}
    present = {path.name for path in (folder / BASE).glob("model*.safetensors*")} | {TOKENIZER}
    problems = [f"{BASE}/{path} is no file of {base['repo']}; remove it" for path in sorted(present - stated.keys())]
    for path, digest in sorted(stated.items()):
        if path not in present or subject.digest(folder / BASE / path) != digest:
            problems.append(
                f"{BASE}/{path} is not that of {base['repo']}; a release holds the published model bit for bit, so "
                "train it in the precision in which it was published"
            )
    text = f"{len(stated)} files of {base['repo']}, {base['digest']}"
    return Findings([escaped(line) for line in problems], detail=escaped(text), summary=escaped(text))
