"""`atom init --cluster` writes a profile from what Slurm prints, and `--ranks` a recipe of another size.

The lines are in the form of those that Slurm 24.11.5 printed for a partition of each kind.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import AtomError
from pipeline.core.store import Store
from pipeline.launch import cluster_profile
from pipeline.launch.cluster_profile import Profile
from pipeline.operations import recipe_check, site_profile
from tests.fixtures.run_fixtures import atom
from tests.fixtures.slurm_line_fixtures import programs

SINFO = """\
cpu|16|64|500000|2-00:00:00|(null)
gpu|12|96+|2000000+|12:00:00|gpu:h100:8(S:0-1)
debug|2|96|2000000|30:00|gpu:h100:8(S:0-1)
mixed|4|64|500000|1:30:00|(null)
mixed|2|32|250000|infinite|gpu:a100:4,gpu:v100:2"""
RECIPE = "atom-1b-a300m"


def write(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sinfo: str = SINFO, like: str = "h100-pyxis", sampling: int = 64
) -> Profile:
    monkeypatch.setenv("PATH", programs(folder / "bin", sinfo=sinfo, sacctmgr="llm"))
    path = site_profile.write_profile(folder / "mine.yaml", like, "/images/mine.sqsh", sampling)
    return cluster_profile.load(str(path))


def test_times_of_slurm_are_minutes() -> None:
    texts = ("infinite", "n/a", "30:00", "12:00:00", "1-00:00:00", "2-12:30:00")
    assert [site_profile._minutes(text) for text in texts] == [None, None, 30, 720, 1440, 3630]


def test_partitions_are_read_as_slurm_prints_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path, sinfo=SINFO))
    rows = [(row.name, row.nodes, row.cpus, row.minutes, row.gpus) for row in site_profile.partitions()]
    assert rows == [
        ("cpu", 16, 64, 2880, 0),
        ("gpu", 12, 96, 720, 8),
        ("debug", 2, 96, 30, 8),
        ("mixed", 4, 64, 90, 0),
        ("mixed", 2, 32, None, 6),
    ]
    assert (tmp_path / "calls").read_text() == "sinfo -h -o %R|%D|%c|%m|%l|%G\n"


@pytest.mark.parametrize("like", ["h100-pyxis", "h100-apptainer", "h100-modules"])
def test_a_profile_has_what_slurm_says_and_nothing_of_the_site_of_the_example(
    like: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = write(tmp_path, monkeypatch, like=like)
    slurm = profile.cluster()
    assert profile.name == "mine" and slurm.servers is not None and slurm.gpu is not None
    assert (slurm.cpu.partition, slurm.cpu.minutes, slurm.cpu.cpus_per_task) == ("cpu", 2880, 8)
    train = slurm.train
    assert (train.partition, train.minutes, train.nodes, train.tasks_per_node) == ("gpu", 720, 12, 8)
    assert (train.gpus_per_node, train.cpus_per_task, slurm.gpu.minutes) == (8, 12, 480)
    # Eight of twelve nodes have the ranks beside which the servers run.
    assert (slurm.servers.count, slurm.servers.cpus_per_task, slurm.servers.minutes) == (4, 96, 720)
    for jobs in (slurm.cpu, train, slurm.gpu, slurm.servers):
        assert (jobs.account, jobs.qos, jobs.constraint, jobs.exclude) == ("llm", None, None, None)
    assert not {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} & set(slurm.environment)
    assert not slurm.modules and slurm.scratch is None
    if slurm.container:
        assert slurm.container.image == "/images/mine.sqsh" and not slurm.container.mounts
    recipe_check.write_recipe("my-1b", RECIPE, tmp_path)
    findings = recipe_check.check(str(tmp_path / "my-1b.yaml"), Store(tmp_path / "home"), str(tmp_path / "mine.yaml"))
    assert not findings.problems


@pytest.mark.parametrize(
    ("sinfo", "sampling", "sentence"),
    [
        (SINFO.splitlines()[0], 0, "sinfo shows no partition with GPUs; ask your site for its name"),
        (SINFO, 96, "96 ranks take all 12 nodes of partition gpu, and the servers that sample beside them need one; "
         "use at most --ranks 88"),
        (SINFO.replace("12:00:00", "5:00"), 64, "cluster profile mine: slurm.train.minutes = 5 is no longer than "
         "signal_before_limit_seconds = 300"),
    ],
)  # fmt: skip
def test_one_sentence(
    sinfo: str, sampling: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AtomError) as error:
        write(tmp_path, monkeypatch, sinfo, sampling=sampling)
    assert str(error.value).startswith(sentence) and not (tmp_path / "mine.yaml").exists()


def test_nothing_is_overwritten_and_a_host_without_slurm_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, monkeypatch)
    with pytest.raises(AtomError, match=r"mine\.yaml exists, and is not overwritten"):
        write(tmp_path, monkeypatch)
    with pytest.raises(AtomError, match="local is a profile without servers on Slurm"):
        site_profile.write_profile(tmp_path / "b.yaml", "local", None, 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AtomError, match="there is no sinfo here"):
        site_profile.write_profile(tmp_path / "b.yaml", "h100-pyxis", None, 0)


def test_ranks_are_scaled_alike(tmp_path: Path) -> None:
    path = recipe_check.write_recipe("half", "atom-30b-a3b", tmp_path, ranks=128)
    text, origin = path.read_text(), Path(recipe_check.__file__).parents[1] / "recipes/atom-30b-a3b.yaml"
    assert [int(number) for number in recipe_check.RANKS.findall(text)] == [
        int(number) // 2 for number in recipe_check.RANKS.findall(origin.read_text())
    ]
    store = Store(tmp_path / "home")
    assert recipe_check.sampling_ranks(path, store) == 32
    assert recipe_check.sampling_ranks(recipe_check.write_recipe("tiny", "atom-smoke", tmp_path), store) == 0
    with pytest.raises(
        AtomError, match="--ranks 130 gives no whole number to the phases of atom-30b-a3b with 64 ranks"
    ):
        recipe_check.write_recipe("odd", "atom-30b-a3b", tmp_path, ranks=130)
    with pytest.raises(AtomError, match="atom-smoke states no ranks; leave --ranks out"):
        recipe_check.write_recipe("small", "atom-smoke", tmp_path, ranks=4)


def test_the_command_writes_both_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = programs(tmp_path / "bin", sinfo=SINFO.replace("gpu|12", "gpu|4"), sacctmgr="")
    words = ("init", "my-1b", "--from", RECIPE, "--cluster", "mine.yaml", "--image", "/images/mine.sqsh", "--ranks")
    refused = atom(tmp_path / "home", *words, "32", code=2, cwd=tmp_path, PATH=path)
    assert "32 ranks take all 4 nodes of partition gpu" in refused.stderr
    assert not list(tmp_path.glob("*.yaml"))
    programs(tmp_path / "bin", sinfo=SINFO, sacctmgr="")
    made = atom(tmp_path / "home", *words, "32", cwd=tmp_path, PATH=path)
    assert made.stdout.endswith("check it: atom validate my-1b.yaml --cluster mine.yaml\n")
    profile = cluster_profile.load(str(tmp_path / "mine.yaml"))
    assert profile.cluster().train.account is None and "ranks: 32" in (tmp_path / "my-1b.yaml").read_text()
