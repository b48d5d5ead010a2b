"""The scripts of Slurm jobs: what sbatch reads of each profile, and what the shell does with the job at its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from submitit.core.utils import DelayedSubmission

from pipeline.core import json_files
from pipeline.core.errors import AtomError, Failure, Kind, MachineError, RecipeError
from pipeline.core.stage import Config, ServerPlace, ServerSearch, Stage
from pipeline.core.store import Store
from pipeline.graph import recipe, registry
from pipeline.graph.dag import Graph, Node
from pipeline.graph.run import Run
from pipeline.launch import bad_nodes, clean_environment, cluster_profile, job, local, slurm
from pipeline.launch.attempt import ALIVE, Task, server_seconds
from pipeline.launch.batch_script import BatchScript, batch_script, servers_script
from pipeline.launch.cluster_profile import Changes, Slurm
from pipeline.launch.decision import Decision, Verdict
from pipeline.launch.diagnoses import NO_PYTHON

SLURM = {"cpu": {"partition": "cpu", "minutes": 60}, "train": {"partition": "gpu", "minutes": 90}}
OF_PROFILES = {
    "dev": ["#SBATCH --partition=test", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --requeue"],
    "h100-pyxis": [
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --exclusive",
        "#SBATCH --account=llm",
        "--kill-on-bad-exit=1 --container-image=/shared/images/atom.sqsh "
        "--container-mounts=/shared/atom:/shared/atom,/tmp:/tmp,/shared:/shared "
        "/opt/atom/venv/bin/python -u -m submitit.core._submit",
        "export ATOM_VLLM_PYTHON=/opt/atom/vllm/bin/python\n",
    ],
    "h100-apptainer": [
        "module load apptainer",
        "--kill-on-bad-exit=1 apptainer exec --nv --bind "
        "/shared/atom:/shared/atom,/scratch/local:/scratch/local,/shared:/shared "
        "/shared/images/atom.sif /opt/atom/venv/bin/python -u -m submitit.core._submit",
    ],
    "h100-modules": [
        "--kill-on-bad-exit=1 /shared/envs/atom/bin/python -u -m submitit.core._submit",
        "#SBATCH --constraint=h100",
        "#SBATCH --exclude='node[013,027]'",
        "#SBATCH --signal=USR2@300",
        "module load cuda/12.8\ncheck_setup $? 'module cuda/12.8'\nmodule load nccl\n",
        "export NCCL_SOCKET_IFNAME=ib0\n",
        "ulimit -n 65536\n",
    ],
}


def node(ranks: int, trains: bool = True, gpus: int = 0) -> Node:
    stage = Stage(
        "phase", 1, Config, lambda *_: None, ranks=lambda config: ranks, trains=trains, gpus=lambda config: gpus
    )
    return Node("pretrain", stage, Config(), {}, "pretrain-0123456789ab")


def script(settings: Slurm, home: str | Path = "/shared/atom", ranks: int = 2, **options: Any) -> BatchScript:
    store = Store(Path(home))
    run = Run("tiny-1", store.logs / "tiny-1", {})
    return batch_script(
        store,
        run,
        node(ranks, options.pop("trains", True), options.pop("gpus", 0)),
        settings,
        Path("/code"),
        **{"dependencies": [], **options},
    )


def test_a_stage_that_asks_for_gpus_gets_them_and_their_cores() -> None:
    jobs = {"partition": "eval", "minutes": 30, "gpus_per_node": 8, "cpus_per_task": 12, "memory_gb": 256}
    options = script(Slurm.model_validate({**SLURM, "gpu": jobs}), ranks=1, trains=False, gpus=4).sbatch_options
    names = ("partition", "gpus-per-node", "ntasks-per-node", "cpus-per-task", "mem", "time")
    assert [options[name] for name in names] == ["eval", 4, 1, 48, "262144M", 30]
    train = SLURM["train"] | {"gpus_per_node": 8}
    options = script(Slurm.model_validate({**SLURM, "train": train}), ranks=1, trains=False, gpus=4).sbatch_options
    assert (options["partition"], options["gpus-per-node"]) == ("gpu", 4), "without a section of their own"


def test_a_stage_in_an_unpacked_image_sees_the_places_of_the_profile() -> None:
    container = {"kind": "bubblewrap", "image": "/images/atom", "mounts": ["/data", "/a:/b"], "python": "/venv/python"}
    text = script(Slurm.model_validate({**SLURM, "container": container, "scratch": "/scratch"})).text()
    (command,) = re.findall(r"--kill-on-bad-exit=1 (env .*) -u -m submitit", text)
    words = command.split()
    places = [(words[i + 1], words[i + 2]) for i, word in enumerate(words) if word == "--dev-bind"]
    assert {("/shared/atom", "/shared/atom"), ("/scratch", "/scratch"), ("/data", "/data"), ("/a", "/b")} < set(places)
    assert (
        words[3:8] == ["bwrap", "--overlay-src", "/images/atom", "--tmp-overlay", "/"] and words[-1] == "/venv/python"
    )


def test_the_script_of_a_job_word_by_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/usr/bin:/bin", "SITE": "north wing", "EDITOR": "vi"})
    settings: dict[str, Any] = {
        "python": "/envs/atom/bin/python", "forward": ["SITE"], "environment": {"A": "it's"},
        "restarts_in_allocation": 0,
    }  # fmt: skip
    text = script(Slurm.model_validate({**SLURM, **settings}), dependencies=["7", "8"]).text()
    head, _, rest = text.partition("\n# The stage gets no secret")
    assert (
        head
        == """#!/bin/bash
#SBATCH --chdir=/shared/atom
#SBATCH --comment='atom tiny-1 pretrain pretrain-0123456789ab'
#SBATCH --cpus-per-task=1
#SBATCH --dependency=afterok:7:8
#SBATCH --export=NIL
#SBATCH --job-name=atom-pretrain
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/shared/atom/logs/tiny-1/pretrain/submitit/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=90
"""
    )
    _, _, body = rest.partition("\nkeep_allowed_variables\n")
    body, _, rest = body.partition("say() {")  # the functions that explain a failure: test_bad_nodes.py
    assert (
        body
        == """export PATH=/usr/bin:/bin
export SITE='north wing'

export ARROW_DEFAULT_MEMORY_POOL=jemalloc
export OMP_NUM_THREADS=1
export MKL_NUM_THREADS=1
export OPENBLAS_NUM_THREADS=1
export RAYON_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false
export PYTHONHASHSEED=0
export PYTHONUTF8=1
export HF_HUB_OFFLINE=1
export HF_HUB_DISABLE_TELEMETRY=1
export HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
export PYTHONPATH=/code
export PYTHONSAFEPATH=1
export ATOM_HOME=/shared/atom
export A='it'"'"'s'

job=$SLURM_JOB_ID
start=${SLURM_RESTART_COUNT:-0}
launches=/shared/atom/logs/tiny-1/pretrain/ranks/$SLURM_JOB_ID
may_restart=
restarts_left() { # whether another start may follow one without progress
    [ "$start" -lt 3 ]
}
begin_launch() { # FOLDER
    launch=$1
    mkdir -p "$launch"
    messages=$launch/srun
    : > "$messages" || messages=$(mktemp)  # the home folder may be full
}
previous=$(find "$launches.$((start - 1))" "$launches.$((start - 1))".* -maxdepth 0 2> /dev/null | sort -V | tail -n 1)
begin_launch "$launches.$start"

"""
    )
    assert (
        rest.partition("\n}\n\nexport")[2]
        == """ SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/atom/logs/tiny-1/pretrain/submitit/%j_%t_log.out --export=ALL --cpus-per-task=1 --kill-on-bad-exit=1 /envs/atom/bin/python -u -m submitit.core._submit /shared/atom/logs/tiny-1/pretrain/submitit 2> "$messages"
exit_code=$?
cat "$messages" >&2

# What rank 0 decided is done. If it left no decision, the job is started again: 3 times, and as long as
# rank 0 began in one of the last starts.
decision=$(head -n 1 "$launch/decision" 2> /dev/null)
kind=$(sed -n 2p "$launch/decision" 2> /dev/null)
outcome=$(tail -n +3 "$launch/decision" 2> /dev/null)
[ "$decision" = relaunch ] && decision=again

restarts_left && may_restart=yes
for n in $(seq 0 3); do [ -e "$launches.$((start - n))/started-0" ] && may_restart=yes; done
{ [ -z "$decision" ] || { [ "$decision" = again ] && ran_out_of_memory; }; } && explain
case $decision in sealed | done) ;; *) blame_lost ;; esac

if [ "$decision" = again ]; then
    # A job that Slurm itself has ended (scancel, requeue) is no longer RUNNING. A controller that is down is awaited.
    for _ in $(seq 60); do
        state=$(squeue -h -j "$job" -o %T 2>&1) && break
        case $state in *Invalid*) break ;; esac
        sleep 5
    done
    avoided_nodes
    # Slurm takes a list of excluded nodes only of a job that waits: right after it is queued again, while it ends this
    # start, which the update must survive. The next start is seconds later.
    terminated=
    trap 'terminated=yes' TERM
    if [ "$state" = RUNNING ] && scontrol requeue "$job"; then
        [ ! -e "$launches-avoided" ] || (
            trap '' TERM
            message=$(scontrol update "jobid=$job" "excnodelist=$avoided" 2>&1) ||
                echo "Slurm did not take the nodes to avoid, ${avoided:-none}, for the next start ($message)" |
                tee -a "$launches-kept"
        )
        trap - TERM
        [ -n "$terminated" ] || sleep 300  # until Slurm ends this start
    fi
    exit 1
fi

[ "$decision" = sealed ] || [ "$decision" = done ] && exit 0
[ "$kind" = check ] && exit 1
exit 2
"""
    )


@pytest.mark.parametrize("name", OF_PROFILES)
@pytest.mark.parametrize("tasks", [0, 3])
def test_each_profile_asks_for_its_own(name: str, tasks: int) -> None:
    text = script(cluster_profile.load(name).cluster(), tasks=tasks).text()
    assert [words for words in OF_PROFILES[name] if words not in text] == [], text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_what_is_not_asked_for_is_not_there() -> None:
    text = script(Slurm.model_validate(SLURM), trains=False, ranks=1).text()
    assert "#SBATCH --partition=cpu\n" in text and "#SBATCH --time=60\n" in text
    for words in (
        "gpus-per-node",
        "#SBATCH --mem",
        "exclusive",
        "account",
        "#SBATCH --dependency",
        "array",
        "module load",
        "ATOM_OUTCOME",
    ):
        assert words not in text, words


def test_an_array_has_its_own_folder_and_ids() -> None:
    settings = Slurm.model_validate({**SLURM, "array_tasks": 256, "notify": "mail me"})
    text = script(settings, tasks=1000).text()
    folder = "/shared/atom/logs/tiny-1/pretrain/shards"
    for words in (
        "#SBATCH --array=0-999%256\n",
        f"#SBATCH --output={folder}/submitit/%A_%a_0_log.out\n",
        f"--output {folder}/submitit/%A_%a_%t_log.out ",
        "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID\n",
        '[ -e "$launch/further" ] && may_restart=yes\n',
        f"mkdir {folder}/notified 2> /dev/null; then\n",
    ):
        assert words in text, words
    assert "#SBATCH --array=0-2%3\n" in script(settings, tasks=3).text()
    throttled = settings.model_copy(update={"stages": {"pre*": Changes(array_tasks=8)}})
    assert "#SBATCH --array=0-999%8\n" in script(throttled, tasks=1000).text()


def test_ranks_that_do_not_fill_nodes_are_refused() -> None:
    settings = Slurm.model_validate({**SLURM, "train": {**SLURM["train"], "tasks_per_node": 8}})
    with pytest.raises(RecipeError, match="12 ranks, which do not fill nodes of 8"):
        script(settings, ranks=12)


def test_preemptions_of_an_array_task_are_no_failed_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a preemptible partition a task is started again and again by Slurm itself, and may then still fail."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    batch = script(Slurm.model_validate(SLURM), tmp_path, tasks=3)
    launches = batch.launches_folder
    for start in range(9):  # Slurm preempted them: no decision, or that of a stop
        (launches / f"7.{start}").mkdir(parents=True)
        (launches / f"7.{start}/started-0").write_text("n1\n")
    Verdict(Decision.RESTART, "interrupted", Kind.STOPPED).write(launches / "7.3")
    ids = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2"}
    assert end_of(tmp_path, batch.text(), 9, **ids) == (1, "requeue 6_2\n")
    for start in (4, 5):
        Verdict(Decision.RESTART, "its node failed", Kind.MACHINE).write(launches / f"7.{start}")
    code, requeued = end_of(tmp_path, batch.text(), 10, **ids)
    assert (code, requeued) == (2, "requeue 6_2\n"), "the third failed start was the one before"
    assert job._failed_starts(launches / "7.10") == 3


STUBS = {
    "srun": 'case "$*" in *"sh -c echo"*) echo n1; exit ;; esac; env -0 > "$PLACE/environment"; exit 9',
    "squeue": "echo RUNNING",
    # the script would wait 300 s for Slurm to end it
    "scontrol": '[ "$1" = show ] && { echo n1; exit; }; echo "$*" >> "$PLACE/requeued"; exit 1',
    "sbatch": "exit 0",
}


def end_of(home: Path, text: str, start: int = 0, **variables: str) -> tuple[int, str]:
    """Runs a script with commands in the place of Slurm's. Returns its exit code, and what it asked scontrol for."""
    commands = home / "bin"
    commands.mkdir(exist_ok=True)
    for name, line in STUBS.items():
        (commands / name).write_text(f"#!/bin/bash\nPLACE={home}\n{line}\n")
        (commands / name).chmod(0o755)
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(start)}
    code = subprocess.run(["bash", "-c", text], env={**environment, **variables}, stderr=subprocess.DEVNULL).returncode
    requeued = home / "requeued"
    return code, requeued.read_text() if requeued.exists() else ""


@pytest.mark.parametrize(
    ("decision", "starts", "end"),
    [
        ("sealed\n\nsealed\n", 0, (0, "")),
        ("done\n\nsealed\n", 0, (0, "")),
        ("failed\nuser\nrecipe r: no\n", 0, (2, "")),
        ("failed\ncheck\nother weights\n", 0, (1, "")),
        ("again\nmachine\nits node failed\n", 0, (1, "requeue 7\n")),
        (None, 0, (1, "requeue 7\n")),
        (None, 3, (2, "")),
    ],
    ids=["sealed", "done", "user", "check", "again", "no decision", "no decision, often"],
)
def test_what_rank_0_decided_is_done(
    decision: str | None, starts: int, end: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    notify = f'echo "$ATOM_RUN $ATOM_STAGE: $ATOM_OUTCOME" >> {tmp_path}/notes'
    batch = script(Slurm.model_validate({**SLURM, "notify": notify}), tmp_path)
    if decision is not None:
        launch = Path(f"{batch.launches_folder}/7.{starts}")
        launch.mkdir(parents=True)
        (launch / "decision").write_text(decision)
    assert end_of(tmp_path, batch.text(), starts) == end
    notes = (tmp_path / "notes").read_text() if (tmp_path / "notes").exists() else ""
    is_over = decision is None or not decision.startswith(("sealed", "again"))
    expected = (
        decision.split("\n", 2)[2] if decision else f"{NO_PYTHON.text(nodes='n1', detail='it printed nothing')}\n"
    )
    assert notes == (f"tiny-1 pretrain: {expected}" if is_over and not end[1] else "")


def launched(
    home: Path, outcomes: str, answer: str, nodes: str = "n1 n2", says: str = "", **settings: Any
) -> tuple[list[str], str]:
    """Runs the script of a job whose launches end with these decisions, `-` for none, one after the other.

    answer: of squeue. nodes: those that answer. says: what srun reports of each launch. Returns the options of srun for
    each launch after the first one, and what scontrol is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{home / 'bin'}:/usr/bin:/bin")
        batch = script(Slurm.model_validate({**SLURM, **settings}), home)
    (home / "outcomes").write_text("\n".join(outcomes.split()) + "\n")
    (home / "answering").write_text("".join(f"{node}\n" for node in nodes.split()))
    line = f"""case "$*" in
        *pipeline.launch.job*)  # Python starts
            out=$(grep -o -- '--output [^ ]*-%t' <<< "$*"); sed "s/^/ready /" $PLACE/answering > "${{out#--output }}"
            exit 0 ;;
        *SLURMD_NODENAME*) cat $PLACE/answering; exit 0 ;;
        *"scontrol requeue"*) exit 0 ;;  # which watches the first node
    esac
    echo "$ATOM_RELAUNCH $*" >> $PLACE/launched
    echo "{says}" >&2
    launch={batch.launches_folder}/7.0${{ATOM_RELAUNCH:+.$ATOM_RELAUNCH}}
    mkdir -p $launch; touch $launch/started-0
    outcome=$(sed -n $(wc -l < $PLACE/launched)p $PLACE/outcomes)
    [ "$outcome" = - ] || printf '%s\\n\\nas it is\\n' $outcome > $launch/decision
    exit 1"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUBS, "srun", line)
        patch.setitem(STUBS, "squeue", f"""case "$*" in *EndTime*) echo "{answer}" ;; *) echo RUNNING ;; esac""")
        _, requeued = end_of(home, batch.text(), SLURM_JOB_NUM_NODES="2")
    first, *others = (home / "launched").read_text().splitlines()
    assert first.startswith(" --unbuffered") and "--overlap" not in first
    return [re.sub(r" --unb.*bad-exit=1| \S+ -u -m.*", "", each) for each in others], requeued


LATER, SOON = (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds)) for seconds in (3600, 170))


@pytest.mark.parametrize(
    ("outcomes", "answer", "launches", "requeued"),
    [
        ("relaunch sealed", f"RUNNING N/A {LATER} 2", 1, ""),
        ("relaunch relaunch relaunch relaunch", f"RUNNING N/A {LATER} 2", 3, "requeue 7\n"),
        ("- - sealed", f"RUNNING N/A {LATER} 2", 1, "requeue 7\n"),
        ("- relaunch - sealed", f"RUNNING N/A {LATER} 2", 3, ""),
        ("failed", f"RUNNING N/A {LATER} 2", 0, ""),
        ("again", f"RUNNING N/A {LATER} 2", 0, "requeue 7\n"),
        ("relaunch sealed", f"RUNNING N/A {SOON} 2", 0, "requeue 7\n"),
        ("relaunch sealed", f"RUNNING {LATER} {LATER} 2", 0, "requeue 7\n"),
        ("relaunch sealed", f"COMPLETING N/A {LATER} 2", 0, "requeue 7\n"),
        ("relaunch sealed", "", 0, "requeue 7\n"),
    ],
    ids=["once", "limit", "unknown", "mixed", "final", "stopped", "late", "preempted", "canceled", "controller"],
)
def test_ranks_start_again_in_the_same_allocation(
    outcomes: str, answer: str, launches: int, requeued: str, tmp_path: Path
) -> None:
    expected = [f"{number} --overlap --mem=0 --nodelist=n1,n2" for number in range(1, launches + 1)]
    assert launched(tmp_path, outcomes, answer) == (expected, requeued)


def test_without_launches_in_the_allocation_the_job_is_requeued(tmp_path: Path) -> None:
    answer = f"RUNNING N/A {LATER} 2"
    assert launched(tmp_path, "relaunch", answer, restarts_in_allocation=0) == ([], "requeue 7\n")


def test_a_node_that_loses_a_rank_in_two_launches_of_one_start_is_bad(tmp_path: Path) -> None:
    says = "srun: error: n2: task 1: Killed"
    answer = f"RUNNING N/A {LATER} 2"
    for outcomes, relaunches in (("relaunch", 0), ("relaunch relaunch", 1)):
        home = tmp_path / str(relaunches)
        home.mkdir()
        launches, requeued = launched(home, outcomes, answer, says=says, restarts_in_allocation=relaunches)
        assert (len(launches), requeued) == (relaunches, "requeue 7\n")
        assert [entry.node for entry in bad_nodes.read(Store(home))] == ["n2"] * relaunches


def test_a_node_is_blamed_for_any_two_launches_in_a_row(tmp_path: Path) -> None:
    """The launches before the requeue ended otherwise, and the one that fails for good counts, too."""
    answer = f"RUNNING N/A {LATER} 2"
    says = """$([ "$ATOM_RELAUNCH" = 2 ] && echo srun: error: n1: task 0: Killed || echo srun: error: n2: task 1: Killed)"""
    launches, requeued = launched(tmp_path, "relaunch relaunch again", answer, says=says)
    assert (len(launches), requeued) == (2, "requeue 7\n")
    assert [entry.node for entry in bad_nodes.read(Store(tmp_path))] == ["n2"]
    (tmp_path / "final").mkdir()
    says = "srun: error: n2: task 1: Killed"
    assert launched(tmp_path / "final", "relaunch failed", answer, says=says) == (
        ["1 --overlap --mem=0 --nodelist=n1,n2"],
        "",
    )
    assert [entry.node for entry in bad_nodes.read(Store(tmp_path / "final"))] == ["n2"]


def test_a_rank_without_memory_is_not_launched_again_in_the_allocation(tmp_path: Path) -> None:
    answer, says = f"RUNNING N/A {LATER} 2", "srun: error: n2: task 1: Out Of Memory"
    assert launched(tmp_path, "relaunch sealed", answer, says=says) == ([], "requeue 7\n")


def test_a_node_that_does_not_answer_is_left_out(tmp_path: Path) -> None:
    answer = f"RUNNING N/A {LATER} 3"
    assert launched(tmp_path, "relaunch sealed", answer, "n1") == ([], "requeue 7\n")
    (tmp_path / "spare").mkdir()
    train = {**SLURM["train"], "spare_nodes": 1}
    launches, requeued = launched(tmp_path / "spare", "relaunch sealed", answer, "n10 n1", train=train)
    assert launches == ["1 --overlap --mem=0 --nodelist=n1,n10 --nodes=2 --ntasks=2"] and not requeued
    options = script(Slurm.model_validate({**SLURM, "train": train})).sbatch_options
    assert (options["nodes"], options["no-kill"]) == (3, True)
    options = script(Slurm.model_validate({**SLURM, "train": train}), ranks=1).sbatch_options
    assert options["nodes"] == 1 and "no-kill" not in options, "one node has no spare"


def test_options_of_a_kind_and_of_a_stage_reach_sbatch_and_srun() -> None:
    kind = {
        **SLURM["train"], "memory_gb": 0, "sbatch": ["--reservation=llm", "--nice=100", "--hint=nomultithread"],
        "srun": ["--cpu-bind=cores"], "environment": {"NCCL_DEBUG": "WARN"},
    }  # fmt: skip
    stages = {
        "pre*": {"partition": "big,small", "minutes": 30, "sbatch": ["--nice=5"], "srun": ["--mem-bind=local"]},
        "pretrain": {"environment": {"NCCL_DEBUG": "INFO"}, "memory_gb": 4},
        "sft": {"qos": "low"},
    }
    settings = {**SLURM, "train": kind, "stages": stages, "environment": {"NCCL_DEBUG": "TRACE", "A": "b"}}
    batch = script(Slurm.model_validate(settings))
    options = {"partition": "big,small", "time": 30, "mem": "4096M", "reservation": "llm", "nice": "5"}
    assert options.items() <= batch.sbatch_options.items() and "qos" not in batch.sbatch_options
    assert batch.srun_options.endswith(" --kill-on-bad-exit=1 --cpu-bind=cores --mem-bind=local")
    assert batch.variables["NCCL_DEBUG"] == "INFO" and batch.variables["A"] == "b"
    batch = script(Slurm.model_validate({**settings, "stages": {}}))
    assert (batch.sbatch_options["mem"], batch.variables["NCCL_DEBUG"]) == ("0", "WARN")
    assert {"NCCL_DEBUG", "A"} <= set(Slurm.model_validate(settings).variables)


def test_a_stage_has_gpus_of_its_own_number_and_type() -> None:
    train = {**SLURM["train"], "gpus_per_node": 8, "tasks_per_node": 8, "cpus_per_task": 12, "gpu_type": "h100"}
    batch = script(Slurm.model_validate({**SLURM, "train": train}), ranks=16)
    options = {"gpus-per-node": "h100:8", "nodes": 2, "ntasks-per-node": 8, "cpus-per-task": 12}
    assert options.items() <= batch.sbatch_options.items()
    assert " --cpus-per-task=12 " in batch.srun_options, "not every version of srun takes that of sbatch"
    stages = {"pre*": {"gpus_per_node": 4, "tasks_per_node": 4, "gpu_type": "a100", "spare_nodes": 1}}
    options = {"gpus-per-node": "a100:4", "nodes": 5, "ntasks-per-node": 4, "no-kill": True}
    settings = Slurm.model_validate({**SLURM, "train": train, "stages": stages})
    assert options.items() <= script(settings, ranks=16).sbatch_options.items()


def test_a_dry_run_has_slurm_check_the_options_of_srun_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun refuses what sbatch does not read; what it answers of a sound job is shown."""
    (tmp_path / "bin").mkdir()
    start = "Job 7 to start at 2026-11-28T16:09:21 using 2 processors on nodes n[1-2] in partition gpu"
    for name, line in {
        "sbatch": f"echo sbatch: {start} >&2",
        "srun": f'echo "$*" >> {tmp_path}/srun; [[ "$*" != *bogus* ]] || {{ echo "srun: error: no bogus" >&2; exit 255; }}',
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for option, ok, said in (
        ("--cpu-bind=cores", True, f"Slurm takes it, {start.partition('7 ')[2]}"),
        ("--cpu-bind=bogus", False, "no bogus"),
    ):
        kind = {**SLURM["train"], "partition": "gpu,low", "srun": [option], "gpus_per_node": 1, "exclusive": True}
        batch = script(Slurm.model_validate({**SLURM, "train": kind}), tmp_path)
        checked = slurm._check_script(batch, tmp_path / "job.sh", [])
        assert (checked.ok, checked.said) == (ok, said)
    call = (tmp_path / "srun").read_text().splitlines()[0]
    assert call.startswith("--test-only --cpus-per-task=1 --exclusive --gpus-per-node=1 --nodes=2 ")
    assert " --partition=gpu,low " in call and call.endswith(" --kill-on-bad-exit=1 --cpu-bind=cores true")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sbatch": ["--mem=4G"]}, "slurm.train.sbatch.0: --mem has a field here; write memory_gb instead"),
        ({"srun": ["--export=NONE"]}, "--export follows from the stage; leave it out"),
        ({"sbatch": ["-p big"]}, "long option of Slurm, such as --nice=100"),
        ({"sbatch": ["--nice=$(id)"]}, "long option of Slurm, such as --nice=100"),
        ({"environment": {"HF_TOKEN": "x"}}, "HF_TOKEN looks like a secret"),
    ],
)
def test_options_that_a_profile_may_not_give(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    profile = {"name": "p", "power": {"watts_per_core": 1}, "slurm": {**SLURM, "train": {**SLURM["train"], **changes}}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(RecipeError) as error:
        cluster_profile.load(str(tmp_path / "p.yaml"))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("starts", "end"), [(0, (1, "requeue 7\n")), (3, (2, ""))])
def test_a_node_on_which_the_setup_fails_does_not_run_the_stage(
    starts: int, end: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    batch = script(Slurm.model_validate({**SLURM, "setup": ["A=1", "test -e /no/such/driver", "true"]}), tmp_path)
    assert end_of(tmp_path, batch.text(), starts) == end
    verdict = Verdict.read(Path(f"{batch.launches_folder}/7.{starts}"))
    assert verdict is not None and verdict.kind is Kind.MACHINE
    assert re.fullmatch(
        r"line 2 of setup of the cluster profile failed with exit code 1 on node \S+; see .*", verdict.text
    )
    assert not (tmp_path / "environment").exists(), "srun was not called"


def test_a_job_that_dies_after_it_began_is_started_again_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attempts are counted from its events, not here."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    batch = script(Slurm.model_validate(SLURM), tmp_path)
    (Path(f"{batch.launches_folder}/7.90")).mkdir(parents=True)
    (Path(f"{batch.launches_folder}/7.90") / "started-0").touch()
    assert end_of(tmp_path, batch.text(), 93) == (1, "requeue 7\n")
    (tmp_path / "requeued").unlink()
    assert end_of(tmp_path, batch.text(), 94) == (2, "")


def test_a_task_that_finished_a_shard_is_started_again_and_one_task_notifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    text = (
        array := script(Slurm.model_validate({**SLURM, "notify": f"echo x >> {tmp_path}/notes"}), tmp_path, tasks=2)
    ).text()
    ids = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"}
    launch = Path(f"{array.launches_folder}/7.8")
    for start in range(5, 9):
        launch.with_name(f"7.{start}").mkdir(parents=True)
    (launch / "further").touch()
    assert end_of(tmp_path, text, 8, **ids) == (1, "requeue 5_1\n")
    (tmp_path / "requeued").unlink()
    (launch / "further").unlink()
    for start in range(5, 8):
        Verdict(Decision.RESTART, "its node failed", Kind.MACHINE).write(launch.with_name(f"7.{start}"))
    for _ in range(2):
        (launch / "decision").unlink()
        assert end_of(tmp_path, text, 8, **ids) == (2, "")
    assert (tmp_path / "notes").read_text() == "x\n"


def served_node(serve: Any = lambda config, place: None) -> Node:
    stage = Stage("phase", 1, Config, lambda *_: None, trains=True, takes_servers=lambda config: True, serve=serve)
    return Node("rlvr", stage, Config(), {}, "rlvr-0123456789ab")


WITH_SERVERS = Slurm.model_validate(
    {**SLURM, "servers": {"partition": "infer", "minutes": 600, "gpus_per_node": 4, "count": 3, "wait_minutes": 2}}
)


def scripts_with_servers(home: Path) -> tuple[BatchScript, BatchScript]:
    """The script of a stage's job, which is job 9, and that of its servers."""
    store = Store(home)
    run = Run("tiny-1", store.logs / "tiny-1", {})
    job_script = batch_script(store, run, served_node(), WITH_SERVERS, Path("/code"), [])
    assert WITH_SERVERS.servers is not None
    return job_script, servers_script(store, run, served_node(), WITH_SERVERS, Path("/code"), WITH_SERVERS.servers, "9")


def test_servers_are_an_array_beside_the_job_of_their_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    job_script, servers = scripts_with_servers(Path("/shared/atom"))
    folder = "/shared/atom/logs/tiny-1/rlvr/servers"
    text = servers.text()
    for words in (
        "#SBATCH --array=0-2\n",
        "#SBATCH --dependency=after:9\n",
        "#SBATCH --gpus-per-node=4\n",
        "#SBATCH --nodes=1\n",
        "#SBATCH --ntasks-per-node=1\n",
        "#SBATCH --partition=infer\n",
        "#SBATCH --comment='atom tiny-1 rlvr rlvr-0123456789ab.servers'\n",
        f"#SBATCH --output={folder}/submitit/%A_%a_0_log.out\n",
        "comment=$(squeue -h -j 9 -o %k 2>&1)",
        "[ \"$comment\" = 'atom tiny-1 rlvr rlvr-0123456789ab' ] && continue\n",
    ):
        assert words in text, words
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "ATOM_SERVERS" not in text and "squeue -h -j 9" not in job_script.text()
    monkeypatch.setenv("ATOM_SERVERS", job_script.variables["ATOM_SERVERS"])
    assert ServerSearch.of_environment() == ServerSearch(f"{folder}/announced", "tiny-1", 120.0)
    without = script(Slurm.model_validate(SLURM)).text()
    assert "ATOM_SERVERS" not in without and "squeue -h -j 9" not in without


@pytest.mark.parametrize(
    ("answers", "ends"),
    [
        (["atom tiny-1 rlvr rlvr-0123456789ab"], False),
        (["atom tiny-1 rlvr rlvr-0123456789ab", ""], True),  # it has ended, or was canceled
        (["atom other-2 rlvr rlvr-0123456789ab"], True),  # a controller that lost its jobs gives numbers again
        (["exit 1", "atom tiny-1 rlvr rlvr-0123456789ab"], False),  # the controller is away
        (["echo slurm_load_jobs error: Invalid job id specified; exit 1"], True),
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


def test_seconds_of_servers_are_those_within_the_attempt(tmp_path: Path) -> None:
    """Of each start, from its beginning to its last sign of life: here 100 to 160 and, after it died, 170 to 200."""
    for start, (begin, last) in enumerate(((100, 160), (170, 200))):
        launch = tmp_path / f"ranks/8.{start}"
        launch.mkdir(parents=True)
        for name, when in (("started-0", begin), (ALIVE, last)):
            (launch / name).touch()
            os.utime(launch / name, (when, when))
    (tmp_path / "ranks/9.0").mkdir()  # it waits for its stage
    assert [server_seconds(tmp_path, *times) for times in ((0, 999), (150, 180), (0, 100), (200, 300))] == [
        90,
        20,
        0,
        0,
    ]
    assert server_seconds(tmp_path / "none", 0, 999) == 0
    with job.touching(tmp_path / ALIVE):
        begun = (tmp_path / ALIVE).stat().st_mtime_ns
        time.sleep(0.02)
    assert (tmp_path / ALIVE).stat().st_mtime_ns > begun


def test_what_this_host_lacks_does_not_keep_a_stage_from_a_container(tmp_path: Path) -> None:
    def graph(**refusals: Any) -> Graph:
        stage = Stage("phase", 1, Config, lambda *_: None, **refusals)
        node = Node("rlvr", stage, Config(), {}, "rlvr-0123456789ab")
        return Graph(recipe.load("atom-smoke"), {"rlvr": node})

    here = graph(lack=lambda config: "there is no vLLM here; install it")
    with pytest.raises(AtomError, match=r"recipe atom-smoke, stage rlvr: there is no vLLM here; install it$"):
        local.require_inputs(here, Store(tmp_path), ["rlvr"])
    local.require_inputs(here, Store(tmp_path), ["rlvr"], is_contained=True)
    nowhere = graph(obstacle=lambda config: "nobody can run this; leave it out")
    with pytest.raises(AtomError, match="nobody can run this"):
        local.require_inputs(nowhere, Store(tmp_path), ["rlvr"], is_contained=True)


class Sharded(Config):
    parts: int = 5


def test_every_task_of_an_array_loads_the_same_job_and_does_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, line in {"sbatch": "echo Submitted batch job 7", "srun": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    done: list[int] = []
    stage = Stage(
        "sharded", 1, Sharded, lambda *_: None, shards=lambda config: config.parts,
        run_shard=lambda config, inputs, work, shard: done.append(shard),
    )  # fmt: skip
    monkeypatch.setattr(registry, "stage", lambda name: stage)
    monkeypatch.setattr(clean_environment, "require", lambda names: None)
    task = Task(str(tmp_path), "tiny-1", "pretrain", "sharded", {}, {}, "pretrain-0", 8.0, 1)
    limits = job.JobLimits(None, 0, 0.0, None)
    array = script(Slurm.model_validate(SLURM), tmp_path, tasks=2)
    assert slurm.start_array(array, task, limits, 2) == "7"

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    for number, share in enumerate(([0, 2, 4], [1, 3])):
        done.clear()
        monkeypatch.setenv("SLURM_JOB_ID", str(8 + number))
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        submitted = DelayedSubmission.load(array.submitit_folder / f"7_{number}_submitted.pkl")
        assert submitted.function is job.run_shards and submitted.result() == "sealed" and done == share
        launch = Path(f"{array.launches_folder}/{8 + number}.0")
        assert Verdict.read(launch) == Verdict(Decision.SEALED, f"{len(share)} shards are done")


def test_a_verdict_is_read_as_it_was_written(tmp_path: Path) -> None:
    for verdict in (
        Verdict(Decision.DONE, "sealed"),
        Verdict.of(Decision.RESTART, Failure("a disk\nfailed", Kind.MACHINE)),
    ):
        verdict.write(tmp_path)
        assert Verdict.read(tmp_path) == verdict
    (tmp_path / "decision").write_text("perhaps\n\n\n")
    with pytest.warns(json_files.DamagedFile, match="it holds no decision"):
        assert Verdict.read(tmp_path) is None
    assert Verdict.read(tmp_path / "none") is None
