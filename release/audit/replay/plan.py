"""The plan of a replay: its steps, stage, config, start checkpoint, order and log.

Instead of an order of documents, phases that learn from answers read published answers or pairs, tasks and tokenizer,
and before step 1 the last checkpoint of the phase before. Nothing is sampled or scored again:
`stages.rl.policy.RecordedRollouts` reads the answers as the phase consumed them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import provenance
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import Artifact, FileRow, rows_of
from pipeline.graph import registry
from release.audit.replay.source import Source
from release.layout import BASE, IMPORT, MERGE, WITHOUT_ORDER, when

if TYPE_CHECKING:
    from stages.rl.config import DpoTrainConfig, RewardTrainConfig, RlTrainConfig
    from stages.train.config import TrainConfig

POST_TRAINING = ("rlvr", "dpo", "reward", "distillation")
STAGES = ("pretrain", "midtrain", "sft", "size", *POST_TRAINING)
STATE = re.compile(r"step-([0-9]{1,12})/state\.json")
"""The file of an artifact that every checkpoint in it has."""
FILES = {
    "tasks": "tasks.jsonl",
    "pass_rates": "pass_rates.json",
    "pairs": "pairs.parquet",
    "preferences": "preferences.parquet",
}
"""{role of an input: its published file that training reads}"""
WATCHDOG_SECONDS = 7 * 86_400.0
"""The watchdog timeout of a replay: one process may need long for a step of many ranks, and no rank waits for
another."""


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


def answer_inputs(
    source: Source, files: Mapping[str, str], checkpoints: Mapping[str, str], folder: Path
) -> dict[str, Artifact]:
    """Returns the inputs of a phase of post-training.

    Args:
        source: The release.
        files: {role: path in the release}.
        checkpoints: {role: folder of a checkpoint in the release}, of the phases before that the replay reads.
        folder: The folder of the replay, which gets a link to each checkpoint in a folder of its role.
    """
    artifacts = {role: Artifact("", "", (source.folder / path).parent, ()) for role, path in files.items()}
    for role, checkpoint in checkpoints.items():
        step = folder / role / "step-000000"
        step.parent.mkdir()
        if checkpoint == BASE:
            _import(source, step)
        else:
            # A checkpoint may be large, so it is linked and not copied.
            step.symlink_to(source.folder / checkpoint)
        rows = (FileRow(f"{step.name}/{row.path}", row.size, row.sha256) for row in rows_of(step))
        artifacts[role] = Artifact(checkpoint, "", step.parent, tuple(rows))
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


def select_steps(source: Source, phase: str, first: int | None, last: int | None) -> tuple[int, int]:
    """Returns the steps of the two checkpoints to replay between.

    Step 0 of a phase of post-training is the last checkpoint of the phase before. Raises AtomError with the
    published ones.
    """
    steps_by_phase: dict[str, list[int]] = {}
    for path in source.sums:
        # Averages of checkpoints are not trained.
        if match := re.fullmatch(rf"checkpoints/(?!{MERGE})([a-z0-9-]+)-step-(0|[1-9]\d{{0,11}})/state\.json", path):
            steps_by_phase.setdefault(match[1], []).append(int(match[2]))
    phases = ", ".join(sorted(steps_by_phase, key=when))
    if phase not in steps_by_phase:
        raise AtomError(f"the release has no checkpoints of {phase}; phases that can be replayed: {phases}")
    steps = sorted({*steps_by_phase[phase], *([0] if phase in WITHOUT_ORDER else [])})
    end = steps[-1] if last is None else last
    # -1 is no step, so the message below names those that can be replayed.
    start = max((step for step in steps if step < end), default=-1) if first is None else first
    if start not in steps or end not in steps or start >= end:
        span = f"steps {start}:{end}" if start >= 0 else f"the steps up to {end}"
        raise AtomError(
            f"{span} of {phase} cannot be replayed: its published checkpoints are of steps "
            f"{', '.join(map(str, steps))}; give two of them, the earlier one first"
        )
    return start, end


@dataclass(frozen=True)
class Plan:
    """The training of a phase from the checkpoint of step `first` to that of step `last`, from states and statements.

    Attributes:
        source: The release.
        phase: The phase.
        first: The step of the checkpoint that the replay begins with.
        last: The step of the checkpoint that the replay is compared with.
        stage: The stage that trained the phase.
        config: The config of the phase, with what a replay by one process needs.
        start: The folder of the checkpoint that the replay begins with.
        start_state: Its state.json; None if the phase begins there, with the weights of the phase before.
        reference: The folder of the checkpoint to whose policy a KL term refers, or on which an adapter is trained.
        teacher: The folder of the checkpoint from which the phase distills; None of any other phase.
        end_state: The state.json of the checkpoint that the replay is compared with.
        materials: {role: key} of the phase's inputs.
        environment: {name: value} of the environment in which it was trained.
        ranks: The number of processes that trained it.
        order_files: The files of its order, as paths in the release.
        files: {role: path} of the other files that a phase of post-training reads.
        log: The lines of training.jsonl; none if it is not published.
    """

    source: Source
    phase: str
    first: int
    last: int
    stage: Any
    config: TrainConfig | RlTrainConfig | DpoTrainConfig | RewardTrainConfig
    start: str
    start_state: Mapping[str, Any] | None
    reference: str | None
    teacher: str | None
    end_state: Mapping[str, Any]
    materials: Mapping[str, str]
    environment: Mapping[str, str]
    ranks: int
    order_files: tuple[str, ...]
    files: Mapping[str, str]
    log: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, source: Source, phase: str, first: int, last: int) -> Plan:
        """Reads the plan.

        Raises AtomError if the steps cannot be replayed, CheckFailed if the files contradict each other, and
        KeyError, TypeError, ValueError or AttributeError if a file lacks a field.
        """
        from stages.formats.table import column_names
        from stages.models.parallel_layout import Layout
        from stages.rl.config import RlTrainConfig

        # The state at the end is the published one: it says what the retrained one must be.
        end_state = _checked_state(source, phase, last)
        key, body = _statement_of(source, phase, last)
        materials, run = provenance.material_keys(body), provenance.phase_of(body) or key
        start, start_state = cls.checkpoint(phase, first), None
        if f"{start}/state.json" in source.sums:
            start_state = _checked_state(source, phase, first)
            start_key, start_statement = _statement_of(source, phase, first)
            if run != (provenance.phase_of(start_statement) or start_key) and start_key != materials.get("continue"):
                raise AtomError(
                    f"steps {first}:{last} of {phase} were trained by two runs with different settings; replay up to "
                    "the step where the second run began, and then from there"
                )
        else:
            start = previous_checkpoint(source, materials["init"])
            # `file` raises CheckFailed for a file that differs from its checksum.
            for file in checkpoint_files(source, start):
                source.file(file)
        parameters = provenance.parameters_of(body)
        if (
            parameters["stage"] not in STAGES
            or parameters["node"].split("@")[0] != phase
            or parameters["config"] != end_state["config"]
        ):
            raise CheckFailed(
                f"{cls.checkpoint(phase, last)}/state.json has another config than the statement about {key}"
            )
        # A run may have been resumed with another number of processes.
        layouts = [operation["phase"]["parallelism"] for operation in provenance.operations_of(body)]
        ranks = max(layout["ranks"] for layout in layouts)
        stage = registry.stage(parameters["stage"])
        config: Any = stage.config.model_validate(parameters["config"])
        reference = teacher = None
        if config.phase.adapter or (isinstance(config, RlTrainConfig) and config.phase.kl_coef is not None):
            reference = previous_checkpoint(source, materials["init"])
        if "teacher" in materials:
            teacher = previous_checkpoint(source, materials["teacher"])
        for checkpoint in filter(None, (reference, teacher)):
            for file in checkpoint_files(source, checkpoint):
                source.file(file)
        overrides: dict[str, Any] = {"watchdog_timeout_seconds": WATCHDOG_SECONDS}
        # Nobody resumes a replay, so it needs no checkpoints on the way.
        overrides |= {"checkpoint_interval": config.phase.steps}
        overrides |= {"parallelism": Layout.model_validate(layouts[-1]) if ranks == 1 else Layout()}
        order: list[Path] = []
        first_step = 1
        if "order" in materials:
            order = [source.copy(materials["order"], file) for file in sorted(source.listed(materials["order"]))]
            meta = source.copy(materials["order"], "meta.json")
            first_step = int(json.loads(meta.read_bytes()).get("first_step", 1))
            for path in order:
                # Reads the footer, so that a damaged table is found before the training.
                if path.suffix == ".parquet":
                    column_names(path)
        # Phases of post-training read published answers or pairs instead of an order.
        is_text = stage.name not in POST_TRAINING
        files = {} if is_text else published_files(source, key, stage.name, materials)
        log_path = source.place(key, "training.jsonl")
        log = [json.loads(line) for line in source.file(log_path).read_text().splitlines()] if log_path else []
        if "rollouts" in files and config.phase.is_asynchronous:
            require_same_consumption(source.folder / files["rollouts"], log)
        elif "rollouts" in files:
            require_same_policies(source, files["rollouts"], log)
        if log_path is None and first >= first_step:
            raise AtomError(f"the log of {run} is not in the release; replay it from its first step, {first_step - 1}")
        return cls(
            source=source,
            phase=phase,
            first=first,
            last=last,
            stage=stage,
            config=config.model_copy(update={"phase": config.phase.model_copy(update=overrides)}),
            start=start,
            start_state=start_state,
            reference=reference,
            teacher=teacher,
            end_state=end_state,
            materials=materials,
            environment=environment_values(
                parameters["version"], provenance.code_of(body), provenance.environment_of(body)
            ),
            ranks=ranks,
            order_files=tuple(path.relative_to(source.folder).as_posix() for path in order),
            files=files,
            log=tuple(log),
        )

    @staticmethod
    def checkpoint(phase: str, step: int) -> str:
        """Returns the folder of a published checkpoint."""
        return f"checkpoints/{phase}-step-{step}"

    @property
    def end(self) -> str:
        """The folder of the checkpoint that the replay is compared with."""
        return self.checkpoint(self.phase, self.last)

    @property
    def checkpoints(self) -> dict[str, str]:
        """{role: folder} of the checkpoints of phases before that the replay reads.

        It reads `init`, the one that the phase began with, if it begins there too, has a KL term to it or trains an
        adapter on it.
        """
        init = self.start if self.start_state is None else self.reference
        return {role: place for role, place in {"init": init, "teacher": self.teacher}.items() if place is not None}

    @property
    def mix(self) -> Mapping[str, float]:
        """The shares of the sources whose documents the phase reads; none if it reads no documents."""
        from stages.rl.config import RlPhase
        from stages.train.config import PhaseConfig

        phase = self.config.phase
        if isinstance(phase, RlPhase):
            return phase.replay.mix if phase.replay else {}
        return phase.mix if isinstance(phase, PhaseConfig) else {}

    @property
    def data_files(self) -> tuple[str, ...]:
        """The published data that the phase reads, as paths in the release."""
        return (*self.order_files, *self.files.values())

    def order(self) -> Artifact:
        """Returns the published order, in its folder of the release."""
        return Artifact(self.materials["order"], "", (self.source.folder / self.order_files[0]).parent, ())


def checkpoint_files(source: Source, checkpoint: str) -> dict[str, str]:
    """Returns {path: SHA-256} of a published checkpoint: its tensors, their index if they are split, and state.json."""
    digests = source.digests(checkpoint)
    return {path: digest for path, digest in digests.items() if path.endswith((".safetensors", ".json"))}


def environment_values(version: int, code: Mapping[str, str], description: Mapping[str, Any]) -> dict[str, str]:
    """Returns {name: value} of an environment, the most important first.

    Args:
        version: The version of the stage.
        code: {module: SHA-256} of its code.
        description: The environment as statements describe it.
    """
    values = {"stage version": str(version), "python": description["python"]}
    values |= {f"device {name}": str(value) for name, value in sorted(description["device"].items())}
    values |= {f"code of {name}": digest[:12] for name, digest in sorted(code.items())}
    return values | dict(sorted(description["packages"].items()))


def _checked_state(source: Source, phase: str, step: int) -> dict[str, Any]:
    """Returns state.json of a checkpoint whose files all have their checksums.

    Raises CheckFailed if it is of another step.
    """
    checkpoint = Plan.checkpoint(phase, step)
    for path in checkpoint_files(source, checkpoint):
        source.file(path)
    state: dict[str, Any] = source.json(f"{checkpoint}/state.json")
    if (state["phase"], state["step"]) != (phase, step):
        raise CheckFailed(f"{checkpoint}/state.json is of step {state['step']} of {state['phase']}")
    return state


def _statement_of(source: Source, phase: str, step: int) -> tuple[str, provenance.Statement]:
    """Returns (key, statement) of the artifact that a published checkpoint comes from."""
    return source.statement(source.origins[f"{Plan.checkpoint(phase, step)}/state.json"]["artifact"])
