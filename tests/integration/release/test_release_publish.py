"""Publishing with the real client to a real server: private first, pulled back, verified, then public."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.launch.rendezvous import free_port
from release.assembly import build_release as builder
from release.hub.local.server import running
from tests.fixtures import release_fixtures
from tests.fixtures.publish_fixtures import build_another
from tests.fixtures.run_fixtures import at_length


def test_staged_publication_and_a_strangers_check(client, release: Path, tmp_path: Path) -> None:
    journal = release.with_name("tiny-0.1.0.publish.jsonl")
    with running(tmp_path / "hub") as endpoint:
        client(
            """
report = publish(release, "local")
names = ["local/tiny-" + s for s in ("data", "evidence", "checkpoints", "base")] + ["local/tiny", "local/tiny-page"]
assert [r.repo for r in report.repositories if r.revision == "main"] == names
assert all(api().repo_info(r.repo, repo_type=r.kind).private for r in report.repositories)
branches = {"main"} | {p + "-step-" + str(n) for p in ("pretrain", "midtrain") for n in (0, 2)}
assert {b.name for b in api().list_repo_refs("local/tiny-checkpoints").branches} == branches
again = publish(release, "local")
assert not sum(r.files_sent for r in again.repositories)
assert [r.commit for r in again.repositories] == [r.commit for r in report.repositories]
""",
            endpoint,
        )
        rows = [json.loads(line) for line in journal.read_text().splitlines()]
        assert not [row for row in rows if row["call"] == "make_public"]
        assert all(len(row["files"]) <= 50 for row in rows if row["call"] == "create_commit")
        out = client('assert "that HF_TOKEN may read" in said(AtomError, verify, "local/tiny")', endpoint, token=None)
        out = client("print(json.dumps(publish(release, 'local', public=True).to_json()))", endpoint)
        report = json.loads(out.stdout.splitlines()[-1])
        rows = [json.loads(line) for line in journal.read_text().splitlines()]
        opened = [row["repo"] for row in rows if row["call"] == "make_public"]
        order = ("-data", "-evidence", "-checkpoints", "-base", "", "-page")
        assert opened == ["local/tiny" + suffix for suffix in order]
        assert report["public"] and rows[-1]["call"] == "collection"
        assert report["collection"].startswith("local/tiny-0-1-0-")
        assert rows.index(next(r for r in rows if r["call"] == "verified")) < rows.index(
            next(r for r in rows if r["call"] == "make_public")
        )
        client(
            """
kinds = {"": "model", "-base@v0.1.0": "model", "-data": "dataset", "-evidence": "evidence",
         "-checkpoints": "repository", "-checkpoints@pretrain-step-2": "checkpoint"}
for suffix, kind in kinds.items():
    name = "local/tiny" + suffix
    v = verify(name, deep=True); assert v.ok and v.kind == kind, (name, v.to_json())
assert "no such revision" in said(AtomError, verify, "local/tiny@v9")
assert "neither a folder here nor a repository" in said(AtomError, verify, "local/none")
""",
            endpoint,
            token=None,
        )


@at_length("release", 12)
def test_plain_transformers_loads_the_pulled_model(client, release: Path, tmp_path: Path) -> None:
    with running(tmp_path / "hub") as endpoint:
        client("publish(release, 'local', public=True)", endpoint)
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer; "
            "t = AutoTokenizer.from_pretrained('local/tiny'); "
            "m = AutoModelForCausalLM.from_pretrained('local/tiny', revision='v0.1.0'); "
            "assert m.generate(**t('1+1', return_tensors='pt'), max_new_tokens=3).shape[1] > 3"
        )
        env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "stranger"), "HF_HUB_DISABLE_XET": "1"}
        subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, timeout=120)


@at_length("release", 14)
def test_an_interrupted_publication_is_finished_by_the_next(client, release: Path, tmp_path: Path) -> None:
    with running(tmp_path / "hub") as endpoint:
        cut = """
import os, release.hub.publish as p
count = 0
write = p.Journal.write
def dying(self, call, **what):
    global count
    write(self, call, **what); count += 1
    if count == 7: os._exit(9)
p.Journal.write = dying
publish(release, "local")
"""
        assert client(cut, endpoint, check=False).returncode == 9
        client("r = publish(release, 'local'); assert sum(x.files_sent for x in r.repositories)", endpoint)


def test_a_hub_that_returns_other_bytes_is_found_before_anything_is_public(
    client, release: Path, tmp_path: Path
) -> None:
    root = tmp_path / "hub"
    with running(root) as endpoint:
        client("publish(release, 'local')", endpoint)
        data = bytearray((release / "model/model.safetensors").read_bytes())
        (blob,) = (path for path in (root / "blobs").iterdir() if path.read_bytes() == data)
        data[len(data) // 2] ^= 1
        blob.write_bytes(data)
        client(
            """
import json
text = said(CheckFailed, publish, release, "local", public=True)
assert "is altered" in text, text
assert all(api().repo_info(r, repo_type="model").private for r in ("local/tiny", "local/tiny-base"))
""",
            endpoint,
        )


def test_what_is_refused_and_in_which_words(client, release: Path, tmp_path: Path) -> None:
    with running(tmp_path / "hub", "local", "hf_local", "--token", "other=hf_other") as endpoint:
        client('assert "refuses the token" in said(AtomError, publish, release, "local")', endpoint, token="hf_expired")
        client('t = said(AtomError, publish, release, "local"); assert "HF_TOKEN" in t, t', endpoint, token=None)
        client(
            't = said(AtomError, publish, release, "local"); assert "use a namespace that is yours" in t, t',
            endpoint,
            token="hf_other",
        )
        client(
            'assert "set release.namespace: other" in said(AtomError, publish, release, "other")',
            endpoint,
            token="hf_other",
        )
        (release / "model/LICENSE").write_text("x")
        client('assert "model/LICENSE is altered" in said(CheckFailed, publish, release, "local")', endpoint)
        assert not list((tmp_path / "hub/repos").rglob("*.json"))
    shutil.rmtree(release / "evidence")
    client(
        'assert "is not a release folder" in said(AtomError, publish, release, "local")',
        f"http://127.0.0.1:{free_port()}",
    )


def test_an_endpoint_that_does_not_answer(client) -> None:
    for call in ('publish, release, "local"', 'verify, "local/tiny"'):
        code = f't = said(AtomError, {call}); assert "cannot be reached" in t, t'
        client(code, f"http://127.0.0.1:{free_port()}")


def test_stale_and_dirty_must_be_acknowledged_by_name(tmp_path: Path) -> None:
    from pipeline.core.errors import AtomError
    from release.hub.publish import _require_publishable

    about = release_fixtures.release_info(stale=("dedup",), dirty=True)
    _require_publishable(about, "local", False, [])
    _require_publishable(about, "local", True, ["dedup", "dirty"])
    with pytest.raises(AtomError, match="dedup was made by other code than today's"):
        _require_publishable(about, "local", True, ["dirty"])
    with pytest.raises(AtomError, match="uncommitted changes"):
        _require_publishable(about, "local", True, ["dedup"])


HEADS = """
def heads():
    repos = [("local/tiny" + s, k) for s, k in (("", "model"), ("-base", "model"), ("-checkpoints", "model"),
                                                ("-data", "dataset"), ("-evidence", "dataset"))]
    return {r + "@" + b.name: b.target_commit for r, k in repos for b in api().list_repo_refs(r, repo_type=k).branches}
"""


def test_a_version_is_published_once(client, source: builder.BuildInput, release: Path, tmp_path: Path) -> None:
    journal = release.with_name("tiny-0.1.0.publish.jsonl")
    with running(tmp_path / "hub") as endpoint:
        client("publish(release, 'local')", endpoint)
        before = journal.read_bytes()
        another = build_another(source, tmp_path / "another")
        shutil.rmtree(release)
        shutil.copytree(another, release)
        client(
            HEADS
            + """
before = heads()
t = said(AtomError, publish, release, "local"); assert "raise the recipe's version" in t, t
assert heads() == before
""",
            endpoint,
        )
        assert journal.read_bytes() == before  # nothing was changed anywhere


@at_length("release", 30)
def test_a_later_version_is_verified_before_a_public_branch_moves(client, release: Path, tmp_path: Path) -> None:
    source = release_fixtures.build_input(tmp_path / "run")
    (source.code_root / "LICENSE").write_text("Another license.\n")  # it stands in the repository of every model
    later = builder.build(dataclasses.replace(source, version="0.2.0"), tmp_path / "home")
    where = f"later = pathlib.Path({str(later)!r})\n" + HEADS
    with running(tmp_path / "hub") as endpoint:
        client("publish(release, 'local', public=True)", endpoint)
        client(
            where
            + """
import release.hub.publish as p
before, pull = heads(), p.pull
def damaged(remote, revision, target):
    pull(remote, revision, target)
    if remote.id == "local/tiny": (target / "config.json").write_text("{}")
p.pull = damaged
assert "config.json is altered" in said(CheckFailed, publish, later, "local", public=True)
after = heads()
assert {name: after[name] for name in before} == before, "a branch that anyone pulls was moved"
assert {n for n in after if n not in before} >= {"local/tiny@upload-v0.2.0", "local/tiny-checkpoints@upload-v0.2.0-pretrain-step-2"}
assert verify("local/tiny").ok and verify("local/tiny-evidence").ok
""",
            endpoint,
        )
        client(
            where
            + """
before = heads()
report = publish(later, "local", public=True)
sent = {r.repo for r in report.repositories if r.files_sent}
assert sent == {"local/tiny-page"}, f"the staging branches held all but the page, and {sent} was sent again"
after = heads()
moved = {r.repo + "@" + r.revision: r.commit for r in report.repositories if r.repo != "local/tiny-page"}
assert moved == after
assert all(after[n] != before[n] for n in after) and not [n for n in after if "upload-" in n]
again = publish(later, "local", public=True)
assert [r.commit for r in again.repositories] == [r.commit for r in report.repositories] and heads() == after
refusal = said(AtomError, publish, release, "local", public=True)
assert "has another version in main since v0.1.0 was published" in refusal and heads() == after
""",
            endpoint,
        )
        client(
            """
for name in ("", "-base", "-data", "-evidence", "-checkpoints"):
    for revision in ("main", "v0.1.0", "v0.2.0"):
        assert verify("local/tiny" + name + "@" + revision).ok, (name, revision)
assert verify("local/tiny-checkpoints@pretrain-step-2").ok
""",
            endpoint,
            token=None,
        )


@at_length("release", 17)
def test_a_snapshot_in_the_clients_cache_is_verified_as_it_lies(client, release: Path, tmp_path: Path) -> None:
    with running(tmp_path / "hub") as endpoint:
        client(
            """
import os
publish(release, "local")
for suffix, kind, file in (("", "model", "model.safetensors"), ("-evidence", "dataset", "code/release/assembly/build_release.py")):
    folder = pathlib.Path(api().snapshot_download("local/tiny" + suffix, repo_type=kind))
    assert (folder / file).is_symlink() and "/hf/" in str(folder), folder
    v = verify(folder, deep=True); assert v.ok, v.to_json()
    blob = (folder / file).resolve()
    data = bytearray(blob.read_bytes()); data[len(data) // 2] ^= 1
    os.chmod(blob, 0o644); blob.write_bytes(data)
    found = [t for c in verify(folder).checks for t in c.wrong]
    assert any(t.startswith(file + " is altered") for t in found), found
""",
            endpoint,
        )


MANY = """
from release.hub import upload
from pipeline.hub.client import RemoteRepository
from release.hub.upload import Destination, Difference, Journal
from release.repositories import Repository
folder = release.with_name("many")
folder.mkdir()
names = [f"rows/{number:05d}.json" for number in range(3400)]
(folder / "rows").mkdir()
for name in names: (folder / name).write_text("{}")
api().create_repo("local/many", repo_type="dataset")
remote = RemoteRepository("local/many", "dataset")
many = Destination(folder, Repository("", "-many", "dataset"), remote, "v1", Journal(folder / "j"))
many._commit("main", Difference(names, []), "a whole release in one commit", remote.commit("main"))
assert set(names) <= set(remote.files("main"))
many.refuse_beyond_limits()
upload.FILE_BYTES = 1
assert "bytes, and a file on the Hub has at most 1;" in said(AtomError, many.refuse_beyond_limits)
upload.FOLDER_FILES = 3399
assert "has 3400 files, and a folder on the Hub has at most 3399" in said(AtomError, many.refuse_beyond_limits)
"""


@at_length("release", 9)
def test_a_commit_of_thousands_of_files_and_a_folder_of_too_many(client, tmp_path: Path) -> None:
    """The client names the files of a commit in many requests to one address."""
    with running(tmp_path / "hub") as endpoint:
        client(MANY, endpoint)
