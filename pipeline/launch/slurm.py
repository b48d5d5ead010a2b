"""Hands a graph to Slurm through submitit: a job a stage, tied by `afterok`. Nothing of ours stays behind.

The job's script sets up what the profile says, runs the stage by srun, and does with the job what rank 0 decided
(job.py). Code comes from a frozen snapshot, so the checkout may change or go.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from pipeline.core import code_snapshot
from pipeline.core.errors import AtomError, Kind, RecipeError
from pipeline.core.progress import stages
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.dag import Graph, Node
from pipeline.graph.run import Run
from pipeline.launch import clean_environment, job, slurm_client, submission_lock
from pipeline.launch.attempt import Task
from pipeline.launch.cluster_profile import Jobs, Profile, Slurm
from pipeline.launch.job import JobLimits
from pipeline.launch.local import JOB_ENVIRONMENT, damage_of, require_inputs
from pipeline.launch.submission_lock import Claim
from pipeline.tracking import budget

UNLIMITED = 10**6


@dataclass
class Submission:
    """What became of the stages: submitted with a job, attached to one that was there, or sealed already."""

    run: Run | None = None
    """None where nothing is to be done: then there is no new run."""
    submitted: dict[str, str] = field(default_factory=dict)
    attached: dict[str, str] = field(default_factory=dict)
    sealed: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    """Of the attached ones, those that Slurm held back after it had failed to launch them."""
    arrays: dict[str, str] = field(default_factory=dict)
    """The job arrays that do the shards of submitted stages beforehand."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Stages that were left out, each with a sentence on the file that is damaged."""
    lack: str | None = None
    """What will not be known of the jobs, in one sentence."""

    def require_undamaged(self) -> None:
        """Raises AtomError if a stage was left out for a damaged file."""
        if self.damaged:
            raise AtomError(f"{stages(len(self.damaged))} not submitted: {next(iter(self.damaged.values()))}")


def submit(graph: Graph, store: Store, selected: list[str], profile: Profile, reference: str) -> Submission:
    """Submits what is neither sealed nor queued in Slurm. Raises AtomError before anything is submitted, or after what
    was submitted by this call has been canceled."""
    slurm = profile.cluster()
    damage = damage_of(graph, store, selected)
    selected = [name for name in selected if name not in damage]
    if all(store.sealed(graph.nodes[name].key) for name in selected):
        return Submission(sealed=selected, damaged=damage)
    require_inputs(graph, store, selected)
    require_image(profile)
    budget_limits = None if graph.recipe.config.budget is None else graph.recipe.config.budget.model_dump()
    if over_budget := budget.exceeded(budget_limits, store, (node.key for node in graph.nodes.values())):
        raise AtomError(over_budget)
    for name in selected:
        shape(slurm, graph.nodes[name])
    with submission_lock.submitting(store):
        slurm_jobs = slurm_client.queued_jobs()
        code = code_snapshot.freeze(store, graph.recipe.files)  # here, so that no gc takes it before the run names it
        run_fields = {"cluster": profile.name, "code": code.name, "prices": profile.costs()}
        run = runs.start(graph, store, selected, reference, **run_fields)
        submission = Submission(run, damaged=damage)
        keys = {name: graph.nodes[name].key for name in selected}
        variables = (*slurm.forward, *slurm.environment)
        limits = JobLimits(keys, budget_limits, slurm.restarts, slurm.free_gb, slurm.scratch, variables)
        jobs: dict[str, str] = {}
        try:
            for name in selected:
                node = graph.nodes[name]
                claim = submission_lock.read(store, node.key, slurm_jobs)
                if store.sealed(node.key):
                    submission.sealed.append(name)
                elif claim is not None and claim.holds(slurm_jobs):
                    submission.attached[name] = jobs[name] = claim.job
                    if slurm_jobs[claim.job].stuck:
                        slurm_client.run_command("scontrol", "release", claim.job)
                        submission.released.append(name)
                else:
                    dependencies = sorted({jobs[i] for i in node.inputs.values() if i in jobs}, key=int)
                    task = task_of(graph, store, run, node, profile)
                    if tasks := array_of(slurm, node):
                        executor = executor_of(store, run, node, profile, code, dependencies, shards=True)
                        dependencies = [start(executor, task, limits, tasks)]
                        submission.arrays[name] = dependencies[0]
                    executor = executor_of(store, run, node, profile, code, dependencies)
                    jobs[name] = submission.submitted[name] = start(executor, task, limits)
                    submission_lock.write(store, Claim(node.key, jobs[name], run.id, name))
                if name in jobs:
                    array, shards = submission.arrays.get(name), node.stage.shards(node.config)
                    run.note_job(name, jobs[name], name in submission.attached, array, shards)
        except BaseException:
            if submission.submitted or submission.arrays:
                slurm_client.run_command("scancel", *submission.submitted.values(), *submission.arrays.values())
                for name in submission.submitted:
                    submission_lock.remove(store, graph.nodes[name].key)
            raise
    try:
        slurm_client.run_command("sacct", "-n", "-X", "-j", "1", seconds=5)
    except slurm_client.NoAnswer as error:
        submission.lack = (
            f"{error}; the jobs are submitted, but how one ended that Slurm has forgotten will not be known"
        )
    return submission


def start(executor: submitit.SlurmExecutor, task: Task, limits: JobLimits, tasks: int = 0) -> str:
    """Submits one job, or an array of so many tasks for the shards; returns its id. Raises AtomError with sbatch's
    words."""
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what sbatch says, which is told below
            if tasks:
                arguments = ([x] * tasks for x in (tasks, asdict(limits)))
                first, *_ = executor.map_array(job.run_shards, [task.json()] * tasks, range(tasks), *arguments)
                return str(first.job_id).split("_")[0]
            submitted = executor.submit(job.run, task.json(), asdict(limits))
    except (FailedJobError, FailedSubmissionError) as error:
        raise AtomError(f"Slurm refused stage {task.node}: {refusal(str(error))}; fix the profile") from None
    return str(submitted.job_id)


def refusal(output: str) -> str:
    """What sbatch said, in one line: its errors without their prefixes."""
    lines = [line.partition("error: ")[2] for line in output.splitlines() if "error: " in line]
    return "; ".join(dict.fromkeys(line.strip() for line in lines)) or " ".join(output.split())


def task_of(graph: Graph, store: Store, run: Run, node: Node, profile: Profile) -> Task:
    jobs, nodes, ranks_per_node = shape(profile.cluster(), node)
    return Task(
        home=str(store.home),
        run=run.id,
        node=node.name,
        stage=node.stage.name,
        config=node.config.model_dump(mode="json"),
        inputs=graph.materials(node),
        key=node.key,
        watts_per_core=profile.power.watts_per_core,
        ranks=nodes * ranks_per_node,
        gpus=nodes * min(ranks_per_node, jobs.gpus_per_node),
        watts_per_gpu=profile.power.watts_per_gpu,
    )


def array_of(slurm: Slurm, node: Node) -> int:
    """The tasks of the array that comes before its job; 0 if there is none."""
    shards = 1 if node.stage.run_shard is None else node.stage.shards(node.config)
    return min(shards, slurm.array_size) if shards > 1 else 0


def shape(slurm: Slurm, node: Node) -> tuple[Jobs, int, int]:
    """(what its job asks for, nodes, ranks on each). Raises RecipeError if the ranks do not fill nodes alike."""
    return slurm.shape(node.name, node.stage.ranks(node.config), node.stage.trains)


def executor_of(
    store: Store, run: Run, node: Node, profile: Profile, code: Path, dependencies: list[str], shards: bool = False
) -> submitit.SlurmExecutor:
    """submitit's executor with all that the node's job asks for; shards: the array that comes before it. Raises
    AtomError where there is no Slurm."""
    slurm = profile.cluster()
    jobs, nodes, ranks_per_node = shape(slurm, node)
    folder = run.node_folder(node.name) / ("shards" if shards else "")
    try:
        executor = submitit.SlurmExecutor(
            folder / "submitit", max_num_timeout=UNLIMITED, python=interpreter(slurm, store)
        )
    except RuntimeError:
        raise slurm_client.NoAnswer(
            "there is no srun here; submit from a host of a Slurm cluster, or use `atom run`"
        ) from None
    sbatch_options: dict[str, Any] = {"kill-on-invalid-dep": "yes", "requeue": True, "chdir": str(store.home)}
    sbatch_options |= {"export": "NIL"}  # a list of names would make Slurm load the login environment, tokens and all
    if jobs.memory_gb is not None:
        sbatch_options["mem"] = f"{round(jobs.memory_gb * 1024)}M"
    if jobs.exclusive:
        sbatch_options["exclusive"] = True
    executor.update_parameters(
        job_name=f"atom-{node.name}",
        partition=jobs.partition,
        time=jobs.minutes,
        nodes=nodes,
        ntasks_per_node=ranks_per_node,
        cpus_per_task=jobs.cpus_per_task,
        gpus_per_node=min(ranks_per_node, jobs.gpus_per_node) or None,
        account=jobs.account,
        qos=jobs.qos,
        constraint=jobs.constraint,
        exclude=jobs.exclude,
        dependency=f"afterok:{':'.join(dependencies)}" if dependencies else None,
        comment=slurm_client.comment(run.id, node.name, node.key),
        signal_delay_s=slurm.signal_before_limit_seconds,
        stderr_to_stdout=True,
        wckey=None,
        setup=setup(slurm, store, code),
        teardown=teardown(slurm, run, node, folder, shards),
        srun_args=["--export=ALL", "--kill-on-bad-exit=1", *container(slurm, store)],
        additional_parameters=sbatch_options,
        array_parallelism=slurm.array_tasks,
    )
    return executor


def require_image(profile: Profile) -> None:
    """Raises RecipeError if the container's image is a file that is not there."""
    c = profile.cluster().container
    if c is not None and c.image.startswith("/") and not Path(c.image).exists():
        raise RecipeError(
            f"cluster profile {profile.name}: slurm.container.image = {c.image} is not there; make it, or name another"
        )


def interpreter(slurm: Slurm, store: Store) -> str:
    """The shell command that is Python, in the container if there is one."""
    c = slurm.container
    if c is None:
        return shlex.quote(slurm.python or sys.executable)
    if c.kind == "pyxis":
        return shlex.quote(c.python)
    binds = ",".join([f"{store.home}:{store.home}", *c.mounts])
    return shlex.join(["apptainer", "exec", "--nv", "--bind", binds, c.image, c.python])


def container(slurm: Slurm, store: Store) -> list[str]:
    """srun's arguments for a container by pyxis."""
    c = slurm.container
    if c is None or c.kind != "pyxis":
        return []
    mounts = ",".join([f"{store.home}:{store.home}", *c.mounts])
    return [f"--container-image={c.image}", f"--container-mounts={mounts}"]


def setup(slurm: Slurm, store: Store, code: Path) -> list[str]:
    """Lines of shell before the stage."""
    variables = {**JOB_ENVIRONMENT, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1", "ATOM_HOME": str(store.home)}
    if slurm.scratch:
        variables["TMPDIR"] = slurm.scratch
    lines = [*clean_environment.shell(), *_exports(clean_environment.forwarded_variables(os.environ, slurm.forward))]
    if slurm.modules:  # no login shell has defined `module`
        lines += ["type module > /dev/null 2>&1 || . /etc/profile", *clean_environment.shell()]
        lines += [f"module load {shlex.quote(name)}" for name in slurm.modules]
    return [*lines, *_exports({**variables, **slurm.environment}), *slurm.setup]


def _exports(variables: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def teardown(slurm: Slurm, run: Run, node: Node, folder: Path, shards: bool) -> list[str]:
    """Lines of shell after the stage: what rank 0 decided is done. If it did not live to decide, the job is started
    again: `restarts` times where nothing counts attempts, as of a shard, or of Python that never begins."""
    # one task of an array has the id of the whole
    me = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if shards else "$SLURM_JOB_ID"
    lines = [
        "code=$?",
        f"me={me}",
        "start=${SLURM_RESTART_COUNT:-0}",
        f"launches={shlex.quote(str(folder))}/ranks/$SLURM_JOB_ID",
        'decision=$(head -n 1 "$launches.$start/decision" 2> /dev/null)',
        'kind=$(sed -n 2p "$launches.$start/decision" 2> /dev/null)',
        'outcome=$(tail -n +3 "$launches.$start/decision" 2> /dev/null)',
        f'[ "$start" -lt {slurm.restarts} ] && more=yes',
    ]
    if shards:
        lines.append('[ -e "$launches.$start/further" ] && more=yes')
    else:
        lines.append(
            f'for n in $(seq 0 {slurm.restarts}); do [ -e "$launches.$((start - n))/started-0" ] && more=yes; done'
        )
    lines += [
        '[ -z "$decision" ] && [ -n "$more" ] && decision=again',
        'if [ "$decision" = again ]; then',
        "    # what Slurm itself has ended (scancel, requeue) is not RUNNING any more; a controller is awaited",
        "    for _ in $(seq 60); do",
        '        state=$(squeue -h -j "$me" -o %T 2>&1) && break',
        "        case $state in *Invalid*) break ;; esac",
        "        sleep 5",
        "    done",
        '    if [ "$state" = RUNNING ] && scontrol requeue "$me"; then',
        "        sleep 300  # until Slurm ends this start",
        "    fi",
        "    exit 1",
        "fi",
    ]
    if slurm.notify:
        notify_once = f" && mkdir {shlex.quote(str(folder / 'told'))} 2> /dev/null" if shards else ""
        notify_variables = f"ATOM_RUN={shlex.quote(run.id)} ATOM_STAGE={shlex.quote(node.name)}"
        lines += [
            # of an array, one task speaks for all
            f'if [ "$decision" != sealed ]{notify_once}; then',
            f'    {notify_variables} ATOM_OUTCOME="${{outcome:-it did not start, exit code $code}}" \\',
            f"        sh -c {shlex.quote(slurm.notify)}",
            "fi",
        ]
    return [
        *lines,
        '[ "$decision" = sealed ] || [ "$decision" = done ] && exit 0',
        f'[ "$kind" = {Kind.CHECK} ] && exit {Kind.CHECK.exit_code}',
        f"exit {Kind.USER.exit_code}",
    ]


@dataclass(frozen=True)
class Checked:
    """A script that was written, and what Slurm says of it."""

    stage: str
    script: str
    ok: bool
    said: str

    def json(self) -> dict[str, Any]:
        return asdict(self)


def dry_run(graph: Graph, store: Store, selected: list[str], profile: Profile) -> list[Checked]:
    """Writes the scripts of what is not sealed under `$ATOM_HOME/dry-run/<recipe>/` and has `sbatch --test-only` judge
    each. Dependencies stand in a comment, since no job is there to be waited for."""
    require_inputs(graph, store, selected)
    require_image(profile)
    code = code_snapshot.freeze(store, graph.recipe.files)
    run = Run("dry-run", store.home / "dry-run" / graph.recipe.config.name, {})
    checks = []
    for name in selected:
        node = graph.nodes[name]
        if store.sealed(node.key):
            continue
        dependencies = [n for n in dict.fromkeys(node.inputs.values()) if not store.sealed(graph.nodes[n].key)]
        if tasks := array_of(profile.cluster(), node):
            executor = executor_of(store, run, node, profile, code, [], shards=True)
            executor.parameters["map_count"] = tasks
            checks.append(_check_script(executor, name, run.folder / f"{name}.shards.sh", dependencies))
            dependencies = ["its shards"]
        executor = executor_of(store, run, node, profile, code, [])
        checks.append(_check_script(executor, name, run.folder / f"{name}.sh", dependencies))
    return checks


def _check_script(executor: submitit.SlurmExecutor, stage: str, path: Path, dependencies: list[str]) -> Checked:
    text = executor._make_submission_file_text(executor._submitit_command_str, "")
    head, _, body = text.partition("\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}\n# waits for: {', '.join(dependencies) or 'nothing'}\n{body}\n")
    try:
        slurm_client.run_command("sbatch", "--test-only", str(path))
    except slurm_client.Refused as error:
        return Checked(stage, str(path), False, refusal(str(error)))
    return Checked(stage, str(path), True, "Slurm takes it")
