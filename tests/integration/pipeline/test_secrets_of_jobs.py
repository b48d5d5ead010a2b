"""No secret of whoever runs or submits reaches a stage: by which rule, and as its processes have it on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.core.errors import RecipeError
from pipeline.core.progress import Display
from pipeline.core.stage import Config, Stage
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.dag import Node
from pipeline.graph.run import Run
from pipeline.launch import clean_environment, cluster_profile
from pipeline.launch.batch_script import RunScripts
from pipeline.launch.local import JOB_ENVIRONMENT, LocalLauncher
from tests.fixtures import verdict_fixtures
from tests.fixtures.secret_fixtures import PLANTED, SECRETS

NEEDED = {"NCCL_IB_PKEY": "0x8001", "PYTHONUSERBASE": "/z", "OLDPWD": "/", "SLURM_TOPOLOGY_ADDR_PATTERN": "node",
          "NCCL_SOCKET_IFNAME": "ib0", "CUDA_VISIBLE_DEVICES": "0,1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
          "ATEN_CPU_CAPABILITY": "avx2", "SLURM_JOB_ID": "7", "PYTHONPATH": "/x", "LC_ALL": "C.UTF-8", "ATOM_HOME": "/y",
          "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000", "SLURM_STEP_TASKS_PER_NODE": "1"}  # fmt: skip


OF_SRUN = (
    "HYDRA_BOOTSTRAP", "HYDRA_LAUNCHER_EXTRA_ARGS", "I_MPI_HYDRA_BOOTSTRAP", "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS",
    "PRTE_MCA_plm_slurm_args",
)  # fmt: skip
"""What srun of Slurm 24.11 sets for launchers of MPI."""


def test_names_and_values_decide() -> None:
    assert clean_environment.denied_names(SECRETS) == sorted(SECRETS)
    assert clean_environment.denied_names(NEEDED) == []
    assert clean_environment.denied_names({**JOB_ENVIRONMENT, **dict.fromkeys(OF_SRUN, "ssh")}) == [], "no restart"
    assert clean_environment.denied_names({"BASH_FUNC_module%%": "() { :; }", "my-variable": "x", "EDITOR": "vi"}) != []


def test_the_shell_has_the_same_rule(tmp_path: Path) -> None:
    run = Run("run", tmp_path / "run", {})
    run.folder.mkdir()
    (run.folder / "run.json").touch()  # a node that does not see it runs nothing
    node = Node("stage", Stage("stage", 1, Config, lambda *_: None), Config(), {}, "stage-0")
    script = RunScripts(Store(tmp_path), run, cluster_profile.load("dev").cluster(), tmp_path).of_stage(node, [])
    text = replace(script, forwarded_variables={}, variables={}, srun_options="2> /dev/null; env -0; exit;").text()
    secrets = {
        name: value for name, value in SECRETS.items() if clean_environment.is_secret(name) or name == "TEAM_LOGIN"
    }
    function = {"BASH_FUNC_planted%%": f"() {{ echo {PLANTED}; }}"}
    process = subprocess.run(["bash", "-c", text], env={**secrets, **function, **NEEDED}, capture_output=True)
    assert process.returncode == 0 and not process.stderr, process.stderr
    variables = dict(entry.split("=", 1) for entry in process.stdout.decode().split("\0") if entry)
    assert PLANTED not in process.stdout.decode()
    assert variables.keys() - {"PWD", "SHLVL", "_", "SUBMITIT_EXECUTOR"} == NEEDED.keys() and all(
        variables[name] == NEEDED[name] for name in NEEDED
    )


def test_a_profile_that_would_carry_a_secret_is_refused(tmp_path: Path) -> None:
    text = Path(cluster_profile.__file__).parents[1].joinpath("clusters/dev.yaml").read_text()
    path = tmp_path / "mine.yaml"
    for section, words in (
        ("  forward: [HF_TOKEN]\n", "HF_TOKEN looks like a secret"),
        ("  forward: [MLFLOW_TRACKING_PASSWORD]\n", "~/.mlflow/credentials"),
        ("  forward: [AWS_SECRET_ACCESS_KEY]\n", "no secret reaches a job"),
    ):
        path.write_text(text + section)
        with pytest.raises(RecipeError, match=words) as error:
            cluster_profile.load(str(path))
        assert "\n" not in str(error.value)
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_URI, which a job would take over, looks like a secret"):
        clean_environment.forwarded_variables(SECRETS, ["MLFLOW_TRACKING_URI"])
    assert clean_environment.forwarded_variables({"HOME": "/h", "OTHER": "x"}, ["MINE"]) == {"HOME": "/h"}
    path.write_text(text.replace("environment:\n", "environment:\n    MLFLOW_TRACKING_URI: https://me@host\n"))
    assert cluster_profile.load(str(path)).cluster().environment["MLFLOW_TRACKING_URI"] == "https://me@host"


def test_what_setup_or_an_image_sets_is_dropped_unless_the_profile_names_it(tmp_path: Path) -> None:
    """Once, even where Python itself sets a variable at each start."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['OF_PYTHON'] = 'x'\n")
    code = (
        "import os; from pathlib import Path; from pipeline.launch import clean_environment as c\n"
        "c.require(['MINE', 'MLFLOW_TRACKING_URI']); print('names', *sorted(os.environ))\n"
        "print(Path('/proc/self/environ').read_bytes())"
    )
    root = Path(cluster_profile.__file__).parents[2]
    variables = {
        "MINE": "x",
        "MLFLOW_TRACKING_URI": "https://me@host",
        "OF_IMAGE": "x",
        "PYTHONPATH": f"{tmp_path}:{root}",
    }
    process = subprocess.run(
        [sys.executable, "-c", code], env={**SECRETS, **NEEDED, **variables}, capture_output=True, text=True, check=True
    )
    first, names, block = process.stdout.splitlines()
    dropped = set(first.partition("without ")[2].partition(":")[0].split(", "))
    assert dropped == SECRETS.keys() - {"MLFLOW_TRACKING_URI"} | {"OF_IMAGE"}
    assert set(names.split()[1:]) - {"LC_CTYPE"} == NEEDED.keys() | {"MINE", "MLFLOW_TRACKING_URI"}
    assert PLANTED not in block and PLANTED.replace("-", "") not in block and "OF_IMAGE" not in block


@pytest.mark.parametrize("gpus", ["", "0"])
def test_a_stage_here_has_none(gpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it has the variables that it needs, on GPUs from its start, unless the user has set others."""
    variables = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_ALGO": "Tree", "CUDA_VISIBLE_DEVICES": gpus}
    for name, value in (SECRETS | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", verdict_fixtures.python_path(tmp_path))
    store, graph = Store(tmp_path / "home"), verdict_fixtures.graph(tmp_path / "act", "environment", ranks=1)
    (tmp_path / "act" / "go").touch()
    (name,) = graph.nodes
    run = runs.start(graph, store, [name], "local", {"launcher": "local"})
    LocalLauncher(graph, store, run, [name], cluster_profile.load("local"), Display(Console(quiet=True))).go()
    assert os.environ["HF_TOKEN"] == PLANTED, "what runs the stages keeps its own"
    for role in ("stage", "child"):
        environ = (tmp_path / "act" / f"{role}.environ").read_bytes()
        assert PLANTED.encode() not in environ and PLANTED.replace("-", "").encode() not in environ, environ
        assert b"NCCL_SOCKET_IFNAME=lo" in environ and b"PATH=" in environ
        assert f"CUDA_VISIBLE_DEVICES={gpus}\0".encode() in environ and b"NCCL_ALGO=Tree" in environ
        assert (b"CUDA_DEVICE_MAX_CONNECTIONS=1" in environ) == (bool(gpus) or role == "child")
