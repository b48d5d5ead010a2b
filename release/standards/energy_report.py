"""energy.json: energy by stage, and carbon by the factor that the maker states, with the method of both.

carbon in kg = energy in kWh x overhead x grams of CO2 equivalent per kWh / 1000
"""

from __future__ import annotations

from typing import Any

from release.assembly import costs
from release.standards.standard_facts import StandardFacts

LEFT_OUT = "making of the machines, network, storage, experiments before this run, and use of the model"


def energy(facts: StandardFacts) -> dict[str, Any]:
    """The content of energy.json. Energies are in kWh, carbon in kg of CO2 equivalent, null without a factor."""
    carbon, (counted, attempts) = facts.maker.carbon, facts.counted

    def row(usage: dict[str, float]) -> dict[str, float | None]:
        kwh = usage["energy_wh"] / 1000
        return {
            "attempts": int(usage["attempts"]),
            "failed": int(usage["failed"]),
            "core_hours": usage["core_hours"],
            "gpu_hours": usage["gpu_hours"],
            "energy_kwh": kwh,
            "co2_kg": kwh * carbon.overhead * carbon.grams_per_kwh / 1000 if carbon else None,
        }

    return {
        "measured": False,
        "methods": facts.methods,
        "attempts_with_energy": counted,
        "attempts": attempts,
        "factors": {"carbon": carbon.model_dump() if carbon else None, "stated_by": "maker" if carbon else None},
        "left_out": LEFT_OUT,
        "stages": {stage: row(usage) for stage, usage in facts.costs.items()},
        "total": row(costs.total(facts.costs)),
    }
