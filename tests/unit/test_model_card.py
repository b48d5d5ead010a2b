"""What the template of a model's card says of conversation."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest

from release.assembly.model_facts import ModelFacts, Parameters
from release.cards import card_tables
from release.cards.render import TEMPLATES


def card(phases: list[str], chat: dict[str, Any]) -> str:
    training: Any = dict.fromkeys(phases)
    model = ModelFacts("Qwen3ForCausalLM", {}, "float32", Parameters(1, 1, 1), {}, {}, {}, chat=chat, training=training)
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
