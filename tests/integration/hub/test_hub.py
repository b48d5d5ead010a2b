"""The local Hub against the real huggingface_hub client, in a process of its own (the client reads its
environment at import)."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import AtomError
from release.hub.local.server import running
from release.hub.local.store import HubStore

PRELUDE = """
import os, sys, pathlib, tempfile
import huggingface_hub as hub
from huggingface_hub import HfApi, CommitOperationAdd, snapshot_download, hf_hub_download
from huggingface_hub.errors import *
api, anonymous, stranger = HfApi(), HfApi(token=False), HfApi(token="hf_wrong")
tmp = pathlib.Path(tempfile.mkdtemp())
def refused(error, call, *args, **kw):
    try: call(*args, **kw)
    except error as e: return e
    raise AssertionError("was not refused")
"""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    extra = ("--token", "other=hf_other", "--lfs-bytes", "50000")
    with running(tmp_path_factory.mktemp("hub"), "local", "hf_local", *extra) as url:
        yield url


@pytest.fixture
def client(endpoint: str, tmp_path: Path):
    def run(code: str) -> None:
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_local", "HF_HOME": str(tmp_path / "hf")}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        process = subprocess.run(
            [sys.executable, "-c", PRELUDE + code], env=env, capture_output=True, text=True, timeout=120
        )
        assert process.returncode == 0, process.stderr

    return run


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_upload_and_download_are_the_same_bytes(client, kind: str) -> None:
    client(f"""
kind, rid = "{kind}", "local/bytes-{kind}"
assert api.whoami()["name"] == "local"
api.create_repo(rid, repo_type=kind, private=True); api.create_repo(rid, repo_type=kind, private=True, exist_ok=True)
d = tmp / "up"; (d / "sub dir").mkdir(parents=True)
(d / "README.md").write_text("---\\nlicense: apache-2.0\\ntags: [x]\\n---\\n# Demo\\n")
(d / "sub dir" / "é a.txt").write_text("hi"); (d / "empty.txt").write_text("")
(d / "small.bin").write_bytes(os.urandom(1000))
(d / "model.safetensors").write_bytes(os.urandom(350_001))
(d / "long.json").write_text("1" * 60_000)                          # LFS by size
first = api.upload_folder(folder_path=d, repo_id=rid, repo_type=kind)
assert api.upload_folder(folder_path=d, repo_id=rid, repo_type=kind).oid == first.oid     # nothing to send
info = api.repo_info(rid, repo_type=kind, files_metadata=True)
assert info.private and info.card_data.license == "apache-2.0" and info.sha == first.oid
assert {{s.rfilename: s.size for s in info.siblings}}["model.safetensors"] == 350_001
for target in (None, tmp / "down"):
    got = pathlib.Path(snapshot_download(rid, repo_type=kind, local_dir=target))
    for f in d.rglob("*"):
        if f.is_file(): assert (got / f.relative_to(d)).read_bytes() == f.read_bytes(), f
assert {{e.path for e in api.list_repo_tree(rid, repo_type=kind)}} >= {{"sub dir", "README.md", ".gitattributes"}}
assert len(api.get_paths_info(rid, ["long.json", "sub dir"], repo_type=kind)) == 2
place = ("datasets/" if kind == "dataset" else "") + rid + "/sub dir"
assert "é a.txt" in hub.HfFileSystem().ls(place, detail=False)[0]
import httpx2
prefix = "datasets/" if kind == "dataset" else ""
r = httpx2.get(os.environ["HF_ENDPOINT"] + f"/{{prefix}}{{rid}}/resolve/main/model.safetensors",
               headers={{"Range": "bytes=10-19", "Authorization": "Bearer hf_local"}})
assert r.status_code == 206 and r.content == (d / "model.safetensors").read_bytes()[10:20]
api.delete_file("long.json", rid, repo_type=kind); assert not api.file_exists(rid, "long.json", repo_type=kind)
e = refused(HfHubHTTPError, api.create_commit, rid, [CommitOperationAdd("a", b"1")], commit_message="x",
            parent_commit=first.oid, repo_type=kind)
assert e.response.status_code == 412
assert len(api.list_repo_commits(rid, repo_type=kind)) == 3
api.delete_repo(rid, repo_type=kind); assert not api.repo_exists(rid, repo_type=kind)
""")


@pytest.mark.parametrize("name", ["kept/code", "sub dir/%2F/a+b", "100%25 é/c#d", "q?x=%2f/%"])
def test_a_folder_and_a_revision_of_any_name_are_listed_and_read(client, name: str) -> None:
    """A client quotes the slashes of a folder whose tree it asks for, and those of a revision."""
    client(f"""
from urllib.parse import quote
rid, name, branch = "local/names", {name!r}, "b/%2F"
api.create_repo(rid, repo_type="dataset", exist_ok=True)
api.create_branch(rid, repo_type="dataset", branch=branch, exist_ok=True)
api.upload_file(path_or_fileobj=b"text", path_in_repo=name + "/x.txt", repo_id=rid, repo_type="dataset", revision=branch)
path = name + "/x.txt"
listed = api.list_repo_tree(rid, path_in_repo=name, repo_type="dataset", revision=branch)
assert [entry.path for entry in listed] == [path]
got = hf_hub_download(rid, path, repo_type="dataset", revision=branch, local_dir=tmp)
assert pathlib.Path(got).read_text() == "text"
refused(EntryNotFoundError, lambda: list(api.list_repo_tree(rid, path_in_repo=name + "/y", repo_type="dataset")))
api.delete_branch(rid, repo_type="dataset", branch=branch)
""")


def test_load_dataset_reads_a_configuration_by_name(client) -> None:
    client("""
import datasets
api.create_repo("local/rows-data", repo_type="dataset"); d = tmp / "rows"
for split in ("train", "heldout"):
    (d / "messages/chat" / split).mkdir(parents=True)
    datasets.Dataset.from_list([{"text": split}]).to_parquet(d / "messages/chat" / split / "part-00000.parquet")
files = [{"split": s, "path": f"messages/chat/{s}/*.parquet"} for s in ("train", "heldout")]
(d / "README.md").write_text(f"---\\nconfigs: {[{'config_name': 'chat-messages', 'data_files': files}]}\\n---\\n")
api.upload_folder(folder_path=d, repo_id="local/rows-data", repo_type="dataset")
for split in ("train", "heldout"):
    rows = datasets.load_dataset("local/rows-data", "chat-messages", split=split, cache_dir=str(tmp / "cache"))
    assert rows["text"] == [split]
""")


def test_equal_files_may_be_sent_at_once(client) -> None:
    client("""
api.create_repo("local/twins"); d = tmp / "twins"; d.mkdir()
for size, count in ((200_000, 6), (5_000, 12)):
    data = os.urandom(size)
    for n in range(count): (d / f"{size}-{n}.bin").write_bytes(data)
api.upload_folder(folder_path=d, repo_id="local/twins")
got = pathlib.Path(snapshot_download("local/twins"))
assert all((got / f.name).read_bytes() == f.read_bytes() for f in d.iterdir())
""")


def test_branches_and_tags(client) -> None:
    client("""
rid = "local/refs"; api.create_repo(rid)
api.create_branch(rid, branch="pretrain-step-200"); api.create_branch(rid, branch="pretrain-step-200", exist_ok=True)
api.upload_file(path_or_fileobj=b"abc", path_in_repo="state.json", repo_id=rid, revision="pretrain-step-200")
assert pathlib.Path(hf_hub_download(rid, "state.json", revision="pretrain-step-200")).read_text() == "abc"
refused(EntryNotFoundError, hf_hub_download, rid, "state.json")
refused(RevisionNotFoundError, api.repo_info, rid, revision="none")
api.create_tag(rid, tag="v1", revision="pretrain-step-200"); api.create_tag(rid, tag="v1", exist_ok=True)
assert pathlib.Path(hf_hub_download(rid, "state.json", revision="v1")).read_text() == "abc"
api.create_branch(rid, branch="a/b")
api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id=rid, revision="a/b")
refs = api.list_repo_refs(rid)
assert {r.name for r in refs.branches} == {"main", "pretrain-step-200", "a/b"} and refs.tags[0].name == "v1"
api.delete_branch(rid, branch="a/b"); api.delete_tag(rid, tag="v1"); assert not api.list_repo_refs(rid).tags
""")


def test_private_repositories_do_not_exist_for_others(client) -> None:
    client("""
rid = "local/hidden"; api.create_repo(rid, private=True)
api.upload_file(path_or_fileobj=b"s", path_in_repo="s.txt", repo_id=rid)
other = HfApi(token="hf_other")
for who in (anonymous, other):
    refused(RepositoryNotFoundError, who.repo_info, rid)
    refused(RepositoryNotFoundError, who.hf_hub_download, rid, "s.txt", cache_dir=tmp)
assert refused(HfHubHTTPError, stranger.whoami).response.status_code == 401
assert refused(HfHubHTTPError, stranger.create_repo, "local/new").response.status_code == 401
assert refused(HfHubHTTPError, other.create_repo, "local/new").response.status_code == 403
api.update_repo_settings(rid, private=False)
assert pathlib.Path(anonymous.hf_hub_download(rid, "s.txt", cache_dir=tmp)).read_text() == "s"
e = refused(HfHubHTTPError, other.upload_file, path_or_fileobj=b"1", path_in_repo="x", repo_id=rid)
assert e.response.status_code == 403
""")


def test_cards(client) -> None:
    client("""
api.create_repo("local/carded")
hub.ModelCard("---\\nlicense: mit\\n---\\n# hi").push_to_hub("local/carded")
assert hub.ModelCard.load("local/carded").data.license == "mit"
bad = b"---\\na: [\\n---\\n"
refused(Exception, api.upload_file, path_or_fileobj=bad, path_in_repo="README.md", repo_id="local/carded")
""")


def test_a_view_of_a_repository_follows_its_file(tmp_path: Path) -> None:
    store = HubStore(tmp_path)
    assert store.view("model", "local/m") is None
    repo = store.create("model", "local/m", private=False, author="local")
    view = store.view("model", "local/m")
    assert view == repo and store.view("model", "local/m") is view
    repo.private = True
    store.save(repo)
    assert store.view("model", "local/m") == repo != view
    store.delete(repo)
    assert store.view("model", "local/m") is None


def test_the_server_says_when_it_is_up_and_where(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "release.hub.local.server", "--root", str(tmp_path / "hub"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        limit = threading.Timer(60, server.kill)  # then the line is empty
        limit.start()
        line = server.stdout.readline()
        try:
            address = re.search(r"set HF_ENDPOINT=(http://127.0.0.1:\d+), and HF_TOKEN=hf_local", line)
            assert address, line
            with urllib.request.urlopen(f"{address[1]}/health") as answer:
                assert answer.status == 200
        finally:
            limit.cancel()
            server.terminate()


def test_a_server_that_does_not_start_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("no folder")
    with pytest.raises(AtomError, match="ended before it was up"), running(tmp_path / "hub"):
        pass


def test_an_idle_connection_stays_open_longer_than_clients_keep_it(endpoint: str) -> None:
    """Clients keep one for 5 s (httpx), which is how long uvicorn keeps it as well: a request that is sent at this
    moment would get no answer."""
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"))
    for seconds in (0, 6):
        time.sleep(seconds)
        connection.request("GET", "/health")
        assert connection.getresponse().read() is not None and connection.sock is not None
    connection.close()
