"""Signatures without a key, by a Sigstore on this machine: the real client and the stock tool against it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.core.errors import AtomError
from release import signing
from release.audit import show
from release.hub.local.server import running
from release.layout import PUBLIC_KEY, SIGNATURE, SUMS
from release.opened_release import Release
from release.repositories import files_below, files_of, repositories
from release.signing import Trust
from tests.fixtures import sigstore_fixtures
from tests.fixtures.release_fixtures import resum
from tests.fixtures.run_fixtures import at_length
from tests.fixtures.signing_fixtures import verdict, write_key
from tests.fixtures.sigstore_fixtures import IDENTITY, ISSUER, Sigstore


@pytest.fixture(scope="module")
def sigstore(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sigstore]:
    with pytest.MonkeyPatch.context() as patch, sigstore_fixtures.running() as instance:
        for name, value in sigstore_fixtures.ambient(instance).items():
            patch.setenv(name, value)
        yield instance


@pytest.fixture(scope="module")
def config(sigstore: Sigstore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sigstore.write_config(tmp_path_factory.mktemp("trust") / "trust.json")


@pytest.fixture(scope="module")
def ours(config: Path) -> Trust:
    return Trust(identity=IDENTITY, issuer=ISSUER, trust_config=config)


@pytest.fixture(scope="module")
def signed(built: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(built, tmp_path_factory.mktemp("signed") / "tiny-0.1.0"))
    assert signing.sign_keyless(copy, config) == signing.Identity(IDENTITY, ISSUER)
    return copy


@pytest.fixture
def release(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "tiny-0.1.0"))


def test_a_release_and_every_repository_alone(
    signed: Path, sigstore: Sigstore, config: Path, ours: Trust, tmp_path: Path
) -> None:
    assert sigstore.tokens == 1, "a browser would be opened once, not for every repository"
    ok, detail = verdict(signed, ours)
    assert ok and detail == f"{len(repositories(signed))} repositories signed by {IDENTITY} ({ISSUER})"
    ok, detail = verdict(signed)
    assert ok and f"signed by {IDENTITY} ({ISSUER}); nothing but the release itself says so: give --identity" in detail
    for place in repositories(signed)[-2:]:
        folder = tmp_path / place.folder
        for path in [*files_of(signed, place), SUMS, SIGNATURE]:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(signed / place.folder / path, folder / path)
        assert verdict(folder, ours)[0], place
        stock = [sys.executable, "-m", "model_signing", "verify", "sigstore", "--trust_config", str(config)]
        stock += ["--signature", str(folder / SIGNATURE), "--identity", IDENTITY, "--identity_provider", ISSUER]
        process = subprocess.run([*stock, str(folder)], capture_output=True)
        assert process.returncode == 0 and b"Verification succeeded" in process.stdout, process
        (folder / "more.txt").write_text("x")
        assert subprocess.run([*stock, str(folder)], capture_output=True).returncode != 0


def altered(release: Path) -> str:
    (release / "model/config.json").write_text((release / "model/config.json").read_text() + " ")
    resum(release)
    return "model/config.json was altered after signing"


def other_payload(release: Path) -> str:
    """Another repository's own words in the envelope."""
    ours, others = (release / name / SIGNATURE for name in ("model", "model-base"))
    payload, other = (json.loads(path.read_bytes())["dsseEnvelope"]["payload"] for path in (ours, others))
    ours.write_text(ours.read_text().replace(payload, other))
    return "or is altered: DSSE: invalid signature"


def spelled_otherwise(release: Path) -> str:
    """The same bundle in other bytes, as flipped bits of base64 that decide nothing would leave it."""
    path = release / "model" / SIGNATURE
    path.write_text(path.read_text() + "\n")
    return "or is altered: it is not written as signers write it"


def cut(release: Path) -> str:
    (release / "model" / SIGNATURE).write_text('{"verificationMaterial": {"tlogEntries": [1]}}')
    return "model/model.sig is not by "


def with_a_key(release: Path) -> str:
    (release / "model" / PUBLIC_KEY).write_text("x")
    return "model/model.pub is there, and model.sig was made without a key"


@pytest.mark.parametrize(
    "tamper", [altered, other_payload, spelled_otherwise, cut, with_a_key], ids=lambda f: f.__name__
)
def test_what_was_done_after_signing_is_reported(tamper, release: Path, ours: Trust) -> None:
    expected = tamper(release)
    for trust in (ours, Trust()):
        ok, wrong = verdict(release, trust)
        assert ok is False and any(expected in text for text in wrong), wrong


def test_another_identity_provider_or_instance_is_not_ours(signed: Path, config: Path, tmp_path: Path) -> None:
    other = sigstore_fixtures.Sigstore(url="http://127.0.0.1:1").write_config(tmp_path / "other.json")
    for trust, words in (
        (Trust(identity="eve@example.org", issuer=ISSUER, trust_config=config), "SANs do not match eve@example.org"),
        (Trust(identity=IDENTITY, issuer="https://else.example.org", trust_config=config), "OIDCIssuer does not match"),
        (Trust(identity=IDENTITY, issuer=ISSUER, trust_config=other), "is altered: failed to build"),
    ):
        ok, wrong = verdict(signed, trust)
        assert ok is False and len(wrong) == len(repositories(signed)), wrong
        assert all(f"model.sig is not by {trust.identity} ({trust.issuer}), or is altered: " in text for text in wrong)
        assert words in wrong[0]


def test_keys_and_identities_are_reported_apart(release: Path, ours: Trust, config: Path, tmp_path: Path) -> None:
    key = f"sha256:{'0' * 64}"
    ok, wrong = verdict(release, Trust(key))
    assert ok is False and f"model/model.sig is {IDENTITY} ({ISSUER}), not {key}" in wrong
    name = signing.sign(release, signing.SigningKey(write_key(tmp_path / "key.pem")))
    ok, wrong = verdict(release, ours)
    assert ok is False and f"model/model.sig was made with the key {name[:23]}…, not by {IDENTITY} ({ISSUER})" in wrong
    assert verdict(release)[0], "and the key's signatures took the others' place"
    signing.sign_keyless(release, config)
    assert verdict(release, ours)[0] and not [*release.rglob(PUBLIC_KEY)]


def test_what_fails_half_way_writes_nothing(built: Path, sigstore: Sigstore, config: Path) -> None:
    before = sorted(built.rglob("*"))
    sigstore.entries, sigstore.fails_at = 0, 3
    with pytest.raises(AtomError, match="cannot be signed without a key: 503: the log is closed; nothing was written"):
        signing.sign_keyless(built, config)
    assert sigstore.entries == 3 and sorted(built.rglob("*")) == before
    sigstore.fails_at = 0


def test_without_a_network_there_is_one_sentence(built: Path, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    env = {**os.environ, "HTTPS_PROXY": nowhere, "HOME": str(tmp_path), "NO_PROXY": ""}
    config = sigstore_fixtures.Sigstore(url=nowhere).write_config(tmp_path / "trust.json")
    (tmp_path / "bad.json").write_text("x")
    before = sorted(built.rglob("*"))
    for arguments, words in (
        (["sign", "--keyless"], "cannot sign without a key: Failed to refresh TUF metadata"),
        (["sign", "--keyless", "--trust-config", str(config)], "cannot sign without a key: NetworkError"),
        (["sign", "--keyless", "--trust-config", str(tmp_path / "bad.json")], "Invalid JSON"),
        (
            ["verify", "--identity", IDENTITY, "--issuer", ISSUER],
            f"cannot verify whether {IDENTITY} ({ISSUER}) signed: Failed",
        ),
    ):
        command = [sys.executable, "-m", "pipeline.cli", arguments[0], str(built), *arguments[1:]]
        process = subprocess.run(command, env=env, capture_output=True, text=True)
        lines = process.stderr.strip().splitlines()
        assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("atom: ") and words in lines[0], (
            process
        )
    assert sorted(built.rglob("*")) == before and not [p for p in files_below(built) if p.endswith(".sig")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sign"], "no key to sign with; give --key PEM"),
        (
            ["sign", "--keyless", "--key", "key.pem"],
            "--keyless signs without a key; leave out --key",
        ),
        (["sign", "--key", "key.pem", "--trust-config", "t.json"], "give it with --keyless"),
        (["verify", "--identity", IDENTITY], "give --identity WHO and --issuer URL"),
        (["verify", "--issuer", ISSUER], "give --identity WHO and --issuer URL"),
        (["verify", "--trust-config", "t.json"], "give --identity WHO and --issuer URL"),
        (["verify", "--identity", IDENTITY, "--issuer", ISSUER, "--key", "k.pub"], "leave out --key"),
    ],
)
def test_what_goes_not_together_is_reported(arguments: list[str], words: str, built: Path) -> None:
    result = CliRunner().invoke(app, [arguments[0], str(built), *arguments[1:]])
    assert isinstance(result.exception, AtomError) and result.exception.exit_code == 2
    assert words in str(result.exception) and "\n" not in str(result.exception)


@at_length("release", 16)
def test_they_are_published_and_come_back(client, release: Path, config: Path, tmp_path: Path) -> None:
    assert f"signed with the identity {IDENTITY} ({ISSUER}); unchecked, atom verify checks it" in " ".join(
        show.text(show.facts_of(Release(release))).split()
    )
    with running(tmp_path / "hub") as endpoint:
        client(
            f"""
publish(release, "local", public=True)
from release.signing import Trust
trust = Trust(identity={IDENTITY!r}, issuer={ISSUER!r}, trust_config=pathlib.Path({str(config)!r}))
for suffix in ("", "-data", "-evidence", "-checkpoints@pretrain-step-2"):
    found = next(c for c in verify("local/tiny" + suffix, trust=trust).checks if c.name == "signatures")
    assert found.ok, found
from release.scratch import pull_named
hidden = ".eval_results/tiny-data.yaml"
came = pull_named("local/tiny", release.with_name("came")) / hidden
assert came.read_bytes() == (release / "model" / hidden).read_bytes()
came.write_text("[]")
found = next(c for c in verify(came.parent.parent, trust=trust).checks if c.name == "signatures")
assert found.wrong == [hidden + " was altered after signing"], found
""",
            endpoint,
        )
