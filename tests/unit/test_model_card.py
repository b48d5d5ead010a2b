"""What the template of a model's card says of conversation."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest

from release.cards import card_tables
from release.cards.render import TEMPLATES
from release.facts.model_facts import ModelFacts, Parameters


def card(phases: list[str], chat: dict[str, Any], scores: Any = (), **facts: Any) -> str:
    training: Any = dict.fromkeys(phases)
    model = ModelFacts(
        "Qwen3ForCausalLM", {}, "float32", Parameters(1, 1, 1), dict(scores), chat=chat, training=training,
        **facts,
    )  # fmt: skip
    names: Any = dict(name="tiny", namespace="local", title="Tiny", description="A test.")
    release = SimpleNamespace(version="0.1.0", contact=None, **names)
    template = jinja2.Template((TEMPLATES / "model.md.jinja").read_text())
    return template.render(
        release=release,
        model=model,
        title="",
        trained_by="SFT",
        repo="local/tiny",
        t=defaultdict(str),
        sections={},
        folded=card_tables.folded,
    )


@pytest.mark.parametrize("chat", [{}, {"test": {}}], ids=["not-evaluated", "evaluated"])
def test_a_model_that_was_trained_to_converse_is_called_so(chat: dict[str, Any]) -> None:
    text = card(["pretrain", "midtrain", "sft"], chat)
    assert "It was trained to converse" in text and "vllm serve --config serve.yaml" in text
    assert "no dialogue was trained" not in text and ("as for pass@k above" in text) == bool(chat)


def test_another_model_is_called_a_base_model() -> None:
    text = card(["pretrain", "midtrain"], {})
    assert "no dialogue was trained" in text and "serve.yaml" not in text and "converse" not in text


@pytest.mark.parametrize("scores", [{"init": {}, "base": {}}, {"base": {}, "mid": {}}])
def test_the_data_of_a_published_model_is_said_to_be_elsewhere(scores: Any) -> None:
    """Also if pre-training began with it."""
    published = "[local/published](https://huggingface.co/local/published)"
    text = card(["midtrain"], {}, base={"repo": "local/published"}, scores=scores)
    assert f"It was trained on the published model {published}" in text
    assert "What the published model was trained on is not in this release" in text
    assert f"{published} states what the published model was trained on" in text
    assert "published model" not in card(["midtrain"], {})
