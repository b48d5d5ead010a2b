"""Whose signatures count: a key's, whom certificates vouch for, or whom Sigstore certified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import AtomError
from release.signing import keyless, sign


@dataclass(frozen=True)
class Trust:
    """Whose signatures count. key: a public key's fingerprint, or a file that holds the key; chain: certificates.

    identity, issuer: whom Sigstore certified, by trust_config if it is given.
    """

    key: str | None = None
    chain: tuple[Path, ...] = ()
    identity: str | None = None
    issuer: str | None = None
    trust_config: Path | None = None

    def policy(self) -> sign.TrustPolicy:
        """Raises AtomError if these are not sound or go not together, or if Sigstore's trust root cannot be had."""
        if missing := [path for path in self.chain if not path.is_file()]:
            raise AtomError(f"there is no certificate {missing[0]}; name the file of one that you trust, as PEM")
        if self.identity or self.issuer or self.trust_config:
            return self._identity_policy()
        if self.key is None or sign.FINGERPRINT.fullmatch(self.key):
            return sign.TrustPolicy(self.key, self.chain)
        try:
            return sign.TrustPolicy(sign.fingerprint(Path(self.key).read_bytes()), self.chain)
        except (OSError, ValueError):
            raise AtomError(f"{self.key} is neither a fingerprint, sha256:…, nor the file of a public key") from None

    def _identity_policy(self) -> sign.TrustPolicy:
        if not self.identity or not self.issuer:
            raise AtomError("who signed without a key is told by both: give --identity WHO and --issuer URL")
        if self.key is not None or self.chain:
            raise AtomError("--identity is about signatures without a key; leave out --key and --chain")
        identity = keyless.Identity(self.identity, self.issuer)
        return sign.TrustPolicy(str(identity), verifier=keyless.verifier(identity, self.trust_config))


ANYONE = Trust()
