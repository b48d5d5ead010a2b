"""Key pairs on an elliptic curve: private keys as PEM files, public keys by their fingerprint."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import AtomError

FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
HOW_TO = "make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"


@dataclass(frozen=True)
class SigningKey:
    """A private key (PEM), and the password of an encrypted one."""

    path: Path
    password: str | None = None

    def public_key(self) -> bytes:
        """The public key as PEM. Raises AtomError if the file is not a private key on an elliptic curve."""
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
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)


def fingerprint(pem: bytes, exact: bool = False) -> str:
    """`sha256:` and the SHA-256 of a public key's DER form. Raises ValueError if it is not a public key of a known
    kind, or, if `exact`, if any byte is not as `sign` writes it."""
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


def is_fingerprint(text: str | None) -> bool:
    """Whether a text has the form of a public key's fingerprint."""
    return text is not None and FINGERPRINT.fullmatch(text) is not None
