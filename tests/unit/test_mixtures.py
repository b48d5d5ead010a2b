"""`atom mix`: proxies, their draws, supply and limits, and what is read of sealed runs."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.core.errors import AtomError
from pipeline.core.store import Store, write_manifest
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from pipeline.launch import slurm
from release.cards import plots
from release.prediction import mixtures
from release.prediction.mixtures import Supply
from stages.evaluation.mixing_law import Law
from tests.fixtures import ROOT

pytestmark = pytest.mark.numeric

SOURCES = ("docstrings", "code", "sums")
DOMAINS = ("docstrings", "code", "courtesies")
# Bits of docstrings, code and courtesies.
LAW = Law(np.array([0.9, 0.8, 1.5]), np.array([[-2.0, 0.2, 0.6], [0.3, -2.5, 0.5], [0.1, -0.2, 0.0]]))
BYTES = {"docstrings": 1_000_000, "code": 60_000, "sums": 20_000}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, with recipes of atom-smoke's family beside it: `small`, and `large` with twice the steps."""
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    data = yaml.safe_load((ROOT / "data_recipes/smoke.yaml").read_text())
    for source in data["sources"]:
        if source["name"] in BYTES:
            source["expected"] = {"documents": 100, "bytes": BYTES[source["name"]]}
    (tmp_path / "data/own.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    recipe = yaml.safe_load((ROOT / "pipeline/recipes/atom-smoke.yaml").read_text()) | {"data": "data/own.yaml"}
    recipe["midtrain"]["mix"] = {"docstrings": 0.35, "worked": 0.65}
    for name, steps in (("small", 60), ("large", 120)):
        recipe["pretrain"]["steps"] = steps
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe | {"name": name}, sort_keys=False))
    return tmp_path


def acknowledge(home: Path, epochs: dict[str, float]) -> None:
    """Lets the phases of `large` read sources more often."""
    recipe = yaml.safe_load((home / "large.yaml").read_text()) | {"supply": {"acknowledged_epochs": epochs}}
    (home / "large.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def atom_mix(home: Path, *options: str) -> Any:
    command = ["mix", str(home / "small.yaml"), "--for", str(home / "large.yaml"), *options]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def graph(path: Path, home: Path) -> dag.Graph:
    return dag.compose(recipes.load(str(path)), Store(home / "home"))


def seal(home: Path, runs: int, noise: float = 0.0) -> list[dag.Graph]:
    """The proxies of `small`, as if they had been run: their bits follow LAW."""
    store = Store(home / "home")
    proxies, draw = mixtures.proxies_of(graph(home / "small.yaml", home), runs, store), np.random.default_rng(2)
    for proxy in proxies:
        mix = mixtures.mix_of(proxy)
        bits = LAW.bits(np.array([mix.get(source, 0.0) for source in SOURCES])) * np.exp(noise * draw.normal(size=3))
        folder = store.artifacts / proxy.nodes["evaluate-base"].key
        folder.mkdir(parents=True)
        scores = {"bits_per_byte": {name: {"value": value} for name, value in zip(DOMAINS, bits, strict=True)}}
        (folder / "scores.json").write_text(json.dumps(scores))
        write_manifest(folder, folder.name)
    return proxies


def test_draws_keep_their_places_and_flatten_the_supply() -> None:
    own, natural = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.96, "b": 0.03, "c": 0.01}
    many = mixtures.draw(own, natural, 400, seed=7)
    assert many[:20] == mixtures.draw(own, natural, 20, seed=7) and many[:2] == [own, natural]
    assert many[2:20] != mixtures.draw(own, natural, 20, seed=8)[2:]
    assert all(sum(mix.values()) == pytest.approx(1, abs=1e-9) and min(mix.values()) > 0.003 for mix in many[2:])
    mean = np.mean([list(mix.values()) for mix in many[2:]], axis=0)
    flat = np.sqrt(list(natural.values()))
    assert mean == pytest.approx(flat / flat.sum(), abs=0.06)
    assert mixtures.draw(own, None, 3, seed=7)[0] == own


def test_a_proxy_is_the_recipe_with_another_mix_and_its_file_gives_the_same_keys(home: Path) -> None:
    proxies = mixtures.proxies_of(graph(home / "small.yaml", home), 6, Store(home / "home"))
    small = graph(home / "small.yaml", home)
    assert proxies[0].nodes["pretrain"].key == small.nodes["pretrain"].key, "the first has the recipe's own mix"
    for proxy in proxies:
        path = proxy.recipe.path
        assert (
            path.parent == home / "home/mixtures/small"
            and path.read_bytes() == proxy.recipe.files[f"recipes/{path.name}"]
        )
        again = graph(path, home)
        assert {name: node.key for name, node in again.nodes.items()} == {
            n: node.key for n, node in proxy.nodes.items()
        }
        assert proxy.nodes["tokenize"].key == small.nodes["tokenize"].key, "all proxies share the corpus"
    assert len({proxy.nodes["evaluate-base"].key for proxy in proxies}) == 6


def test_supply_is_counted_stated_or_unknown(home: Path) -> None:
    large = graph(home / "large.yaml", home)
    stated = mixtures.supply_of(large, Store(home / "home"))
    # A tenth is held out, but none of the problems.
    assert stated["docstrings"] == Supply(225_000.0, "expected") and stated["sums"] == Supply(5_000.0, "expected")
    assert stated["worked"] == Supply(None, "unknown")
    folder = Store(home / "home").artifacts / large.nodes["tokenize"].key
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"tokens": {"train": {"docstrings": 9, "code": 5}}}))
    write_manifest(folder, folder.name)
    counted = mixtures.supply_of(large, Store(home / "home"))
    assert counted["docstrings"] == Supply(9.0, "counted") and counted["sums"] == Supply(0.0, "counted")
    assert mixtures.natural_mix(counted, SOURCES) == {"docstrings": 0.642857, "code": 0.357143}
    assert mixtures.natural_mix(stated, (*SOURCES, "worked")) is None


def test_the_proposal_follows_the_law_and_the_supply(home: Path) -> None:
    seal(home, 8)
    result = atom_mix(home, "--runs", "8", "--json", "--out", str(home / "out"))
    assert result.exit_code == 0
    report = json.loads(result.output)
    assert report == json.loads((home / "out/mix.json").read_text())
    assert plots.entries((home / "out/mix.png").read_bytes()), "a whole picture"
    # 120 steps of 1,536 tokens; four times 13,500 tokens of code.
    assert report["target"]["tokens"] == 184_320
    assert report["sources"]["code"]["limit"] == pytest.approx(4 * 13_500 / 184_320)
    proposed = report["mixes"]["proposed"]
    assert proposed["weights"]["code"] == pytest.approx(4 * 13_500 / 184_320, abs=1e-6), "the limit binds"
    assert proposed["weights"]["sums"] == 0, "it harms both"
    assert set(report["domains"]) == {"docstrings", "code"}, "what is scored of the sources that are mixed"
    assert report["domains"]["code"]["floor"] == pytest.approx(0.8, abs=1e-5)
    assert set(report["mixes"]) == {"proposed", "recipe", "natural"}
    for name in ("recipe", "natural"):
        assert report["mixes"][name]["above"]["value"] > 0
        assert report["mixes"][name]["expected"]["value"] > proposed["expected"]["value"] == proposed["mean"]
    assert report["rank_correlation"]["mean"] == pytest.approx(1)
    for curve in report["pareto"].values():
        assert curve[0]["weights"] == proposed["weights"]
        assert all(
            row["weights"][name] <= source["limit"] for row in curve for name, source in report["sources"].items()
        )
    best = [row["bits"]["docstrings"] for row in report["pareto"]["docstrings"]]
    assert best == sorted(best, reverse=True) and best[-1] < best[0]


def test_the_first_line_says_whether_the_law_ranks_and_the_last_one_is_the_mix(home: Path) -> None:
    seal(home, 8)
    lines = atom_mix(home, "--runs", "8").stdout.splitlines()
    assert lines[0].startswith("the law ranks the proxies: rank correlation, each of the 8 left out of it, mean 1.00")
    assert "code 0.293 (0.293 to 0.293): 4 epochs of 13.5k tokens (expected)" in "\n".join(lines)
    assert "the proxies have 181k parameters; ranks of mixes are known to carry over from 15M on" in lines
    assert yaml.safe_load(lines[-1])["mix"] == {"docstrings": 0.707032, "code": 0.292968}


def test_noise_is_no_base_for_a_mix(home: Path) -> None:
    seal(home, 8, noise=1.0)
    first = atom_mix(home, "--runs", "8").output.splitlines()[0]
    assert first.startswith("the law does not rank the proxies, so use no mix below: ")


def test_weights_choose_domains_that_need_not_be_mixed(home: Path) -> None:
    seal(home, 8)
    report = json.loads(atom_mix(home, "--runs", "8", "--json", "--weights", "courtesies: 3, docstrings: 1").output)
    assert {name: row["factor"] for name, row in report["domains"].items()} == {"courtesies": 0.75, "docstrings": 0.25}


def test_wrong_options_cost_one_sentence(home: Path) -> None:
    seal(home, 6)
    for options, words in (
        (["--runs", "5"], "--runs 5: the law of the 3 sources of small needs at least 6 runs"),
        (["--runs", "6", "--weights", "sums: 1"], "sums has no held-out documents that were scored; there are docs"),
        (["--runs", "6", "--weights", "code: -1"], "--weights: write such as 'manuals: 2, programs: 1'"),
        (["--runs", "6", "--weights", "code"], "--weights: write such as"),
    ):
        with pytest.raises(AtomError) as caught:
            atom_mix(home, *options)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_supply_that_is_too_small_is_refused_before_anything_is_run(home: Path) -> None:
    data = yaml.safe_load((home / "data/own.yaml").read_text())
    for source in data["sources"]:
        source["expected"] = {"documents": 100, "bytes": 40_000}
    (home / "data/own.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(AtomError) as caught:
        atom_mix(home, "--runs", "6")
    assert caught.value.exit_code == 2 and str(caught.value) == (
        "large reads 184k tokens, and the epochs that its supply allows of docstrings, code, sums, without what later "
        "phases read, are 76k; shorten its pre-training, add sources, or acknowledge more by supply.acknowledged_epochs"
    )
    assert not (home / "home/mixtures").exists()
    acknowledge(home, {"docstrings": 40})
    mixtures.target_of(graph(home / "large.yaml", home), SOURCES, Store(home / "home"))


def test_acknowledged_epochs_are_limits_of_the_mix(home: Path) -> None:
    acknowledge(home, {"code": 10, "docstrings": 1})
    target = mixtures.target_of(graph(home / "large.yaml", home), SOURCES, Store(home / "home"))
    # An acknowledgement only adds epochs, as in `atom plan`.
    assert target.epochs == {"docstrings": 4, "code": 10, "sums": 4}
    assert target.limits[1] == pytest.approx(10 * 13_500 / 184_320)
    seal(home, 8)
    report = json.loads(atom_mix(home, "--runs", "8", "--json").output)
    assert report["sources"]["code"]["epochs"] == 10
    assert 4 * 13_500 / 184_320 < report["mixes"]["proposed"]["weights"]["code"] <= report["sources"]["code"]["limit"]


def test_a_dry_run_lists_the_minutes_of_what_is_not_sealed(home: Path) -> None:
    (first, *_) = mixtures.proxies_of(graph(home / "small.yaml", home), 6, Store(home / "home"))
    rows = json.loads(atom_mix(home, "--runs", "6", "--dry-run", "--json").output)
    assert rows[0]["mix"] == mixtures.mix_of(first) and rows[0]["minutes"] > 1 > rows[1]["minutes"] > 0
    assert not Store(home / "home").artifacts.exists()


def test_on_slurm_what_is_not_sealed_is_submitted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []
    monkeypatch.setattr(slurm, "submit", lambda graph, *rest: submitted.append((graph.recipe.config.name, rest[1][-1])))
    seal(home, 6)
    output = atom_mix(home, "--runs", "8", "--cluster", "h100-pyxis").output
    assert output == "2 of 8 proxies are in Slurm; run this again once they are sealed (atom status)\n"
    assert submitted == [("small-mix-007", "evaluate-base"), ("small-mix-008", "evaluate-base")]


def processes(monkeypatch: pytest.MonkeyPatch, codes: dict[str, int]) -> list[str]:
    """Runs that take a moment and end with these codes, 0 without one. Returns the recipes that were begun."""
    begun = []

    def run(command: list[str], stdout: Any, **_: Any) -> Any:
        name = Path(command[4]).stem
        begun.append(name)
        time.sleep(0.02)
        stdout.write(b"run x\natom: stage pretrain failed: no disk\n")
        return SimpleNamespace(returncode=codes.get(name, 0))

    monkeypatch.setattr(subprocess, "run", run)
    return begun


def test_runs_go_on_until_one_fails_and_say_how_long_the_rest_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"r{number}.yaml" for number in range(6)]
    begun = processes(monkeypatch, {})
    mixtures.run_all(files, 2, "local")
    assert sorted(begun) == [file.stem for file in files]
    assert capsys.readouterr().err.splitlines()[-1].endswith("is done; 6 of 6, eta 0:00")
    begun = processes(monkeypatch, {"r0": 2})
    with pytest.raises(AtomError, match=r"^r0 failed: stage pretrain failed: no disk \(log: .*r0\.log\)$"):
        mixtures.run_all(files, 1, "local")
    assert len(begun) <= 2, "no run begins after a failure, but for one that had begun"


def test_ctrl_c_waits_for_what_runs_and_begins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, threads = processes(monkeypatch, {}), threading.active_count()

    def stop(seconds: float) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(mixtures, "duration", stop)  # in the loop over runs that have ended
    with pytest.raises(KeyboardInterrupt):
        mixtures.run_all([tmp_path / f"r{number}.yaml" for number in range(20)], 2, "local")
    assert len(begun) <= 4 and threading.active_count() == threads
