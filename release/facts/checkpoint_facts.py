"""The published checkpoints, and the resumptions of training from a checkpoint of an earlier run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from release.facts.published_tables import read_json
from release.layout import when


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint. branch: of the checkpoint repository; state: its state.json."""

    branch: str
    phase: str
    step: int
    state: dict[str, Any]


@dataclass(frozen=True)
class Intervention:
    """A resumption of a phase from a checkpoint of an earlier run, whose phase with key `by` trained the steps `first`
    to `step`. changes: [setting, before, after] of the settings that differ afterwards."""

    phase: str
    first: int
    step: int
    by: str
    changes: list[tuple[str, Any, Any]]


def read_checkpoints(folder: Path) -> list[Checkpoint]:
    """Every published checkpoint with its state, by phase and step. folder: of the checkpoint repository."""
    checkpoints = []
    for path in folder.glob("*/state.json"):
        phase, _, step = path.parent.name.rpartition("-step-")
        checkpoints.append(Checkpoint(path.parent.name, phase, int(step), read_json(path)))
    return sorted(checkpoints, key=lambda checkpoint: (when(checkpoint.phase), checkpoint.step))


def index_rows(checkpoints: list[Checkpoint]) -> list[dict[str, Any]]:
    """The content of checkpoints/index.json."""
    return [asdict(checkpoint) for checkpoint in checkpoints]


def context_of(checkpoints: list[Checkpoint], phase: str) -> int:
    """The context length that a phase was trained for, in tokens, from the state of its last checkpoint."""
    states = [checkpoint.state for checkpoint in checkpoints if checkpoint.phase == phase]
    return int(states[-1]["config"]["model"]["context_length"])


def find_interventions(checkpoints: list[Checkpoint]) -> list[Intervention]:
    """All interventions, by phase and step."""
    states = {(checkpoint.phase, checkpoint.step): checkpoint.state for checkpoint in checkpoints}
    sources: dict[tuple[str, int], tuple[str, list[tuple[str, Any, Any]]]] = {}
    for (phase, _), state in sorted(states.items()):
        settings = _settings(state)
        source_key, _, step = settings.pop("continue_from", "").partition("@")
        if source_key:
            previous = _settings(states[phase, int(step)])
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


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    config = dict(state.get("config", {}))
    return _flat(config.pop("phase", {})) | _flat(config)


def _flat(config: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, as in the section of the recipe."""
    if not isinstance(config, dict):
        return {name: config}
    return {k: v for part, value in config.items() for k, v in _flat(value, f"{name}.{part}".strip(".")).items()}
