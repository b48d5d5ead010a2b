"""The jobs of servers beside that of their stage: their script, when they end, and what is counted of them."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError, Kind, MachineError
from pipeline.core.stage import Config, ServerPlace, ServerSearch, Stage
from pipeline.core.store import Store
from pipeline.graph import registry
from pipeline.graph.dag import Node
from pipeline.graph.run import Run
from pipeline.launch import clean_environment, job, slurm, submission_lock
from pipeline.launch.attempt import Task
from pipeline.launch.batch_script import BatchScript, RunScripts
from pipeline.launch.cluster_profile import Profile, Slurm
from pipeline.launch.rendezvous import Decision, Verdict
from pipeline.operations import run_actions
from tests.fixtures import batch_fixtures, counting_fixtures, slurm_line_fixtures
from tests.fixtures.batch_fixtures import SLURM, STUBS, end_of, script


def served_node(serve: Any = lambda config, place: None) -> Node:
    stage = Stage("phase", 1, Config, lambda *_: None, trains=True, takes_servers=lambda config: True, serve=serve)
    return Node("rlvr", stage, Config(), {}, "rlvr-0123456789ab")


OF_STAGE, OF_SERVERS = (slurm_line_fixtures.script_path("tiny-1", "rlvr", part) for part in ("", "servers"))
WITH_SERVERS = Slurm.model_validate(
    {**SLURM, "servers": {"partition": "infer", "minutes": 600, "gpus_per_node": 4, "count": 3, "wait_minutes": 2}}
)


def scripts_with_servers(home: Path) -> tuple[BatchScript, BatchScript]:
    """The script of a stage's job, whose first server is job 8, and that of its other servers, if that is job 9."""
    store = Store(home)
    run = batch_fixtures.make_run(store)
    scripts = RunScripts(store, run, WITH_SERVERS, Path("/code"))
    assert WITH_SERVERS.servers is not None
    servers = scripts.of_servers(served_node(), WITH_SERVERS.servers, "1-2", ["after:9"])
    return scripts.of_stage(served_node(), ["4"], server_job="8"), servers


def test_servers_are_an_array_beside_the_job_of_their_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    job_script, servers = scripts_with_servers(Path("/shared/atom"))
    folder = "/shared/atom/logs/tiny-1/rlvr/servers"
    text = servers.text()
    for words in (
        "#SBATCH --array=1-2\n",
        "#SBATCH --dependency=after:9\n",
        "#SBATCH --gpus-per-node=4\n",
        "#SBATCH --nodes=1\n",
        "#SBATCH --ntasks-per-node=1\n",
        "#SBATCH --partition=infer\n",
        "#SBATCH --job-name=atom-rlvr-servers\n",
        "#SBATCH --mem=0\n",
        "#SBATCH --comment='atom tiny-1 rlvr rlvr-0123456789ab.servers'\n",
        f"#SBATCH --output={folder}/submitit/%A_%a_0_log.out\n",
        """jobs=$(squeue -h -u "$(id -un)" -o '%o|%k|' 2> /dev/null) || continue\n""",
        "grep -qF -e /logs/tiny-1/rlvr/submitit/ -e '|atom tiny-1 rlvr rlvr-0123456789ab|' <<< \"$jobs\" && continue\n",
    ):
        assert words in text, words
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "#SBATCH --dependency=afterok:4,after:8\n" in job_script.text()
    assert "ATOM_SERVERS" not in text and 'touch "$ended"' not in job_script.text()
    monkeypatch.setenv("ATOM_SERVERS", job_script.variables["ATOM_SERVERS"])
    assert ServerSearch.of_environment() == ServerSearch(f"{folder}/announced", "tiny-1", 120.0)
    without = script(Slurm.model_validate(SLURM)).text()
    assert "ATOM_SERVERS" not in without and "no server runs" not in without


@pytest.mark.parametrize(
    ("answers", "ends"),
    [
        ([f"{OF_STAGE}|charged to project 42|"], False),
        (["/tmp/copy.sh|atom tiny-1 rlvr rlvr-0123456789ab|"], False),  # the site's sbatch copies scripts
        ([f"{OF_STAGE}|(null)|", f"{OF_SERVERS}|(null)|"], True),  # it has ended, or was canceled
        ([f"{OF_STAGE.replace('tiny-1', 'other-2')}|(null)|"], True),
        ([f"{OF_SERVERS}|atom tiny-1 rlvr rlvr-0123456789ab.servers|"], True),  # that of the servers themselves
        (["exit 1", f"{OF_STAGE}|(null)|"], False),  # the controller is away
    ],
)
def test_servers_end_with_the_job_of_their_stage(
    answers: list[str], ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    _, servers = scripts_with_servers(tmp_path)
    launch = Path(f"{servers.launches_folder}/7.0")
    launch.mkdir(parents=True)
    lines = [answer if "exit 1" in answer else f'echo "{answer}"' for answer in answers]
    replies = "\n".join(f"[ $count = {n} ] && {{ {line}; exit; }}" for n, line in enumerate(lines[:-1], start=1))
    monkeypatch.setitem(STUBS, "squeue", f"echo >> $PLACE/asked; count=$(wc -l < $PLACE/asked)\n{replies}\n{lines[-1]}")
    monkeypatch.setitem(STUBS, "sleep", "case $1 in 120) exec /bin/sleep 20 ;; *) exec /bin/sleep 0.05 ;; esac")
    # the server ends when it sees the file, or after the controller was asked some times
    decide = f"printf 'sealed\\n\\nover\\n' > {launch}/decision; exit 0"
    server = f'[ -e {launch}/ended ] || [ "$(cat $PLACE/asked 2> /dev/null | wc -l)" -ge 5 ]'
    monkeypatch.setitem(
        STUBS, "srun", f"for _ in $(seq 400); do {server} && {{ {decide}; }}; /bin/sleep 0.02; done; exit 9"
    )
    ids = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    assert end_of(tmp_path, servers.text(), **ids) == (0, "")
    assert (launch / "ended").exists() == ends


def slurm_commands(place: Path, monkeypatch: pytest.MonkeyPatch, **lines: str) -> None:
    """Puts shell lines in the place of Slurm's commands, for a submission."""
    (place / "bin").mkdir()
    for name in ("squeue", "sacct", "srun", "scontrol", "scancel", "sbatch"):
        (place / "bin" / name).write_text(f"#!/bin/bash\n{lines.get(name, '')}\n")
        (place / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "require_inputs", lambda *arguments: None)


def test_the_first_server_starts_before_the_stage_and_the_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the ranks hold no nodes while they wait for a server, and one server alone waits for the ranks."""
    noted = "grep -hE '^#SBATCH --(array|dependency|job-name)=' \"${@: -1}\" | sort | tr '\\n' ' '"
    sbatch = f'{{ {noted}; echo; }} >> {tmp_path}/jobs; echo "Submitted batch job $(wc -l < {tmp_path}/jobs)"'
    slurm_commands(tmp_path, monkeypatch, sbatch=sbatch)
    profile = Profile.model_validate({"name": "p", "power": {"watts_per_core": 1}, "slurm": WITH_SERVERS.model_dump()})
    (tmp_path / "home").mkdir()
    store, graph = Store(tmp_path / "home"), counting_fixtures.graph(servers=True)
    run = slurm.submit(graph, store, ["counting"], profile, "p").run
    assert [line.split() for line in (tmp_path / "jobs").read_text().replace("#SBATCH ", "").splitlines()] == [
        ["--array=0", "--job-name=atom-counting-servers"],
        ["--dependency=after:1", "--job-name=atom-counting"],
        ["--array=1-2", "--dependency=after:2", "--job-name=atom-counting-servers"],
    ]
    assert run is not None and run.jobs()["counting"].get("servers") == ["1", "3"]
    assert run_actions.cancel_jobs(run, store) == [], "Slurm has none of them"


@pytest.mark.parametrize(
    ("running", "first", "begins"),
    [("", "PENDING", False), (OF_SERVERS, "PENDING", True), (OF_SERVERS, "", True), ("", "", True)],
    ids=["none runs", "another runs", "the first runs", "the first has ended for good"],
)
def test_a_stage_waits_in_the_queue_while_no_server_runs(
    running: str, first: str, begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a requeue: otherwise its ranks would hold their nodes until a server comes."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    job_script, _ = scripts_with_servers(tmp_path)
    answers = f"""case "$*" in
        *"-t running"*) echo "{running}" ;;
        *"-j 8 -t pending"*) echo "{first}" ;;
        *) echo RUNNING ;;
    esac"""
    monkeypatch.setitem(STUBS, "squeue", answers)
    monkeypatch.setitem(STUBS, "scontrol", 'echo "$*" >> "$PLACE/requeued"')
    monkeypatch.setitem(STUBS, "sleep", "exit 0")
    monkeypatch.setitem(STUBS, "srun", 'touch "$PLACE/began"; exit 9')
    _, asked = end_of(tmp_path, job_script.text())
    assert (tmp_path / "began").exists() == begins
    assert begins or asked == "requeue 7\nupdate jobid=7 dependency=after:8\n"


@pytest.mark.parametrize("full", ["remove", "refuse"])
def test_a_full_disk_does_not_hide_why_a_submission_was_withdrawn(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third sbatch fails, after the stage's job was submitted."""

    def no_space(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    count = f"echo >> {tmp_path}/jobs; count=$(wc -l < {tmp_path}/jobs)"
    sbatch = f'{count}; [ $count -lt 3 ] || {{ echo "no such QOS" >&2; exit 1; }}; echo "Submitted batch job $count"'
    slurm_commands(tmp_path, monkeypatch, sbatch=sbatch, scancel=f'echo "$*" > {tmp_path}/canceled')
    profile = Profile.model_validate({"name": "p", "power": {"watts_per_core": 1}, "slurm": WITH_SERVERS.model_dump()})
    (tmp_path / "home").mkdir()
    store = Store(tmp_path / "home")
    monkeypatch.setattr(*{"remove": (submission_lock, "remove"), "refuse": (Run, "refuse")}[full], no_space)
    with pytest.raises(AtomError, match="no such QOS"):
        slurm.submit(counting_fixtures.graph(servers=True), store, ["counting"], profile, "p")
    assert (tmp_path / "canceled").read_text() == "2 1\n"
    (record,) = store.logs.glob("*/run.json")
    refused = json.loads(record.read_text()).get("refused")
    if full == "remove":
        assert "no such QOS" in refused and "cannot be removed ([Errno 28] No space left on device)" in refused
    else:
        told = capsys.readouterr().err
        assert refused is None and "cannot be marked as refused ([Errno 28]" in told and "no such QOS" in told


def test_a_server_is_started_again_after_it_has_answered_and_else_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(serve: Any, restart: int = 0) -> Verdict | None:
        stage = served_node(serve).stage
        monkeypatch.setattr(registry, "stage", lambda name: stage)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        decision = job.run_server(task, limits)
        verdict = Verdict.read(tmp_path / f"logs/tiny-1/rlvr/servers/ranks/8.{restart}")
        assert verdict is not None and verdict.decision == decision
        return verdict

    def serves(config: Config, place: ServerPlace) -> None:
        assert (place.run, place.number, place.folder.name) == ("tiny-1", 2, "announced") and place.folder.is_dir()
        assert not place.ended()
        (place.log.parent / "ended").touch()
        assert place.ended()

    def dies(config: Config, place: ServerPlace) -> None:
        raise MachineError("it is gone")

    def answers_and_dies(config: Config, place: ServerPlace) -> None:
        place.ready()
        raise MachineError("it is gone")

    def refuses(config: Config, place: ServerPlace) -> None:
        raise AtomError("there is no vLLM")

    def is_stopped(config: Config, place: ServerPlace) -> None:
        signal.raise_signal(signal.SIGUSR2)
        raise AssertionError("the signal did not stop it")

    monkeypatch.setattr(clean_environment, "require", lambda names: None)
    for name, value in {"EXECUTOR": "slurm"}.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    for name, value in {"JOB_ID": "8", "ARRAY_JOB_ID": "6", "ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    task = Task(str(tmp_path), "tiny-1", "rlvr", "phase", {}, {}, "rlvr-0123456789ab", 8.0, 1)
    limits = job.JobLimits(None, 3, 0.0, None)
    assert run(serves) == Verdict(Decision.SEALED, "the stage has ended")
    for restart in range(1, 4):
        assert run(dies, restart) == Verdict(Decision.RESTART, "it is gone", Kind.MACHINE)
    assert run(dies, 4) == Verdict(Decision.FAILED, "it is gone", Kind.MACHINE)
    assert run(answers_and_dies, 90) == Verdict(Decision.RESTART, "it is gone", Kind.MACHINE)
    assert run(refuses, 1) == Verdict(Decision.FAILED, "there is no vLLM", Kind.USER)
    assert run(is_stopped, 50) == Verdict(Decision.RESTART, "interrupted", Kind.STOPPED)
    assert run(dies, 91) == Verdict(Decision.RESTART, "it is gone", Kind.MACHINE), "the first since it answered"
