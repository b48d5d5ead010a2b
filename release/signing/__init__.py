"""Signatures of a release: OpenSSF Model Signing v1.0, a `model.sig` in each repository.

A signature is made with a private key (`sign`; the public key is beside it as `model.pub`) or without one, by Sigstore
(`sign_keyless`; the bundle contains the certificate that names the signer). It covers every file of its repository,
`SHA256SUMS` among them, and nothing of the repositories inside its folder in a release. The stock `model_signing`
command verifies a pulled repository by itself. `verify` here takes computed digests, so that no file is hashed twice.
`Trust` states which signers are trusted. Nothing here records which keys are revoked: after a key has leaked, its
holder signs with another key and announces that key.
"""

from release.signing.keyless import Identity, recorded_identity
from release.signing.signatures import HOW_TO, SigningKey, fingerprint, is_fingerprint, make_key, sign, sign_keyless
from release.signing.verification import ANYONE, SignatureVerdict, Trust, TrustPolicy, load_libraries, verify

__all__ = [
    "ANYONE",
    "HOW_TO",
    "Identity",
    "SignatureVerdict",
    "SigningKey",
    "Trust",
    "TrustPolicy",
    "fingerprint",
    "is_fingerprint",
    "load_libraries",
    "make_key",
    "recorded_identity",
    "sign",
    "sign_keyless",
    "verify",
]
