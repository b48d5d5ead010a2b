"""Extensions: a recipe names classes in a folder beside it, in every registry, and their digest is in the keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fixtures import ROOT
from tests.fixtures.run_fixtures import atom

REWARD = """
from stages.rl.protocols import Verifier

class Short(Verifier):
    name, version = "short", "1"

    def score(self, answers):
        return [{"reward": float(response.finished and len(response.answer) < 9)} for row, response in answers]
"""
TASKS = (
    "{source: rows, path: rows.jsonl, digest: 'sha256:" + 64 * "0" + "', verifier: short, kind: words, "
    "license: CC0-1.0, origin: own}"
)
CLASSES = {
    "readers": ("stages.data.acquire.readers.base", "Reader", "reader"),
    "filters": ("stages.data.curate.filters.base", "Filter", "step"),
    "task_sources": ("stages.rl.rollout.task_sources.procedural_tasks", "ProblemTasks", "source"),
    "tools": ("stages.rl.tools.python_program", "PythonTool", "tool"),
    "optimizers": ("stages.mcore.optimizer", "Adam", "kind"),
    "architectures": ("stages.models.mixture", "Qwen3MoeConfig", "architecture"),
}
"""{registry: (module, class and field of the name of one of this project)}: an extension derives from it."""
MODULES = {
    name: f"from typing import Literal\nfrom {module} import {base}\n\n"
    f"class Mine({base}):\n    {tag}: Literal['mine'] = 'mine'\n"
    for name, (module, base, tag) in CLASSES.items()
}
MODULES["samplers"] = """
from stages.generation.samplers import SamplerEntry

Mine = SamplerEntry("stages.generation.in_process:InProcess", promise="bitwise")
"""
MODULES["algorithms"] = "from stages.rl.algorithms.policy_gradient import GRPO as Mine\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The smoke recipe with a verifier and an algorithm from `my_rewards`, which a part of its RL uses."""
    (tmp_path / "my_rewards").mkdir()
    (tmp_path / "my_rewards/length.py").write_text(REWARD)
    for name, module in MODULES.items():
        (tmp_path / f"my_rewards/{name}.py").write_text(module)
    text = (ROOT / "pipeline/recipes/atom-smoke.yaml").read_text()
    extensions = "extensions:\n  verifiers: {short: my_rewards.length.Short}\n"
    extensions += "".join(f"  {name}: {{mine: my_rewards.{name}.Mine}}\n" for name in MODULES)
    path = tmp_path / "own.yaml"
    path.write_text(extensions + text.replace("rlvr:\n", "rlvr:\n  algorithm: mine\n"))
    return path


def keys(recipe: Path, home: Path) -> dict[str, str]:
    rows = json.loads(atom(home, "plan", str(recipe), "--json", cwd=home).stdout)["stages"]
    return {row["name"]: row["key"] for row in rows}


def test_the_digest_of_the_code_is_in_the_keys_of_the_stages_that_use_it(recipe: Path, tmp_path: Path) -> None:
    before = keys(recipe, tmp_path)
    (tmp_path / "my_rewards/length.py").write_text(REWARD.replace("< 9", "< 8"))
    after = keys(recipe, tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert "rlvr" in changed and "export-rlvr" in changed
    assert not changed & {"pretrain", "midtrain", "sft", "tokenize", "acquire-code"}


def test_every_registry_takes_names(recipe: Path, tmp_path: Path) -> None:
    """Each name is used where the recipe names such a thing, and validates with all rules of its section."""
    text = recipe.read_text()
    text = text.replace("model:\n", "model:\n  architecture: mine\n", 1)
    text = text.replace("{source: problems, task: add, levels: [0, 1]", "{source: mine, task: add, levels: [0, 1]")
    text = text.replace("sampling: {max_new_tokens: 48}", "sampling: {max_new_tokens: 48, kind: mine}")
    text = text.replace("optimizer: {lr: 2.0e-4", "optimizer: {kind: mine, lr: 2.0e-4")
    text = text.replace("rlvr:\n", "rlvr:\n  tools: {offered: [{tool: mine}]}\n")
    recipe.write_text(text)
    assert "no mistake" in atom(tmp_path, "validate", str(recipe)).stdout


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("my_rewards.length.Short", "my_rewards.length.Long", "my_rewards.length.Long cannot be imported"),
        ("my_rewards.length.Short", "elsewhere.length.Short", "there is no Python module in"),
        ("verifiers: {short:", "verifiers: {exact:", "extensions.verifiers.exact is a name of this project"),
        ("verifiers: {short:", "rewards: {short:", "extensions.rewards"),
        ("my_rewards.length.Short", "'my rewards'", "import path of a class"),
    ],
)
def test_a_mistake_is_one_sentence(recipe: Path, tmp_path: Path, old: str, new: str, sentence: str) -> None:
    text = recipe.read_text().replace(old, new, 1)
    text = text.replace("{source: problems, task: add, levels: [0, 1], count: 100}", TASKS)
    recipe.write_text(text)
    process = atom(tmp_path, "plan", str(recipe), code=2)
    assert sentence in process.stderr and "Traceback" not in process.stderr
