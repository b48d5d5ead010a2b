"""Signatures of a release: OpenSSF Model Signing v1.0, a `model.sig` inside each repository, the public key beside it.

A signature covers every file of its repository, `SHA256SUMS` among them, and nothing of the repositories that lie
inside its folder in a release. The stock `model_signing` command verifies a pulled repository by itself. Verification
here takes the digests that are known already, so no file is read twice.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from pipeline.errors import AtomError
from release.layout import PARTS, PUBLIC_KEY, SIGNATURE, Repository, model_folders, repositories

IGNORED = (SIGNATURE, PUBLIC_KEY, ".cache")
"""Beside what belongs to git: the signature and its key, and what the Hub's client leaves in a folder."""
FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
HOW_TO = "make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"


def make_key(path: Path) -> None:
    """A new private key on P-256 as PEM, which nobody but its owner may read. Raises FileExistsError."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(serialization.Encoding.PEM, form, none)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)


@dataclass(frozen=True)
class Signer:
    """A private key (PEM, elliptic curve), and the certificate that names its owner, with those that vouch for it."""

    key: Path
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()
    password: str | None = None

    def public_key(self) -> bytes:
        """The public key as PEM. Raises AtomError if the file is no private key on an elliptic curve."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

        try:
            password = None if self.password is None else self.password.encode()
            key = serialization.load_pem_private_key(self.key.read_bytes(), password)
        except FileNotFoundError:
            raise AtomError(f"there is no key {self.key}; {HOW_TO}") from None
        except (ValueError, TypeError) as error:
            raise AtomError(f"{self.key} cannot be read as a private key ({error}); {HOW_TO}") from None
        if not isinstance(key, EllipticCurvePrivateKey):
            raise AtomError(f"{self.key} is not a key on an elliptic curve; {HOW_TO}")
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return key.public_key().public_bytes(serialization.Encoding.PEM, form)


def fingerprint(pem: bytes) -> str:
    """`sha256:` and the SHA-256 of a public key's DER form. Raises ValueError if it is none that is known."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_public_key(pem)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def sign(release: Path, signer: Signer, progress: Callable[[str], None] = lambda text: None) -> str:
    """Signs every repository of a release folder; returns the key's fingerprint. Earlier signatures are replaced.

    Raises AtomError if the key or certificate cannot be used.
    """
    from model_signing import hashing, signing

    if signer.certificate is not None and not signer.chain:
        raise AtomError("a certificate needs those that vouch for it, up to the root; give each by --chain")
    if signer.certificate is not None and signer.password is not None:
        raise AtomError("a key with a password cannot be used with a certificate; give the key without one")
    pem = signer.public_key()
    for place in repositories(release):
        folder = release / place.folder
        progress(f"signing {place.folder or 'the release itself'}")
        paths = hashing.Config()
        paths.set_ignored_paths(paths=[*IGNORED, *_nested(release, place)])
        config = signing.Config()
        config.set_hashing_config(paths)
        try:
            if signer.certificate is None:
                config.use_elliptic_key_signer(private_key=signer.key, password=signer.password)
            else:
                config.use_certificate_signer(
                    private_key=signer.key, signing_certificate=signer.certificate, certificate_chain=signer.chain
                )
            config.sign(folder, folder / SIGNATURE)
        except (ValueError, TypeError, OSError) as error:
            raise AtomError(f"{release} cannot be signed: {' '.join(str(error).split())}") from None
        (folder / PUBLIC_KEY).write_bytes(pem)
    return fingerprint(pem)


def _nested(release: Path, place: Repository) -> list[str]:
    """What lies in a repository's folder, in a release, and is a repository or branch of its own."""
    if place.folder == "":
        return [*dict.fromkeys((*PARTS, *model_folders(release)))]
    folder = release / place.folder
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if place.folder == "checkpoints" else []


@dataclass(frozen=True)
class Verdict:
    """What the signature of one repository says; wrong: empty if it holds, else a sentence for everything."""

    fingerprint: str | None
    wrong: list[str]


def verify(
    folder: Path, present: Iterable[str], digest: Callable[[Path], str], chain: Sequence[Path] = ()
) -> Verdict | None:
    """The verdict on the repository in `folder`; None if it is not signed.

    present: its files, without those that belong to git or to the Hub's client. digest: SHA-256 of a file. chain:
    certificates to trust, for a release that was signed with one; without them the key beside the signature counts.
    """
    signature, public = folder / SIGNATURE, folder / PUBLIC_KEY
    if not os.path.lexists(signature) and not os.path.lexists(public):
        return None
    if missing := [path.name for path in (signature, public) if not path.is_file()]:
        return Verdict(None, [f"{missing[0]} is missing"])
    try:
        name = fingerprint(public.read_bytes())
    except ValueError:
        return Verdict(None, [f"{PUBLIC_KEY} is not a public key"])
    try:
        signed = _signed(signature, public, chain)
    except Exception as error:  # whatever a forger may have put there is a finding
        said = " ".join(str(error).split()) or type(error).__name__
        return Verdict(name, [f"{SIGNATURE} is not by the key {name[:23]}… in {PUBLIC_KEY}, or is altered: {said}"])
    there = set(present) - set(IGNORED)
    wrong = [f"{path} is missing, and was signed" for path in sorted(signed.keys() - there)]
    wrong += [f"{path} was added after signing" for path in sorted(there - signed.keys())]
    both = sorted(there & signed.keys())
    return Verdict(name, wrong + [f"{p} was altered after signing" for p in both if digest(folder / p) != signed[p]])


def _signed(signature: Path, public: Path, chain: Sequence[Path]) -> dict[str, str]:
    """{path: SHA-256} of what a signature covers, if it is by that key. Raises what the library raises, if not."""
    # its public interface hashes every file again
    from model_signing._signing import sign_certificate, sign_ec_key, sign_sigstore_pb

    bundle = sign_sigstore_pb.Signature.read(signature)
    given = bundle.bundle.verification_material.x509_certificate_chain
    with redirect_stdout(sys.stderr), NamedTemporaryFile(suffix=".pem") as anchor:
        verifier: Any = sign_ec_key.Verifier(public)
        if given is not None:
            pems = [_pem(certificate.raw_bytes) for certificate in given.certificates]
            if fingerprint(pems[0][1]) != fingerprint(public.read_bytes()):
                raise ValueError("its certificate is of another key")
            # where no certificate is trusted, the signature vouches for itself, as a key does
            anchor.write(pems[-1][0])
            anchor.flush()
            verifier = sign_certificate.Verifier(chain or [Path(anchor.name)])
        elif chain:
            raise ValueError("it was made without a certificate")
        manifest = verifier.verify(bundle)
    rows = list(manifest.resource_descriptors())
    if other := [row for row in rows if row.digest.algorithm != "sha256"]:
        raise ValueError(f"{other[0].identifier} was signed by {other[0].digest.algorithm}, not sha256")
    return {row.identifier: row.digest.digest_hex for row in rows}


def _pem(der: bytes) -> tuple[bytes, bytes]:
    """A certificate and its public key, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    found = x509.load_der_x509_certificate(der)
    key = found.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return found.public_bytes(Encoding.PEM), key
