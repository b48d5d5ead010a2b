"""What `atom gc` takes: never what was trained, and nothing that a run or a release leads to."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core import source_code
from pipeline.core.errors import AtomError
from pipeline.core.lease import Lease
from pipeline.core.store import Store
from pipeline.graph import dag, recipe
from pipeline.graph import run as runs
from pipeline.graph.dag import Graph
from pipeline.launch import cluster_profile, slurm, slurm_client, submission_lock
from pipeline.launch.attempt import prediction_key
from pipeline.operations import garbage_collection
from tests.fixtures import home_fixtures
from tests.fixtures.run_fixtures import atom

pytestmark = pytest.mark.filterwarnings("ignore::pipeline.core.json_files.DamagedFile")
DAMAGES = ("", "{", "[]", '{"id": 1}', "[" * 100_000, "\x00\xff")


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Graph]:
    return home_fixtures.graphs(tmp_path_factory.mktemp("recipes"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def collected_paths(store: Store, **options: Any) -> set[str]:
    """The paths below the home that gc deletes."""
    listed = {row.path for row in garbage_collection.loose(store, **options)[0]}
    deleted = garbage_collection.delete(store, listed, **options)
    return {row.path.relative_to(store.home).as_posix() for row in deleted}


class History:
    """Runs of three recipes in one home, and what must not go, known without looking at any file."""

    def __init__(self, store: Store, three: list[Graph]) -> None:
        self.store, self.graphs = store, three
        self.runs: dict[Path, tuple[int, list[str]]] = {}
        self.released: dict[str, set[str]] = {}
        self.trained: set[str] = set()
        self.training: set[Path] = set()
        self.damaged: set[Path] = set()
        self.code: dict[Path, Path] = {}

    def run(self, number: int, selected: list[str], stop_before: str | None) -> None:
        composed = self.graphs[number]
        run = home_fixtures.start(self.store, composed, selected, stop_before)
        self.runs[run.folder] = (number, selected)
        for name in selected:
            key, trains = composed.nodes[name].key, composed.nodes[name].stage.trains
            if trains and self.store.sealed(key):
                self.trained |= {key, home_fixtures.Checkpoint(key, 1).key}
            elif trains and name == stop_before:
                self.training.add(self.store.work(key) / "state" / "checkpoint" / "file")
            if self.store.sealed(key):
                self.training.discard(self.store.work(key) / "state" / "checkpoint" / "file")

    def lose(self, number: int, selected: list[str]) -> None:
        """A submission whose jobs have not begun, and whose run.json is lost."""
        code = self.store.home / "code" / f"{len(self.code):016x}"
        code.mkdir(parents=True)
        folder = runs.start(
            self.graphs[number], self.store, selected, "dev", {"launcher": "slurm", "code": code.name}
        ).folder
        (folder / selected[0] / "submitit").mkdir(parents=True)
        (folder / "run.json").unlink()
        self.runs[folder], self.code[folder] = (number, selected), code
        self.damaged.add(folder)

    def led_to(self) -> set[str]:
        keys = set()
        for number, selected in self.runs.values():
            composed = self.graphs[number]
            keys |= {composed.nodes[name].key for name in composed.upstream(set(selected))}
        return keys.union(*self.released.values())

    def collect(self) -> None:
        before = set(os.listdir(self.store.artifacts)) if self.store.artifacts.exists() else set()
        collected_paths(self.store)
        after = set(os.listdir(self.store.artifacts)) if before else set()
        expected = before if self.damaged else before & (self.led_to() | self.trained)
        assert after == expected, (after - expected, expected - after)
        assert all(code.exists() for run, code in self.code.items() if run in self.runs), (
            "the code of pending jobs stays"
        )
        assert all(path.exists() for path in self.training), "work checkpoints of unfinished training stay"
        assert not any(self.store.damage(key) for key in after)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["run", "run", "only", "retry", "release", "damage", "lose", "forget", "gc"]),
        st.integers(0, 2),
        st.integers(0, 23),
        st.integers(0, 30),
    ),
    max_size=9,
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS)
def test_after_any_history_gc_takes_nothing_that_is_needed(three: list[Graph], steps: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        history = History(Store(Path(folder) / "home"), three)
        for step, number, place, other in steps:
            composed = three[number]
            names = list(composed.nodes)
            name, known = names[place], sorted(history.runs)
            if step == "run":
                history.run(number, composed.select(name, None), names[other])
            elif step == "only" and all(
                history.store.sealed(k) for k in composed.materials(composed.nodes[name]).values()
            ):
                history.run(number, [name], names[other])
            elif step == "retry" and known:
                history.run(*history.runs[known[place % len(known)]], names[other])
            elif step == "release":
                selected = composed.select(name, None)
                if all(history.store.sealed(composed.nodes[n].key) for n in selected):
                    home_fixtures.release(history.store, composed, selected)
                    keys = {composed.nodes[n].key for n in selected}
                    history.released[composed.recipe.config.name] = keys
            elif step == "damage" and known:
                folder_of = known[place % len(known)]
                (folder_of / "run.json").write_text(DAMAGES[other % len(DAMAGES)])
                history.damaged.add(folder_of)
            elif step == "lose":
                history.lose(number, composed.select(name, None))
            elif step == "forget" and known:
                shutil.rmtree(known[place % len(known)])
                del history.runs[known[place % len(known)]]
                history.damaged.discard(known[place % len(known)])
            else:
                history.collect()
        history.collect()


def test_a_trivial_later_submission_makes_no_run_and_takes_nothing(three: list[Graph], store: Store) -> None:
    composed = three[0]
    home_fixtures.start(store, composed, composed.select("sft", None))
    before, recipe = sorted(os.listdir(store.artifacts)), str(composed.recipe.path)
    output = atom(store.home, "submit", recipe, "--cluster", "dev", "--until", "acquire-code").stdout
    assert "1 stage sealed already: nothing to submit" in output
    assert "nothing to run" in atom(store.home, "run", recipe, "--until", "acquire-code").stdout
    assert "nothing to run" in atom(store.home, "retry").stdout
    assert len(os.listdir(store.logs)) == 1, "no run that does nothing"
    home_fixtures.start(
        store, composed, composed.select("acquire-code", None)
    )  # as an older version of this program made one
    report = json.loads(atom(store.home, "gc", "--delete", "--yes", "--json").stdout)
    assert report["loose"] == [] and sorted(os.listdir(store.artifacts)) == before


def test_what_no_run_leads_to_goes(three: list[Graph], store: Store) -> None:
    first, second = three[0], three[1]
    run = home_fixtures.start(store, first, first.select("export-base", None))
    home_fixtures.start(store, second, second.select("export-base", None), "midtrain")
    only = {first.nodes[name].key for name in first.select("export-base", None)}
    only -= {second.nodes[name].key for name in second.select("export-base", None)}
    trained = {key for key in only if key.startswith("pretrain")}
    collectable = {f"artifacts/{key}" for key in only - trained}
    assert collected_paths(store) == set(), "the run leads to it"
    shutil.rmtree(run.folder)
    assert collected_paths(store) == collectable and len(collectable) == 2, "order and export"
    assert not any(store.sealed(key) for key in only - trained)


def test_what_was_trained_goes_only_by_its_name(three: list[Graph], store: Store) -> None:
    composed = three[0]
    run = home_fixtures.start(store, composed, composed.select("pretrain", None))
    home_fixtures.start(store, composed, composed.select("midtrain", None), "midtrain")
    shutil.rmtree(run.folder)
    key, unfinished = composed.nodes["pretrain"].key, composed.nodes["midtrain"].key
    assert collected_paths(store) == set() and not garbage_collection.loose(store)[1], "the other run leads to it"
    assert collected_paths(store, named=[key]) == {f"artifacts/{key}"}
    assert collected_paths(store, named=[unfinished[:-3]]) == {f"work/{unfinished}"}
    with pytest.raises(AtomError, match="is not there"):
        garbage_collection.loose(store, named=["pretrain-nothing"])
    checkpoint = home_fixtures.Checkpoint(key, 1).key
    assert store.sealed(checkpoint), "a checkpoint has a name of its own"


def test_a_prediction_is_kept_for_a_run_to_come_and_named_as_what_it_is(three: list[Graph], store: Store) -> None:
    home_fixtures.start(store, three[0], three[0].select("pretrain", None), "pretrain")
    begun, to_come = (prediction_key(graph.nodes["pretrain"].key) for graph in three[:2])
    for key in (begun, to_come):
        draft = store.home / "work" / f".{key}"
        draft.mkdir(parents=True)
        (draft / "prediction.json").write_text("{}")
        store.seal(draft, key, lambda product: None)
    assert collected_paths(store) == set()
    _, kept = garbage_collection.loose(store)
    assert kept == [
        f"{to_come} is kept, since a prediction is sealed once, before its run begins; --include {to_come} names it"
    ]
    assert collected_paths(store, named=[to_come]) == {f"artifacts/{to_come}"}


def test_what_is_at_work_is_not_taken_even_if_it_is_named(three: list[Graph], store: Store) -> None:
    composed = three[0]
    run = home_fixtures.start(store, composed, composed.select("midtrain", None), "midtrain")
    key = composed.nodes["pretrain"].key
    lease = Lease.take(store.work(composed.nodes["midtrain"].key))
    assert lease
    with pytest.raises(AtomError, match=f"{key} is needed by run {run.id}, which is running"):
        garbage_collection.loose(store, named=[key])
    lease.release()
    driver = Lease.take(run.folder / "driver")
    assert driver
    with pytest.raises(AtomError, match="which is running"):
        garbage_collection.loose(store, named=[key])
    driver.release()
    assert collected_paths(store, named=[key]) == {f"artifacts/{key}"}


def test_left_work_and_code_go(three: list[Graph], store: Store) -> None:
    composed = three[0]
    home_fixtures.start(store, composed, composed.select("tokenizer", None), "tokenizer", code="1" * 16)
    work = store.work(composed.nodes["items"].key) / "state"
    work.mkdir(parents=True)
    for name in ("1" * 16, "2" * 16):
        (store.home / "code" / name).mkdir(parents=True)
    assert collected_paths(store) == {
        f"work/{composed.nodes['items'].key}",
        f"work/{composed.nodes['tokenizer'].key}/out.1",
        f"code/{'2' * 16}",
    }


def test_sizes_count_a_file_when_its_last_link_goes(three: list[Graph], store: Store, tmp_path: Path) -> None:
    composed = three[0]
    run = home_fixtures.start(store, composed, composed.select("pretrain", None))
    key = composed.nodes["pretrain"].key
    checkpoint = home_fixtures.Checkpoint(key, 1).key
    shutil.rmtree(run.folder)
    size, manifests = (store.artifacts / key / "file").stat().st_size, 0
    for each in (key, checkpoint):
        manifests += (store.artifacts / each / "manifest.json").stat().st_size
        rows = {row.path.name: row.bytes for row in garbage_collection.loose(store, named=[each])[0]}
        assert rows[each] < size, "the other link holds the file"
    both = [
        row for row in garbage_collection.loose(store, named=[key, checkpoint])[0] if row.path.name in (key, checkpoint)
    ]
    assert sum(row.bytes for row in both) == size + manifests
    os.link(store.artifacts / key / "file", tmp_path / "elsewhere")
    both = [
        row for row in garbage_collection.loose(store, named=[key, checkpoint])[0] if row.path.name in (key, checkpoint)
    ]
    assert sum(row.bytes for row in both) == manifests


@pytest.mark.parametrize("file", ["evidence/release.json", "evidence/manifests/items.json"])
def test_a_damaged_release_keeps_everything(three: list[Graph], store: Store, file: str) -> None:
    composed = three[0]
    selected = composed.select("dedup", None)
    run = home_fixtures.start(store, composed, selected)
    home_fixtures.release(store, composed, selected)
    (store.home / "releases" / "one-0.1.0" / file).write_text("[]")
    shutil.rmtree(run.folder)
    process = atom(store.home, "gc")
    assert file in process.stderr and "is kept" in process.stderr and "artifacts/" not in process.stdout


def test_what_a_publication_leaves_beside_a_release_is_no_release(three: list[Graph], store: Store) -> None:
    """The journal of its calls, and the certificates of replays that its page shows."""
    kept, other = three[0].select("dedup", None), three[2].select("order-pretrain", None)
    folders = [home_fixtures.start(store, three[number], names).folder for number, names in ((0, kept), (2, other))]
    home_fixtures.release(store, three[0], kept)
    release = store.home / "releases/one-0.1.0"
    release.with_name(f"{release.name}.publish.jsonl").write_text("{}\n")
    certificates = release.with_name(f"{release.name}.replays")
    certificates.mkdir()
    for folder in folders:
        shutil.rmtree(folder)
    rows, doubts = garbage_collection.loose(store)
    unused = {three[2].nodes[name].key for name in other} - {three[0].nodes[name].key for name in kept}
    assert {row.path.name for row in rows} == unused and not doubts and len(unused) >= 3
    (certificates / "evidence").mkdir()  # a release with such a name, whose files are lost
    assert garbage_collection.loose(store)[0] == [] != garbage_collection.loose(store)[1]


def test_smaller_models_are_kept_as_all_that_was_trained(three: list[Graph], store: Store, tmp_path: Path) -> None:
    body = yaml.safe_load(home_fixtures.SMOKE.read_text()) | {"sizes": [{"model": {"layers": 1}}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(body))
    composed = dag.compose(recipe.load(str(tmp_path / "r.yaml")), store)
    selected = composed.select("size-1", None)
    run = home_fixtures.start(store, composed, selected)
    shutil.rmtree(run.folder)
    key = composed.nodes["size-1"].key
    assert collected_paths(store) == {f"artifacts/{composed.nodes[name].key}" for name in selected if name != "size-1"}
    assert store.sealed(key) and store.sealed(home_fixtures.Checkpoint(key, 1).key)


def test_a_statement_that_would_say_what_went_in_keeps_everything(three: list[Graph], store: Store) -> None:
    composed = three[0]
    run = home_fixtures.start(store, composed, composed.select("filter", None))
    home_fixtures.start(store, composed, ["dedup"])
    shutil.rmtree(run.folder)
    assert collected_paths(store) == set(), "the run of one stage leads to what went into it"
    (statement,) = (store.ledger / composed.nodes["filter"].key).iterdir()
    statement.write_text("")
    assert collected_paths(store) == set()


@pytest.mark.parametrize("obstacle", ["a link that leads nowhere", "a link to an empty folder", "a loop", "a file"])
@pytest.mark.parametrize("kind", ["logs", "releases"])
def test_what_cannot_be_looked_into_keeps_everything(
    three: list[Graph], store: Store, kind: str, obstacle: str
) -> None:
    """Such as a run that was archived to a disk that is not mounted now."""
    composed = three[0]
    home_fixtures.start(store, composed, ["items"], code="1" * 16)
    (store.home / "code" / ("1" * 16)).mkdir(parents=True)
    home_fixtures.release(store, composed, ["items"])
    shutil.rmtree(store.home / {"logs": "releases", "releases": "logs"}[kind])
    (path,) = (store.home / kind).iterdir()
    os.rename(path, store.home / "archive")
    if obstacle == "a file":
        path.touch()
    else:
        (store.home / "mount").mkdir()
        links = {"a link that leads nowhere": "/unmounted/x", "a link to an empty folder": store.home / "mount"}
        path.symlink_to(links.get(obstacle, path.name))
    process = atom(store.home, "gc", "--delete", "--yes")
    assert str(path) in process.stderr and "damaged" in process.stderr and "is kept" in process.stderr
    assert not (store.home / "trash").exists()


def test_the_code_of_a_submission_is_frozen_while_nobody_collects(
    three: list[Graph], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = submission_lock.submitting

    @contextmanager
    def after_gc(home: Store) -> Iterator[None]:
        monkeypatch.setattr(submission_lock, "submitting", real)
        (path,) = collected_paths(home)
        assert path.startswith("code/"), "of an earlier dry run"
        with real(home):
            yield

    monkeypatch.setattr(slurm_client, "queued_jobs", lambda users: {})
    monkeypatch.setattr(slurm_client, "run_command", lambda *words, **options: "")
    monkeypatch.setattr(slurm, "start", lambda *words: "7")
    source_code.freeze(store, three[0].recipe.files)
    monkeypatch.setattr(submission_lock, "submitting", after_gc)
    run = slurm.submit(three[0], store, ["acquire-sums"], cluster_profile.load("dev"), "dev").run
    assert run and (store.home / "code" / run.body["code"]).is_dir()


def test_what_a_run_that_begins_meanwhile_needs_is_moved_back_or_made_anew(
    three: list[Graph], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed, real = three[0], garbage_collection._move
    selected = composed.select("dedup", None)
    shutil.rmtree(home_fixtures.start(store, composed, selected).folder)

    def slow(home: Store, path: Path, trash: Path) -> Path | None:
        """A run is begun after the first one was moved, and makes what is not there."""
        if sorted(os.listdir(home.artifacts)) == sorted(keys[1:]):
            home_fixtures.start(home, composed, selected)
        return real(home, path, trash)

    keys = [row.path.name for row in garbage_collection.loose(store)[0]]
    monkeypatch.setattr(garbage_collection, "_move", slow)
    assert collected_paths(store) == set() and set(os.listdir(store.artifacts)) == set(keys)
    assert not any(store.damage(key) for key in keys) and not (store.home / "trash").exists()


def test_a_deletion_asks_first_and_one_that_was_killed_is_finished(three: list[Graph], store: Store) -> None:
    composed = three[0]
    home_fixtures.start(store, composed, composed.select("tokenizer", None), "tokenizer")
    product = store.work(composed.nodes["tokenizer"].key) / "out.1"
    process = atom(store.home, "gc", "--delete", code=2)
    assert str(product) in process.stdout
    assert process.stderr == "atom: 1000B are to be deleted for good; add --yes to delete them\n"
    assert "asks no question; add --yes" in atom(store.home, "gc", "--delete", "--json", code=2).stderr
    assert product.exists()
    (store.home / "trash" / "0123").mkdir(parents=True)
    (store.home / "trash" / "link").symlink_to(store.artifacts)
    report = json.loads(atom(store.home, "gc", "--delete", "--yes", "--json").stdout)
    assert [row["path"] for row in report["loose"]] == [str(product)] and not product.exists()
    assert not (store.home / "trash").exists() and os.listdir(store.artifacts), "no link is followed"


def test_nothing_is_deleted_that_was_not_listed_or_through_a_link(three: list[Graph], store: Store) -> None:
    composed = three[0]
    home_fixtures.start(store, composed, composed.select("tokenizer", None), "tokenizer")
    product = store.work(composed.nodes["tokenizer"].key) / "out.1"
    assert garbage_collection.delete(store, set()) == [] and product.exists()
    (store.home / "trash").symlink_to(store.artifacts)
    with pytest.raises(AtomError, match="trash is a link, and nothing is deleted through it"):
        collected_paths(store)
    assert product.exists()
