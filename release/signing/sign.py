"""Signatures of a release: OpenSSF Model Signing v1.0, a `model.sig` inside each repository, the public key beside it.

A signature by Sigstore (`keyless`) has no key beside it: the bundle holds the certificate that names the signer.

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

from pipeline.core.errors import AtomError
from release.layout import PARTS, PUBLIC_KEY, SIGNATURE
from release.repositories import Repository, model_folders, repositories
from release.signing import keyless

IGNORED = (SIGNATURE, PUBLIC_KEY, ".cache")
"""Beside what belongs to git: the signature and its key, and what the Hub's client leaves in a folder."""
FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
HOW_TO = "make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"


def load_libraries() -> None:
    """Imports once what verifying needs."""
    from model_signing._signing import sign_certificate, sign_ec_key, sign_sigstore_pb, signing  # noqa: F401
    from sigstore import dsse  # noqa: F401


def make_key(path: Path) -> None:
    """A new private key on P-256 as PEM, which nobody but its owner may read. Raises FileExistsError."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    form, no_encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(serialization.Encoding.PEM, form, no_encryption)
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


def fingerprint(pem: bytes, exact: bool = False) -> str:
    """`sha256:` and the SHA-256 of a public key's DER form. Raises ValueError if it is none that is known, or, if
    `exact`, if any byte is not as `sign` writes it."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_public_key(pem)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    if exact and pem != key.public_bytes(serialization.Encoding.PEM, form):
        raise ValueError("it has bytes that no key needs")
    return f"sha256:{hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()}"


def sign(release: Path, signer: Signer, progress: Callable[[str], None] = lambda text: None) -> str:
    """Signs every repository of a release folder; returns the key's fingerprint. Earlier signatures are replaced.

    Raises AtomError if the key or certificate cannot be used.
    """
    from model_signing import signing

    if signer.certificate is not None and not signer.chain:
        raise AtomError("a certificate needs those that vouch for it, up to the root; give each by --chain")
    if signer.certificate is not None and signer.password is not None:
        raise AtomError("a key with a password cannot be used with a certificate; give the key without one")
    pem = signer.public_key()
    for repository in repositories(release):
        folder = release / repository.folder
        progress(f"signing {repository.folder or 'the release itself'}")
        config = signing.Config()
        config.set_hashing_config(_hashing(release, repository))
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


def sign_keyless(
    release: Path, trust_config: Path | None = None, progress: Callable[[str], None] = lambda text: None
) -> keyless.Identity:
    """Signs every repository as the identity that Sigstore certifies, and returns that. No signature is written before
    all are made.

    trust_config: of another instance of Sigstore. Raises AtomError if it cannot be reached, or certifies nobody.
    """
    from model_signing._signing.signing import Payload

    signer = keyless.signer(trust_config)  # what cannot be reached is told before anything is hashed
    release_repositories = repositories(release)
    payloads, signatures = [], []
    for repository in release_repositories:
        progress(f"hashing {repository.folder or 'the release itself'}")
        with keyless.as_atom_error(f"{release} cannot be signed"):
            payloads.append(Payload(_hashing(release, repository).hash(release / repository.folder)))
    for repository, payload in zip(release_repositories, payloads, strict=True):
        progress(f"signing {repository.folder or 'the release itself'}")
        with keyless.as_atom_error(f"{release} cannot be signed without a key", "; nothing was written"):
            signatures.append(signer.sign(payload))
            identity = keyless.certificate_identity(signatures[0].bundle.signing_certificate)
    with keyless.as_atom_error(f"not every signature could be written into {release}", "; sign it again"):
        for repository, signature in zip(release_repositories, signatures, strict=True):
            signature.write(release / repository.folder / SIGNATURE)
            (release / repository.folder / PUBLIC_KEY).unlink(missing_ok=True)
    return identity


def _hashing(release: Path, repository: Repository) -> Any:
    """How the library hashes a repository."""
    from model_signing import hashing

    config = hashing.Config()
    config.set_ignored_paths(paths=[*IGNORED, *_nested(release, repository)])
    return config


def _nested(release: Path, repository: Repository) -> list[str]:
    """What lies in a repository's folder, in a release, and is a repository or branch of its own."""
    if repository.folder == "":
        return [*dict.fromkeys((*PARTS, *model_folders(release)))]
    folder = release / repository.folder
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if repository.folder == "checkpoints" else []


@dataclass(frozen=True)
class TrustPolicy:
    """What signatures must satisfy. signer: who must have signed, as a key's fingerprint, or as an identity, which
    `verifier` then checks. chain: certificates to trust, for a release that was signed with one; without them the key
    beside the signature counts."""

    signer: str | None = None
    chain: tuple[Path, ...] = ()
    verifier: Any = None


@dataclass(frozen=True)
class SignatureVerdict:
    """What the signature of one repository says. signer: a key's fingerprint, or an identity; problems: one sentence
    each, none if the signature is valid."""

    signer: str | None
    problems: list[str]


def verify(
    folder: Path, present: Iterable[str], digest: Callable[[Path], str], policy: TrustPolicy
) -> SignatureVerdict | None:
    """The verdict on the repository in `folder`; None if it is not signed.

    present: its files, without those that belong to git or to the Hub's client. digest: SHA-256 of a file.
    """
    signature, public = folder / SIGNATURE, folder / PUBLIC_KEY
    if not os.path.lexists(signature) and not os.path.lexists(public):
        return None
    signer, signed, problem = (_by_identity if keyless.is_keyless(signature) else _by_key)(signature, public, policy)
    if problem:
        return SignatureVerdict(signer, [problem])
    files = set(present) - set(IGNORED)
    problems = [f"{path} is missing, and was signed" for path in sorted(signed.keys() - files)]
    problems += [f"{path} was added after signing" for path in sorted(files - signed.keys())]
    common = sorted(files & signed.keys())
    return SignatureVerdict(
        signer, problems + [f"{p} was altered after signing" for p in common if digest(folder / p) != signed[p]]
    )


Signed = tuple[str | None, dict[str, str], str]
"""Who signed, {path: SHA-256} of what, and what is wrong with the signature."""


def _by_identity(signature: Path, public: Path, policy: TrustPolicy) -> Signed:
    if os.path.lexists(public):
        return None, {}, f"{PUBLIC_KEY} is there, and {SIGNATURE} was made without a key"
    if policy.chain:
        return None, {}, f"{SIGNATURE} was made without a key, not by whom the certificates vouch for"
    try:
        with redirect_stdout(sys.stderr):
            identity, manifest = keyless.verify_bundle(signature, policy.verifier)
        return str(identity), _digests(manifest), ""
    except Exception as error:  # whatever a forger may have put there is a finding
        expected_signer = policy.signer if policy.verifier else "whom its certificate names"
        return None, {}, f"{SIGNATURE} is not by {expected_signer}, or is altered: {_error_text(error)}"


def _by_key(signature: Path, public: Path, policy: TrustPolicy) -> Signed:
    if missing := [path.name for path in (signature, public) if not path.is_file()]:
        return None, {}, f"{missing[0]} is missing"
    try:
        name = fingerprint(public.read_bytes(), exact=True)
    except ValueError:
        return None, {}, f"{PUBLIC_KEY} is not a public key, or is altered"
    if policy.verifier:
        return None, {}, f"{SIGNATURE} was made with the key {name[:23]}…, not by {policy.signer}"
    try:
        return name, _verified_digests(signature, public, policy.chain), ""
    except Exception as error:
        return (
            name,
            {},
            f"{SIGNATURE} is not by the key {name[:23]}… in {PUBLIC_KEY}, or is altered: {_error_text(error)}",
        )


def _error_text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _verified_digests(signature: Path, public: Path, chain: Sequence[Path]) -> dict[str, str]:
    """{path: SHA-256} of what a signature covers, if it is by that key. Raises what the library raises, if not."""
    # its public interface hashes every file again
    from model_signing._signing import sign_certificate, sign_ec_key, sign_sigstore_pb

    bundle = sign_sigstore_pb.Signature.read(signature)
    if signature.read_text() != bundle.bundle.to_json():  # base64 has bits that decide nothing
        raise ValueError("it is not written as signers write it")
    certificate_chain = bundle.bundle.verification_material.x509_certificate_chain
    with redirect_stdout(sys.stderr), NamedTemporaryFile(suffix=".pem") as anchor:
        verifier: Any = sign_ec_key.Verifier(public)
        if certificate_chain is not None:
            pems = [_pem(certificate.raw_bytes) for certificate in certificate_chain.certificates]
            if fingerprint(pems[0][1]) != fingerprint(public.read_bytes()):
                raise ValueError("its certificate is of another key")
            # where no certificate is trusted, the signature vouches for itself, as a key does
            anchor.write(pems[-1][0])
            anchor.flush()
            verifier = sign_certificate.Verifier(chain or [Path(anchor.name)])
        elif chain:
            raise ValueError("it was made without a certificate")
        return _digests(verifier.verify(bundle))


def _digests(manifest: Any) -> dict[str, str]:
    rows = list(manifest.resource_descriptors())
    if foreign := [row for row in rows if row.digest.algorithm != "sha256"]:
        raise ValueError(f"{foreign[0].identifier} was signed by {foreign[0].digest.algorithm}, not sha256")
    return {row.identifier: row.digest.digest_hex for row in rows}


def _pem(der: bytes) -> tuple[bytes, bytes]:
    """A certificate and its public key, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    certificate = x509.load_der_x509_certificate(der)
    key = certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return certificate.public_bytes(Encoding.PEM), key
