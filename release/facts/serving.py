"""`serve.yaml` of a chat model: the options of `vllm serve`, in the form of vLLM's recipes."""

from __future__ import annotations

from pathlib import Path

from release.facts.published_tables import read_json

NAME = "serve.yaml"


def serve_config(folder: Path, repo: str, version: str) -> str:
    """The content of serve.yaml of the model in a folder. repo: its repository on the Hub.

    The parsers `hf` of vLLM read answers as `response_template` of the tokenizer says; without it none is set, and
    reasoning stays a part of the content.
    """
    tokenizer, config = (read_json(folder / f"{name}.json") for name in ("tokenizer_config", "config"))
    options = {
        "model": repo,
        "revision": f"v{version}",
        "served-model-name": repo,
        "max-model-len": config["max_position_embeddings"],
        "generation-config": "auto",
    }
    if "response_template" in tokenizer:
        options |= {"reasoning-parser": "hf", "tool-call-parser": "hf", "enable-auto-tool-choice": "true"}
    lines = [f"{name}: {value}" for name, value in options.items()]
    return "\n".join([f"# vllm serve --config {NAME}", *lines]) + "\n"
