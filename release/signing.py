"""Signatures of a release: OpenSSF Model Signing v1.0, a `model.sig` in each repository.

A signature is made with a private key (`sign`; the public key is beside it as `model.pub`) or without one, by Sigstore
(`sign_keyless`; the bundle contains the certificate that names the signer). It covers every file of its repository,
`SHA256SUMS` among them, and nothing of the repositories inside its folder in a release. The stock `model_signing`
command verifies a pulled repository by itself. `verify` here takes computed digests, so that no file is hashed twice.
`Trust` states which signers are trusted. Nothing here records which keys are revoked: after a key has leaked, its
holder signs with another key and announces that key.

A bundle of Sigstore is what `model_signing sign sigstore` writes. Signing and verifying without a key need a network,
at least for the trust root of the public instance. A trust configuration (a file of `sigstore`) names another instance,
or holds its trust root.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from release.layout import PARTS, PUBLIC_KEY, SIGNATURE
from release.repositories import Repository, model_folders, repositories, variant_folders

FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
HOW_TO = "make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
# Files that a signature does not cover, besides git's: the signature and its key, and files of the Hub's client.
IGNORED = (SIGNATURE, PUBLIC_KEY, ".cache")
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


def keyless_signer(trust_config: Path | None) -> Any:
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
) -> Identity:
    """Signs every repository as the identity that Sigstore certifies, and returns that identity.

    Args:
        release: The release folder.
        trust_config: The configuration of another instance of Sigstore than the public one.
        progress: Gets a sentence for each repository.

    Raises:
        AtomError: If Sigstore cannot be reached, or certifies no identity.
    """
    from model_signing._signing.signing import Payload

    signer = keyless_signer(trust_config)  # fails before anything is hashed
    release_repositories = repositories(release)
    payloads, signatures = [], []
    for repository in release_repositories:
        progress(f"hashing {repository.folder or 'the release itself'}")
        with as_atom_error(f"{release} cannot be signed"):
            payloads.append(Payload(_hashing(release, repository).hash(release / repository.folder)))
    # No signature is written before all are made: a release is never signed in part.
    for repository, payload in zip(release_repositories, payloads, strict=True):
        progress(f"signing {repository.folder or 'the release itself'}")
        with as_atom_error(f"{release} cannot be signed without a key", "; nothing was written"):
            signatures.append(signer.sign(payload))
            identity = certificate_identity(signatures[0].bundle.signing_certificate)
    with as_atom_error(f"not every signature could be written into {release}", "; sign it again"):
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
        identity = Identity(self.identity, self.issuer)
        return TrustPolicy(str(identity), verifier=verifier(identity, self.trust_config))


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
    read = _by_identity if is_keyless(signature) else _by_key
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
            identity, manifest = verify_bundle(signature, policy.verifier)
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
