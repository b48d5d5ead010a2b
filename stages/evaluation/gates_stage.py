"""Stage `gates`: judges, after a training phase, the gates on its effect, which a release must pass.

    atom run RECIPE --only gates-midtrain

A gate of a release refuses it after all phases are paid for. With `evaluation.stop_at_gates`, the same rule is applied
as soon as a phase is evaluated, and a gate that fails stops the run before the next phase. No later phase reads what
this stage seals, so neither a threshold nor a waiver changes the key of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.core.bounds import Context, Key, Line
from pipeline.core.errors import CheckFailed
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage
from stages.evaluation.gates import OUTCOMES, RULES, Measurements, waived_detail
from stages.evaluation.scores import pass_at_1
from stages.formats.table import stream_rows, write_json

NAME, VERSION = "gates", 2
# Seconds: a handful of small files is read.
ESTIMATE = Estimate(cpu_seconds=5.0, memory_bytes=300_000_000)
POSITIONS = "positions.parquet"
POSITION_COLUMNS = ["source", "first", "last", "tokens", "nll_bits"]


class GatesConfig(Config):
    """The gates that one phase decides, and their thresholds."""

    phase: Key
    """phase after which they are judged"""
    gates: tuple[Key, ...]
    """gates, in the order of the registry"""
    later: dict[Key, Key]
    """gates that cannot be judged yet, and the phase that decides each"""
    models: tuple[Key, ...]
    """models up to the one of the phase, in the order of training"""
    phases: tuple[Key, ...]
    """phases on text up to this one, in the order of training"""
    context: Context
    """context of mid-training, in tokens"""
    thresholds: dict[str, Any]
    """thresholds of the section `evaluation`"""
    waived: Annotated[dict[Key, Line], Field(max_length=len(RULES))]
    """gates that the recipe waives, each with the reason"""


def run(config: GatesConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `gates.json`: {phase, gates: {name: {ok, detail}}, later: {name: phase}}.

    `ok` is null for a gate that the recipe waives, or if there is nothing to judge.

    Args:
        config: The gates.
        inputs: By name of their node, the scores of the models, the orders of the phases on text, and the training of
            a reward model, if it is judged.
        work: Not used.
        out: The artifact.
        report: Receives a line for each gate.

    Raises:
        CheckFailed: A gate failed.
    """
    measured, results = _measurements(config, inputs), dict[str, tuple[bool | None, str]]()
    for name in config.gates:
        judgement = RULES[name].judge(measured, config.thresholds)
        ok, detail = judgement or (None, "there is nothing to judge")
        if name in config.waived:
            ok, detail = None, waived_detail(config.waived[name], detail)
        results[name] = ok, detail
        report.note(f"gate {name}: {OUTCOMES[ok]}, {detail}")
    for name, phase in config.later.items():
        report.note(f"gate {name}: cannot be judged before {phase}")
    if failed := [name for name, (ok, _) in results.items() if ok is False]:
        name, detail = failed[0], results[failed[0]][1]
        others = f" ({', '.join(failed[1:])} failed too)" if failed[1:] else ""
        raise CheckFailed(
            f"after {config.phase}, the gate {name} failed: {detail}{others}; {RULES[name].remedy}, or waive it by "
            f"evaluation.waived_gates: {{{name}: REASON}}, which repeats no phase"
        )
    gates = {name: {"ok": ok, "detail": detail} for name, (ok, detail) in results.items()}
    write_json(out / "gates.json", {"phase": config.phase, "gates": gates, "later": config.later})


def _measurements(config: GatesConfig, inputs: Inputs) -> Measurements:
    """Returns what the inputs say of the models so far."""

    def scores(stage: str) -> dict[str, Any]:
        names = {model: f"{stage}-{model}" for model in config.models}
        return {model: inputs[name].json("scores.json") for model, name in names.items() if name in inputs}

    def positions(model: str) -> Sequence[Mapping[str, Any]]:
        path = inputs[f"evaluate-{model}"] / POSITIONS
        return list(stream_rows(path, POSITION_COLUMNS)) if path.is_file() else []

    orders = {phase: inputs[f"order-{phase}"].json("meta.json")["sources"] for phase in config.phases}
    return Measurements(
        scores=scores("evaluate"),
        # A source of the mix whose share is too small for a row is not read.
        sources={phase: {name for name, facts in of.items() if facts["rows"]} for phase, of in orders.items()},
        pass_at_1=pass_at_1(scores("solve")),
        preferences=scores("prefer"),
        positions=positions,
        context=lambda: config.context,
        reward_model=inputs["reward"].json("summary.json") if "reward" in inputs else None,
    )


STAGE = Stage(NAME, VERSION, GatesConfig, run, estimate=lambda config: ESTIMATE)
