"""A secret that the processes of a run share, and the signatures by which they know each other's messages.

The secret is 32 random bytes in a file that only its user may read. It never travels: a message carries an HMAC
(SHA-256) of its purpose and its content. This module imports no other one of the project, because vLLM's processes
import it too.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

# The environment variable with the path of the file, for processes that are started with a secret.
VARIABLE = "ATOM_SECRET_FILE"


class UnusableSecret(Exception):
    """The reason why a file is no secret, in one sentence."""


def make(path: Path) -> None:
    """Writes a new secret, unless the file exists. The file appears complete."""
    draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(descriptor)
        # The link appears with its content complete, and fails if another process was faster.
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def read(path: Path) -> bytes:
    """Returns the secret in a file.

    Raises UnusableSecret if the file holds none, or if another user owns it or may read it.
    """
    try:
        # A link is not followed, and the writer of a pipe is not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        file = os.fdopen(descriptor, errors="replace")  # not of a folder
    except OSError as error:
        raise UnusableSecret(f"the secret {path} cannot be read ({error.strerror})") from None
    with file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise UnusableSecret(f"the secret {path} must be a file of this user that nobody else may read; remove it")
        text = file.read(100).strip()
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise UnusableSecret(f"{path} holds no secret; remove it")
    return bytes.fromhex(text)


def sign(key: bytes, purpose: str, *parts: str) -> str:
    """Returns the signature of a message.

    Args:
        key: The secret.
        purpose: The use of the message, so that no message stands for another.
        *parts: The parts of the message.
    """
    signature = hmac.new(key, digestmod="sha256")
    for part in (purpose, *parts):
        data = part.encode(errors="surrogateescape")
        # The length before each part tells apart ("ab", "c") and ("a", "bc").
        signature.update(len(data).to_bytes(8, "big") + data)
    return signature.hexdigest()


def is_signed(signature: str, key: bytes, purpose: str, *parts: str) -> bool:
    """Returns True if a signature is that of a message, in a time that does not depend on where they differ."""
    return hmac.compare_digest(signature.encode(errors="replace"), sign(key, purpose, *parts).encode())
