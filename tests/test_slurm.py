"""On a real Slurm cluster of virtual nodes: the same bytes as on one machine, whatever happens to jobs, nodes and daemons."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_world as world
import yaml
from conftest import atom, digests
from mlflow import MlflowClient
from test_tracking import runs as tracked
from test_tracking import tracking_server

from release.local_hub import free_port

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of the test cluster run as root")


@pytest.fixture(scope="module", autouse=True)
def slurm() -> Iterator[None]:
    world.cluster("up")
    os.environ["SLURM_CONF"] = str(world.PLACE / "etc/slurm.conf")
    yield
    world.cluster("down")


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that pre-training needs, sealed."""
    folder = tmp_path_factory.mktemp("upstream")
    atom(folder / "home", "run", world.write_recipe(folder), "--until", "order-pretrain")
    return folder / "home"


@pytest.fixture(scope="module")
def calm(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of an undisturbed pre-training by two ranks, on this machine."""
    folder = tmp_path_factory.mktemp("calm")
    shutil.copytree(upstream, folder / "home")
    atom(folder / "home", "run", world.write_recipe(folder), "--only", "pretrain")
    return world.digest(folder / "home", "pretrain")


@pytest.fixture
def home(upstream: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(upstream, tmp_path / "home")
    yield tmp_path / "home"
    subprocess.run(["scancel", "--me"], check=False)
    world.cluster("up")  # whatever a test has killed


def submit(home: Path, until: str = "pretrain", **settings) -> None:
    """Submits pre-training on two nodes."""
    folder = home.parent
    atom(
        home,
        "submit",
        world.write_recipe(folder),
        "--cluster",
        world.write_profile(folder, **settings),
        "--until",
        until,
    )


def finish(home: Path, stage: str = "pretrain") -> str:
    world.until(lambda: world.sealed(home, stage), f"{stage} sealed")
    return world.digest(home, stage)


# --- what happens to the job of a stage, or to the cluster under it -----------------------------------------------------


def requeue(home: Path, stage: str = "pretrain") -> None:
    world.slurm("scontrol", "requeue", world.job_of(home, stage))


def told_to_save(home: Path, stage: str = "pretrain") -> None:
    """The signal that comes before a time limit."""
    world.slurm("scancel", "--signal=USR2", world.job_of(home, stage))


def preempt(home: Path, stage: str = "pretrain") -> None:
    command = ["--partition=test", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
    world.slurm("sbatch", *command)


def node_down(home: Path, stage: str = "pretrain") -> None:
    node = world.nodes_of(home, stage)[-1]
    world.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def node_crash(home: Path, stage: str = "pretrain") -> None:
    """Every process of a node, its daemon and Slurm's supervisors among them."""
    node = world.nodes_of(home, stage)[-1]
    world.kill([world.daemon(f"slurmd.{node}"), *world.processes(node)])
    time.sleep(12)  # until the controller has noticed
    world.cluster("up")


def rank_killed(home: Path, stage: str = "pretrain") -> None:
    world.kill(world.processes(world.nodes_of(home, stage)[-1], b"submitit"))


def first_rank_killed(home: Path, stage: str = "pretrain") -> None:
    world.kill(world.processes(world.nodes_of(home, stage)[0], b"submitit"))


def rank_hangs(home: Path, stage: str = "pretrain") -> None:
    world.kill(world.processes(world.nodes_of(home, stage)[-1], b"submitit"), signal.SIGSTOP)


def daemons_killed(home: Path, stage: str = "pretrain") -> None:
    """Node daemon and supervisors, while the stage's own processes live on."""
    daemons = [world.daemon(f"slurmd.{node}") for node in world.nodes_of(home, stage)]
    world.kill([*daemons, *world.stepds(world.job_of(home, stage))])
    time.sleep(12)
    world.cluster("up")


def controller_killed(home: Path, stage: str = "pretrain") -> None:
    world.kill([world.daemon("slurmctld")])
    world.cluster("up")


def controller_away_as_a_rank_dies(home: Path, stage: str = "pretrain") -> None:
    """The job's script then asks for a new start of a controller that does not answer."""
    rank = world.processes(world.nodes_of(home, stage)[-1], b"submitit")
    world.kill([world.daemon("slurmctld"), *rank])
    time.sleep(12)
    world.cluster("up")


def accounting_away(home: Path, stage: str = "pretrain") -> None:
    world.kill([world.daemon("slurmdbd")], signal.SIGTERM)
    told = atom(home, "status").stdout
    assert stage in told
    time.sleep(2)
    world.cluster("up")


AGAIN = {requeue: True, told_to_save: True, preempt: True, daemons_killed: None}
AGAIN |= {controller_killed: None, accounting_away: False}
"""Whether the stage's job must have been started again; None: as it comes."""
AT_LENGTH = {node_down: True, node_crash: True, rank_killed: True, first_rank_killed: True, rank_hangs: True}
AT_LENGTH |= {controller_away_as_a_rank_dies: True}
"""As well by `make soak`."""
SOAK = bool(os.environ.get("ATOM_SOAK"))


@pytest.mark.parametrize("disturb", AGAIN | (AT_LENGTH if SOAK else {}), ids=lambda x: x.__name__)
def test_the_same_bytes_after(disturb: Callable[[Path], None], home: Path, calm: str) -> None:
    partition = "low" if disturb is preempt else "test"
    hang = {"hang_seconds": 8.0} if disturb in (rank_hangs, first_rank_killed) else {}
    recipe = world.write_recipe(home.parent, **hang)
    cluster = world.write_profile(home.parent, train={"partition": partition})
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain")
    world.until(lambda: world.reached(home, "pretrain", 12), "step 12")
    disturb(home)
    assert finish(home) == calm
    if (again := (AGAIN | AT_LENGTH)[disturb]) is not None:
        assert (world.attempts(home, "pretrain") > 1) == again
    told = world.until(lambda: (s := status(home)) and not s["unknown"] and s, "what Slurm says")
    stage = next(stage for stage in told["stages"] if stage["name"] == "pretrain")
    assert (stage["state"], stage.get("restarts", 0)) == ("sealed", world.attempts(home, "pretrain") - 1)


@pytest.mark.skipif(not SOAK, reason="ten minutes each; see `make soak`")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.timeout(1800)
def test_the_same_bytes_after_everything_in_random_order(seed: int, upstream: Path, home: Path) -> None:
    """`make soak`: each kind of disturbance in one run, wherever it happens to be."""
    rng, folder = random.Random(seed), home.parent
    steps = {"steps": 600, "hang_seconds": 8.0, "release_checkpoint_every": 600}
    recipe = world.write_recipe(folder, **steps)
    (folder / "calm").mkdir()
    shutil.copytree(upstream, folder / "calm/home")
    atom(folder / "calm/home", "run", recipe, "--until", "pretrain")
    cluster = world.write_profile(folder, train={"partition": "low"}, restarts=20)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain")
    kinds = [*AGAIN, *AT_LENGTH]
    rng.shuffle(kinds)
    for number, disturb in enumerate(kinds):
        world.until(lambda n=number: world.reached(home, "pretrain", 20 + 40 * n), f"step {20 + 40 * number}", 600)
        time.sleep(rng.random() * 4)
        job = world.job_of(home, "pretrain")
        world.until(lambda j=job: "RUNNING" in world.slurm("squeue", "-h", "-j", j, "-o", "%T"), "it runs", 300)
        print(disturb.__name__, flush=True)
        disturb(home)
    world.until(lambda: world.sealed(home, "pretrain"), "pretrain sealed", 900)
    assert world.digest(home, "pretrain") == world.digest(folder / "calm/home", "pretrain")


@pytest.mark.skipif(not SOAK, reason="a quarter of an hour each; see `make soak`")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.timeout(3600)
def test_a_whole_recipe_in_disorder_has_the_digests_of_a_quiet_one(seed: int, tmp_path: Path) -> None:
    """`make soak`: all stages, training on two nodes, arrays of shards; whatever runs is disturbed every few seconds, and
    status is held to squeue and sacct all the while."""
    rng, home, quiet = random.Random(seed), tmp_path / "home", tmp_path / "quiet"
    recipe = with_shards(tmp_path, 3)
    body = yaml.safe_load(Path(recipe).read_text())
    body["rlvr"]["logprob_gap"] = 0.1  # so short a training leaves the ids that pad the vocabulary some weight
    Path(recipe).write_text(yaml.safe_dump(body))
    atom(quiet, "run", recipe)
    cluster = world.write_profile(tmp_path, cpu={"partition": "low"}, train={"partition": "low"}, restarts=30)
    atom(home, "submit", recipe, "--cluster", cluster)
    kinds: list[Callable[[Path, str], None]] = []
    while True:
        told = told_truly(home)
        if all(stage["state"] == "sealed" for stage in told["stages"]):
            break
        bad = [stage for stage in told["stages"] if stage["state"] in ("failed", "cancelled")]
        assert not bad, bad
        if any(stage["state"] == "lost" or "retry" in stage.get("reason", "") for stage in told["stages"]):
            atom(home, "retry")
        running = [stage["name"] for stage in told["stages"] if stage["state"] == "running"]
        if not running or rng.random() < 0.5:
            time.sleep(rng.random() * 8)
            continue
        if not kinds:
            kinds = rng.sample([*AGAIN, node_down, node_crash, rank_killed], len(AGAIN) + 3)
        disturb, stage = kinds.pop(), rng.choice(running)
        print(f"{disturb.__name__}: {stage}", flush=True)
        try:
            disturb(home, stage)
        except (AssertionError, IndexError):  # the job has ended meanwhile
            world.until(lambda s=stage: s not in running_now(home), "the end of what was disturbed")
        world.cluster("up")
    assert digests(home) == digests(quiet)


def running_now(home: Path) -> list[str]:
    return [stage["name"] for stage in status(home)["stages"] if stage["state"] == "running"]


def told_truly(home: Path) -> dict:
    """What status says, after a comparison with what Slurm said just before and after."""

    def now() -> dict[str, str]:
        return dict(line.split("|") for line in world.slurm("squeue", "-h", "-t", "all", "-o", "%i|%T").splitlines())

    before, told, after = now(), status(home), now()
    for stage in told["stages"]:
        state = before.get(stage.get("job", ""))
        if state != after.get(stage.get("job", "")) or state is None or stage["state"] in ("lost", "sealed"):
            continue  # it was changing; or Slurm has another job of that number; or the artifact says more
        expected = {"COMPLETED": "sealed", "NODE_FAIL": "failed", "TIMEOUT": "failed"}.get(state, state.lower())
        assert stage["state"] == expected, (stage, state)
    return told


@pytest.mark.skipif(not SOAK, reason="four minutes; see `make soak`; above, the same signal is sent by hand")
def test_a_time_limit_reached_again_and_again(upstream: Path, home: Path) -> None:
    """One minute, with a signal some twenty seconds after the start (Slurm may send it much earlier)."""
    folder = home.parent
    recipe = world.write_recipe(folder, steps=240)
    shutil.copytree(upstream, folder / "calm/home")
    atom(folder / "calm/home", "run", recipe, "--until", "pretrain")
    cluster = world.write_profile(folder, train={"minutes": 1}, signal_lead_seconds=40, restarts=9)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain")
    assert finish(home) == world.digest(folder / "calm/home", "pretrain")
    assert world.attempts(home, "pretrain") > 1


def test_jobs_that_the_controller_lost_are_told_and_submitted_again(home: Path, calm: str) -> None:
    world.slurm("scontrol", "update", "nodename=n[1-4]", "state=drain", "reason=test")
    time.sleep(6)  # the state before is saved
    submit(home)
    world.kill([world.daemon("slurmctld")])
    world.cluster("up")
    state = next(stage["state"] for stage in status(home)["stages"] if stage["name"] == "pretrain")
    if state == "lost":  # else the controller had saved it in time
        world.slurm("sbatch", "--hold", "--output=/dev/null", "--wrap=true")  # takes the id that was given before
        assert "1 stage submitted" in atom(home, "retry").stdout
    world.cluster("up")  # which ends the draining, if the controller remembers it
    assert finish(home) == calm


def test_jobs_send_to_a_tracking_server_and_go_on_without_it(home: Path, tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "mlflow"
    folder.mkdir()
    recipe = world.write_recipe(tmp_path, steps=400)
    cluster = world.write_profile(tmp_path, forward=["MLFLOW_TRACKING_URI"])

    def steps(uri: str) -> list[int]:
        client = MlflowClient(tracking_uri=uri)
        found = tracked(uri) if client.get_experiment_by_name("atom-smoke") else {}
        run = found.get("pretrain")
        return [m.step for m in client.get_metric_history(run.info.run_id, "loss")] if run else []

    with tracking_server(folder, port) as uri:
        atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain", MLFLOW_TRACKING_URI=uri)
        world.until(lambda: steps(uri), "steps, while it trains")
        assert not world.sealed(home, "pretrain")
    world.until(lambda: world.sealed(home, "pretrain"), "the end without a server")
    world.until(lambda: "MLflow did not take everything" in atom(home, "logs", "pretrain").stdout, "a word of it", 60)
    assert world.attempts(home, "pretrain") == 1
    with tracking_server(folder, port) as uri:
        atom(home, "track", MLFLOW_TRACKING_URI=uri)
        assert sorted(steps(uri)) == list(range(1, 401))


def test_a_full_disk_for_a_while(upstream: Path, calm: str, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("a small disk to fill needs the right to mount one, which a container may not have")
    try:
        shutil.copytree(upstream, place / "home")
        atom(
            place / "home",
            "submit",
            world.write_recipe(tmp_path),
            "--cluster",
            world.write_profile(tmp_path, free_gb=0.0),
            "--until",
            "pretrain",
        )
        world.until(lambda: world.reached(place / "home", "pretrain", 8), "step 8")
        fill = place / "fill"
        with open(fill, "wb") as file, pytest.raises(OSError):
            while True:
                file.write(b"\0" * 65536)
        time.sleep(8)
        fill.unlink()
        assert finish(place / "home") == calm
    finally:
        subprocess.run(["scancel", "--me"], check=False)
        world.until(lambda: not world.slurm("squeue", "-h", "-t", "running,completing"), "an empty cluster", 60)
        subprocess.run(["umount", "-l", str(place)], check=True)


# --- a stage that cannot succeed ----------------------------------------------------------------------------------------


def test_a_stage_that_gets_no_further_ends_with_a_diagnosis_and_stops_what_waits_for_it(home: Path) -> None:
    folder = home.parent
    told = folder / "told"
    recipe = world.write_recipe(folder)
    order = next((home / "artifacts").glob("order-pretrain-*"))
    (order / "order.parquet").write_bytes(b"x" * (order / "order.parquet").stat().st_size)  # no retry will mend it
    notify = f'echo "$ATOM_STAGE: $ATOM_OUTCOME" >> {told}'
    cluster = world.write_profile(folder, restarts=1, notify=notify)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "midtrain")
    stages = world.until(lambda: settled(home), "an end")
    assert stages["pretrain"]["state"] == "failed" and stages["pretrain"]["restarts"] == 1
    assert stages["midtrain"]["state"] == "cancelled"
    assert "pretrain" in stages["pretrain"]["message"] or "order" in stages["pretrain"]["message"]
    assert told.read_text().startswith("pretrain: ") and stages["pretrain"]["message"] in told.read_text()
    assert atom(home, "logs", "pretrain").stdout.startswith("pretrain failed: ")
    failed = [path for path in (home / "ledger").glob("pretrain-*/*.json")]
    assert len(failed) == 2, "each attempt has its statement"


def status(home: Path) -> dict:
    return json.loads(atom(home, "status", "--json").stdout)


def settled(home: Path) -> dict | None:
    stages = {s["name"]: s for s in status(home)["stages"]}
    return stages if all(s["state"] in ("sealed", "failed", "cancelled", "lost") for s in stages.values()) else None


# --- arrays over shards -------------------------------------------------------------------------------------------------


def with_shards(folder: Path, shards: int) -> str:
    """The recipe, with a data recipe whose sources are cut into so many shards."""
    recipe = Path(world.write_recipe(folder))
    body = yaml.safe_load(recipe.read_text())
    data = yaml.safe_load((world.ROOT / "data_recipes/smoke.yaml").read_text())
    data["curation"] = {**data.get("curation", {}), "shards": shards}
    (folder / "cut.yaml").write_text(yaml.safe_dump(data))
    recipe.write_text(yaml.safe_dump({**body, "data": "cut.yaml"}))
    return str(recipe)


@pytest.fixture
def acquired(upstream: Path, tmp_path: Path) -> Path:
    """A home folder in which all is sealed that comes before curation."""
    home = tmp_path / "home"
    for path in (p for kind in ("artifacts", "ledger") for p in (upstream / kind).iterdir()):
        if path.name.startswith(("acquire-", "items-")):
            shutil.copytree(path, home / path.parent.name / path.name)
    return home


@pytest.mark.parametrize("shards, tasks", [(1000, 3), *([(3, 1000), (8, 8)] if SOAK else [])])
def test_curation_in_an_array_gives_the_same_bytes(
    acquired: Path, upstream: Path, tmp_path: Path, shards: int, tasks: int
) -> None:
    home, recipe = acquired, with_shards(tmp_path, shards)
    cluster, size = world.write_profile(tmp_path, array_size=tasks), min(tasks, shards)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "tokenize", "--dry-run")
    script = (home / "dry-run/atom-smoke/curate.shards.sh").read_text()
    assert f"#SBATCH --array=0-{size - 1}%{size}\n" in script
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "tokenize")
    if size == 3:  # tasks that are killed are done again
        word = b"submitit.core._submit"

        def three() -> list[int]:
            found = [pid for n in range(1, 5) for pid in world.processes(f"n{n}", word)]
            return found if len(found) >= 6 else []  # each with its srun

        world.kill(world.until(three, "three tasks"))
    world.until(lambda: world.sealed(home, "tokenize"), "tokenize sealed")
    for stage in ("curate", "tokenize"):
        assert world.digest(home, stage) == world.digest(upstream, stage)
        assert len(list(home.glob(f"logs/*/{stage}/shards/submitit/*_submission.sh"))) == 1, "one submission"
        assert world.reached_shards(home, stage) == shards and world.array_of(home, stage).isdigit()
        assert {s["name"]: s for s in status(home)["stages"]}[stage]["state"] == "sealed"
    body = next(json.loads(path.read_text()) for path in home.glob("ledger/curate-*/*.json"))
    usage = next(x for x in body["predicate"]["runDetails"]["byproducts"] if x["name"] == "usage")["annotations"]
    assert usage["ranks_counted"] == size + 1


def test_shards_here_give_the_same_bytes_too(upstream: Path, tmp_path: Path) -> None:
    atom(tmp_path / "home", "run", with_shards(tmp_path, 5), "--until", "tokenize")
    for stage in ("curate", "tokenize"):
        assert world.digest(tmp_path / "home", stage) == world.digest(upstream, stage)


def test_a_shard_that_fails_is_told_and_stops_what_waits(acquired: Path, tmp_path: Path) -> None:
    home, recipe, cluster = acquired, with_shards(tmp_path, 2), world.write_profile(tmp_path, restarts=0)
    documents = next(home.glob("artifacts/acquire-sums-*/documents.parquet"))
    documents.write_bytes(b"x" * documents.stat().st_size)
    atom(home, "submit", recipe, "--cluster", cluster, "--until", "tokenize")
    stages = world.until(lambda: settled(home), "an end")
    assert stages["curate"]["state"] == "failed"
    assert re.match(r"shard [01]: .*documents.parquet cannot be read as Parquet", stages["curate"]["message"]), stages
    assert stages["tokenize"]["state"] == "cancelled"


# --- submitting ---------------------------------------------------------------------------------------------------------


def test_submitting_twice_attaches_and_two_at_once_share(home: Path, calm: str) -> None:
    folder = home.parent
    recipe, cluster = world.write_recipe(folder), world.write_profile(folder)
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "submit",
        recipe,
        "--cluster",
        cluster,
        "--until",
        "pretrain",
        "--json",
    ]
    both = [
        subprocess.Popen(command, env={**os.environ, "ATOM_HOME": str(home)}, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [json.loads(each.communicate(timeout=60)[0]) for each in both]
    assert sorted(list(each["submitted"]) for each in told) == [[], ["pretrain"]]
    third = json.loads(atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain", "--json").stdout)
    assert third["attached"] == {"pretrain": world.job_of(home, "pretrain")} and not third["submitted"]
    assert finish(home) == calm
    assert world.attempts(home, "pretrain") == 1
    assert "all sealed" not in atom(home, "submit", recipe, "--cluster", cluster, "--until", "pretrain").stdout


def test_jobs_run_from_the_code_as_it_was(home: Path, tmp_path: Path) -> None:
    submit(home)
    (code,) = (home / "code").iterdir()
    assert (code / "stages/pretrain.py").read_bytes() == (world.ROOT / "stages/pretrain.py").read_bytes()
    assert not os.access(code / "stages/pretrain.py", os.W_OK) or os.geteuid() == 0
    script = next(home.glob("logs/*/pretrain/submitit/*_submission.sh")).read_text()
    assert f"export PYTHONPATH={code}\n" in script and "HF_TOKEN" not in script
    world.until(lambda: world.reached(home, "pretrain", 1), "a step")
    environment = (
        (Path("/proc") / str(world.processes(world.nodes_of(home, "pretrain")[0], b"submitit")[0]) / "environ")
        .read_bytes()
        .split(b"\0")
    )
    assert f"PYTHONPATH={code}".encode() in environment
    assert "pretrain" in atom(home, "cancel").stdout
    world.until(lambda: settled(home), "an end")
    assert world.attempts(home, "pretrain") == 1, "what is cancelled does not come back"


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"train": {"partition": "nowhere"}}, "invalid partition specified: nowhere"),
        ({"train": {"cpus_per_task": 97}}, "Requested node configuration is not available"),
        ({"train": {"minutes": 0}}, "slurm.train.minutes = 0"),
        ({"train": {"partitions": "test"}}, "did you mean partition?"),
        ({"train": {"memory_gb": 9e6}}, "Requested node configuration is not available"),
        ({"train": {"account": "nobody"}}, "Invalid account or account/partition combination"),
        ({"container": {"kind": "apptainer", "image": "/images/none.sif"}}, "/images/none.sif is not there; make it"),
    ],
    ids=str,
)
def test_what_slurm_or_the_schema_refuses_is_one_sentence_and_leaves_nothing(
    home: Path, changed: dict, words: str
) -> None:
    folder = home.parent
    recipe, cluster = world.write_recipe(folder), world.write_profile(folder, **changed)
    for more in ((), ("--dry-run",)):
        said = atom(home, "submit", recipe, "--cluster", cluster, "--until", "midtrain", *more, code=2).stderr
        assert said.count("\n") == 1 and words in said, said
    assert not world.slurm("squeue", "-h", "--me", "-t", "pending,running")
    assert not list(home.glob("jobs/*.json"))


def test_without_slurm_one_sentence(home: Path, tmp_path: Path) -> None:
    recipe, cluster = world.write_recipe(tmp_path), world.write_profile(tmp_path)
    asked = ("submit", recipe, "--cluster", cluster, "--until", "pretrain")
    said = atom(home, *asked, code=2, PATH=str(tmp_path)).stderr
    assert said.count("\n") == 1 and "there is no s" in said and "atom run" in said
    dead = tmp_path / "slurm.conf"
    text = Path(os.environ["SLURM_CONF"]).read_text()
    dead.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=45999", text))
    shutil.copy(world.PLACE / "etc/slurm.key", tmp_path)
    said = atom(home, *asked, code=2, SLURM_CONF=str(dead)).stderr
    assert said.count("\n") == 1 and "squeue failed: " in said and "ontroller" in said
    said = atom(home, "submit", recipe, "--cluster", "local", code=2).stderr
    assert said.count("\n") == 1 and "has no section slurm" in said


def test_a_budget_that_is_used_up_stops_what_comes_next(home: Path) -> None:
    folder = home.parent
    recipe = Path(world.write_recipe(folder))
    body = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**body, "budget": {"core_hours": 1e-6}}))
    said = atom(
        home, "submit", str(recipe), "--cluster", world.write_profile(folder), "--until", "pretrain", code=2
    ).stderr
    assert "the budget of 1e-06 core hours is used up" in said and said.count("\n") == 1


def test_other_profiles_give_the_same_keys_and_scripts_of_their_own(home: Path) -> None:
    from pipeline import graph, profile, recipe
    from pipeline.launch import slurm
    from pipeline.store import Store

    store = Store(home)
    composed = graph.compose(recipe.load(world.write_recipe(home.parent)), store)
    for name, words in {
        "h100-pyxis": [
            "--container-image=/shared/images/atom.sqsh",
            "#SBATCH --gpus-per-node=2",
            "#SBATCH --exclusive",
        ],
        "h100-apptainer": ["apptainer exec --nv --bind", "module load apptainer"],
        "h100-modules": ["/shared/envs/atom/bin/python -u -m submitit", "#SBATCH --constraint=h100", "ulimit -n 65536"],
    }.items():
        run = slurm.Run("test", home.parent / name, {})
        made = slurm.executor_of(store, run, composed.nodes["pretrain"], profile.load(name), Path("/code"), ["7", "8"])
        text = made._make_submission_file_text(made._submitit_command_str, "")
        for word in [
            *words,
            "#SBATCH --dependency=afterok:7:8",
            "#SBATCH --kill-on-invalid-dep=yes",
            "--signal=USR2@300",
        ]:
            assert word in text, (name, word, text)
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


# --- housekeeping -------------------------------------------------------------------------------------------------------


def test_what_nothing_needs_is_named_and_deleted_and_nothing_else(home: Path) -> None:
    folder = home.parent
    atom(home, "run", world.write_recipe(folder, steps=60), "--until", "pretrain")
    old = {key for key in digests(home) if key.startswith("pretrain")}
    assert len(old) == 4, "the phase and its checkpoints of three steps"
    atom(home, "run", world.write_recipe(folder, steps=90), "--only", "order-pretrain")
    before = digests(home)
    out, code = home / "work" / "pretrain-000000000000" / "out.3", home / "code" / "0123456789abcdef"
    out.mkdir(parents=True)
    (out / "model").write_bytes(b"x" * 1000)
    code.mkdir(parents=True)
    told = {Path(row["path"]) for row in json.loads(atom(home, "gc", "--json").stdout)["loose"]}
    orders = {home / "artifacts" / key for key in before if key.startswith("order-")}
    assert told == {out, code, *(home / "artifacts" / key for key in old), *(told & orders)} and len(told & orders) == 2
    atom(home, "gc", "--delete")
    assert not any(path.exists() for path in told)
    assert digests(home) == {key: value for key, value in before.items() if home / "artifacts" / key not in told}
    assert "0B can be deleted" in atom(home, "gc").stdout


def test_orchestration_benchmark() -> None:
    run = subprocess.run(
        [sys.executable, "bench/orchestration.py", "--quick"],
        cwd=world.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    *table, last = run.stdout.splitlines()
    assert json.loads(last)["name"] == "orchestration" and len(table) == 7
