"""The chat templates: what they render, that training examples have the ids of the former template, and that the form
of an answer is read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from release.checks.loading import compile_template
from stages.data.acquire.readers.procedural import ChatProblems, Courtesies
from stages.formats import chat, tokenizer
from stages.formats.tokenizer import TRAINING_FILE, inference_template, training_template
from tests.fixtures.conversation_fixtures import CALL, CONVERSATIONS, TOOLS

FORMER = """\
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] + '\\n\\n' -}}
{%- endif -%}
{{- 'These tools can be called:\\n<tools>\\n' -}}
{%- for tool in tools -%}
{{- tool | tojson + '\\n' -}}
{%- endfor -%}
{{- '</tools>\\nTo call one, end the turn with\\n<tool_call>\\n' -}}
{{- '{"name": "the tool", "arguments": {"its argument": "a value"}}\\n</tool_call>' -}}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (tools and loop.first and message['role'] == 'system') -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- if message['reasoning_content'] -%}
{{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message['content'] or '' -}}
{%- for tool_call in message['tool_calls'] or [] -%}
{%- set call = tool_call['function'] or tool_call -%}
{{- '\\n' if message['content'] or not loop.first else '' -}}
{{- '<tool_call>\\n{"name": ' + (call['name'] | tojson) + ', "arguments": ' -}}
{{- (call['arguments'] if call['arguments'] is string else call['arguments'] | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""The template of version 1 of the stage `tokenizer`."""

CALLED: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "reasoning_content": "why", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Once more.", "tool_calls": [{"name": "now", "arguments": '{"a":2}'}, CALL]},
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": "0"},
    {"role": "assistant", "content": "2", "reasoning_content": "so\nit is"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]
INFERENCE, TRAINING = (compile_template(text) for text in (inference_template(), training_template()))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def rendered(messages: Sequence[Any], **options: Any) -> str:
    text: str = INFERENCE.render(messages=messages, **options)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a tokenizer of the release's kind."""
    place = tmp_path_factory.mktemp("tokenizer")
    trained = tokenizer.untrained()
    trained.train_from_iterator(["think of the weather in Zürich and say thank you"] * 3, tokenizer.bpe_trainer(300))
    tokenizer.save(trained, place)
    return place


def test_training_examples_have_the_ids_of_the_former_template(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All conversations of the kinds that recipes make, and one with tools. Only reasoning of earlier turns is
    different, which is dropped, and empty lines around reasoning."""
    environment = jinja2.Environment(autoescape=False)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    former, turns = environment.from_string(FORMER), chat.turns
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    content = json.loads(backend.to_str())
    former_tokens = [token | {"special": True} for token in content["added_tokens"]]
    special = Tokenizer.from_str(json.dumps({**content, "added_tokens": former_tokens}))
    equal: list[bool] = []

    def compare(messages: Sequence[Any], tools: Sequence[Any] = ()) -> bool:
        for (text, prompt), end in zip(turns(messages, tools), answers(messages), strict=True):
            old = former.render(messages=messages[: end + 1], tools=tools).removesuffix("\n")
            parts = (text[:prompt], old[:prompt]), (text[prompt:], old[prompt:])
            equal.append(all(backend.encode(part).ids == special.encode(old_part).ids for part, old_part in parts))
        return equal[-1]

    def recorded(messages: Sequence[Any]) -> Any:
        compare(messages)
        return turns(messages)

    monkeypatch.setattr(chat, "turns", recorded)
    problems = {"tasks": {"add": 1.0, "sort": 1.0}, "thinking": 0.7}
    readers = (
        ChatProblems.model_validate({"reader": "chat-problems", "count": 300, **problems}),
        Courtesies.model_validate({"reader": "courtesies", "count": 300}),
    )
    for reader in readers:
        assert len(list(reader.documents("x", 0, []))) == 300
    assert len(equal) == 600
    compare(CALLED[:8], TOOLS)
    compare([user("a"), {"role": "assistant", "content": "b"}, {"role": "system", "content": ""}, *CALLED[:8]])
    assert all(equal)
    assert not compare(CALLED, TOOLS), "the last answer comes after another question"


def answers(messages: Sequence[Any]) -> list[int]:
    return [n for n, message in enumerate(messages) if message["role"] == "assistant"]


def test_both_templates_render_the_same_and_the_training_one_marks_the_answers(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    assert "generation" not in inference_template().replace("add_generation_prompt", "")
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment()  # without extensions, and with other rules for blanks
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    without_extensions = plain.from_string(inference_template())
    for row in CONVERSATIONS:
        options = {name: value for name, value in row.items() if name != "messages" and value is not None}
        texts = {template.render(messages=row["messages"], **options) for template in (INFERENCE, TRAINING)}
        texts.add(without_extensions.render(messages=row["messages"], **options))
        texts.add(loaded.apply_chat_template(row["messages"], tokenize=False, **options))
        assert len(texts) == 1
    marked = loaded.apply_chat_template(
        CALLED, tools=TOOLS, chat_template=(folder / TRAINING_FILE).read_text(), return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids = [i for i, is_answer in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if is_answer]
    last = chat.render(CALLED, tools=TOOLS)  # with the history as the last answer sees it
    answers_text = [part.split("<|im_end|>")[0] + "<|im_end|>" for part in last.split("<|im_start|>assistant\n")[1:]]
    assert loaded.decode(ids) == "".join(answers_text)


def test_reasoning_after_the_last_question_is_kept_in_each_form_and_earlier_reasoning_is_dropped() -> None:
    forms: list[dict[str, Any]] = [
        {"content": "b", "reasoning_content": "why"},
        {"content": "b", "reasoning": "\nwhy\n"},
        {"content": "<think>\nwhy\n</think>\n\nb"},
        {"content": [{"type": "text", "text": "<think>why</think>b"}], "reasoning_content": None},
    ]
    for form in forms:
        talk = [user("a"), {"role": "assistant", **form}]
        assert rendered(talk).endswith("assistant\n<think>\nwhy\n</think>\n\nb<|im_end|>\n")
        assert rendered([*talk, user("c")]).count("why") == 0
        assert "assistant\nb<|im_end|>\n<|im_start|>user" in rendered([*talk, user("c")])
    loop = rendered(CALLED[:8], tools=TOOLS)
    assert loop.count("<think>\nwhy\n</think>") == 1 and loop.count("<think>") == 2, "a loop of calls keeps it"


def test_what_the_content_may_be() -> None:
    assert rendered([user(None)]) == rendered([user("")]) == rendered([user([])]) == rendered([{"role": "user"}])
    assert rendered([user(["a", {"type": "text", "text": "b"}])]) == rendered([user("a\nb")])
    with pytest.raises(jinja2.TemplateError, match="reads text alone; leave out the part of type image_url"):
        rendered([user([{"type": "image_url", "image_url": {"url": "x"}}])])
    developer = [{"role": "developer", "content": "S"}, user("a")]
    for tools in (None, TOOLS):
        system = [{"role": "system", "content": "S"}, user("a")]
        assert rendered(developer, tools=tools) == rendered(system, tools=tools)


def test_enable_thinking_opens_an_empty_block_only_if_it_is_false() -> None:
    prompts = {
        value: rendered(
            [user("a")], add_generation_prompt=True, **({} if value is None else {"enable_thinking": value})
        )
        for value in (None, True, False)
    }
    assert prompts[None] == prompts[True] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[False] == prompts[True] + "<think>\n\n</think>\n\n"
    assert "think" not in rendered([user("a")], enable_thinking=False)


def test_the_form_of_an_answer_is_read_back(folder: Path) -> None:
    """By transformers' `parse_response`, for each kind of answer. vLLM's parsers read the same template."""
    loaded = AutoTokenizer.from_pretrained(folder)
    prefix = rendered([user("a")], add_generation_prompt=True)
    call = '<tool_call>\n{"name": "now", "arguments": {"é": [1]}}\n</tool_call>'
    function = {"type": "function", "function": {"name": "now", "arguments": {"é": [1]}}}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("4", {"content": "4"}),
        ("<think>\nwhy\n</think>\n\n4", {"thinking": "why", "content": "4"}),
        (call, {"tool_calls": [function]}),
        (f"<think>\nwhy\n</think>\n\nSee.\n{call}\n{call}",
         {"thinking": "why", "content": "See.", "tool_calls": [function, function]}),
    ]  # fmt: skip
    for text, expected in cases:
        for end in ("<|im_end|>", "<|endoftext|>", "<|im_end|><|pad|><|pad|>", "<|endoftext|><|pad|>"):
            parsed = loaded.parse_response(text + end, prefix=prefix)
            assert {name: value for name, value in parsed.items() if name != "role" and value} == expected, text
    stopped = loaded.parse_response("<think>\nwhy<|endoftext|><|pad|>", prefix=f"<|pad|>{prefix}")
    assert stopped == {"role": "assistant", "thinking": "why"}


def test_loaders_find_what_the_field_expects(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in config and config["padding_side"] == "left"
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.convert_tokens_to_ids(list(tokenizer.SPECIAL_TOKENS)) == list(range(6))
    assert set(loaded.all_special_tokens) == {*tokenizer.SPECIAL_TOKENS} - {"<think>", "</think>"}
    answer = "<think>\nwhy\n</think>\n\n4<|im_end|>"
    ids = loaded(answer)["input_ids"]
    assert loaded.decode(ids, skip_special_tokens=True) == answer.removesuffix("<|im_end|>")
    corpus = tokenizer.load_for_corpus(folder / "tokenizer.json")
    assert not set(range(6)) & set(corpus.encode("a <think> b</think><|im_end|>").ids)
