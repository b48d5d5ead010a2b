"""Shared fixtures: run one stage as the engine would, on small work, in this process or a fresh one."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import resource
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import hypothesis
import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pipeline.launch.local import visible_gpus
from stages.mcore import gpu_environment
from tests.fixtures import layout_fixtures

if visible_gpus():  # as a launcher does
    os.environ.update(gpu_environment.missing(layout_fixtures.ANY))

from pipeline.core.stage import Stage
from pipeline.core.store import Artifact, write_manifest
from release.assembly import build_release as builder
from stages.rl import sandbox
from tests.fixtures import audit_fixtures, load_fixtures, release_fixtures, slurm_fixtures, train_fixtures
from tests.fixtures.hub_fixtures import hub  # noqa: F401 - fixtures
from tests.fixtures.opt_out_release_fixtures import earlier_release, later_release  # noqa: F401 - fixtures
from tests.fixtures.publish_fixtures import client, release  # noqa: F401 - fixtures
from tests.fixtures.run_fixtures import RecordingReport, atom, copy_sealed
from tests.fixtures.verifier_fixtures import gym, maths, serve  # noqa: F401 - fixtures

hypothesis.settings.register_profile("atom", deadline=None)  # no verdict hangs on a busy machine's time
hypothesis.settings.load_profile("atom")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--margin", type=float, default=1.0, help="divide every tolerance of floating-point figures by this"
    )


def pytest_configure(config: pytest.Config) -> None:
    """With --margin, whatever is compared within a tolerance must agree that many times better: a verdict that is near
    its threshold on one processor falls on the other side of it on the next."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script: commands inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    margin = config.getoption("margin")
    if margin == 1:
        return
    import torch

    approx, assert_close, allclose = pytest.approx, torch.testing.assert_close, torch.allclose

    def closer(function: Any, names: tuple[str, str], defaults: tuple[float, float] | None) -> Any:
        def compare(*args: Any, **kwargs: Any) -> Any:
            if len(args) > 2:  # tolerances by position: a library's own comparison
                return function(*args, **kwargs)
            for name, default in zip(names, defaults or (None, None), strict=True):
                value = kwargs.get(name, default)
                kwargs |= {} if value is None else {name: value / margin}
            return function(*args, **kwargs)

        return compare

    pytest.approx = closer(approx, ("rel", "abs"), None)
    torch.testing.assert_close = closer(assert_close, ("rtol", "atol"), None)
    torch.allclose = closer(allclose, ("rtol", "atol"), (1e-5, 1e-8))


def pytest_unconfigure() -> None:
    audit_fixtures.stop()


CPU_SECONDS = "processor seconds"
"""The property of a report that has them."""
STARTED = pytest.StashKey[float]()


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    item.stash[STARTED] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report, now = (yield), cpu_seconds()
    report.user_properties.append((CPU_SECONDS, now - item.stash[STARTED]))
    item.stash[STARTED] = now
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the minutes of all workers together by folder, and the files that take most: what grows shows here first.
    A file's processor minutes do not depend on what else the machine does; jobs of Slurm are not among them. Then the
    number of skipped tests for each reason."""
    minutes: Counter[Path] = Counter()
    processor: Counter[Path] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = Path(report.nodeid.partition("::")[0])
                minutes[file] += report.duration / 60
                processor[file] += dict(report.user_properties).get(CPU_SECONDS, 0) / 60
    folders: Counter[str] = Counter()
    for path, duration in minutes.items():
        folders["/".join(path.parts[:2])] += duration
    by_folder = [f"{name} {duration:.1f}" for name, duration in sorted(folders.items())]
    by_file = [f"{path.stem} {minutes[path]:.1f} ({cpu:.1f})" for path, cpu in processor.most_common(25)]
    terminalreporter.write_line(f"minutes of the workers by folder: {', '.join(by_folder)}")
    terminalreporter.write_line(f"minutes by file, and of the processor, the first 25: {', '.join(by_file)}")
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        terminalreporter.write_line(f"{count} skipped: {reason}")


@cache
def order(file: Path) -> int:
    """Of several workers none is left with a long group at the end: the tests on Slurm, which one worker does, and the
    whole run of atom-smoke begin first; other tests that use that run come when it has ended."""
    text = file.read_text()
    if "ON_SLURM" in text:
        return 0
    if "smoke_demo" in text or "smoke_home" in text:
        return 1 if "demo.txt" in text else 3
    return 4 if "unit" in file.parts else 2


@cache
def group(file: Path) -> str:
    """What one worker does: all files of tests on Slurm, else a file."""
    return "ON_SLURM" if order(file) == 0 else file.name


def pytest_collection_finish() -> None:
    """What the imports have left never ends: no collection walks over it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: order(item.path))


class Groups(LoadScopeScheduling):
    """What one worker of several does: a group of files."""

    def _split_scope(self, nodeid: str) -> str:
        return group(Path(__file__).parent.parent / nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups:
    config.option.loadscopereorder = False  # not by the number of tests
    return Groups(config, log)


most_threads = 100


@pytest.fixture(autouse=True)
def few_threads():
    """A model is part of cycles, and its groups of ranks keep 48 threads, which wake all the time, until those are
    collected."""
    yield
    global most_threads
    if len(os.listdir("/proc/self/task")) > most_threads:
        gc.collect()
        # Those that are still in use: a collection takes up to half a second, and would follow every later test.
        most_threads = len(os.listdir("/proc/self/task")) + 100


@pytest.fixture
def run_stage(tmp_path: Path):
    """run_stage(STAGE, config_dict, {"role": artifact}) -> sealed Artifact, by the stage's own function."""
    count = itertools.count()

    def run(stage: Stage, config: dict[str, Any], inputs: dict[str, Artifact], work: Path | None = None) -> Artifact:
        n = next(count)
        work, out = work or tmp_path / f"work-{n}", tmp_path / f"out-{n}"
        work.mkdir(exist_ok=True)
        out.mkdir()
        stage.run(stage.config.model_validate(config), inputs, work, out, RecordingReport())
        return write_manifest(out, f"{stage.name}-{n}")

    return run


def shared(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all workers share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def filled_once(folder: Path) -> Iterator[bool]:
    """Holds a lock on a shared folder; yields whether it is still to be filled."""
    with FileLock(folder / "lock"):
        done = folder / "done"
        yield not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def smoke_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the data stages of atom-smoke, which the workers share. Treat it as read-only."""
    folder = shared(tmp_path_factory, "smoke-data")
    with filled_once(folder) as empty:
        if empty:
            atom(folder / "home", "run", "atom-smoke", "--until", "tokenize", timeout=1800)
    return folder / "home"


@pytest.fixture(scope="session")
def smoke_home(smoke_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of a whole, undisturbed run of atom-smoke, which the workers share. Treat it as read-only."""
    folder = shared(tmp_path_factory, "smoke")
    with filled_once(folder) as empty:
        if empty:
            home = shutil.copytree(smoke_data, folder / "home", dirs_exist_ok=True)
            # a minute on an idle machine; a loaded one decides no verdict
            atom(home, "run", "atom-smoke", timeout=1800, MLFLOW_TRACKING_URI="")
    return folder / "home"


@pytest.fixture(scope="session")
def smoke_demo(smoke_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of a finished demo of atom-smoke, with its local Hub, which the workers share; the output is in
    `demo.txt` beside it. Treat it as read-only."""
    folder = shared(tmp_path_factory, "smoke-demo")
    with filled_once(folder) as empty:
        if empty:
            home = shutil.copytree(smoke_home, folder / "home", dirs_exist_ok=True)
            demo = atom(home, "demo", "atom-smoke", timeout=1800)
            (folder / "demo.txt").write_text(demo.stdout + demo.stderr, "utf-8")
    return folder / "home"


@pytest.fixture(scope="session", autouse=True)
def equal_models_are_loaded_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    audit_fixtures.loads = shared(tmp_path_factory, "loads")
    load_fixtures.share(audit_fixtures.loads)


@pytest.fixture(scope="session")
def working_sandbox() -> None:
    """Fails with the reason, in one sentence, where code of a model cannot run in a sandbox."""
    if reason := sandbox.missing():
        pytest.fail(reason, pytrace=False)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> builder.BuildInput:
    """What the small release of release_fixtures is built from, which the workers share. Treat it as read-only."""
    folder = shared(tmp_path_factory, "small-run")
    with filled_once(folder) as empty:
        if empty:
            (folder / "input").write_bytes(pickle.dumps(release_fixtures.build_input(folder / "run")))
    return cast(builder.BuildInput, pickle.loads((folder / "input").read_bytes()))


@pytest.fixture(scope="session")
def built(source: builder.BuildInput, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small release, which the workers share. Treat it as read-only; `copy` may be altered."""
    folder = shared(tmp_path_factory, "small-release")
    with filled_once(folder) as empty:
        if empty:
            builder.build(source, folder)
    return folder / "releases" / f"{source.name}-{source.version}"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / built.name))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    train_fixtures.make(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product of a run that nobody disturbed, and its work folder beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_fixtures.pretrain(corpus, folder / "work", folder / "out", train_fixtures.config())
    return folder / "out"


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """One cluster for all tests of a session that need it."""
    slurm_fixtures.cluster("up")
    os.environ["SLURM_CONF"] = str(slurm_fixtures.PLACE / "etc/slurm.conf")
    yield
    slurm_fixtures.cluster("down")


@pytest.fixture(scope="session")
def upstream(smoke_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder in which all is sealed that the pre-training of the tests on Slurm needs."""
    folder = tmp_path_factory.mktemp("upstream")
    copy_sealed(smoke_data, folder / "home", "*")
    atom(folder / "home", "run", slurm_fixtures.write_recipe(folder), "--until", "order-pretrain")
    return folder / "home"


@pytest.fixture(scope="session")
def calm(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of an undisturbed pre-training by two ranks, on this machine."""
    folder = tmp_path_factory.mktemp("calm")
    shutil.copytree(upstream, folder / "home")
    atom(folder / "home", "run", slurm_fixtures.write_recipe(folder), "--only", "pretrain")
    return slurm_fixtures.digest(folder / "home", "pretrain")


@pytest.fixture
def home(upstream: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of `upstream`; afterwards no job is left, and the cluster is whole."""
    shutil.copytree(upstream, tmp_path / "home")
    yield tmp_path / "home"
    subprocess.run(["scancel", "--me"], check=False)
    slurm_fixtures.cluster("up")  # whatever a test has killed
