"""Filter `no_secrets` removes what a release may not hold, and keeps what only speaks of it."""

from __future__ import annotations

import base64
import random
import string

import pytest

from stages.data.filters.base import Removal
from stages.data.filters.no_secrets import FILTER

KEY = base64.encodebytes(random.Random(0).randbytes(200)).decode()
LETTERS = "".join(random.Random(0).choices(string.ascii_letters, k=40))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"Like this:\n-----BEGIN OPENSSH PRIVATE KEY-----\n{KEY}-----END OPENSSH PRIVATE KEY-----", "private_key"),
        (f"export HF_TOKEN=hf_{LETTERS[:34]}", "hugging_face_token"),
        (f"token: ghp_{LETTERS[:36]}", "github_token"),
        ("A key begins with -----BEGIN PRIVATE KEY----- and then has a body.", None),
        ("AWS writes AKIAIOSFODNN7EXAMPLE in its manuals.", None),
    ],
)
def test_a_document_with_a_secret_is_removed(text: str, reason: str | None) -> None:
    result = FILTER(step="no_secrets").function()(text)
    assert result == (text if reason is None else Removal(reason, 1.0, 0.0))
