"""The chat templates of a release, and the form of an answer that parsers of runtimes read.

ChatML, in two texts that render the same. The inference template has no `generation` blocks, which several runtimes
refuse. The training template has them around the assistant's tokens, so that training libraries put loss on these
alone; this project renders its own examples with it.

What they render:

- `content` as a text, as a list of texts and parts of type `text`, or null. Parts are lines, as llama.cpp has it. Other
  parts raise an error.
- `tools` in the system turn, after the text of a first system message, and `tool_calls` in the form of Hermes and Qwen.
  Arguments are an object, or its JSON, which is kept as it is. A result is a turn of the role `tool`.
- Reasoning from `reasoning_content`, `reasoning`, or a think block in the content: only after the last message of the
  user. Earlier reasoning is dropped from the history.
- `enable_thinking=false` begins the answer with an empty think block.
"""

from __future__ import annotations

from typing import Any

# Parts that a conversation may have: a message of the system, tools, and reasoning.
FEATURES = ("system", "tools", "reasoning")
TRAINING = """\
{%- macro text(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content or [] -%}
{{- '' if loop.first else '\\n' -}}
{%- if part is string -%}
{{- part -}}
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- else -%}
{{- raise_exception('This model reads text alone; leave out the part of type ' ~ part.type ~ '.') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- set ns.last_user = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role in ['system', 'developer'] -%}
{{- text(messages[0].content) + '\\n\\n' -}}
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
{%- set role = 'system' if message.role == 'developer' else message.role -%}
{%- set content = text(message.content) -%}
{%- if role == 'assistant' -%}
{%- set reasoning = message.reasoning_content or message.reasoning or '' -%}
{%- if '</think>' in content -%}
{%- set reasoning = reasoning or content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- set reasoning = reasoning.strip('\\n') if loop.index0 > ns.last_user else '' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}
{%- if reasoning -%}
{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content -}}
{%- for tool_call in message.tool_calls or [] -%}
{%- set call = tool_call.function or tool_call -%}
{{- '\\n' if content or not loop.first else '' -}}
{{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' -}}
{{- (call.arguments if call.arguments is string else call.arguments | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- elif not (tools and loop.first and role == 'system') -%}
{{- '<|im_start|>' + role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""

# The templates' texts around the tools in the system turn.
TOOLS_BEGIN, TOOLS_END = "These tools can be called:\n<tools>\n", "</tools>\n"
# Loaders read the first one by its name. The second one is given to training libraries by its path.
INFERENCE_FILE, TRAINING_FILE = "chat_template.jinja", "training_chat_template.jinja"

# The end of a turn, and the padding after it: transformers keeps special tokens for tokenizers with a
# `response_template`, and pads the shorter answers of a batch.
_TURN_ENDS = r"(?:<\|im_end\|>|<\|endoftext\|>)(?:<\|pad\|>)*"
# `response_template` of the tokenizer_config.json of a chat model: the parts of an answer, for `parse_response` of
# transformers 5 and for vLLM's parsers of the name `hf`.
RESPONSE_TEMPLATE: dict[str, Any] = {
    "version": 1,
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {
            "open_pattern": r"<think>\n?",
            "close_pattern": rf"\n?</think>\n*|{_TURN_ENDS}",
            "content": "text",
        },
        "tool_calls": {
            "open_pattern": r"\n?<tool_call>\n?",
            "close_pattern": r"\n?</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": _TURN_ENDS, "content": "text"},
    },
}


def training_template() -> str:
    return TRAINING


def inference_template() -> str:
    """Returns the training template without the lines of its `generation` blocks."""
    lines = TRAINING.splitlines(keepends=True)
    return "".join(line for line in lines if line.strip() not in ("{%- generation -%}", "{%- endgeneration -%}"))
