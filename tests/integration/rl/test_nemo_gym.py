"""NeMo Gym itself scores the rows that a release publishes, by three of its resources servers, and validates their form.

NeMo Gym wants Python 3.12 or newer and an environment of its own: `make test-nemo` makes one and names its interpreter
in ATOM_NEMO_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.formats.table import read_jsonl, write_jsonl
from stages.rl.protocols import Response, make_verifier
from stages.rl.rollout import tasks
from stages.tasks import eval_set
from tests.fixtures import chat_fixtures
from tests.fixtures.verifier_fixtures import GET, INCREMENT, counter_answer, counter_row

PYTHON = os.environ.get("ATOM_NEMO_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="NeMo Gym needs an environment of its own; see `make test-nemo`")

# A resources server without Ray, which only its own launcher wants.
SERVER = """
import importlib, json, socket, sys
from unittest.mock import MagicMock
import uvicorn
from nemo_gym.server_utils import ServerClient
name, settings = sys.argv[1], json.loads(sys.argv[2])
app = vars(importlib.import_module(f"resources_servers.{name}.app"))
own = [v for v in app.values() if isinstance(v, type) and v.__module__.startswith("resources_servers.")]
config = next(v for v in own if v.__name__.endswith("ResourcesServerConfig"))
server = next(v for v in own if v.__name__.endswith("ResourcesServer"))
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
given = config(host="127.0.0.1", port=port, entrypoint="", name=name, **settings)
made = server(config=given, server_client=MagicMock(ServerClient))
print("listens at", port, flush=True)
uvicorn.Server(uvicorn.Config(made.setup_webserver(), log_level="warning")).run(sockets=[listener])
"""
JUDGE = {
    "should_use_judge": False,
    "library_verifier_timeout_seconds": 300,  # an answer that takes longer has the reward 0, also on a busy machine
    "judge_model_server": {"type": "responses_api_models", "name": "none"},
    "judge_responses_create_params": {"input": []},
}
CONFIG = """
atom_tasks:
  resources_servers:
    equivalence_rule: {entrypoint: app.py, grading_rule: exact, domain: math, verified: false}
atom_tasks_simple_agent:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      resources_server: {type: resources_servers, name: atom_tasks}
      model_server: {type: responses_api_models, name: policy_model}
      datasets: [{name: example, type: example, jsonl_fpath: resources_servers/atom_tasks/data/example.jsonl}]
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """serve(name of a resources server, **its settings) -> its address."""
    (tmp_path / "server.py").write_text(SERVER)
    running: list[subprocess.Popen[str]] = []

    def start(name: str, **settings: Any) -> str:
        command = [str(PYTHON), "server.py", name, json.dumps(settings)]
        env = {**os.environ, "HOME": str(tmp_path)}
        running.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True))
        lines = iter(running[-1].stdout or ())
        port = next((line.split()[-1] for line in lines if line.startswith("listens at")), None)
        assert port, f"{name} did not start"
        return f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Rows as the stage seals them and a release publishes them: two kinds of its own, two of reasoning-gym."""
    sources: list[dict[str, Any]] = [
        {"source": "problems", "task": task, "levels": [2, 3], "count": 3} for task in ("add", "sort")
    ]
    sources += [{"source": "reasoning-gym", "dataset": name, "count": 3} for name in ("gcd", "spell_backward")]
    items = chat_fixtures.sealed(eval_set.STAGE, chat_fixtures.ITEMS, {}, tmp_path / "items")
    artifact = chat_fixtures.sealed(tasks.STAGE, {"sources": sources, "seed": 0}, {"items": items}, tmp_path / "tasks")
    return tasks.read(artifact)


def answers_to(row: dict[str, Any]) -> list[str]:
    right = row.get("expected_answer") or row["answer"]
    return [right, f"<think>{right}</think>\n{right}", f"{right} 1", "", "x" * 2000, "\x00{}[]\ud800"]


def test_its_servers_give_the_rewards_that_our_verifiers_give(rows: list[dict[str, Any]], serve) -> None:
    servers = {
        "exact": [("equivalence_rule", serve("equivalence_rule"))],
        "reasoning-gym": [("reasoning_gym", serve("reasoning_gym"))],
    }
    compared = 0
    for name, known in servers.items():
        scorer = make_verifier(name)
        answers = [
            (row, Response.parse(text, True)) for row in rows if row["verifier"] == name for text in answers_to(row)
        ]
        expected = [parts["reward"] for parts in scorer.score(answers)]
        scorer.close()
        assert {0.0, 1.0} <= set(expected)
        for server, url in known:
            scores = make_verifier("nemo-gym", {"url": url, "serves": f"nemo-gym 0.7.0 {server}"}).score(answers)
            assert [parts["reward"] for parts in scores] == expected, server
            compared += len(scores)
    assert compared == len(rows) * 6


def test_its_mathematics_accepts_the_right_sums(rows: list[dict[str, Any]], serve) -> None:
    """Since 0.7 it reads what stands in the last \\boxed{}, and nothing else."""
    sums = [row for row in rows if row["kind"] == "add"]
    url = serve("math_with_judge", **JUDGE)
    scorer = make_verifier("nemo-gym", {"url": url, "serves": "nemo-gym 0.7.0 math_with_judge"})
    forms = {"right": "\\boxed{%s}", "wrong": "\\boxed{%s1}", "without a box": "%s"}
    answers = [(row, Response.parse(form % row["expected_answer"], True)) for form in forms.values() for row in sums]
    rewards = [parts["reward"] for parts in scorer.score(answers)]
    assert dict(zip(forms, zip(*[iter(rewards)] * 6, strict=True), strict=True)) == {
        "right": (1.0,) * 6, "wrong": (0.0,) * 6, "without a box": (0.0,) * 6
    }  # fmt: skip


def test_its_environments_answer_in_turns_and_score(serve, tmp_path: Path) -> None:
    url = serve("example_session_state_mgmt")
    requests = [[INCREMENT], [INCREMENT.replace("1", "2"), GET], [INCREMENT.replace("1", '"x"')]]
    _, turns = counter_answer(url, requests)
    calls = [call for turn in turns for call in turn]
    assert [call["status"] for call in calls] == ["ok", "ok", "ok", "error"]
    assert [json.loads(call["result"]) for call in calls[:3]] == [{"success": True}, {"success": True}, {"count": 6}]
    assert "valid integer" in calls[3]["result"]
    answer = replace(Response.parse("6", True), earlier=tuple(("", calls) for calls in turns))
    verifier = make_verifier("nemo-gym", {"url": url, "serves": "nemo-gym 0.7.0 example_session_state_mgmt"})
    assert [verifier.score([(counter_row(n), answer)])[0]["reward"] for n in (6, 7)] == [1, 0]


def test_its_own_validation_accepts_our_rows(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = tmp_path / "resources_servers/atom_tasks"
    (folder / "data").mkdir(parents=True)
    (folder / "atom_tasks.yaml").write_text(CONFIG)
    sample = [row for row in rows if row["verifier"] == "exact"][:5]  # as many as an example file has
    write_jsonl(folder / "data/example.jsonl", sample)
    command = [str(Path(str(PYTHON)).with_name("gym")), "dataset", "collate", "--mode", "example_validation"]
    command += ["--config", str(folder / "atom_tasks.yaml"), "--model-type", "vllm_model", "--output-dir", "out"]
    env = {**os.environ, "HOME": str(tmp_path)}
    process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    examples = read_jsonl(tmp_path / "out/example.jsonl")
    # since 0.7 the rows name the instance that declares them, and no agent
    assert examples == [{**row, "task_source": "atom_tasks_simple_agent"} for row in sample]
