"""The scripts of Slurm jobs: what sbatch reads of each profile and of each stage."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from submitit.core.utils import DelayedSubmission

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import Config, Stage
from pipeline.core.store import Store
from pipeline.graph import dag, recipe, registry
from pipeline.graph.dag import Graph, Node
from pipeline.launch import clean_environment, cluster_profile, job, local, slurm
from pipeline.launch.attempt import Task
from pipeline.launch.cluster_profile import Changes, Slurm
from pipeline.launch.rendezvous import Decision, Verdict
from tests.fixtures import ROOT, batch_fixtures
from tests.fixtures.batch_fixtures import SLURM, end_of, script

WITH_HOME = """sh -c '[ -e "$0" ] || exit 69; exec "$@"' /shared/atom/logs/tiny-1/run.json"""
"""What looks for a file of the run on each node."""
OF_PROFILES = {
    "dev": ["#SBATCH --partition=test", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --requeue"],
    "h100-pyxis": [
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --exclusive",
        "#SBATCH --account=llm",
        "#SBATCH --mem=0",
        "--kill-on-bad-exit=1 --container-image=/shared/images/atom.sqsh "
        "--container-mounts=/shared/atom:/shared/atom,/tmp:/tmp,/shared:/shared --no-container-mount-home "
        f"--no-container-entrypoint {WITH_HOME} "
        'env "${job_variables[@]}" /opt/atom/venv/bin/python -u -m submitit.core._submit',
        "for name in ARROW_DEFAULT_MEMORY_POOL ",
        " PYTHONPATH PYTHONSAFEPATH ATOM_HOME TMPDIR ATOM_VLLM_PYTHON NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME; do",
        "export ATOM_VLLM_PYTHON=/opt/atom/vllm/bin/python\n",
    ],
    "h100-apptainer": [
        "module load apptainer",
        f"--kill-on-bad-exit=1 {WITH_HOME} apptainer exec --nv --bind "
        "/shared/atom:/shared/atom,/scratch/local:/scratch/local,/shared:/shared "
        '/shared/images/atom.sif env "${job_variables[@]}" /opt/atom/venv/bin/python -u -m submitit.core._submit',
    ],
    "h100-modules": [
        f"--kill-on-bad-exit=1 {WITH_HOME} /shared/envs/atom/bin/python -u -m submitit.core._submit",
        "#SBATCH --constraint=h100",
        "#SBATCH --exclude='node[013,027]'",
        "#SBATCH --signal=USR2@300",
        "module load cuda/12.8\ncheck_setup $? 'module cuda/12.8'\nmodule load nccl\n",
        "export NCCL_SOCKET_IFNAME=ib0\n",
    ],
}


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
    (command,) = re.findall(r"run.json (env .*) -u -m submitit", text)
    words = command.split()
    places = [(words[i + 1], words[i + 2]) for i, word in enumerate(words) if word == "--dev-bind"]
    assert {("/shared/atom", "/shared/atom"), ("/scratch", "/scratch"), ("/data", "/data"), ("/a", "/b")} < set(places)
    assert (
        words[3:8] == ["bwrap", "--overlay-src", "/images/atom", "--tmp-overlay", "/"] and words[-1] == "/venv/python"
    )


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_a_container_gets_the_variables_of_the_job_whatever_its_image_sets(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyxis 0.24.0 prefers a PYTHONPATH of the image, and then the stage runs other code than that of the run."""
    monkeypatch.setitem(batch_fixtures.STUBS, "srun", 'printf "%s\\n" "$@" >> "$PLACE/words"; exit 9')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("SITE", "north wing")
    container = {"kind": kind, "image": "/images/atom", "python": "/venv/python"}
    monkeypatch.setitem(batch_fixtures.STUBS, "module", "exit 0")
    settings = {
        "container": container, "environment": {"NCCL_IB_HCA": "mlx5, a"}, "forward": ["SITE", "NOT_SET"],
        "modules": ["cuda/12.8"], "setup": ["unset NCCL_IB_HCA", "true"] if kind == "apptainer" else [],
    }  # fmt: skip
    end_of(tmp_path, script(Slurm.model_validate({**SLURM, **settings}), tmp_path).text())
    words = (tmp_path / "words").read_text().splitlines()
    assignments = words[words.index("env") + 1 : words.index("/venv/python")]
    values = {"PYTHONPATH": "/code", "ATOM_HOME": str(tmp_path), "SITE": "north wing"}
    values |= {"NCCL_IB_HCA": "mlx5, a"} if kind == "pyxis" else {}
    assert {f"{name}={value}" for name, value in values.items()} <= set(assignments)
    absent = ("PATH=", "NOT_SET=", *(() if kind == "pyxis" else ("NCCL_IB_HCA=",)))
    assert not [word for word in assignments if word.startswith(absent)]


@pytest.mark.parametrize("hard", [900, None])
def test_each_job_may_open_many_files(hard: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the hard limit allows, whatever soft limit the login node has handed on."""
    monkeypatch.setitem(batch_fixtures.STUBS, "srun", 'ulimit -Sn >> "$PLACE/limit"; exit 9')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    of_this_machine = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    text = f"ulimit -Sn 800\nulimit -Hn {hard or 'hard'}\n{script(Slurm.model_validate(SLURM), tmp_path).text()}"
    end_of(tmp_path, text)
    expected = hard or (65536 if of_this_machine == resource.RLIM_INFINITY else min(of_this_machine, 65536))
    assert (tmp_path / "limit").read_text().splitlines()[0] == str(expected)


@pytest.mark.parametrize("kind", ["no container", "pyxis", "apptainer"])
@pytest.mark.parametrize("tasks", [0, 3])
def test_a_stage_has_its_variables_before_python_starts(
    kind: str, tasks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the profile and of a module take precedence; an image's do not."""
    srun = 'printf "%s\\n" "$@" >> "$PLACE/words"; env >> "$PLACE/words"; exit 9'
    monkeypatch.setitem(batch_fixtures.STUBS, "srun", srun)
    monkeypatch.setitem(batch_fixtures.STUBS, "module", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
    settings: dict[str, Any] = {"modules": ["nccl"], "environment": {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}}
    if kind != "no container":
        settings["container"] = {"kind": kind, "image": "/images/atom", "python": "/venv/python"}
    text = script(Slurm.model_validate({**SLURM, **settings}), tmp_path, environment=environment, tasks=tasks).text()
    module = "module() { export NCCL_ALGO=Tree; }\n"
    end_of(tmp_path, text.replace("\nmodule load", f"\n{module}module load", 1), SLURM_ARRAY_JOB_ID="7")
    words = (tmp_path / "words").read_text().splitlines()
    if kind != "no container":
        words = words[words.index("env") + 1 : words.index("/venv/python")]
    expected = {"CUDA_DEVICE_MAX_CONNECTIONS=8", "CUBLAS_WORKSPACE_CONFIG=:4096:8", "NCCL_ALGO=Tree"}
    assert {word for word in words if word.partition("=")[0] in environment} == expected


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
ulimit -Sn 65536 2> /dev/null || ulimit -Sn hard  # srun hands it on

job=$SLURM_JOB_ID
start=${SLURM_RESTART_COUNT:-0}
launches=/shared/atom/logs/tiny-1/pretrain/ranks/$SLURM_JOB_ID
may_restart= exclude= dependency=
# A start that waited for a server, or that Slurm ended before the script, began no launch, and is no failure.
started=()  # the earlier starts that did begin one, the latest first
for ((n = start - 1; n >= 0; n--)); do [ -e "$launches.$n" ] && started+=("$n"); done
restarts_left() { # whether another start may follow one without progress
    local earlier
    earlier=$(wc -w <<< "${started[*]}")
    [ -e "$launch" ] || earlier=$start  # nothing can be written: starts leave no folder
    [ "$earlier" -lt 3 ]
}
begin_launch() { # FOLDER
    launch=$1
    mkdir -p "$launch"
    messages=$launch/srun
    : > "$messages" || messages=$(mktemp)  # the home folder may be full
}
previous=$(find "$launches.${started[0]}" "$launches.${started[0]}".* -maxdepth 0 2> /dev/null | sort -V | tail -n 1)
"""
    )
    assert (
        rest.partition("\n}\n\nif [ ! -e")[2]
        == """ /shared/atom/logs/tiny-1/run.json ]; then
    # Another node gets the job: nobody would see what this one writes.
    echo "node $SLURMD_NODENAME does not see "/shared/atom/logs/tiny-1/run.json >&2
    avoided=$(excluded_nodes) exclude=yes
    # The script lists the node twice, so that the next start can tell it from a node that a person excluded.
    avoided=${avoided:+$avoided,}$SLURMD_NODENAME,$SLURMD_NODENAME
    # Without the folders of the launches, all starts count.
    [ "$start" -lt 3 ] && requeue_job
    exit 69
fi
[ "$start" -eq 0 ] || [ -e "$launches.$((start - 1))" ] || blame_excluded
begin_launch "$launches.$start"

export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/atom/logs/tiny-1/pretrain/submitit/%j_%t_log.out --export=ALL --mpi=none --job-name=atom-pretrain --cpus-per-task=1 --kill-on-bad-exit=1 sh -c '[ -e "$0" ] || exit 69; exec "$@"' /shared/atom/logs/tiny-1/run.json /envs/atom/bin/python -u -m submitit.core._submit /shared/atom/logs/tiny-1/pretrain/submitit \\
    2> "$messages"
exit_code=$?
cat "$messages" >&2

# What rank 0 decided is done. If it left no decision, the job is started again: 3 times, and as long as
# rank 0 began in one of the last starts.
decision=$(head -n 1 "$launch/decision" 2> /dev/null)
kind=$(sed -n 2p "$launch/decision" 2> /dev/null)
[ "$decision" = relaunch ] && decision=again

restarts_left && may_restart=yes
for n in "$start" "${started[@]:0:3}"; do
    [ -e "$launches.$n/started-0" ] && may_restart=yes
done
{ [ -z "$decision" ] || { [ "$decision" = again ] && ran_out_of_memory; }; } && explain
case $decision in sealed | done) ;; *) blame_lost ;; esac

if [ "$decision" = again ]; then
    avoided_nodes
    requeue_job
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
    ):
        assert words not in text, words


def test_ranks_are_bound_to_the_numa_nodes_of_their_gpus(tmp_path: Path) -> None:
    """By what numactl gets from each of eight ranks of a node; without it the rank ends with one sentence, which the job's
    own probe repeats."""
    train = {**SLURM["train"], "gpus_per_node": 8, "tasks_per_node": 8, "ranks_per_numa_node": 4}
    settings = Slurm.model_validate({**SLURM, "train": train, "python": "/envs/atom/bin/python"})
    batch = script(settings, ranks=16)
    assert f"{WITH_HOME} {batch.python} -u -m submitit" in batch.text() and f"{batch.python} -c" in batch.text()
    assert "numactl" not in script(settings, ranks=16, tasks=3).text() + script(settings, trains=False).text()

    def start(rank: int) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_LOCALID": str(rank)}
        return subprocess.run(["sh", "-c", f"{batch.python} -m x"], env=environment, text=True, capture_output=True)

    if shutil.which("numactl") is None:
        ended = start(5)
        assert ended.returncode == 1 and ended.stdout == "" and ended.stderr.count("\n") == 1
        assert "needs numactl, which is not installed; install it, or leave the setting out" in ended.stderr
        assert len(ended.stderr) < 200, "the probe cuts it there"
    (tmp_path / "numactl").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "numactl").chmod(0o755)
    bound = [start(rank).stdout for rank in range(8)]
    assert bound == [f"--cpunodebind={n} --membind={n} /envs/atom/bin/python -m x\n" for n in (0, 0, 0, 0, 1, 1, 1, 1)]


def test_an_array_has_its_own_folder_and_ids() -> None:
    settings = Slurm.model_validate({**SLURM, "array_tasks": 256})
    text = script(settings, tasks=1000).text()
    folder = "/shared/atom/logs/tiny-1/pretrain/shards"
    for words in (
        "#SBATCH --array=0-999%256\n",
        f"#SBATCH --output={folder}/submitit/%A_%a_0_log.out\n",
        f"--output {folder}/submitit/%A_%a_%t_log.out ",
        "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID\n",
        '[ -e "$launch/further" ] && may_restart=yes\n',
    ):
        assert words in text, words
    assert "#SBATCH --array=0-2%3\n" in script(settings, tasks=3).text()
    throttled = settings.model_copy(update={"stages": {"pre*": Changes(array_tasks=8)}})
    assert "#SBATCH --array=0-999%8\n" in script(throttled, tasks=1000).text()


def test_ranks_that_do_not_fill_nodes_are_refused() -> None:
    settings = Slurm.model_validate({**SLURM, "train": {**SLURM["train"], "tasks_per_node": 8}})
    with pytest.raises(RecipeError, match="12 ranks, which do not fill nodes of 8"):
        script(settings, ranks=12)


def test_ranks_of_training_that_share_a_gpu_are_refused() -> None:
    train = {**SLURM["train"], "gpus_per_node": 4, "tasks_per_node": 8}
    words = "stage pretrain has 8 ranks on a node, and slurm.train.gpus_per_node is 4; a rank takes one GPU, so set "
    with pytest.raises(RecipeError, match=f"^{words}tasks_per_node of the cluster profile to 4$"):
        script(Slurm.model_validate({**SLURM, "train": train}), ranks=16)
    script(Slurm.model_validate({**SLURM, "train": {**train, "tasks_per_node": 4}}), ranks=16)


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


def test_smaller_models_request_what_training_does_and_what_the_profile_says_of_them(tmp_path: Path) -> None:
    body = yaml.safe_load((ROOT / "pipeline/recipes/atom-smoke.yaml").read_text())
    body["sizes"] = [{"model": {"layers": 1}, "parallelism": {"ranks": 2, "tp": 2}}, {"model": {"experts": 2}}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(body))
    nodes = dag.compose(recipe.load(str(tmp_path / "r.yaml")), Store(tmp_path)).nodes
    stages = {"size-*": {"minutes": 7}, "size-2": {"partition": "small"}}
    settings = Slurm.model_validate({**SLURM, "stages": stages})
    requests = [slurm.allocation_of(settings, nodes[name]) for name in ("pretrain", "size-1", "size-2")]
    train = SLURM["train"]
    assert [(row.section, row.ranks, row.jobs.minutes, row.jobs.partition) for row in requests] == [
        ("train", 1, train["minutes"], train["partition"]),
        ("train", 2, 7, train["partition"]),
        ("train", 1, 7, "small"),
    ]
    assert nodes["size-1"].inputs == {"tokens": "tokenize", "order": "order-pretrain"}, "they wait for no phase"


def test_a_dry_run_shows_what_slurm_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = "Job 7 to start at 2026-11-28T16:09:21 using 2 processors on nodes n[1-2] in partition gpu"
    batch, program = script(Slurm.model_validate(SLURM), tmp_path), tmp_path / "bin/sbatch"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    for line, ok, answer in (
        (f"echo 'sbatch: {start}' >&2", True, f"Slurm takes it, {start.partition('7 ')[2]}"),
        ("echo 'sbatch: error: no bogus' >&2; exit 1", False, "Slurm refuses it: no bogus"),
    ):
        program.write_text(f"#!/bin/bash\n{line}\n")
        program.chmod(0o755)
        checked = slurm._check_script(batch, tmp_path / "job.sh", [])
        assert (checked.ok, checked.answer) == (ok, answer)


def test_a_refusal_shows_the_request_or_the_setting() -> None:
    """What Slurm 24.11 prints."""
    batch = script(Slurm.model_validate(SLURM))
    unavailable = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
    assert f"available (--cpus-per-task=1 --nodes=2 --ntasks-per-node={batch.sbatch_options['ntasks-per-node']} " in (
        slurm.refusal(unavailable, batch)
    )
    assert slurm.refusal("sbatch: error: no such thing", batch) == "no such thing"
    for message in ("AssocMaxSubmitJobLimit", "Batch job submission failed: Invalid job array specification"):
        assert slurm.refusal(f"sbatch: error: {message}", batch) == (
            f"{message}; lower slurm.array_size, or submit fewer stages at once by --until"
        )


def test_a_dry_run_without_slurm_writes_the_scripts_and_says_that_none_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "home")
    graph, profile = dag.compose(recipe.load("atom-smoke"), store), cluster_profile.load("dev")
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = slurm.dry_run(graph, store, ["items", "tasks-rlvr"], profile)
    assert [(row.stage, row.ok) for row in checks] == [("items", False), ("tasks-rlvr", False)]
    folder = tmp_path / "home/dry-run/atom-smoke"
    assert "#SBATCH --job-name=atom-items\n" in (folder / "items.sh").read_text()
    with pytest.raises(AtomError, match="stage items: not checked, since there is no sbatch here; submit from a host"):
        slurm.require_taken(checks)
    slurm.require_taken([])  # all stages are sealed


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


def test_what_this_host_lacks_does_not_keep_a_stage_from_a_container(tmp_path: Path) -> None:
    def graph(**refusals: Any) -> Graph:
        stage = Stage("phase", 1, Config, lambda *_: None, **refusals)
        node = Node("rlvr", stage, Config(), {}, "rlvr-0123456789ab")
        return Graph(recipe.load("atom-smoke"), {"rlvr": node})

    here = graph(lack=lambda config: "there is no vLLM here; install it")
    with pytest.raises(AtomError, match=r"recipe atom-smoke, stage rlvr: there is no vLLM here; install it$"):
        local.require_inputs(here, Store(tmp_path), ["rlvr"])
    local.require_inputs(here, Store(tmp_path), ["rlvr"], other_python=True)
    nowhere = graph(obstacle=lambda config: "nobody can run this; leave it out")
    with pytest.raises(AtomError, match="nobody can run this"):
        local.require_inputs(nowhere, Store(tmp_path), ["rlvr"], other_python=True)


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
