"""The Space of a release's page: published, with certificates of replays; and what `atom site` and `atom publish` refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from release import schema
from release.audit.replay import certificate
from release.audit.replay.report import BITWISE, Replay, folder_of, read_certificate
from release.audit.replay.source import Source
from release.hub.local.server import LOCAL_TOKEN, running
from release.hub.local.store import HubStore
from release.hub.publish import write_space
from release.layout import PAGE, RETRACTED, SIGNATURE, SITE
from tests.fixtures.run_fixtures import at_length, atom
from tests.fixtures.web_page_fixtures import contents


def certificate_of(release: Path) -> dict[str, Any]:
    """What `atom replay --certificate` writes after a replay with equal bits of the last steps of pre-training."""
    digests = Source(release).digests("checkpoints/pretrain-step-2")
    result = Replay(
        phase="pretrain", first=0, last=2, verdict=BITWISE, tensors=31, different={}, state=(), diverges=None, ranks=1,
        environment=("python: 3.11, 3.12",), fingerprint="sha256:" + "5" * 64,
        materials=Source(release).digests("checkpoints/pretrain-step-0"), subject=digests,
    )  # fmt: skip
    return certificate(result, release)


def space(hub: Path) -> dict[str, bytes] | None:
    """The files of the public Space on its main branch."""
    store = HubStore(hub)
    stored = store.load("space", "local/tiny-page")
    if stored is None:
        return None
    assert not stored.private and set(stored.branches) == {"main"}
    files = stored.commits[stored.branches["main"]].files
    return {path: store.blob(file.blob).read_bytes() for path, file in files.items() if path != ".gitattributes"}


def test_the_space_shows_the_record_of_replays_and_leads_to_the_tag(built: Path, tmp_path: Path) -> None:
    (tmp_path / "lab.json").write_text(json.dumps(certificate_of(built)))
    row = read_certificate(tmp_path / "lab.json", Source(built))
    write_space(built, schema.read_release(built), [row], tmp_path / "space")
    assert contents(tmp_path / "space").keys() == {"README.md", "index.html", "replays/lab.json"}
    text = (tmp_path / "space/index.html").read_text()
    rows = text[text.index("Replays by others") :]
    _, _, phase, first, last, *_ = row.row()
    for cell in ('<a href="replays/lab.json">lab</a>', f"{phase}, {first} to {last}", "31 of 31"):
        assert cell in rows, rows[:2000]
    links = set(re.findall(r'href="(https://[^"]*)" target="_blank" rel="noopener"', text))
    assert "https://huggingface.co/datasets/local/tiny-evidence/blob/v0.1.0/evidence/gates.json" in links
    assert len(links) > 20 and all("/v0.1.0/" in link for link in links)
    assert 'href="../' not in text, "a link that leads nowhere on the Hub"
    write_space(built, schema.read_release(built), [], tmp_path / "empty")
    assert "No certificate was sent so far." in (tmp_path / "empty/index.html").read_text()
    assert "None is in this copy" in (built / PAGE).read_text()


@at_length("release", 45)
def test_the_space_is_published_updated_and_retracted(copy: Path, tmp_path: Path) -> None:
    release, folder = copy, folder_of(copy)
    folder.mkdir()
    body = certificate_of(release)
    (folder / "university-lab.json").write_text(json.dumps(body))
    with running(tmp_path / "hub") as endpoint:
        hub: Any = {"HF_ENDPOINT": endpoint, "HF_TOKEN": LOCAL_TOKEN, "HF_HOME": str(tmp_path / "hf")}
        publish = ["publish", str(release), "--to", "local", "--public"]
        assert re.search(r"^space local/tiny-page@main \w{12}$", atom(tmp_path, *publish, **hub).stdout, re.MULTILINE)
        files = space(tmp_path / "hub")
        assert files is not None
        head = yaml.safe_load(files.pop("README.md").decode().split("---")[1])
        assert (head["sdk"], head["app_file"], head["models"]) == ("static", "index.html", ["local/tiny"])
        page = contents(release / SITE)
        assert files.pop("replays/university-lab.json") == (folder / "university-lab.json").read_bytes()
        assert files.keys() == page.keys() == {"index.html"}

        (folder / "somebody.json").write_text(json.dumps(body))
        before = HubStore(tmp_path / "hub").load("dataset", "local/tiny-evidence")
        atom(tmp_path, *publish, **hub)
        files = space(tmp_path / "hub")
        assert files is not None and b"somebody" in files["index.html"], "a public Space got the later one"
        assert HubStore(tmp_path / "hub").load("dataset", "local/tiny-evidence") == before
        body["subject"][0]["digest"]["sha256"] = "0" * 64
        (folder / "somebody.json").write_text(json.dumps(body))
        refused = atom(tmp_path, *publish, code=2, **hub).stderr
        assert "somebody.json is about another release: its digest of 'checkpoints/" in refused.splitlines()[-1]
        (folder / "somebody.json").write_text("{}")
        assert "is no certificate of a replay; remove it" in atom(tmp_path, *publish, code=2, **hub).stderr
        assert space(tmp_path / "hub") == files, "a refused certificate changes nothing"

        card = (release / "dataset/README.md").read_text()
        (example,) = re.findall(r"^- `(\S+)` of prose: `", card, re.MULTILINE)
        retract = ["retract", str(release), "--documents", example, "--request", "a"]
        preview = atom(tmp_path, *retract, "--dry-run", **hub).stdout
        assert (
            "local/tiny-page, the Space of the page, would be deleted" in preview and space(tmp_path / "hub") == files
        )
        done = atom(tmp_path, *retract, **hub).stdout
        assert "local/tiny-page, the Space of the page, is deleted" in done
        assert space(tmp_path / "hub") is None and not (release / SITE).exists()
        assert f"- `{example}`" not in (release / "dataset/README.md").read_text(), "its beginning left the card"
        assert "Space" not in atom(tmp_path, *retract, **hub).stdout, "nothing is left to delete"


def test_the_command_refuses_what_has_no_page_in_one_sentence(copy: Path, tmp_path: Path) -> None:
    def refused(release: Path, *arguments: str, code: int = 2) -> str:
        before = contents(release / SITE)
        process = atom(tmp_path, "site", str(release), *arguments, code=code)
        assert "page" not in process.stdout and contents(release / SITE) == before, "the page stays as it was"
        return process.stderr.splitlines()[-1]

    assert "is not a release folder; make one with `atom build`" in refused(tmp_path)
    (copy / SITE / "index.html").write_text("altered")
    (copy / SIGNATURE).write_text("{}")
    assert re.search(r"is signed, and another page would break.*then `atom sign`$", refused(copy))
    (copy / SIGNATURE).unlink()
    (copy / RETRACTED).write_text("{}")
    assert "lacks documents that were taken back, so that its figures and files disagree" in refused(copy)
    (copy / RETRACTED).unlink()
    for path, content in (("evidence/gates.json", b"{"), ("dataset/kept/prose/part-00000.parquet", b"PAR1PAR1")):
        kept = (copy / path).read_bytes()
        (copy / path).write_bytes(content)
        assert re.search(r"cannot be read \(\w+\); `atom verify .*` names the damaged files$", refused(copy, code=1)), (
            path
        )
        (copy / path).write_bytes(kept)
    assert "page written: file://" in atom(tmp_path, "site", str(copy)).stdout
