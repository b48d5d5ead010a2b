"""No document with a secret reaches a release, whatever the steps of its source are, and what only speaks of keys does."""

from __future__ import annotations

import base64
import random
import string
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from stages.data.curate.alarms import RULES
from stages.data.curate.filters.base import Filter, FilterFunction
from stages.data.curate.source_filter import Removed, SourceFilter

KEY = base64.encodebytes(random.Random(0).randbytes(200)).decode()
LETTERS = "".join(random.Random(0).choices(string.ascii_letters, k=40))
TOKEN = f"ghp_{LETTERS[:36]}"


class Nothing:
    """Items of which no document has one."""

    ngram = 8

    def find(self, text: str) -> None:
        return None


class Join(Filter):
    """A step whose edited text holds a key that the acquired text does not."""

    step: str = "join"

    def function(self) -> FilterFunction:
        return lambda document: document.text.replace("|", "")


def apply(text: str, *steps: Filter, **row: str) -> Any:
    document = {"id": "a/1", "text": text, "source": "a", "license": "MIT", "origin": "x", "prompt_chars": 0, **row}
    return SourceFilter("a", "prose", steps, Nothing()).apply(document)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (f"Like this:\n-----BEGIN OPENSSH PRIVATE KEY-----\n{KEY}-----END OPENSSH PRIVATE KEY-----", "private_key"),
        (f"export HF_TOKEN=hf_{LETTERS[:34]}", "hugging_face_token"),
        (f"token: {TOKEN}", "github_token"),
        (f"OPENAI_API_KEY=sk-{LETTERS[:18]}7qT3BlbkFJ{LETTERS[:18]}4Z", "openai_key"),
        (f'client = OpenAI(api_key="sk-proj-{LETTERS}_1-9{LETTERS}T3BlbkFJ{LETTERS}A")', "openai_key"),
        (f"sk-svcacct-{LETTERS}07", "openai_key"),
        (f"Bearer sk-admin-{LETTERS}-07.", "openai_key"),
        (f"x-api-key: sk-ant-api03-{LETTERS}-1{LETTERS}_2{LETTERS[:9]}AA", "anthropic_key"),
        (f"sk-ant-admin01-{LETTERS}-12", "anthropic_key"),
        (f"https://maps.example/api/js?key=AIzaSy{LETTERS[:28]}-2_4z&v=3", "google_api_key"),
        (f"?key=AIzaSy{LETTERS[:31]}42&v=3", "google_api_key"),
        # Placeholders, names of classes, and parts of longer words.
        (f"sk-{'x' * 48}, sk-proj-{'x' * 60}, sk-..., sk-ant-api03-{'X' * 93}AA, AIzaSy{'X' * 33}", None),
        ("sk-proj-YOUR-OPENAI-API-KEY-GOES-HERE-AND-NOWHERE-ELSE, sk-your_key, sk-ant-api03-your-key-here", None),
        (f"sk-1234567890{LETTERS}, sk-proj-abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJ", None),
        (
            "sk-container-id-1 sk-toggleable__label-arrow sk-fading-circle sk-estimator-doc-link-2-and-3-of-Many-More",
            None,
        ),
        (f"A key begins with sk- or AIza. desk-{LETTERS}12 risk-{LETTERS}34 {LETTERS}AIzaSy{LETTERS[:31]}42", None),
        (f"AIzaSy{LETTERS[:31]}421", None),
        ("sk-" + "0123456789abcdef" * 4, None),
        ("A key begins with -----BEGIN PRIVATE KEY----- and then has a body.", None),
        ("AWS writes AKIAIOSFODNN7EXAMPLE in its manuals.", None),
    ],
)
def test_a_document_with_a_secret_is_removed(text: str, rule: str | None) -> None:
    result = apply(text)
    assert result == Removed(f"secrets/{rule}", 1.0, 0.0) if rule else result["text"] == text
    assert "secrets" in RULES


def test_what_a_step_leaves_and_where_it_comes_from_is_searched_too() -> None:
    assert apply(f"{TOKEN[:10]}|{TOKEN[10:]}", Join()) == Removed("secrets/github_token", 1.0, 0.0)
    url = f"https://example.org/page?AWSAccessKeyId=AKIA{LETTERS[:16].upper()}&Expires=1"
    assert apply("a page", origin=url) == Removed("secrets/aws_access_key", 1.0, 0.0)


def test_an_id_with_a_secret_stops_the_stage() -> None:
    """Every disposition has its document's id, so removing the document would not help."""
    with pytest.raises(
        AtomError, match="source a: the id of a document holds a GitHub token, and all ids are published"
    ):
        apply("a page", id=f"a/{TOKEN}")
