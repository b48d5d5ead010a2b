"""Trusted timestamps (RFC 3161): an authority signs the time at which it saw a signature.

A timestamp is over the bytes of the signature in the bundle, and is kept in the bundle's `timestampVerificationData`,
as Sigstore's own are. The stock `model_signing` ignores it.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError

SECONDS = 30
"""After which an authority that does not answer is given up."""
RESPONSE_BYTES = 1 << 20
"""The maximum bytes that are read of a response."""
EXAMPLE = "for example http://timestamp.digicert.com"


def request(url: str, data: bytes) -> bytes:
    """A timestamp over SHA-256 of `data` from an authority: a TimeStampResp of RFC 3161, in DER.

    Raises AtomError if the authority cannot be reached, refuses, or answers another question.
    """
    from rfc3161_client import TimestampRequestBuilder, decode_timestamp_response
    from rfc3161_client.base import HashAlgorithm

    if not url.startswith(("http://", "https://")):
        raise AtomError(f"{url} is no address of a timestamp authority; give its URL, {EXAMPLE}")
    query = TimestampRequestBuilder().data(data).hash_algorithm(HashAlgorithm.SHA256).build()
    headers = {"Content-Type": "application/timestamp-query"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, query.as_bytes(), headers), timeout=SECONDS) as answer:
            content: bytes = answer.read(RESPONSE_BYTES)
        response = decode_timestamp_response(content)
        status, info = response.status, response.tst_info
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = " ".join(str(error).split())
        raise AtomError(f"{url} gave no timestamp ({reason}); try again, or another authority") from None
    if status != 0 or info.message_imprint.message != hashlib.sha256(data).digest() or info.nonce != query.nonce:
        raise AtomError(f"{url} answered another request than this one; try again, or another authority")
    return content


def load_roots(paths: Sequence[Path]) -> list[Any]:
    """The certificates of trusted authorities. Raises AtomError for a file that is none."""
    from cryptography import x509

    roots = []
    for path in paths:
        try:
            roots += x509.load_pem_x509_certificates(path.read_bytes())
        except (OSError, ValueError):
            raise AtomError(f"{path} has no certificate of a timestamp authority; give its root as PEM") from None
    return roots


def verified_time(response: bytes, data: bytes, roots: Sequence[Any]) -> datetime.datetime:
    """The time in a timestamp over `data`, in UTC. Raises ValueError if no trusted authority vouches for it."""
    from rfc3161_client import VerifierBuilder, decode_timestamp_response
    from rfc3161_client.errors import VerificationError

    decoded = decode_timestamp_response(response)
    builder = VerifierBuilder()
    for root in roots:
        builder = builder.add_root_certificate(root)
    try:
        builder.build().verify_message(decoded, data)
    except VerificationError as error:
        raise ValueError(str(error)) from None
    return decoded.tst_info.gen_time.astimezone(datetime.UTC)


def add(bundle: Any, response: bytes) -> None:
    """Puts a timestamp into a bundle of sigstore_models."""
    from sigstore_models.bundle.v1 import TimestampVerificationData
    from sigstore_models.common.v1 import RFC3161SignedTimestamp

    stamp = RFC3161SignedTimestamp(signed_timestamp=base64.b64encode(response))
    bundle.verification_material.timestamp_verification_data = TimestampVerificationData(rfc3161_timestamps=[stamp])


def of_bundle(bundle: Any) -> bytes | None:
    """The timestamp in a bundle of sigstore_models; None without one. Raises ValueError if there are several."""
    data = bundle.verification_material.timestamp_verification_data
    if data is None or not data.rfc3161_timestamps:
        return None
    (stamp,) = data.rfc3161_timestamps
    response: bytes = stamp.signed_timestamp
    return response
