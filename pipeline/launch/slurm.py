"""Submits a graph to Slurm through submitit: one job per stage, with `afterok` dependencies. No process keeps running.

The script of a job is made in batch_script.py. Code comes from a frozen snapshot, so the checkout may change or
disappear.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import ParamSpec

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from pipeline.core import source_code
from pipeline.core.errors import AtomError
from pipeline.core.stage import TrainingTime
from pipeline.core.store import Store
from pipeline.graph import budget
from pipeline.graph import run as runs
from pipeline.graph.dag import Graph, Node
from pipeline.graph.run import LauncherFields, Run, RunFolder
from pipeline.launch import bad_nodes, job, slurm_client, submission_lock
from pipeline.launch.attempt import Task
from pipeline.launch.bad_nodes import BadNode
from pipeline.launch.batch_script import BatchScript, RunScripts, servers_of
from pipeline.launch.cluster_profile import Allocation, Profile, Slurm
from pipeline.launch.job import JobLimits
from pipeline.launch.local import require_inputs
from pipeline.launch.slurm_client import Job, NoAnswer, Owner

# Restarts that submitit itself may allow. The job's script counts restarts instead.
UNLIMITED = 10**6
# The options that both sbatch and srun have, by which `srun --test-only` knows the job.
_OF_ALLOCATION = (
    "account constraint cpus-per-task exclude exclusive gpus-per-node mem nodes ntasks-per-node partition qos time"
)
OF_ALLOCATION = frozenset(_OF_ALLOCATION.split())
Arguments = ParamSpec("Arguments")


@dataclass
class Submission:
    """The result for the stages: submitted with a job, attached to an existing one, or sealed already."""

    # None if there is nothing to do: then there is no new run.
    run: Run | None = None
    # The jobs of submitted stages, and the jobs of other runs that this run waits for.
    submitted: dict[str, str] = field(default_factory=dict)
    attached: dict[str, str] = field(default_factory=dict)
    sealed: list[str] = field(default_factory=list)
    # The job arrays for the shards of submitted stages, and those of their servers.
    arrays: dict[str, str] = field(default_factory=dict)
    servers: dict[str, list[str]] = field(default_factory=dict)
    # A sentence on each bad node that jobs may get all the same.
    kept_nodes: list[str] = field(default_factory=list)

    @property
    def jobs(self) -> dict[str, str]:
        """The job of each stage that has one."""
        return self.attached | self.submitted


def submit(graph: Graph, store: Store, selected: list[str], profile: Profile, reference: str) -> Submission:
    """Submits the stages that are neither sealed nor queued in Slurm.

    Raises AtomError before anything is submitted, or after the submissions of this call have been canceled.
    """
    slurm = profile.cluster()
    require_inputs(graph, store, selected, profile.other_python)
    if all(store.sealed(graph.nodes[name].key) for name in selected):
        return Submission(sealed=selected)
    every_key = [node.key for node in graph.nodes.values()]
    if over_budget := budget.exceeded(budget.limits_of(graph.recipe.config), store, every_key):
        raise AtomError(over_budget)
    for name in selected:
        allocation_of(slurm, graph.nodes[name])  # raises before anything is submitted
    # Two submitters at once would not see each other's jobs.
    with submission_lock.submitting(store):
        keys = [graph.nodes[name].key for name in selected]
        slurm_jobs = slurm_client.queued_jobs(submission_lock.users_of(store, keys))
        code = source_code.freeze(store, graph.recipe.files)  # under the lock, so that gc cannot take it
        fields: LauncherFields = {"launcher": "slurm", "cluster": profile.name, "code": code.name}
        fields["prices"] = profile.costs()
        run = runs.start(graph, store, selected, reference, fields)
        submission = Submission(run)
        try:
            avoidance = Avoidance(bad_nodes.read(store))
            submission.kept_nodes = avoidance.kept
            scripts, limits = RunScripts(store, run, slurm, code), _limits(graph, profile)
            submitter = _Submitter(graph, scripts, run, profile, slurm_jobs, submission, avoidance, limits)
            for name in selected:
                submitter.submit(graph.nodes[name])
        except BaseException as error:
            # Also after Ctrl-C, since the jobs before it must not run without the rest.
            sentence = _withdraw(submission, store, graph, error)
            try:
                run.refuse(sentence)
            except OSError as failure:
                print(f"run {run.id} cannot be marked as refused ({failure}): {sentence}", file=sys.stderr)
            raise

    return submission


@dataclass
class _Submitter:
    """Submits the stages of a run one by one, each after its inputs, and notes their jobs."""

    graph: Graph
    scripts: RunScripts
    run: Run
    profile: Profile
    # The jobs in Slurm when the submission began.
    slurm_jobs: Mapping[str, Job]
    submission: Submission
    avoidance: Avoidance
    limits: JobLimits

    def submit(self, node: Node) -> None:
        """Submits a stage, unless it is sealed, or another run has a job for it."""
        submission, slurm_jobs, store = self.submission, self.slurm_jobs, self.scripts.store
        claim = submission_lock.read(store, node.key)
        if store.sealed(node.key):
            submission.sealed.append(node.name)
            return
        user = None
        if claim is not None and claim.holds(slurm_jobs):
            submission.attached[node.name] = claim.job
            user = slurm_jobs[claim.job].user
        else:
            self._start(node)
            submission_lock.write(store, node.key, Owner(self.run.id, node.name), submission.submitted[node.name])
        array, servers = submission.arrays.get(node.name), submission.servers.get(node.name)
        job, shards = submission.jobs[node.name], node.stage.shards(node.config)
        self.run.note_job(node.name, job, node.name in submission.attached, array, shards, servers, user)

    def _start(self, node: Node) -> None:
        """Starts the jobs of a stage: the array of its shards, its first server, its job, and the other servers."""
        submission, scripts, name, jobs = self.submission, self.scripts, node.name, self.submission.jobs
        dependencies = sorted({jobs[source] for source in node.precursors if source in jobs}, key=int)
        task = task_of(self.graph, scripts.store, self.run, node, self.profile)
        if tasks := array_of(scripts.slurm, node):
            script = self.avoidance.apply(scripts.of_stage(node, dependencies, tasks))
            submission.arrays[name] = start_array(script, task, self.limits, tasks)
            # The array waits for the inputs, so the stage's job need wait for the array alone.
            dependencies = [submission.arrays[name]]

        servers, server_job = servers_of(scripts.slurm, node), ""
        if servers:
            conditions = [f"afterok:{':'.join(dependencies)}"] if dependencies else []
            script = self.avoidance.apply(scripts.of_servers(node, servers, "0", conditions))
            server_job = start_servers(script, task, self.limits, range(1))
            submission.servers[name] = [server_job]

        script = scripts.of_stage(node, dependencies, server_job=server_job)
        submission.submitted[name] = start(self.avoidance.apply(script), task, self.limits)
        if servers and servers.count > 1:
            numbers, conditions = f"1-{servers.count - 1}", [f"after:{submission.submitted[name]}"]
            script = self.avoidance.apply(scripts.of_servers(node, servers, numbers, conditions))
            submission.servers[name].append(start_servers(script, task, self.limits, range(1, servers.count)))


def _limits(graph: Graph, profile: Profile) -> JobLimits:
    slurm, test = profile.cluster(), None
    if slurm.device_test_share:
        test = slurm.device_test_share * profile.peaks().get("bf16", 0.0)
    return JobLimits(
        budget=budget.limits_of(graph.recipe.config),
        restarts=slurm.restarts,
        free_gb=slurm.free_gb,
        scratch=slurm.scratch,
        variables=slurm.variables,
        avoid_seconds=slurm.avoid_seconds,
        device_test_flops=test,
    )


def _withdraw(submission: Submission, store: Store, graph: Graph, error: BaseException) -> str:
    """Cancels what was submitted before an error. Returns the sentence about the refused run."""
    reason = str(error) if isinstance(error, AtomError) else f"the submission was stopped ({type(error).__name__})"
    ids = [*submission.submitted.values(), *submission.arrays.values(), *chain(*submission.servers.values())]
    try:
        if ids:
            slurm_client.run_command("scancel", *ids)
    except NoAnswer as failure:
        return f"{reason}; the jobs before it may still be queued, since {failure}; `atom cancel` cancels them"
    try:
        # Only after the jobs are cancelled: as long as a job may live, its claim must stand.
        for name in submission.submitted:
            submission_lock.remove(store, graph.nodes[name].key)
    except OSError as failure:
        return (
            f"{reason}; a record of a cancelled job cannot be removed ({failure}); `atom retry` submits the run again"
        )
    return f"{reason}; then `atom retry` submits the run again"


class Avoidance:
    """Excludes bad nodes from jobs, beside those of the profile, but never so many that a job could not start.

    Slurm is asked once for all jobs that request the same, and once more for each bad node if it refuses to do without
    all. `kept` has a sentence about each node that a job may get all the same.
    """

    def __init__(self, bad: list[BadNode]) -> None:
        self.bad, self.kept = bad, list[str]()
        self._excluded: dict[tuple[tuple[str, object], ...], tuple[str, list[BadNode]]] = {}

    def apply(self, script: BatchScript) -> BatchScript:
        """Returns the script with the bad nodes excluded. Raises NoAnswer without Slurm."""
        if not self.bad:
            return script
        request = tuple((name, value) for name, value in script.sbatch_options.items() if name not in _OF_ONE_JOB)
        if request not in self._excluded:
            self._excluded[request] = self._exclude(script)
        excluded, kept = self._excluded[request]
        for entry in kept:
            sentence = f"node {entry.node} is bad, but stage {script.stage} could not start without it"
            self.kept.append(f"{sentence}, so it is not avoided; have it repaired")
        return _without(script, excluded) if excluded else script

    def _exclude(self, script: BatchScript) -> tuple[str, list[BadNode]]:
        """Returns the nodes to exclude, in Slurm's notation, and the bad ones that are not among them."""
        excluded = str(script.sbatch_options.get("exclude", ""))
        with_all = _list(excluded, *(entry.node for entry in self.bad))
        if _can_start(script, with_all):
            return with_all, []

        # One by one, as many as the job can do without.
        kept = []
        for entry in self.bad:
            with_entry = _list(excluded, entry.node)
            if _can_start(script, with_entry):
                excluded = with_entry
            else:
                kept.append(entry)
        return excluded, kept


def _list(*nodes: str) -> str:
    return ",".join(node for node in nodes if node)


# The options that do not decide on which nodes a job can start.
_OF_ONE_JOB = ("array", "comment", "dependency", "job-name", "output")


def _without(script: BatchScript, excluded: str) -> BatchScript:
    return replace(script, sbatch_options=dict(sorted({**script.sbatch_options, "exclude": excluded}.items())))


def _can_start(script: BatchScript, excluded: str) -> bool:
    """Returns True if Slurm would start the job without these nodes; the jobs that it waits for may not exist yet."""
    options = {name: value for name, value in script.sbatch_options.items() if name != "dependency"}
    try:
        slurm_client.test_only(text=_without(replace(script, sbatch_options=options), excluded).text())
    except slurm_client.Refused:
        return False
    return True


class _Executor(submitit.SlurmExecutor):  # type: ignore[misc]  # submitit has no types
    """submitit's executor with atom's script. Raises NoAnswer without Slurm."""

    def __init__(self, script: BatchScript) -> None:
        try:
            super().__init__(script.submitit_folder, max_num_timeout=UNLIMITED)
        except RuntimeError:
            raise slurm_client.NoAnswer(
                "there is no srun here; submit from a host of a Slurm cluster, or use `atom run`"
            ) from None
        self.script = script

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script.text()


def start(script: BatchScript, task: Task, limits: JobLimits) -> str:
    """Submits the job of a node; returns its id. Raises AtomError with the message of sbatch."""
    return _submit(script, job.run, task, limits)[0]


def start_array(script: BatchScript, task: Task, limits: JobLimits, tasks: int) -> str:
    """Submits the array with that many tasks for a node's shards; returns its id. Raises AtomError as `start` does."""
    return _link_tasks(*_submit(script, job.run_shards, task, tasks, limits), range(tasks))


def start_servers(script: BatchScript, task: Task, limits: JobLimits, numbers: range) -> str:
    """Submits the array of a node's servers with these numbers; returns its id. Raises AtomError as `start` does."""
    return _link_tasks(*_submit(script, job.run_server, task, limits), numbers)


def _link_tasks(id: str, pickled: Path, numbers: range) -> str:
    """Links the file of each task of an array, which submitit expects; here all are equal. Returns the id."""
    for number in numbers:
        os.link(pickled, pickled.with_name(pickled.name.replace(id, f"{id}_{number}", 1)))
    return id


def _submit(
    script: BatchScript, function: Callable[Arguments, str], *arguments: Arguments.args, **options: Arguments.kwargs
) -> tuple[str, Path]:
    """Returns (id of the job, file with the function that it calls)."""
    executor = _Executor(script)
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints the message of sbatch, which the error below has
            submitted = executor.submit(function, *arguments, **options)
    except (FailedJobError, FailedSubmissionError) as error:
        raise AtomError(f"Slurm refused stage {script.stage}: {refusal(str(error), script)}; fix the profile") from None
    return str(submitted.job_id), Path(submitted.paths.submitted_pickle)


def refusal(output: str, script: BatchScript) -> str:
    """Returns the message of sbatch in one line: its errors without their prefixes.

    A remedy or the request of the script follows where the message alone does not help.
    """
    lines = [line.partition("error: ")[2] for line in output.splitlines() if "error: " in line]
    message = "; ".join(dict.fromkeys(line.strip() for line in lines)) or " ".join(output.split())
    if "MaxSubmitJob" in message or "job array" in message:  # too many jobs of a user; more tasks than MaxArraySize
        return f"{message}; lower slurm.array_size, or submit fewer stages at once by --until"
    # Messages with these words do not say which option Slurm objects to.
    if "specifi" in message or "configuration" in message:
        return f"{message} ({' '.join(_request(script))})"
    return message


def _request(script: BatchScript) -> list[str]:
    """Returns the options that decide whether a job can start, as sbatch and srun take them."""
    options = {name: value for name, value in script.sbatch_options.items() if name in OF_ALLOCATION}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]


def task_of(graph: Graph, store: Store, run: Run, node: Node, profile: Profile) -> Task:
    allocation, servers = allocation_of(profile.cluster(), node), servers_of(profile.cluster(), node)
    return Task.of(
        graph,
        store,
        run,
        node,
        watts_per_core=profile.power.watts_per_core,
        ranks=allocation.ranks,
        gpus=allocation.all_gpus,
        watts_per_gpu=profile.power.watts_per_gpu,
        server_gpus=servers.count * servers.gpus_per_node if servers else 0,
        planned_tokens_per_s=planned_speed(node, profile, allocation.gpus),
    )


def planned_speed(node: Node, profile: Profile, gpus: int) -> float:
    """Returns the tokens a second that `atom plan` expects of a phase on text; 0 on CPU, or without an estimate."""
    if not gpus:
        return 0.0
    stage, estimate = node.stage, node.stage.estimate(node.config)
    training = estimate.training
    if training is None or estimate.served is not None:
        return 0.0
    rate = profile.training_rate(training.precision, partial(stage.time, node.config) if stage.time else None)
    if isinstance(rate, str) or estimate.tokens is None or estimate.flops is None:
        return 0.0
    if isinstance(rate, TrainingTime):
        return estimate.tokens / rate.seconds
    assert rate.utilization is not None
    return estimate.tokens * gpus * rate.peak * rate.utilization / (estimate.flops * training.recomputed)


def array_of(slurm: Slurm, node: Node) -> int:
    """Returns the number of tasks of the array before the job; 0 without an array."""
    shards = 1 if node.stage.run_shard is None else node.stage.shards(node.config)
    return min(shards, slurm.array_size) if shards > 1 else 0


def allocation_of(slurm: Slurm, node: Node) -> Allocation:
    """Returns the allocation of a node's job. Raises RecipeError as `Slurm.allocation` does."""
    return slurm.allocation(node.name, node.stage.needs(node.config))


def missing_image(profile: Profile) -> str | None:
    """Returns one sentence if the container's image is a file that this host does not have; else None."""
    container = profile.cluster().container
    if container is None or not container.image.startswith("/") or Path(container.image).exists():
        return None
    return f"slurm.container.image = {container.image} is not on this host; each node of a job needs it"


@dataclass(frozen=True)
class Checked:
    """A written script, and the answer of Slurm to it: when and where the job could start, or why it is refused."""

    stage: str
    script: str
    ok: bool
    answer: str


def require_taken(checks: list[Checked]) -> None:
    """Raises AtomError if Slurm would refuse a script, or did not check it."""
    for row in checks:
        if not row.ok:
            raise AtomError(f"stage {row.stage}: {row.answer}; {row.script} is written")


def dry_run(graph: Graph, store: Store, selected: list[str], profile: Profile) -> list[Checked]:
    """Writes the scripts of unsealed stages under `$ATOM_HOME/dry-run/<recipe>/`, and has `sbatch` test each.

    Dependencies are comments, because the jobs to wait for do not exist.
    """
    require_inputs(graph, store, selected, profile.other_python)
    code = source_code.freeze(store, graph.recipe.files)
    run = RunFolder("dry-run", store.home / "dry-run" / graph.recipe.config.name)
    slurm, checks = profile.cluster(), list[Checked]()
    scripts = RunScripts(store, run, slurm, code)

    def check(script: BatchScript, file: str, dependencies: list[str]) -> None:
        checks.append(_check_script(script, run.folder / file, dependencies))

    for name in selected:
        node = graph.nodes[name]
        if store.sealed(node.key):
            continue
        dependencies = [n for n in node.precursors if not store.sealed(graph.nodes[n].key)]
        if tasks := array_of(slurm, node):
            check(scripts.of_stage(node, [], tasks), f"{name}.shards.sh", dependencies)
            dependencies = ["its shards"]
        check(scripts.of_stage(node, []), f"{name}.sh", dependencies)
        if servers := servers_of(slurm, node):
            script = scripts.of_servers(node, servers, f"0-{servers.count - 1}", [])
            check(script, f"{name}.servers.sh", [f"the start of {name}, except the first one, for which {name} waits"])
    return checks


def _check_script(script: BatchScript, path: Path, dependencies: list[str]) -> Checked:
    """Writes a script, and asks Slurm whether it would take it.

    Args:
        script: The script.
        path: The file to write.
        dependencies: The stages that the job would wait for, for a comment.
    """
    head, _, body = script.text().partition("\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}\n# waits for: {', '.join(dependencies) or 'nothing'}\n{body}")
    try:
        answer = slurm_client.test_only(str(path))
    except slurm_client.Refused as error:
        return Checked(script.stage, str(path), False, f"Slurm refuses it: {refusal(str(error), script)}")
    except NoAnswer as error:
        return Checked(script.stage, str(path), False, f"not checked, since {error}")
    return Checked(script.stage, str(path), True, f"Slurm takes it, {answer}" if answer else "Slurm takes it")
