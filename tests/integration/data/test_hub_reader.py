"""Reader `hub` and `atom pin`, by the real client over HTTP: the local Hub, as it should be and as it should not."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub.utils import close_session
from starlette.responses import JSONResponse, Response

from pipeline.core.errors import AtomError, MachineError, RecipeError
from pipeline.graph import recipe as recipes
from pipeline.hub import client
from pipeline.launch.rendezvous import free_port
from stages.data import pinning
from stages.data.acquire import acquire_stage, hub_files
from stages.data.acquire.sources import Source, resolve_tree_digest
from stages.data.recipe import load
from stages.formats.table import part_files
from tests.fixtures.hub_fixtures import REPO, Hub, acquire_config, lines, pin, write_recipe
from tests.fixtures.run_fixtures import atom

FILES = {f"data/{name}.jsonl.gz": lines(f"{name} one", f"{name} two") for name in "abcd"}


def texts(folder: Path) -> list[str]:
    return [row["text"] for path in part_files(folder, "documents") for row in pq.read_table(path).to_pylist()]


def pulled(hub: Hub) -> list[str]:
    return sorted(name[4:] for name in hub.requests if name.startswith("GET") and name.endswith(".gz"))


def test_keys_are_known_before_a_byte_is_pulled(hub: Hub, tmp_path: Path, run_stage: Any) -> None:
    """They are those of the same files in a folder; parts pull their own files; what was pulled is not pulled again."""
    commit = hub.commit({**FILES, "README.md": b"# Notes"})
    path = write_recipe(tmp_path, parts=2)
    (locked,) = pin(path).values()
    assert (locked.revision, locked.requested, [row.path for row in locked.rows()]) == (commit, "main", sorted(FILES))
    assert not pulled(hub) and not (tmp_path / "home").exists()
    for name, data in FILES.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    hub.behavior = lambda scope: Response(status_code=500)  # a plan needs no Hub
    config = acquire_config(path)
    copy = config.source.model_dump() | {
        "reader": {"reader": "jsonl", "path": str(tmp_path / "copy")},
        "tree_digest": "auto",
    }
    assert resolve_tree_digest(Source.model_validate(copy)) == config.source.tree_digest
    hub.behavior = lambda scope: None
    work = tmp_path / "work"
    acquire_stage.run_shard(config, {}, work, 1)
    assert pulled(hub) == ["c.jsonl.gz", "d.jsonl.gz"]
    artifact = run_stage(acquire_stage.STAGE, config.model_dump(), {}, work)
    assert pulled(hub) == ["a.jsonl.gz", "b.jsonl.gz", "c.jsonl.gz", "d.jsonl.gz"]
    assert texts(artifact.path) == [f"{name} {n}" for name in "abcd" for n in ("one", "two")]
    assert artifact.json("source.json")["documents"] == 8
    hub.behavior = lambda scope: Response(status_code=500)
    assert run_stage(acquire_stage.STAGE, config.model_dump(), {}).digest == artifact.digest
    assert not [path for path in (tmp_path / "home/hub").rglob(".pulling")]


def test_an_unchanged_file_of_another_revision_is_not_pulled_again(hub: Hub, tmp_path: Path, run_stage: Any) -> None:
    hub.commit(FILES)
    path = write_recipe(tmp_path)
    before = pin(path)["notes"]
    run_stage(acquire_stage.STAGE, acquire_config(path).model_dump(), {})
    hub.requests.clear()
    hub.commit({**FILES, "data/d.jsonl.gz": lines("d is new")})
    first_key = acquire_config(path).source.tree_digest
    (row,) = pinning.pin(path, sample=False)
    assert (
        row.previous == before.revision != row.entry.revision
        and f", previously {before.revision[:12]}, 4 files" in str(row)
    )
    assert acquire_config(path).source.tree_digest != first_key
    artifact = run_stage(acquire_stage.STAGE, acquire_config(path).model_dump(), {})
    assert texts(artifact.path)[-1] == "d is new" and pulled(hub) == ["d.jsonl.gz"]
    settled = write_recipe(tmp_path, revision=before.revision)
    with pytest.raises(
        RecipeError,
        match="pinned in mine.lock.yaml with another repository, revision or pattern; run `atom pin RECIPE`",
    ):
        load(settled).resolved()
    assert pin(settled)["notes"].model_copy(update={"requested": "main"}) == before


def test_small_files_and_parquet(hub: Hub, tmp_path: Path, run_stage: Any) -> None:
    """A file that git holds itself has the id of its blob for a digest."""
    pq.write_table(pa.table({"body": ["one", "two"], "terms": ["MIT", "0BSD"]}), tmp_path / "x.parquet")
    hub.commit({"x.parquet": (tmp_path / "x.parquet").read_bytes()}, small=True)
    path = write_recipe(tmp_path, pattern="*.parquet", format="parquet", text_field="body", license_field="terms")
    assert [row.digest[:4] for row in pin(path)["notes"].rows()] == ["git:"]
    artifact = run_stage(acquire_stage.STAGE, acquire_config(path).model_dump(), {})
    rows = pq.read_table(part_files(artifact.path, "documents")[0]).to_pylist()
    assert [(row["id"], row["license"]) for row in rows] == [
        ("notes/x.parquet:1", "MIT"),
        ("notes/x.parquet:2", "0BSD"),
    ]
    hub.damage("x.parquet", b"other bytes")
    (place,) = (tmp_path / "home/hub").rglob("x.parquet")
    place.write_bytes(b"damaged here")
    with pytest.raises(AtomError, match=f"x.parquet of {REPO}@"):
        run_stage(acquire_stage.STAGE, acquire_config(path).model_dump(), {})


def test_licenses_of_the_common_pile(hub: Hub, tmp_path: Path, run_stage: Any) -> None:
    """As in data_recipes/open.yaml: nested, by a map; a string that the map does not have stops nothing."""
    stated = ("Public Domain", "Creative Commons - Attribution - https://creativecommons.org/licenses/by/4.0/", "As is")
    rows = [{"text": f"text {n}", "metadata": {"license": license}} for n, license in enumerate(stated)]
    data = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)
    hub.commit({"arxiv-papers-0000.json.gz": data})
    reader = load("open").sources[0].reader
    settings = {name: getattr(reader, name) for name in ("pattern", "format", "license_field", "license_map")}
    path = write_recipe(tmp_path, **settings)
    pin(path)
    artifact = run_stage(acquire_stage.STAGE, acquire_config(path).model_dump(), {})
    (documents,), (failed,) = (part_files(artifact.path, table) for table in ("documents", "failed"))
    assert pq.read_table(documents)["license"].to_pylist() == ["LicenseRef-Public-Domain", "CC-BY-4.0"]
    ((id, reason),) = [(row["id"], row["reason"]) for row in pq.read_table(failed).to_pylist()]
    assert id == "notes/arxiv-papers-0000.json.gz:3" and reason.startswith("license: ") and "As is" in reason


def test_other_bytes_than_the_pointer_says(hub: Hub, tmp_path: Path, run_stage: Any) -> None:
    """The files before it stay, and are not pulled again; nothing of the bad one is left."""
    hub.commit(FILES)
    path = write_recipe(tmp_path)
    pin(path)
    good = FILES["data/c.jsonl.gz"]
    hub.damage("data/c.jsonl.gz", good[:-1] + b"?")
    config, work = acquire_config(path).model_dump(), tmp_path / "work"
    with pytest.raises(
        AtomError,
        match=r"data/c.jsonl.gz of local/notes@\w{12} has the digest sha256:\w{64} at http.*, but is pinned to sha256:",
    ):
        run_stage(acquire_stage.STAGE, config, {}, work)
    kept = sorted(
        path.name for path in (tmp_path / "home/hub").rglob("*") if path.is_file() and "lease" not in path.name
    )
    assert kept == ["a.jsonl.gz", "b.jsonl.gz"]
    hub.damage("data/c.jsonl.gz", good)
    hub.requests.clear()
    assert len(texts(run_stage(acquire_stage.STAGE, config, {}, work).path)) == 8
    assert pulled(hub) == ["c.jsonl.gz", "d.jsonl.gz"]


def test_two_at_once_pull_a_file_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit(FILES)
    path = write_recipe(tmp_path)
    pin(path)
    source = load(path).sources[0]
    files = source.reader.files("notes")[:1]
    monkeypatch.setattr(hub_files, "POLL", 0.05)
    hub.behavior = lambda scope: time.sleep(0.3) if scope["method"] == "HEAD" else None
    threads = [threading.Thread(target=source.reader.pull, args=("notes", files)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files[0][1].read_bytes() == FILES[files[0][0]] and hub.requests["GET a.jsonl.gz"] == 1


def test_a_revision_that_vanished(hub: Hub, tmp_path: Path, run_stage: Any) -> None:
    commit = hub.commit(FILES)
    path = write_recipe(tmp_path, revision=commit)
    pin(path)
    before = recipes.lock_of(path).read_bytes()
    del hub.repo.commits[commit]
    hub.repo.branches["main"] = next(iter(hub.repo.commits))
    hub.store.save(hub.repo)
    with pytest.raises(
        AtomError,
        match=rf"pulling source notes: data/a.jsonl.gz of local/notes@{commit[:12]}: the repository has no such revision",
    ) as caught:
        run_stage(acquire_stage.STAGE, acquire_config(path).model_dump(), {})
    assert not isinstance(caught.value, MachineError)
    with pytest.raises(
        AtomError, match=f"pinning source notes: local/notes@{commit}: the repository has no such revision"
    ):
        pin(path)
    hub.store.delete(hub.repo)
    with pytest.raises(AtomError, match="has no such repository, or it is private or gated"):
        pin(path)
    assert recipes.lock_of(path).read_bytes() == before


def test_a_hub_that_throttles(hub: Hub, tmp_path: Path, run_stage: Any) -> None:
    """A file that is refused once is asked for again after Retry-After; one that always is, ends the attempt, which the
    machine may repeat."""
    hub.commit(FILES)
    path = write_recipe(tmp_path)
    refused: Counter[str] = Counter()

    def once(scope: Any) -> Any:
        refused[label := f"{scope['method']} {scope['path']}"] += 1
        return JSONResponse({"error": "slow down"}, 429, {"Retry-After": "0"}) if refused[label] == 1 else None

    hub.behavior = once
    pin(path)
    assert len(texts(run_stage(acquire_stage.STAGE, acquire_config(path).model_dump(), {}).path)) == 8
    hub.behavior = lambda scope: JSONResponse({"error": "slow down"}, 429, {"Retry-After": "0"})
    before = recipes.lock_of(path).read_bytes()
    with pytest.raises(MachineError, match="pinning source notes: local/notes@main: http://.* answers 429: slow down"):
        pin(path)
    assert recipes.lock_of(path).read_bytes() == before


def answer(change: Any) -> Any:
    """Changes the rows of a listing of the tree."""
    row = {
        "type": "file",
        "path": "data/a.jsonl.gz",
        "oid": "0" * 40,
        "size": 5,
        "lfs": {"oid": "0" * 64, "size": 5, "pointerSize": 1},
    }
    return lambda scope: JSONResponse(change(row)) if "/tree/" in scope["path"] else None


HOSTILE = {
    "a path outside": (lambda row: [{**row, "path": "data/../../x.jsonl.gz"}], "which is no file of a dataset"),
    "no digest": (lambda row: [{**row, "lfs": {**row["lfs"], "oid": "best"}}], "with the digest 'sha256:best'"),
    "a negative size": (lambda row: [{**row, "size": -1}], "of -1 bytes"),
    "nothing": (lambda row: [], "none of 0 files matches 'data/\\*.jsonl.gz'|has no file that matches"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hub_that_answers_badly(case: str, hub: Hub, tmp_path: Path) -> None:
    change, words = HOSTILE[case]
    hub.commit(FILES)
    hub.behavior = answer(change)
    path = write_recipe(tmp_path)
    with pytest.raises(AtomError, match=words) as caught:
        pin(path)
    assert "\n" not in str(caught.value) and not recipes.lock_of(path).exists()


def test_another_commit_than_that_asked_for(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit(FILES)
    other = hub.commit({})
    answers = {"id": REPO, "sha": other, "siblings": [], "private": False, "tags": [], "downloads": 0, "likes": 0}
    hub.behavior = lambda scope: JSONResponse(answers) if "/revision/" in scope["path"] else None
    with pytest.raises(AtomError, match=f"answers with (the|another) commit.*'{other}'"):
        pin(write_recipe(tmp_path, revision=commit))


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    pause = client._pause
    monkeypatch.setattr(client, "_pause", lambda *failed: None if pause(*failed) is None else 0.0)
    close_session()
    with pytest.raises(MachineError, match="pinning source notes: local/notes@main: http://127.* cannot be reached"):
        pin(write_recipe(tmp_path))
    close_session()


def test_commands(hub: Hub, tmp_path: Path) -> None:
    """Plan says what is not pinned; run and submit refuse; after `atom pin`, a job pulls what it needs."""
    hub.commit(FILES)
    body = yaml.safe_load((Path(recipes.__file__).parents[1] / "recipes/atom-smoke.yaml").read_text())
    data = yaml.safe_load((Path(recipes.__file__).parents[2] / "data_recipes/smoke.yaml").read_text())
    data["sources"] += yaml.safe_load(write_recipe(tmp_path).read_text())["sources"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    # Once they are probed, the few documents of the other sources are known to be read often.
    (tmp_path / "release.yaml").write_text(yaml.safe_dump({**body, "data": "mine.yaml", "supply": {"max_epochs": 99}}))
    home, release = tmp_path / "home", str(tmp_path / "release.yaml")
    unpinned = "source notes: local/notes is not pinned in mine.lock.yaml; run `atom pin RECIPE`"
    assert f"{unpinned} before running; keys below are provisional" in atom(home, "plan", release).stdout
    for command in (["run", release], ["submit", release, "--cluster", "local"]):
        assert atom(home, *command, code=2).stderr == f"atom: {unpinned}\n"
    printed = json.loads(atom(home, "pin", release, "--json").stdout)
    assert printed["lock"] == str(tmp_path / "mine.lock.yaml")
    pinned = {row["name"]: row for row in printed["sources"]}
    # Those that are drawn from a seed have no files.
    assert pinned.keys() == {"code", "docstrings", "notes"} and pinned["notes"]["files"] == 4
    assert pinned["code"]["tree_digest"].startswith("sha256:") and pinned["code"]["probe"]["kept_tokens"] > 10_000
    plan = json.loads(atom(home, "plan", release, "--json", HF_ENDPOINT="http://127.0.0.1:9").stdout)
    assert plan["absent"] == []
    atom(home, "run", release, "--only", "acquire-notes")
    key = next(stage["key"] for stage in plan["stages"] if stage["name"] == "acquire-notes")
    assert len(texts(home / "artifacts" / key)) == 8
    (run,) = (home / "logs").glob("*/data_recipes/mine.lock.yaml")
    assert run.read_bytes() == (tmp_path / "mine.lock.yaml").read_bytes()
    data["sources"] = [source for source in data["sources"] if source["name"] not in pinned]
    (tmp_path / "drawn.yaml").write_text(yaml.safe_dump(data))
    refused = atom(home, "pin", str(tmp_path / "drawn.yaml"), code=2).stderr
    assert refused == "atom: data recipe drawn has no source with files; there is nothing to pin\n"
