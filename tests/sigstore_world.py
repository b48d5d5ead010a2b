"""A Sigstore of our own on this machine: an OpenID provider of a CI, Fulcio with its log of certificates, and Rekor.

It speaks to the real client over HTTP and makes real certificates, time stamps and inclusion proofs, by keys that its
trust configuration names. Of Rekor's log an entry is the only one.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ISSUER = "https://ci.example.org"
IDENTITY = "https://ci.example.org/team/atom/release.yml@main"
Key = ec.EllipticCurvePrivateKey


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def public(key: Key) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def signed(key: Key, data: bytes) -> bytes:
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def usage(**yes: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**{name: yes.get(name, False) for name in names})


@dataclass
class Sigstore:
    """Its keys, and what it was asked for. fails_at: the number of the entry that Rekor does not take."""

    url: str = ""
    identity: str = IDENTITY
    root: Key = field(default_factory=new_key)
    ct: Key = field(default_factory=new_key)
    rekor: Key = field(default_factory=new_key)
    tokens: int = 0
    entries: int = 0
    fails_at: int = 0

    def __post_init__(self) -> None:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])
        self.authority = self._builder(name, self.root.public_key(), datetime.timedelta(days=1))
        self.authority = self.authority.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.authority = self.authority.add_extension(usage(key_cert_sign=True, crl_sign=True), critical=True)
        self.certificate = self.authority.sign(self.root, hashes.SHA256())

    def _builder(self, subject: x509.Name, key: Any, lasts: datetime.timedelta) -> x509.CertificateBuilder:
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])
        start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=1)
        builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number(), start, start + lasts)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        above = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.root.public_key())
        return builder.add_extension(above, critical=False)

    def token(self) -> str:
        self.tokens += 1
        issued_at = int(time.time())
        claims = {"iss": ISSUER, "aud": "sigstore", "sub": self.identity, "iat": issued_at, "exp": issued_at + 600}
        return jwt.encode(claims, "a secret that nobody asks for, of 32 bytes")

    def certify(self, request: bytes, token: str) -> list[str]:
        """Fulcio: a certificate of ten minutes with the promise of the log of certificates."""
        identity = jwt.decode(token, options={"verify_signature": False})["sub"]
        key = x509.load_pem_x509_csr(request).public_key()
        builder = self._builder(x509.Name([]), key, datetime.timedelta(minutes=10))
        builder = builder.add_extension(usage(digital_signature=True), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)])
        builder = builder.add_extension(names, critical=True)
        issuer = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1"), ISSUER.encode())
        builder = builder.add_extension(issuer, critical=False)
        body = builder.sign(self.root, hashes.SHA256()).tbs_certificate_bytes
        stamp = struct.pack("!Q", int(time.time() * 1000))
        promise = b"\0\0" + stamp + b"\0\1" + hashlib.sha256(public(self.root)).digest()
        signature = signed(self.ct, promise + len(body).to_bytes(3) + body + b"\0\0")
        one = b"\0" + hashlib.sha256(public(self.ct)).digest() + stamp + b"\0\0" + b"\4\3"
        one += struct.pack("!H", len(signature)) + signature
        many = struct.pack("!HH", len(one) + 2, len(one)) + one
        promised = x509.UnrecognizedExtension(
            x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2"), bytes([4, len(many)]) + many
        )
        leaf = builder.add_extension(promised, critical=False).sign(self.root, hashes.SHA256())
        return [c.public_bytes(Encoding.PEM).decode() for c in (leaf, self.certificate)]

    def log(self, proposed: dict[str, Any]) -> dict[str, Any]:
        """Rekor: the entry, its time, its place in a log of one, and a signed checkpoint of that."""
        content = proposed["spec"]["proposedContent"]
        envelope = json.loads(content["envelope"])
        payload = base64.b64decode(envelope["payload"])
        spec = {
            "envelopeHash": {"algorithm": "sha256", "value": hashlib.sha256(content["envelope"].encode()).hexdigest()},
            "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()},
            "signatures": [{"signature": envelope["signatures"][0]["sig"], "verifier": content["verifiers"][0]}],
        }
        body = rfc8785.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
        log_id, logged_at = hashlib.sha256(public(self.rekor)).digest(), int(time.time())
        stated = {"body": b64(body), "integratedTime": logged_at, "logID": log_id.hex(), "logIndex": 0}
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"rekor.example.org - 1\n1\n{b64(root)}\n"
        checkpoint = f"{note}\n\u2014 rekor.example.org {b64(log_id[:4] + signed(self.rekor, note.encode()))}\n"
        proof = {"logIndex": 0, "rootHash": root.hex(), "treeSize": 1, "hashes": [], "checkpoint": checkpoint}
        promise = b64(signed(self.rekor, rfc8785.dumps(stated)))
        return {"0" * 64: stated | {"verification": {"inclusionProof": proof, "signedEntryTimestamp": promise}}}

    def write_config(self, path: Path) -> Path:
        """The trust configuration of this instance."""

        def log(key: Key) -> dict[str, Any]:
            about = {"rawBytes": b64(public(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": since}
            id = {"keyId": b64(hashlib.sha256(public(key)).digest())}
            return {"baseUrl": self.url, "hashAlgorithm": "SHA2_256", "publicKey": about, "logId": id}

        since = {"start": "2020-01-01T00:00:00Z"}
        service = {"url": self.url, "majorApiVersion": 1, "validFor": since, "operator": "test"}
        chain = {"certificates": [{"rawBytes": b64(self.certificate.public_bytes(Encoding.DER))}]}
        root = {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.rekor)],
            "ctlogs": [log(self.ct)],
            "certificateAuthorities": [
                {"subject": {"organization": "t", "commonName": "t"}, "certChain": chain, "validFor": since}
            ],
        }
        signing = {
            "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
            "caUrls": [service], "oidcUrls": [service], "rekorTlogUrls": [service],
        }  # fmt: skip
        kind = "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"
        path.write_text(json.dumps({"mediaType": kind, "trustedRoot": root, "signingConfig": signing}))
        return path


class Handler(BaseHTTPRequestHandler):
    sigstore: Sigstore

    def do_GET(self) -> None:
        if self.path.startswith("/token"):
            return self._answer({"value": self.sigstore.token()})
        self._answer({"authorization_endpoint": self.sigstore.url, "token_endpoint": self.sigstore.url})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/api/v2/signingCert":
            request = base64.b64decode(body["certificateSigningRequest"])
            chain = self.sigstore.certify(request, self.headers["Authorization"].removeprefix("Bearer "))
            return self._answer({"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}})
        self.sigstore.entries += 1
        if self.sigstore.entries == self.sigstore.fails_at:
            return self._answer({"code": 503, "message": "the log is closed"}, 503)
        self._answer(self.sigstore.log(body))

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None: ...


@contextmanager
def running(**changes: Any) -> Iterator[Sigstore]:
    """A Sigstore on a free port."""
    sigstore = Sigstore(**changes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"sigstore": sigstore}))
    sigstore.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield sigstore
    finally:
        server.shutdown()
        server.server_close()


def ambient(sigstore: Sigstore) -> dict[str, str]:
    """What a job of that CI has in its environment."""
    return {
        "GITHUB_ACTIONS": "true", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "x", "NO_PROXY": "127.0.0.1",
        "ACTIONS_ID_TOKEN_REQUEST_URL": f"{sigstore.url}/token?a=b",
    }  # fmt: skip
