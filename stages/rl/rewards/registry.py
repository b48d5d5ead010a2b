"""The verifiers (reward functions) by name. A new one is a file in this folder and a line here.

The file defines a class derived from `Verifier` (stages/rl/protocols.py), and is imported when a task names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.extensions import extend, imported
from pipeline.core.stage import Config, Inputs
from pipeline.graph.recipe import explain
from stages.rl.protocols import ChatTokenizer, Verifier, VerifierContext
from stages.tasks.rows import Row

# {verifier: its class}. Importing one is cheap; packages are imported when it is constructed.
VERIFIERS = {
    "courtesy": "stages.rl.rewards.frozen_scorer:Courtesy",
    "exact": "stages.rl.rewards.frozen_scorer:Exact",
    "instructions": "stages.rl.rewards.frozen_scorer:Instructions",
    "math-verify": "stages.rl.rewards.pooled_verifier:MathVerify",
    "nemo-gym": "stages.rl.rewards.gym_server:GymServer",
    "python-tests": "stages.rl.rewards.code_verifier:CodeVerifier",
    "reasoning-gym": "stages.rl.rewards.pooled_verifier:ReasoningGym",
    "reward-model": "stages.rl.rewards.reward_model:RewardModel",
}
extend("verifiers", VERIFIERS)


def verifier_class(name: str) -> type[Verifier]:
    """Returns the class of a verifier. Raises RecipeError for an unknown name."""
    if name not in VERIFIERS:
        raise RecipeError(f"no verifier {name!r}; there are {', '.join(sorted(VERIFIERS))}")
    verifier: type[Verifier] = imported(VERIFIERS[name])
    return verifier


def make_verifier(
    name: str,
    settings: Mapping[str, Any] | None = None,
    inputs: Inputs | None = None,
    chat: ChatTokenizer | None = None,
) -> Verifier:
    """Returns the verifier of that name.

    Raises:
        RecipeError: The name or a setting is unknown, or a requirement is missing.
    """
    verifier, validated = _checked(name, settings or {})
    return verifier(VerifierContext(validated, inputs or {}, chat))


def make_verifiers(
    rows: Sequence[Row], inputs: Inputs, chat: ChatTokenizer | None, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Verifier]:
    """Returns the verifiers that tasks name, with their settings by name. Raises as `make_verifier` does."""
    names = sorted({str(row["verifier"]) for row in rows})
    return {name: make_verifier(name, settings.get(name), inputs, chat) for name in names}


def obstacle(names: Iterable[str], settings: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns the reason why a verifier of these names cannot score here, if any."""
    for name in sorted(set(names)):
        try:
            _checked(name, settings.get(name, {}))
        except AtomError as error:
            return str(error)
    return None


def _checked(name: str, settings: Mapping[str, Any]) -> tuple[type[Verifier], Config]:
    """Returns the class of a verifier and its validated settings, without making one. Raises as `make_verifier`."""
    verifier = verifier_class(name)
    try:
        validated = verifier.Settings.model_validate(settings)
    except ValidationError as error:
        title = f"verifier {verifier.name} with the settings {dict(settings)}"
        raise explain(error, verifier.Settings, title) from None
    if reason := verifier.missing():
        raise RecipeError(reason)
    return verifier, validated
