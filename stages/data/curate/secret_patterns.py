"""The forms of access tokens and private keys, which no published text may have.

Manuals and tests have keys as examples. A release with one is refused, since nobody can tell an example from a key that
is in use; so no document with one is kept, and no task with one is drawn.
"""

from __future__ import annotations

import re


class Pattern:
    """A secret's bytes: a regular expression, and literals of which every match has one.

    These are searched first, since an expression that begins with a boundary is slow.
    """

    def __init__(self, expression: bytes, *literals: bytes) -> None:
        self.expression, self.literals = re.compile(expression), literals

    def is_in(self, data: bytes) -> bool:
        return any(literal in data for literal in self.literals) and self.expression.search(data) is not None


# Keys of OpenAI, Anthropic and Google begin as in gitleaks' rules openai-api-key, anthropic-api-key and gcp-api-key.
# The rest is random characters of base64url: manuals have words or dots in its place, or repeat a character, or count.
_RANDOM = (
    rb"(?![\w-]*?(?:(\w)\1{4}|abcdef|ABCDEF|123456))"
    rb"(?=[\w-]*?[0-9][\w-]*?[0-9])(?=[\w-]*?[A-Z][\w-]*?[A-Z])(?=[\w-]*?[a-z][\w-]*?[a-z])"
)

PATTERNS = {
    "a Hugging Face token": Pattern(rb"\bhf_[A-Za-z0-9]{30,}", b"hf_"),
    "an AWS access key": Pattern(rb"\b(?:AKIA|ASIA)(?!IOSFODNN7)[A-Z0-9]{16}\b", b"AKIA", b"ASIA"),
    "a GitHub token": Pattern(
        rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})",
        *(b"gh" + kind + b"_" for kind in (b"p", b"o", b"u", b"s", b"r")),
        b"github_pat_",
    ),
    "a Slack token": Pattern(rb"\bxox[abprs]-[A-Za-z0-9-]{20,}", b"xox"),
    # Lengths have changed over the years: 48 characters without a prefix, and up to 156 after one.
    "an OpenAI key": Pattern(
        rb"(?<![\w-])sk-(?:(?:proj|svcacct|admin)-(?=[\w-]{40})|(?=[A-Za-z0-9]{40}))" + _RANDOM, b"sk-"
    ),
    "an Anthropic key": Pattern(rb"(?<![\w-])sk-ant-[a-z]{1,9}\d\d-" + _RANDOM + rb"[\w-]{40,}", b"sk-ant-"),
    "a Google API key": Pattern(rb"(?<![\w-])AIza" + _RANDOM + rb"[\w-]{35}(?![\w-])", b"AIza"),
    # The header alone occurs in much documentation; a secret has a body of base64 after it.
    "a private key": Pattern(
        rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s*(?:[A-Za-z0-9+/=]{40,}\s*){2}", b"PRIVATE KEY-----"
    ),
}


def find_secret(*texts: str | None) -> str | None:
    """Returns the kind of a secret in one of the texts, a key of PATTERNS; None if there is none."""
    for text in filter(None, texts):
        data = text.encode()
        for kind, pattern in PATTERNS.items():
            if pattern.is_in(data):
                return kind
    return None
