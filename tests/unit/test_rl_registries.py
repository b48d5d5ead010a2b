"""The registries of verifiers, samplers, task sources and algorithms: each file is named, and each entry keeps its contract."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.source_code import code_digests
from stages.generation.protocols import Sampler
from stages.generation.samplers import SAMPLERS
from stages.rl.algorithms.policy_gradient import ALGORITHMS, Algorithm
from stages.rl.protocols import (
    TASK_SOURCES,
    TOOLS,
    VERIFIERS,
    TaskSource,
    Tool,
    Verifier,
    make_verifier,
    obstacle,
    verifier_class,
)
from stages.rl.rewards import pooled_verifier
from tests.fixtures import ROOT

FOLDERS: dict[str, tuple[str, Callable[[Any], bool], list[str]]] = {
    "stages/rl/rewards": ("VERIFIERS", lambda x: is_class(x, Verifier) and "name" in vars(x), [*VERIFIERS.values()]),
    "stages/generation": (
        "SAMPLERS",
        lambda x: is_class(x, Sampler),
        [entry.sampler for entry in SAMPLERS.values()],
    ),
    "stages/rl/rollout/task_sources": (
        "TASK_SOURCES",
        lambda x: is_class(x, TaskSource) and "source" in x.model_fields,
        [*TASK_SOURCES.values()],
    ),
    "stages/rl/tools": ("TOOLS", lambda x: is_class(x, Tool), [*TOOLS.values()]),
    "stages/rl/algorithms": ("ALGORITHMS", lambda x: isinstance(x, Algorithm), [*ALGORITHMS.values()]),
}
"""{folder: (its registry, whether a value of a module is an entry, the entries that the registry names)}"""


def is_class(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_registry_name_each_other(folder: str) -> None:
    registry, is_entry, registered = FOLDERS[folder]
    for path in sorted(Path(ROOT, folder).glob("[!_]*.py")):
        module = import_module(f"{folder.replace('/', '.')}.{path.stem}")
        for name, value in vars(module).items():
            if is_entry(value) and (not isinstance(value, type) or value.__module__ == module.__name__):
                place = f"{module.__name__}:{name}"
                assert place in registered, f"{folder}/{path.name} has {name}; add a line to {registry}"
    for place in registered:
        assert is_entry(resolve_name(place)), f"{registry} names {place}, which is no entry"


def test_a_class_has_the_name_of_its_entry() -> None:
    for name in VERIFIERS:
        assert verifier_class(name).name == name
    for name, place in TASK_SOURCES.items():
        assert resolve_name(place).model_fields["source"].annotation.__args__ == (name,)
    for name, place in TOOLS.items():
        assert resolve_name(place).model_fields["tool"].annotation.__args__ == (name,)


@pytest.mark.parametrize("name", sorted(VERIFIERS))
def test_a_verifier_keeps_the_contract(name: str) -> None:
    kind = verifier_class(name)
    assert kind.missing() is None
    if any(field.is_required() for field in kind.Settings.model_fields.values()):
        pytest.skip("a verifier that needs settings is made by its own tests")
    try:
        verifier = make_verifier(name)
    except RecipeError as error:
        assert f"verifier {name}" in str(error), "it lacks an input"
        return
    assert verifier.name == name and verifier.version and verifier.score([]) == []
    verifier.close()


def test_the_reward_model_needs_its_inputs() -> None:
    with pytest.raises(RecipeError, match="which only online_rlhf has; use another reward function"):
        make_verifier("reward-model")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("math", {}, f"no verifier 'math'; there are {', '.join(sorted(VERIFIERS))}"),
        ("exact", {"strict": True}, "verifier exact with the settings {'strict': True}: strict is not a field"),
        ("nemo-gym", {}, "verifier nemo-gym with the settings {}: url is missing (and 1 more)"),
        ("math-verify", {"seconds": 0}, "verifier math-verify with the settings {'seconds': 0}: seconds = 0: input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_wrong_names_and_settings_are_refused_before_a_run(name: str, settings: dict[str, Any], words: str) -> None:
    assert obstacle([name], {name: settings}) == words
    with pytest.raises(AtomError) as refused:
        make_verifier(name, settings)
    assert str(refused.value) == words


def test_a_missing_package_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise pooled_verifier.PackageNotFoundError(package)

    assert obstacle(["exact", "math-verify"], {}) is None
    monkeypatch.setattr(pooled_verifier, "version", version)
    assert (
        obstacle(["exact", "math-verify"], {})
        == "math-verify is not installed; run pip install '.[rl]' in the checkout or in code/ of a release"
    )
    with pytest.raises(AtomError, match="math-verify is not installed"):
        make_verifier("math-verify")


def test_verifiers_are_imported_by_name_and_without_torch() -> None:
    """All of them, as an obstacle asks; and none before."""
    code = """
import sys
from stages.rl import rlvr
from stages.rl.protocols import VERIFIERS, verifier_class
print([place for place in VERIFIERS.values() if place.partition(':')[0] in sys.modules])
for name in VERIFIERS: verifier_class(name)
print([module for module in ("torch", "transformers", "pyarrow", "math_verify", "reasoning_gym") if module in sys.modules])
"""
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    imported, heavy = process.stdout.splitlines()
    assert imported == heavy == "[]"


@pytest.mark.parametrize("stage", ["stages.rl.rollout.tasks", "stages.rl.rlvr", "stages.rl.dpo"])
def test_the_code_digest_of_a_stage_holds_what_its_registries_name(stage: str) -> None:
    """So that `atom plan` shows a changed verifier as stale."""
    places = [*VERIFIERS.values(), *TASK_SOURCES.values()]
    if stage != "stages.rl.rollout.tasks":
        places += [*(entry.sampler for entry in SAMPLERS.values()), *ALGORITHMS.values(), *TOOLS.values()]
    assert {place.partition(":")[0] for place in places} - set(code_digests(stage)) == set()
    assert "stages.graph" not in code_digests(stage)
