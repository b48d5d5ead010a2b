"""Signatures: the stock tool takes each repository, and every way of tampering has a verdict of its own."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import base64
import json
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from pipeline.core.errors import AtomError
from release import signing
from release.hub.local.server import running
from release.layout import PUBLIC_KEY, SIGNATURE, SUMS
from release.repositories import files_of, repositories
from release.signing import Trust
from tests.fixtures.audit_fixtures import verify
from tests.fixtures.release_fixtures import resum
from tests.fixtures.run_fixtures import at_length
from tests.fixtures.signing_fixtures import signed, signer, verdict, write_key  # noqa: F401 - fixtures


@pytest.fixture
def release(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "tiny-0.1.0"))


def test_a_signed_release_and_every_repository_alone(signed: Path, signer: signing.SigningKey, tmp_path: Path) -> None:
    name = signing.fingerprint(signer.public_key())
    ok, detail = verdict(signed, Trust(name))
    assert ok and detail == f"{len(repositories(signed))} repositories signed by {name}"
    ok, detail = verdict(signed)
    assert ok and "nothing but the release itself says whose key that is" in detail
    for place in repositories(signed):
        folder = tmp_path / (place.folder.replace("/", "_") or "root")
        for path in [*files_of(signed, place), SUMS, SIGNATURE, PUBLIC_KEY]:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(signed / place.folder / path, folder / path)
        (folder / ".gitattributes").write_text("x\n")  # what a Hub and its client add
        (folder / ".cache/huggingface").mkdir(parents=True)
        (folder / ".cache/huggingface/x.metadata").write_text("x\n")
        assert verdict(folder, Trust(str(folder / PUBLIC_KEY)))[0], place
        stock = [sys.executable, "-m", "model_signing", "verify", "key", "--signature", str(folder / SIGNATURE)]
        process = subprocess.run([*stock, "--public_key", str(folder / PUBLIC_KEY), str(folder)], capture_output=True)
        assert process.returncode == 0 and b"Verification succeeded" in process.stdout, process
        (folder / "more.txt").write_text("x")
        process = subprocess.run([*stock, "--public_key", str(folder / PUBLIC_KEY), str(folder)], capture_output=True)
        assert process.returncode != 0, "the stock tool sees what was added"


def altered(release: Path) -> str:
    (release / "model/config.json").write_text((release / "model/config.json").read_text() + " ")
    return "model/config.json was altered after signing"


def removed(release: Path) -> str:
    (release / "dataset/dispositions/prose/part-00000.parquet").unlink()
    return "dataset/dispositions/prose/part-00000.parquet is missing, and was signed"


def added(release: Path) -> str:
    (release / "model-base/more.json").write_text("{}")
    return "model-base/more.json was added after signing"


@pytest.mark.parametrize("tamper", [altered, removed, added], ids=lambda f: f.__name__)
def test_what_was_done_after_signing_is_reported_though_all_checksums_were_made_anew(tamper, release: Path) -> None:
    expected = tamper(release)
    resum(release)
    ok, wrong = verdict(release)
    assert ok is False and expected in wrong
    assert all("SHA256SUMS was altered" in text for text in wrong if text != expected), wrong


def test_another_key_is_no_signature_of_ours(release: Path, signer: signing.SigningKey, tmp_path: Path) -> None:
    ours = Trust(signing.fingerprint(signer.public_key()))
    other = signing.SigningKey(write_key(tmp_path / "other.pem"))
    (release / "model" / PUBLIC_KEY).write_bytes(other.public_key())
    ok, wrong = verdict(release)
    assert ok is False and any("model/model.sig is not by the key sha256:" in text for text in wrong)
    theirs = signing.sign(release, other)
    assert verdict(release)[0], "whoever signs everything anew can only be recognized by the key"
    ok, wrong = verdict(release, ours)
    assert ok is False and f"model/model.pub is {theirs}, not {ours.key}" in wrong


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff\x00", b'{"verificationMaterial": {}, "dsseEnvelope": []}', b"[" * 99999]
)
def test_what_is_no_signature_is_reported(content: bytes, release: Path) -> None:
    (release / "model" / SIGNATURE).write_bytes(content)
    ok, wrong = verdict(release)
    assert ok is False and len(wrong) == 1 and "model/model.sig is not by the key" in wrong[0]


def test_bytes_that_decide_nothing_may_not_change_either(release: Path) -> None:
    """The white space of a key, and the last bits of a payload in base64, which no decoder reads."""
    key = release / "model" / PUBLIC_KEY
    pem = key.read_bytes()
    key.write_bytes(pem[:-1] + b"\v")
    assert verdict(release) == (False, ["model/model.pub is not a public key, or is altered"])
    key.write_bytes(pem)
    digits = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    changed = 0
    for path in sorted(release.rglob(SIGNATURE)):
        bundle = path.read_text()
        payload = json.loads(bundle)["dsseEnvelope"]["payload"]
        stem = payload.rstrip("=")
        other = (stem[:-1] + digits[digits.index(stem[-1]) ^ 1]).ljust(len(payload), "=")
        if base64.b64decode(other) == base64.b64decode(payload):
            path.write_text(bundle.replace(payload, other))
            changed += 1
    ok, wrong = verdict(release)
    assert ok is False and len(wrong) == changed > 0, wrong
    assert all("it is not written as signers write it" in text for text in wrong)


def test_one_repository_without_and_a_release_without(release: Path, signer: signing.SigningKey) -> None:
    for name in (SIGNATURE, PUBLIC_KEY):
        assert verdict(release)[0]
        (release / "model" / name).unlink()
        ok, wrong = verdict(release)
        assert ok is False and len(wrong) == 1, wrong
        signing.sign(release, signer)
    for place in repositories(release):
        for name in (SIGNATURE, PUBLIC_KEY):
            (release / place.folder / name).unlink()
    assert verdict(release) == (None, "not signed")
    assert verdict(release, Trust(signing.fingerprint(signer.public_key())))[0] is False


def test_keys_that_are_none_cost_a_sentence(signed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("x")
    write_key(tmp_path / "rsa.pem", rsa.generate_private_key(65537, 2048))
    for name, words in {
        "none.pem": "there is no key",
        "text.pem": "cannot be read as a private key",
        "rsa.pem": "is not a key on an elliptic curve",
    }.items():
        with pytest.raises(AtomError, match=words) as error:
            signing.sign(signed, signing.SigningKey(tmp_path / name))
        assert "\n" not in str(error.value) and "openssl ecparam" in str(error.value)
    for key in ("sha256:12", str(tmp_path / "text.pem"), str(tmp_path / "none.pub")):
        with pytest.raises(AtomError, match="is neither a fingerprint, sha256:…, nor the file of a public key"):
            verify(signed, trust=Trust(key))


@at_length("release", 20)
def test_signatures_are_published_and_come_back(client, release: Path, tmp_path: Path) -> None:
    with running(tmp_path / "hub") as endpoint:
        client(
            """
publish(release, "local", public=True)
from release.signing import Trust
trust = Trust(str(release / "model.pub"))
for suffix in ("", "-base", "-data", "-evidence", "-checkpoints", "-checkpoints@pretrain-step-2"):
    found = next(c for c in verify("local/tiny" + suffix, trust=trust).checks if c.name == "signatures")
    assert found.ok, found
assert not sum(r.files_sent for r in publish(release, "local", public=True).repositories)
""",
            endpoint,
        )
