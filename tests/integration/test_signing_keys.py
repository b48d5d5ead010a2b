"""Signatures by keys that were rotated, revoked or expired, with and without a trusted timestamp."""

from __future__ import annotations

import datetime
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipeline.core.errors import AtomError
from pipeline.core.store import sha256_file
from release import signing
from release.layout import SIGNATURE
from release.repositories import files_below
from release.signing import Trust, validity
from release.signing.key_history import KeyHistory, format_time, signed_statement
from tests.fixtures import timestamp_fixtures
from tests.fixtures.run_fixtures import atom
from tests.fixtures.timestamp_fixtures import Authority

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    with timestamp_fixtures.running(tmp_path_factory.mktemp("authority")) as running:
        yield running


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, signing.SigningKey]:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("old", "new"):
        signing.keys.make_key(folder / f"{name}.pem")
    return {name: signing.SigningKey(folder / f"{name}.pem") for name in ("old", "new")}


@pytest.fixture(scope="module")
def signed(
    built: Path, keys: dict[str, signing.SigningKey], authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, Path]:
    """The release signed by the old key, without and with a timestamp."""
    copies = {}
    for stamped in (False, True):
        copy = Path(shutil.copytree(built, tmp_path_factory.mktemp("signed") / built.name))
        signing.sign(copy, keys["old"], timestamp_url=authority.url if stamped else None)
        copies[stamped] = copy
    return copies


def history(
    path: Path,
    keys: dict[str, signing.SigningKey],
    expires: datetime.datetime | None = None,
    rotated: datetime.datetime | None = None,
    revoked: datetime.datetime | None = None,
) -> Path:
    """A history of the old key."""
    old, new = (key.public_key().decode() for key in keys.values())
    name, history = signing.fingerprint(old.encode()), KeyHistory()
    until = expires and format_time(expires)
    history.add(signed_statement({"kind": "key", "key": old, "expires": until}, keys["old"]))
    if rotated:
        statement = {"kind": "rotation", "key": name, "successor": new, "expires": None, "time": format_time(rotated)}
        history.add(signed_statement(statement, keys["old"], keys["new"]))
    if revoked:
        statement = {"kind": "revocation", "key": name, "time": format_time(revoked), "reason": "stolen"}
        history.add(signed_statement(statement, keys["new" if rotated else "old"]))
    history.write(path)
    return path


def verdict(release: Path, trust: Trust) -> tuple[list[str], str]:
    """The problems and the note of the signature of one repository."""
    folder = release / "model"
    result = signing.verify(folder, files_below(folder), sha256_file, trust.policy())
    assert result is not None
    return result.problems, result.note


@pytest.mark.parametrize(
    ("stamped", "events", "problem", "note"),
    [
        (False, {}, "", ""),
        (False, {"rotated": NOW - DAY}, "", "its successor at"),
        (True, {"rotated": NOW - DAY}, "its successor at .*, and its timestamp says", ""),
        (True, {"rotated": NOW + DAY}, "", "its successor at .*it was made by .*, as a trusted timestamp proves"),
        (False, {"revoked": NOW + DAY}, "was revoked .*no trusted timestamp proves that it was made before$", ""),
        (True, {"revoked": NOW - DAY}, r"was revoked as of .* \(stolen\), and its timestamp says", ""),
        (True, {"revoked": NOW + DAY}, "", r"\(stolen\), after this signature; it was made by .*proves"),
        (True, {"rotated": NOW + DAY, "revoked": NOW + DAY}, "", "after this signature; the key .* named"),
        (False, {"expires": NOW + DAY}, "", ""),
        (False, {"expires": NOW - DAY}, "expired at .*, and no trusted timestamp proves", ""),
        (True, {"expires": NOW - DAY}, "expired at .*, and its timestamp says", ""),
        (True, {"expires": NOW + DAY}, "", ""),
    ],
)
def test_what_became_of_a_key_decides(
    stamped: bool,
    events: dict[str, datetime.datetime],
    problem: str,
    note: str,
    signed: dict[bool, Path],
    keys: dict[str, signing.SigningKey],
    authority: Authority,
    tmp_path: Path,
) -> None:
    name = signing.fingerprint(keys["old"].public_key())
    path = history(tmp_path / "keys.json", keys, **events)
    trust = Trust(name, keys=path, timestamp_authorities=(authority.root,))
    problems, text = verdict(signed[stamped], trust)
    assert len(problems) == bool(problem) and (text == "") == (note == "")
    assert re.search(problem, "".join(problems)) and re.search(note, text)


def test_a_signature_outlives_its_key_by_its_timestamp(
    signed: dict[bool, Path], keys: dict[str, signing.SigningKey], authority: Authority, tmp_path: Path
) -> None:
    """The clock goes on: what was made while the key was valid counts later by the timestamp alone."""
    name, later = signing.fingerprint(keys["old"].public_key()), NOW + 5 * DAY
    key = KeyHistory.read(history(tmp_path / "keys.json", keys, expires=NOW + DAY)).keys[name]
    proven = validity.of_key(name, key, validity.SigningTime(NOW, False, later))
    assert not proven.problem and "expired at" in proven.note and "as a trusted timestamp proves" in proven.note
    for untrusted, hint in (
        (True, "it has a timestamp, so give --timestamp-authority"),
        (False, "proves that it was made"),
    ):
        assert hint in validity.of_key(name, key, validity.SigningTime(None, untrusted, later)).problem


def test_only_an_authority_that_is_trusted_counts(
    signed: dict[bool, Path], keys: dict[str, signing.SigningKey], tmp_path: Path
) -> None:
    name, path = signing.fingerprint(keys["old"].public_key()), history(tmp_path / "k", keys, revoked=NOW + DAY)
    problems, _ = verdict(signed[True], Trust(name, keys=path))
    assert "it has a timestamp, so give --timestamp-authority" in problems[0]
    (tmp_path / "other").mkdir()
    with timestamp_fixtures.running(tmp_path / "other") as stranger:
        problems, _ = verdict(signed[True], Trust(name, keys=path, timestamp_authorities=(stranger.root,)))
        assert len(problems) == 1 and "is altered" in problems[0]
    copy = Path(shutil.copytree(signed[True], tmp_path / "copy"))
    body = json.loads((signed[False] / "model" / SIGNATURE).read_text())
    stamp = json.loads((signed[True] / "model" / SIGNATURE).read_text())["verificationMaterial"]
    body["verificationMaterial"]["timestampVerificationData"] = stamp["timestampVerificationData"]
    (copy / "model" / SIGNATURE).write_text(json.dumps(body, separators=(",", ":")))
    problems, _ = verdict(copy, Trust(name, keys=path, timestamp_authorities=(tmp_path / "other/root.pem",)))
    assert problems, "a timestamp over another signature proves nothing"


def test_a_successor_is_trusted_and_a_stranger_is_not(
    signed: dict[bool, Path], keys: dict[str, signing.SigningKey], tmp_path: Path
) -> None:
    old, new = (signing.fingerprint(key.public_key()) for key in keys.values())
    path = history(tmp_path / "keys.json", keys, rotated=NOW - DAY)
    release = str(signed[False])
    accepted = atom(tmp_path, "verify", release, "--key", new, "--keys", str(path))
    assert f"signed by {old}; the key {old[:23]}… named {new[:23]}… its successor" in accepted.stdout
    refused = atom(tmp_path, "verify", release, "--key", new, code=1)
    assert f"model.pub is {old}, not {new}" in refused.stdout
    alone = history(tmp_path / "alone.json", keys)
    with pytest.raises(AtomError, match=f"says nothing about the key {new}"):
        Trust(new, keys=alone).policy()
    with pytest.raises(AtomError, match="name one of them that you trust with --key"):
        Trust(keys=path).policy()
    with pytest.raises(AtomError, match="has no certificate of a timestamp authority"):
        Trust(timestamp_authorities=(path,)).policy()


def test_an_authority_that_fails_leaves_no_signature(
    built: Path, keys: dict[str, signing.SigningKey], authority: Authority, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(built, tmp_path / built.name))
    authority.answers = b"x"
    try:
        with pytest.raises(AtomError, match="gave no timestamp"):
            signing.sign(copy, keys["old"], timestamp_url=authority.url)
    finally:
        authority.answers = None
    assert not list(copy.rglob(SIGNATURE))
    for url, reason in (
        ("http://127.0.0.1:9", "gave no timestamp"),
        ("ftp://x", "is no address of a timestamp authority"),
    ):
        with pytest.raises(AtomError, match=reason):
            signing.sign(copy, keys["old"], timestamp_url=url)


def certificate(
    of: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey, root: bool, end: datetime.datetime
) -> bytes:
    def common_name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = x509.CertificateBuilder(
        common_name("root"), common_name("root" if root else "team"), of.public_key(), x509.random_serial_number()
    )
    builder = builder.not_valid_before(NOW - 9 * DAY).not_valid_after(end)
    builder = builder.add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
    usage = x509.KeyUsage(not root, False, False, False, False, root, root, False, False)
    pem = builder.add_extension(usage, critical=True).sign(by, hashes.SHA256())
    return pem.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("days", [-1, 1])
def test_a_certificate_that_expired_signs_no_more(days: int, built: Path, authority: Authority, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / built.name))
    root = ec.generate_private_key(ec.SECP256R1())
    signing.keys.make_key(tmp_path / "leaf.key")
    leaf = serialization.load_pem_private_key((tmp_path / "leaf.key").read_bytes(), None)
    assert isinstance(leaf, ec.EllipticCurvePrivateKey)
    (tmp_path / "root.pem").write_bytes(certificate(root, root, True, NOW + 99 * DAY))
    (tmp_path / "leaf.pem").write_bytes(certificate(leaf, root, False, NOW + days * DAY))
    key = signing.SigningKey(tmp_path / "leaf.key", tmp_path / "leaf.pem", (tmp_path / "root.pem",))
    signing.sign(copy, key, timestamp_url=authority.url)
    problems, _ = verdict(copy, Trust(chain=(tmp_path / "root.pem",), timestamp_authorities=(authority.root,)))
    assert ["certificate expired at" in text and "its timestamp says" in text for text in problems] == [True] * (
        days < 0
    )
