"""The inputs of a replay of rlvr, dpo, reward or online-rlhf.

Instead of an order of documents, these phases read published answers or pairs, tasks and tokenizer, and before step 1
the last checkpoint of the phase before.

Nothing is sampled or scored again. `stages.rl.policy.RecordedRollouts` reads the answers as the phase consumed them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core import provenance
from pipeline.core.errors import CheckFailed
from pipeline.core.store import Artifact, FileRow, rows_of
from release.audit.replay.source import Source
from release.layout import BASE, IMPORT

STAGES = ("rlvr", "dpo", "reward")
STATE = re.compile(r"step-([0-9]{1,12})/state\.json")
FILES = {"tasks": "tasks.jsonl", "pairs": "pairs.parquet"}
"""{role of an input: its published file that training reads}"""


def published_files(source: Source, key: str, stage: str, materials: Mapping[str, str]) -> dict[str, str]:
    """Returns {role: path in the release} of the files that a phase reads beside tokens and checkpoints.

    Args:
        source: The release.
        key: The key of the phase's artifact.
        stage: The stage that trained it.
        materials: {role: key} of its inputs.

    Raises:
        CheckFailed: A file is missing or altered.
    """
    files = {role: source.copy(materials[role], name) for role, name in FILES.items() if role in materials}
    if "pairs" in files:
        require_pairs_of_answers(source, materials["pairs"])
    files["tokenizer"] = source.tokenizer(materials["tokenizer"])
    if stage != "reward":
        files["rollouts"] = source.copy(key, "rollouts.parquet")
    return {role: path.relative_to(source.folder).as_posix() for role, path in files.items()}


def require_pairs_of_answers(source: Source, key: str) -> None:
    """Forms the pairs of a dpo phase from its published answers again.

    Args:
        source: The release.
        key: The key of the artifact with the pairs.

    Raises:
        CheckFailed: The pairs differ from the published ones; the message names the first round.
        AtomError: One of the files is damaged.
    """
    from stages.formats.table import read_jsonl, read_table, require_columns
    from stages.rl.algorithms.preferences import pair_rows
    from stages.rl.config import DpoTrainConfig
    from stages.rl.rollout import rollouts

    pairs, answers = (source.copy(key, name) for name in ("pairs.parquet", "rollouts.parquet"))
    _, body = source.statement(source.manifests[key].node)
    phase = DpoTrainConfig.model_validate(provenance.parameters_of(body)["config"]).phase
    rows = read_jsonl(source.copy(provenance.material_keys(body)["tasks"], "tasks.jsonl"))
    tasks = {row["id"]: row for row in rows}
    require_columns(answers, rollouts.schema())
    rounds = read_table(pairs, ["round"])["round"].to_pylist()
    if rounds != sorted(rounds):
        raise CheckFailed(f"{pairs.name}: the pairs are not in the order of their rounds; it was changed")
    # Rounds of the config as well, so that one whose pairs were all removed is found.
    for number in sorted({*rounds, *range(1, phase.steps + 1)}):
        published = read_table(pairs, filters=[("round", "=", number)]).to_pylist()
        if published != pair_rows(rollouts.read(answers, number), tasks, phase.min_margin):
            raise CheckFailed(
                f"{pairs.name}: the pairs of round {number} are not those of the answers in {answers.name}; one of the "
                "two was changed"
            )


def require_same_policies(source: Source, path: str, log: Iterable[Mapping[str, Any]]) -> None:
    """Compares the policies that drew the answers of each step with those of the log.

    A replay compares the policies of the log with its own.

    Args:
        source: The release.
        path: The path of rollouts.parquet in it.
        log: The published lines of the phase.

    Raises:
        CheckFailed: A step differs; the message names the first.
    """
    from stages.formats.table import read_table

    table = read_table(source.folder / path, ["step", "policy"]).group_by(["step", "policy"]).aggregate([])
    drawn_by: dict[int, set[str]] = {}
    for row in table.to_pylist():
        drawn_by.setdefault(row["step"], set()).add(row["policy"])
    for line in log:
        policies = sorted(drawn_by.get(line["step"], ()))
        if "policy" in line and policies != [line["policy"]]:
            raise CheckFailed(
                f"{path} says that the answers of step {line['step']} are of {', '.join(policies) or 'nobody'}, and "
                f"the log says {line['policy']}; one of the two was changed"
            )


def require_same_consumption(path: Path, log: Iterable[Mapping[str, Any]]) -> None:
    """Compares the answers that each step of an asynchronous phase took with those that the log seals.

    Their order and the policies that drew them are compared, too.

    Args:
        path: The file rollouts.parquet.
        log: The published lines of the phase.

    Raises:
        CheckFailed: A step differs; the message names the first.
    """
    from stages.rl.rollout import rollouts

    lines = [line for line in log if "policy" in line]
    # Answers name a policy by the step after which it was made, which is one before the step that used it.
    policies = {line["step"] - 1: line["policy"] for line in lines}
    for line in lines:
        answers = rollouts.read(path, line["step"])
        if rollouts.consumption_digest(answers) != line["consumed"]:
            raise CheckFailed(
                f"{path.name}: the answers of step {line['step']} are not those that the log says were taken, or stand "
                "in another order; one of the two was changed"
            )
        for span in (span for r in answers for span in r.versions or ()):
            if policies.get(span["version"]) != span["policy"]:
                raise CheckFailed(
                    f"{path.name}: an answer of step {line['step']} is of the policy {span['policy']} after step "
                    f"{span['version']}, and the log says {policies.get(span['version'])}; one of the two was changed"
                )


def previous_checkpoint(source: Source, key: str) -> str:
    """Returns the published folder of the last checkpoint of the phase before.

    If no phase was before, it is that of the published model that the first phase began with.

    Args:
        source: The release.
        key: The key of the artifact that has the checkpoint.

    Raises:
        CheckFailed: The checkpoint is not published.
    """
    steps = {int(match[1]): file for file in source.listed(key) if (match := STATE.fullmatch(file))}
    if not steps:
        raise CheckFailed(f"the manifest of {key} lists no checkpoint; it was changed")
    # Imported weights are published once, as the model `model-base`, and not again as a checkpoint.
    if source.manifests[key].node == IMPORT and source.place(key, steps[max(steps)]) is None:
        return BASE
    return source.copy(key, steps[max(steps)]).parent.relative_to(source.folder).as_posix()


def inputs(source: Source, files: Mapping[str, str], init: str | None, folder: Path) -> dict[str, Artifact]:
    """Returns the inputs of a phase of post-training.

    Args:
        source: The release.
        files: {role: path in the release}.
        init: The folder of the checkpoint of the phase before; None if the replay does not read it.
        folder: The folder of the replay, which gets a link to that checkpoint in `init`.
    """
    artifacts = {role: Artifact("", "", (source.folder / path).parent, ()) for role, path in files.items()}
    if init is not None:
        step = folder / "init" / "step-000000"
        step.parent.mkdir()
        if init == BASE:
            _import(source, step)
        else:
            # A checkpoint may be large, so it is linked and not copied.
            step.symlink_to(source.folder / init)
        rows = (FileRow(f"{step.name}/{row.path}", row.size, row.sha256) for row in rows_of(step))
        artifacts["init"] = Artifact(init, "", step.parent, tuple(rows))
    return artifacts


def _import(source: Source, step: Path) -> None:
    """Writes the checkpoint that the stage `import` made of the published model, whose copy is `model-base`.

    Raises CheckFailed if the files differ from its manifest.
    """
    from stages.train.imported_weights import ImportConfig, write_checkpoint

    key, body = source.statement(IMPORT)
    config = ImportConfig.model_validate(provenance.parameters_of(body)["config"])
    write_checkpoint(source.folder / BASE, config, step)
    listed, prefix = source.listed(key), f"{step.name}/"
    expected = {path.removeprefix(prefix): digest for path, digest in listed.items() if path.startswith(prefix)}
    written = {row.path: row.sha256 for row in rows_of(step)}
    if written != expected:
        raise CheckFailed(f"{BASE} does not give the weights that {key} lists; the model or the manifest was changed")
