"""Signs every repository of a release, with a private key or by Sigstore."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from release.layout import PARTS, PUBLIC_KEY, SIGNATURE
from release.repositories import Repository, model_folders, repositories, variant_folders
from release.signing import keyless

FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
HOW_TO = "make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"


@dataclass(frozen=True)
class SigningKey:
    """A private key.

    Attributes:
        path: A PEM file.
        password: The password of an encrypted key.
    """

    path: Path
    password: str | None = None

    def public_key(self) -> bytes:
        """Returns the public key as PEM. Raises AtomError if the file is not a private key on an elliptic curve."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

        try:
            password = None if self.password is None else self.password.encode()
            key = serialization.load_pem_private_key(self.path.read_bytes(), password)
        except FileNotFoundError:
            raise AtomError(f"there is no key {self.path}; {HOW_TO}") from None
        except (ValueError, TypeError) as error:
            raise AtomError(f"{self.path} cannot be read as a private key ({error}); {HOW_TO}") from None
        if not isinstance(key, EllipticCurvePrivateKey):
            raise AtomError(f"{self.path} is not a key on an elliptic curve; {HOW_TO}")
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return key.public_key().public_bytes(serialization.Encoding.PEM, form)


def make_key(path: Path) -> None:
    """Writes a new private key on P-256 as PEM that only its owner may read. Raises FileExistsError."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    form, no_encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(serialization.Encoding.PEM, form, no_encryption)
    path.parent.mkdir(parents=True, exist_ok=True)
    # O_EXCL: never over a key that exists. The mode is set at creation, so nobody can read it in between.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)


def fingerprint(pem: bytes, exact: bool = False) -> str:
    """Returns `sha256:` and the SHA-256 of a public key's DER form.

    Args:
        pem: The key.
        exact: Refuses a key of which any byte is not as `sign` writes it.

    Raises:
        ValueError: If it is not a public key of a known kind.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_public_key(pem)
    # Callers treat every key that cannot be used alike.
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    if exact and pem != key.public_bytes(serialization.Encoding.PEM, form):
        raise ValueError("it has bytes that no key needs")
    return f"sha256:{hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()}"


def is_fingerprint(text: str | None) -> bool:
    """Returns True if a text has the form of a public key's fingerprint."""
    return text is not None and FINGERPRINT.fullmatch(text) is not None


# Files that a signature does not cover, besides git's: the signature and its key, and files of the Hub's client.
IGNORED = (SIGNATURE, PUBLIC_KEY, ".cache")


def sign(release: Path, key: SigningKey, progress: Callable[[str], None] = lambda text: None) -> str:
    """Signs every repository of a release folder with a key and replaces earlier signatures.

    Returns:
        The fingerprint of the key.

    Raises:
        AtomError: The key cannot be used.
    """
    from model_signing import signing

    pem = key.public_key()
    for repository in repositories(release):
        folder = release / repository.folder
        progress(f"signing {repository.folder or 'the release itself'}")
        config = signing.Config()
        config.set_hashing_config(_hashing(release, repository))
        try:
            config.use_elliptic_key_signer(private_key=key.path, password=key.password)
            config.sign(folder, folder / SIGNATURE)
        except (ValueError, TypeError, OSError) as error:
            raise AtomError(f"{release} cannot be signed: {' '.join(str(error).split())}") from None
        # Next to the signature, so that whoever knows the fingerprint needs no other file.
        (folder / PUBLIC_KEY).write_bytes(pem)
    return fingerprint(pem)


def sign_keyless(
    release: Path, trust_config: Path | None = None, progress: Callable[[str], None] = lambda text: None
) -> keyless.Identity:
    """Signs every repository as the identity that Sigstore certifies, and returns that identity.

    Args:
        release: The release folder.
        trust_config: The configuration of another instance of Sigstore than the public one.
        progress: Gets a sentence for each repository.

    Raises:
        AtomError: If Sigstore cannot be reached, or certifies no identity.
    """
    from model_signing._signing.signing import Payload

    signer = keyless.signer(trust_config)  # fails before anything is hashed
    release_repositories = repositories(release)
    payloads, signatures = [], []
    for repository in release_repositories:
        progress(f"hashing {repository.folder or 'the release itself'}")
        with keyless.as_atom_error(f"{release} cannot be signed"):
            payloads.append(Payload(_hashing(release, repository).hash(release / repository.folder)))
    # No signature is written before all are made: a release is never signed in part.
    for repository, payload in zip(release_repositories, payloads, strict=True):
        progress(f"signing {repository.folder or 'the release itself'}")
        with keyless.as_atom_error(f"{release} cannot be signed without a key", "; nothing was written"):
            signatures.append(signer.sign(payload))
            identity = keyless.certificate_identity(signatures[0].bundle.signing_certificate)
    with keyless.as_atom_error(f"not every signature could be written into {release}", "; sign it again"):
        for repository, signature in zip(release_repositories, signatures, strict=True):
            signature.write(release / repository.folder / SIGNATURE)
            # The key of an earlier signature would contradict this one.
            (release / repository.folder / PUBLIC_KEY).unlink(missing_ok=True)
    return identity


def _hashing(release: Path, repository: Repository) -> Any:
    """Returns the library's settings for hashing a repository."""
    from model_signing import hashing

    config = hashing.Config()
    # In a release folder, repositories lie inside of each other; a pulled one lies alone.
    config.set_ignored_paths(paths=[*IGNORED, *_nested(release, repository)])
    return config


def _nested(release: Path, repository: Repository) -> list[str]:
    """Returns the paths in a repository's folder that belong to another repository or branch."""
    if repository.folder == "":
        return [*dict.fromkeys((*PARTS, *model_folders(release), *variant_folders(release)))]
    folder = release / repository.folder
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if repository.folder == "checkpoints" else []
