"""The traces of the run of a release.

These are its checkpoints and resumptions, its cost, its smaller models, and the changes since the version before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from pipeline.core import provenance
from pipeline.core.errors import AtomError, Kind
from release import schema
from release.facts.model_facts import ModelFacts, read_model_facts
from release.facts.published_tables import read_json, read_rows
from release.layout import MODEL, RECIPE, REHEARSALS, RELEASE, SIZE, sizes_of, when
from stages.confidence import Figure, Ratio
from stages.train.rehearsal import NAME


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        branch: Its branch of the checkpoint repository.
        phase: The phase.
        step: The step.
        state: Its state.json.
    """

    branch: str
    phase: str
    step: int
    state: dict[str, Any]


@dataclass(frozen=True)
class Intervention:
    """A resumption of a phase from a checkpoint of an earlier run.

    Attributes:
        phase: The phase.
        first: The first step of the earlier run.
        step: Its last step that counts.
        by: The key of the phase in the earlier run.
        changes: (setting, before, after) of the settings that differ afterwards.
    """

    phase: str
    first: int
    step: int
    by: str
    changes: list[tuple[str, Any, Any]]


def read_checkpoints(folder: Path) -> list[Checkpoint]:
    """Returns every published checkpoint of a checkpoint repository with its state, by phase and step."""
    checkpoints = []
    for path in folder.glob("*/state.json"):
        phase, _, step = path.parent.name.rpartition("-step-")
        checkpoints.append(Checkpoint(path.parent.name, phase, int(step), read_json(path)))
    return sorted(checkpoints, key=lambda checkpoint: (when(checkpoint.phase), checkpoint.step))


def index_rows(checkpoints: list[Checkpoint]) -> list[dict[str, Any]]:
    """Returns the content of checkpoints/index.json."""
    return [asdict(checkpoint) for checkpoint in checkpoints]


def context_of(checkpoints: list[Checkpoint], phase: str) -> int:
    """Returns the context length that a phase was trained for, in tokens, from the state of its last checkpoint."""
    states = [checkpoint.state for checkpoint in checkpoints if checkpoint.phase == phase]
    return int(states[-1]["config"]["model"]["context_length"])


def find_interventions(checkpoints: list[Checkpoint]) -> list[Intervention]:
    """Returns all interventions, by phase and step."""
    states = {(checkpoint.phase, checkpoint.step): checkpoint.state for checkpoint in checkpoints}
    sources: dict[tuple[str, int], tuple[str, list[tuple[str, Any, Any]]]] = {}
    for (phase, _), state in sorted(states.items()):
        settings = _settings(state)
        source_key, _, step = settings.pop("continue_from", "").partition("@")
        if source_key:
            previous = _settings(states[phase, int(step)])
            # It names the run to go on from, and is no setting of the training.
            previous.pop("continue_from", None)
            names = sorted(
                name for name in previous.keys() | settings.keys() if previous.get(name) != settings.get(name)
            )
            changes = [(name, previous.get(name), settings.get(name)) for name in names]
            sources[phase, int(step)] = source_key, changes
    interventions = []
    last_steps: dict[str, int] = {}
    for (phase, at), (source_key, changes) in sorted(sources.items(), key=lambda item: (when(item[0][0]), item[0][1])):
        interventions.append(Intervention(phase, last_steps.get(phase, 0) + 1, at, source_key, changes))
        last_steps[phase] = at
    return interventions


def find_optimizers(checkpoints: Iterable[Checkpoint], phases: Collection[str]) -> dict[str, dict[str, Any]]:
    """Returns the settings of the optimizer of each of these phases, from the state of its last checkpoint."""
    configs = {row.phase: row.state.get("config", {}).get("phase", {}) for row in checkpoints if row.phase in phases}
    return {phase: config["optimizer"] for phase, config in configs.items() if "optimizer" in config}


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    config = dict(state.get("config", {}))
    return _flat(config.pop("phase", {})) | _flat(config)


def _flat(config: Any, name: str = "") -> dict[str, Any]:
    """Returns nested settings by dotted names, as in the section of the recipe."""
    if not isinstance(config, dict):
        return {name: config}
    return {k: v for part, value in config.items() for k, v in _flat(value, f"{name}.{part}".strip(".")).items()}


Costs = dict[str, dict[str, float]]
JOULES_PER_WH = 3600.0
COST_COLUMNS = ("attempts", "failed", "core_hours", "gpu_hours", "energy_wh")


@dataclass(frozen=True)
class Rehearsal:
    """The rehearsal of a phase.

    Attributes:
        phase: The phase.
        compared: The published record of the step that was taken before and after a restart.
        statement: The statement about it; None without one.
    """

    phase: str
    compared: dict[str, Any]
    statement: provenance.Statement | None

    @property
    def measured(self) -> provenance.Rehearsed | None:
        """The measurements of its last start; None if no statement has them."""
        starts = [] if self.statement is None else provenance.starts(self.statement)
        return next((start["rehearsed"] for start in reversed(starts) if "rehearsed" in start), None)


def read_rehearsals(root: Path, statements: Iterable[provenance.Statement]) -> list[Rehearsal]:
    """Reads the rehearsals of a release, in the order of their phases."""
    sealed = (body for body in statements if provenance.kind(body) is None)
    statements_of = {provenance.parameters_of(body)["node"]: body for body in sealed}
    files = sorted((root / REHEARSALS).glob("*.json"), key=lambda path: when(path.stem))
    return [Rehearsal(path.stem, read_json(path), statements_of.get(f"{NAME}-{path.stem}")) for path in files]


def usage_by_stage(statements: Iterable[provenance.Statement]) -> Costs:
    """Returns {stage: its cost}, with the stages in alphabetical order.

    A cost is {attempts, failed, core_hours (busy), gpu_hours (allotted), energy_wh (an estimate)}. A release checkpoint
    is part of the attempt that wrote it and is not counted again.
    """
    costs_by_stage: Costs = {}
    for body in statements:
        # A release checkpoint is part of the attempt that wrote it.
        if provenance.phase_of(body) is not None:
            continue
        usage, stage = provenance.usage(body), str(provenance.parameters_of(body)["stage"])
        row = costs_by_stage.setdefault(stage, dict.fromkeys(COST_COLUMNS, 0.0))
        row["attempts"] += 1
        # A rehearsal asks for a restart, which is no failure.
        row["failed"] += provenance.outcome(body) != "sealed" and provenance.kind(body) != Kind.RESTART
        row["core_hours"] += usage.get("cpu_seconds", 0.0) / 3600
        row["gpu_hours"] += usage.get("gpu_seconds", 0.0) / 3600
        row["energy_wh"] += usage.get("energy_joules_estimate", 0.0) / JOULES_PER_WH
    return dict(sorted(costs_by_stage.items()))


def total_cost(costs: Costs) -> dict[str, float]:
    return {column: sum(row[column] for row in costs.values()) for column in COST_COLUMNS}


def cost_rows(costs: Costs) -> list[list[Any]]:
    """Returns cells of a table: one row for each stage, and one for the total."""
    all_rows = {**costs, "all": total_cost(costs)}
    return [
        [name, f"{row['attempts']:.0f}", f"{row['failed']:.0f}", *(f"{row[c]:.3g}" for c in COST_COLUMNS[2:])]
        for name, row in all_rows.items()
    ]


CHANGES_FILE = "evidence/changes.json"
FIGURES = {"bits_per_byte_all": "bits per byte of held-out text", "accuracy_all": "right, in plain text"}


@dataclass(frozen=True)
class Changes:
    """The changes since an earlier version.

    Attributes:
        version: The earlier version.
        settings: (setting of the recipe, before, after), None for none.
        figures: {title: (before, after)} of the final model.
    """

    version: str
    settings: list[tuple[str, Any, Any]]
    figures: dict[str, tuple[Figure, Figure]]


def compare_with_previous(previous: Path, recipe: Mapping[str, Any], model: ModelFacts) -> dict[str, Any]:
    """Returns the content of CHANGES_FILE.

    Args:
        previous: The folder of the earlier release.
        recipe: The recipe of the later one.
        model: The final model of the later one.

    Raises:
        AtomError: The folder is no release.
        CheckFailed: A file of it is damaged.
    """
    if not ((previous / RELEASE).is_file() and (previous / RECIPE).is_file()):
        raise AtomError(f"{previous} is no release folder; --previous takes one that `atom build` made")
    before, after = dict(_leaves(read_json(previous / RECIPE))), dict(_leaves(recipe))
    names = [*before, *(name for name in after if name not in before)]
    old, new = read_model_facts(previous / MODEL).own_scores(), model.own_scores()
    return {
        "version": schema.read_release(previous).version,
        "settings": [
            [name, before.get(name), after.get(name)] for name in names if before.get(name) != after.get(name)
        ],
        "figures": {title: [old[name], new[name]] for name, title in FIGURES.items()},  # type: ignore[literal-required]
    }


def read_changes(release: Path) -> Changes | None:
    """Returns the changes that a release states; None if it states none."""
    if not (release / CHANGES_FILE).exists():
        return None
    body = read_json(release / CHANGES_FILE)
    settings = [(str(name), before, after) for name, before, after in body["settings"]]
    figures = {str(title): (before, after) for title, (before, after) in body["figures"].items()}
    return Changes(str(body["version"]), settings, figures)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (name with dots, value) of every setting; a list is one value, unless it is of sections."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            # A section is compared with the one of its name, wherever it stands in the list.
            label = inner.get("name", number) if isinstance(inner, Mapping) else number
            yield from _leaves(inner, f"{name}.{label}")
    else:
        yield name, value


TRAINING = "evidence/training"
PRETRAIN = "pretrain"
"""The phase with which they are compared: it reads the same rows."""


@dataclass(frozen=True)
class Trained:
    """A model after pre-training.

    Attributes:
        name: The phase.
        settings: Settings of the model that differ from the recipe's; none of the recipe's model itself.
        steps: Optimizer steps.
        tokens: Targets that it read.
        total: Parameters.
        active: Those that are active for one token.
        loss: On held-out rows at the end.
        bits: Bits per byte of the held-out documents; None of a smaller model that is no twin.
        difference: Bits per byte less those of the base model, over the same documents; None as above.
    """

    name: str
    settings: Mapping[str, Any]
    steps: int
    tokens: int
    total: int
    active: int
    loss: float
    bits: Ratio | None = None
    difference: Ratio | None = None

    @property
    def checkpoint(self) -> str:
        """The folder of its last checkpoint, of the size of the release."""
        return f"checkpoints/{self.name}-step-{self.steps}"


def smaller_models(release: Path) -> list[str]:
    """Returns the smaller models with a record of training, in order."""
    return sizes_of(path.parent.name for path in (release / TRAINING).glob("*/summary.json"))


def read_sizes(release: Path) -> list[Trained]:
    """Returns the recipe's model after pre-training, and its smaller ones; none of a release without smaller ones."""
    phases = smaller_models(release)
    stated = read_json(release / RECIPE).get("sizes", []) if phases else []
    settings = {f"{SIZE}-{number}": section["model"] for number, section in enumerate(stated, 1)}
    return [_read_size(release, name, settings.get(name, {})) for name in (PRETRAIN, *phases)] if phases else []


def _read_size(release: Path, name: str, settings: Mapping[str, Any]) -> Trained:
    body = read_json(release / TRAINING / name / "summary.json")
    counts, loss = body["parameters"], float(body["heldout_loss"]["last"])
    trained = Trained(name, settings, body["steps"], body["tokens"], counts["total"], counts["active"], loss)
    evaluation = release / "dataset/evaluation"
    paths = [evaluation / ("base" if each == PRETRAIN else each) / "documents.parquet" for each in (name, PRETRAIN)]
    if not all(path.is_file() for path in paths):
        return trained
    from stages.evaluation.model_evaluation import bits_per_byte

    of_model, of_base = (read_rows(path, ["source", "id", "work", "bytes", "nll_bits"]) for path in paths)
    trained = replace(trained, bits=bits_per_byte(cast(Any, of_model))[1])
    if [(row["id"], row["bytes"]) for row in of_model] != [(row["id"], row["bytes"]) for row in of_base]:
        return trained
    # Paired, so that a document that is hard for both models is no error of the difference.
    pairs = zip(of_model, of_base, strict=True)
    change: Any = [{**row, "nll_bits": row["nll_bits"] - reference["nll_bits"]} for row, reference in pairs]
    return replace(trained, difference=bits_per_byte(change)[1])
