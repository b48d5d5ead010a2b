"""Verifies the signature of a repository by a trust policy: a key, or a Sigstore identity."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from release.layout import PUBLIC_KEY, SIGNATURE
from release.signing import keyless
from release.signing.signatures import IGNORED, fingerprint, is_fingerprint


@dataclass(frozen=True)
class TrustPolicy:
    """The requirements on signatures.

    Attributes:
        signer: The required signer, as a key's fingerprint, or as an identity, which `verifier` then checks.
        verifier: Checks signatures without a key.
    """

    signer: str | None = None
    verifier: Any = None


@dataclass(frozen=True)
class Trust:
    """The trusted signers, as the caller states them.

    Attributes:
        key: A public key's fingerprint, or the file of the key.
        identity: The signer that Sigstore certified.
        issuer: The OpenID provider that vouches for the identity.
        trust_config: The trust configuration of another instance of Sigstore than the public one.
    """

    key: str | None = None
    identity: str | None = None
    issuer: str | None = None
    trust_config: Path | None = None

    def policy(self) -> TrustPolicy:
        """Returns the policy to verify by.

        Raises:
            AtomError: If a value is invalid or contradicts another, or if Sigstore's trust root cannot be loaded.
        """
        if self.identity or self.issuer or self.trust_config:
            return self._identity_policy()
        name = self.key
        if name is not None and not is_fingerprint(name):
            try:
                name = fingerprint(Path(name).read_bytes())
            except (OSError, ValueError):
                raise AtomError(f"{name} is neither a fingerprint, sha256:…, nor the file of a public key") from None
        return TrustPolicy(name)

    def _identity_policy(self) -> TrustPolicy:
        if not self.identity or not self.issuer:
            raise AtomError("a signer without a key is named by both: give --identity WHO and --issuer URL")
        if self.key is not None:
            raise AtomError("--identity is for signatures without a key; leave out --key")
        identity = keyless.Identity(self.identity, self.issuer)
        return TrustPolicy(str(identity), verifier=keyless.verifier(identity, self.trust_config))


ANYONE = Trust()


def load_libraries() -> None:
    """Imports the libraries for verifying, once."""
    from model_signing._signing import sign_ec_key, sign_sigstore_pb, signing  # noqa: F401
    from sigstore import dsse  # noqa: F401


@dataclass(frozen=True)
class SignatureVerdict:
    """The result for the signature of one repository.

    Attributes:
        signer: A key's fingerprint, or an identity; None if unknown.
        problems: One sentence each; none if the signature is valid.
    """

    signer: str | None
    problems: list[str]


def verify(
    folder: Path, present: Iterable[str], digest: Callable[[Path], str], policy: TrustPolicy
) -> SignatureVerdict | None:
    """Returns the verdict on the repository in a folder; None if it is not signed.

    Args:
        folder: The repository.
        present: Its files, without those that belong to git or to the Hub's client.
        digest: Returns SHA-256 of a file; the caller has them already, so that no file is hashed twice.
        policy: The requirements on the signature.
    """
    signature, public = folder / SIGNATURE, folder / PUBLIC_KEY
    # lexists: a link that leads nowhere is no unsigned repository.
    if not os.path.lexists(signature) and not os.path.lexists(public):
        return None
    read = _by_identity if keyless.is_keyless(signature) else _by_key
    try:
        signer, digests = read(signature, public, policy)
    except _Invalid as error:
        return SignatureVerdict(error.signer, [str(error)])
    files = set(present) - set(IGNORED)
    problems = [f"{path} is missing, and was signed" for path in sorted(digests.keys() - files)]
    problems += [f"{path} was added after signing" for path in sorted(files - digests.keys())]
    # Digests are compared for the files on both sides; the others are problems already.
    common = sorted(files & digests.keys())
    problems += [f"{path} was altered after signing" for path in common if digest(folder / path) != digests[path]]
    return SignatureVerdict(signer, problems)


class _Invalid(Exception):
    """A signature that is not valid. `signer` is the one that it claims, if that is known."""

    def __init__(self, problem: str, signer: str | None = None) -> None:
        super().__init__(problem)
        self.signer = signer


def _by_identity(signature: Path, public: Path, policy: TrustPolicy) -> tuple[str, dict[str, str]]:
    """Returns the identity that signed, and {path: SHA-256} of the signed files. Raises _Invalid."""
    if os.path.lexists(public):
        raise _Invalid(f"{PUBLIC_KEY} is there, and {SIGNATURE} was made without a key")
    try:
        # The libraries may print, and stdout is for the verdict.
        with redirect_stdout(sys.stderr):
            identity, manifest = keyless.verify_bundle(signature, policy.verifier)
        return str(identity), _digests(manifest)
    except Exception as error:  # a forger may have put anything there
        expected_signer = policy.signer if policy.verifier else "whom its certificate names"
        raise _Invalid(f"{SIGNATURE} is not by {expected_signer}, or is altered: {_error_text(error)}") from None


def _by_key(signature: Path, public: Path, policy: TrustPolicy) -> tuple[str, dict[str, str]]:
    """Returns the fingerprint of the key that signed, and {path: SHA-256} of the signed files. Raises _Invalid."""
    if missing := [path.name for path in (signature, public) if not path.is_file()]:
        raise _Invalid(f"{missing[0]} is missing")
    try:
        # Exact, since the signature does not cover the file of its key.
        name = fingerprint(public.read_bytes(), exact=True)
    except ValueError:
        raise _Invalid(f"{PUBLIC_KEY} is not a public key, or is altered") from None
    # The caller trusts an identity, and anybody can make a key.
    if policy.verifier:
        raise _Invalid(f"{SIGNATURE} was made with the key {name[:23]}…, not by {policy.signer}")
    try:
        return name, _verified_digests(signature, public)
    except Exception as error:
        problem = f"{SIGNATURE} is not by the key {name[:23]}… in {PUBLIC_KEY}, or is altered: {_error_text(error)}"
        raise _Invalid(problem, name) from None


def _error_text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _verified_digests(signature: Path, public: Path) -> dict[str, str]:
    """Returns {path: SHA-256} of the files that a signature by a key covers.

    Raises what the library raises, if it is invalid.
    """
    # The library's public interface hashes every file again.
    from model_signing._signing import sign_ec_key, sign_sigstore_pb

    bundle = sign_sigstore_pb.Signature.read(signature)
    if signature.read_text() != bundle.bundle.to_json():  # base64 has bits that decide nothing
        raise ValueError("it is not written as signers write it")
    with redirect_stdout(sys.stderr):
        return _digests(sign_ec_key.Verifier(public).verify(bundle))


def _digests(manifest: Any) -> dict[str, str]:
    """Returns {path: SHA-256} of a signed manifest. Raises ValueError for another algorithm."""
    digests = {}
    for row in manifest.resource_descriptors():
        if row.digest.algorithm != "sha256":
            raise ValueError(f"{row.identifier} was signed by {row.digest.algorithm}, not sha256")
        digests[row.identifier] = row.digest.digest_hex
    return digests
