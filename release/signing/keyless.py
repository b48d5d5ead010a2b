"""Signatures without a key: Sigstore certifies an identity that an OpenID provider vouches for, and logs its use.

A bundle is what `model_signing sign sigstore` writes. Signing and verifying need a network, at least for the trust root
of the public instance. A trust configuration (a file of `sigstore`) names another instance, or holds its trust root.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError

# The extension of a certificate that names the OpenID provider.
ISSUER = "1.3.6.1.4.1.57264.1.1"
# The remedy at the end of messages about Sigstore.
ONLINE = "; Sigstore needs a network, or give --trust-config of another instance"


@dataclass(frozen=True)
class Identity:
    """Somebody who signs.

    Attributes:
        name: An e-mail address, or the URL of a workflow.
        issuer: The OpenID provider that vouches for it.
    """

    name: str
    issuer: str

    def __str__(self) -> str:
        return f"{self.name} ({self.issuer})"


@contextmanager
def as_atom_error(action: str, hint: str = "") -> Iterator[None]:
    """Turns any error of the libraries, which have no base class in common, into one AtomError.

    Its message is the `action`, the error, and the `hint`.
    """
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise AtomError(f"{action}: {message}{hint}") from None


def signer(trust_config: Path | None) -> Any:
    """Returns a signer of payloads, by the credentials of a CI job or those given in a browser.

    Raises:
        AtomError: If Sigstore cannot be reached, or the configuration cannot be used.
    """
    from model_signing._signing import sign_sigstore

    class Signer(sign_sigstore.Signer):  # type: ignore[misc]
        """A signer that requests a token once, and again when it expires, not for every repository."""

        token: Any = None

        def _get_identity_token(self) -> Any:
            if self.token is None or not self.token.in_validity_period():
                self.token = super()._get_identity_token()
            return self.token

    _require_file(trust_config)
    with as_atom_error("cannot sign without a key", ONLINE):
        return Signer(trust_config=trust_config)


def verifier(identity: Identity, trust_config: Path | None) -> Any:
    """Returns a verifier of bundles. Raises AtomError if the trust root cannot be loaded."""
    from model_signing._signing import sign_sigstore

    _require_file(trust_config)
    with as_atom_error(f"cannot verify whether {identity} signed", ONLINE):
        return sign_sigstore.Verifier(identity=identity.name, oidc_issuer=identity.issuer, trust_config=trust_config)


def _require_file(trust_config: Path | None) -> None:
    if trust_config is not None and not trust_config.is_file():
        raise AtomError(f"there is no trust configuration {trust_config}; give the file of an instance of Sigstore")


def is_keyless(signature: Path) -> bool:
    """Returns True if a bundle has an entry of a transparency log, which a signature with a key never has."""
    try:
        return bool(json.loads(signature.read_bytes())["verificationMaterial"]["tlogEntries"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def verify_bundle(signature: Path, bundle_verifier: Any = None) -> tuple[Identity, Any]:
    """Returns the identity in a bundle, and the manifest that it signs. Raises the errors of the libraries.

    Args:
        signature: The file of the bundle.
        bundle_verifier: A verifier; without one, nothing vouches for the certificate, and its name may be invented.

    Raises:
        ValueError: The file is not written as signers write it.
    """
    from model_signing._signing import sign_sigstore, signing
    from sigstore import dsse

    class SelfVerifier(signing.Verifier):  # type: ignore[misc]
        """Verifies with the key in the bundle's own certificate: the bundle is whole, but anybody may have made it."""

        def _verify_signed_content(self, signature: Any) -> tuple[str, bytes]:
            envelope = signature.bundle._dsse_envelope
            payload = dsse._verify(signature.bundle.signing_certificate.public_key(), envelope)
            return envelope._inner.payload_type, payload

    bundle_signature = sign_sigstore.Signature.read(signature)
    # Some bits of base64 decide nothing, so other files would be read as the same bundle.
    if signature.read_text() != bundle_signature.bundle.to_json():
        raise ValueError("it is not written as signers write it")
    identity = certificate_identity(bundle_signature.bundle.signing_certificate)
    manifest = (bundle_verifier or SelfVerifier()).verify(bundle_signature)
    return identity, manifest


def recorded_identity(signature: Path) -> str | None:
    """Returns the identity in a bundle, which nobody has checked; None for a signature with a key."""
    from model_signing._signing import sign_sigstore

    if not is_keyless(signature):
        return None
    try:
        return str(certificate_identity(sign_sigstore.Signature.read(signature).bundle.signing_certificate))
    except Exception:  # a forger may have put anything there
        return "which cannot be read"


def certificate_identity(certificate: Any) -> Identity:
    """Returns the identity that a certificate of Sigstore names."""
    from cryptography import x509

    # People have an e-mail address, workflows a URL; a certificate has one of them.
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    [name] = names.get_values_for_type(x509.RFC822Name) + names.get_values_for_type(x509.UniformResourceIdentifier)
    issuer = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(ISSUER)).value
    return Identity(name, issuer.value.decode())
