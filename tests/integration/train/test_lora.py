"""The script for fine-tuning: TRL and PEFT on a chat model of a release, with its published conversations."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM

from release.cards.render import _config_of_messages
from release.facts.message_tables import write_messages
from stages.formats import chat
from stages.formats.table import KEPT, content_hash, split_of, write_rows
from stages.formats.tokenizer import SPECIAL_TOKENS, save, untrained
from tests.fixtures import ROOT
from tests.fixtures.run_fixtures import at_length

pytestmark = pytest.mark.numeric

SOURCE = "courtesies"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def make_data(folder: Path) -> None:
    """The dataset repository as far as it is read: kept conversations, messages, and the card's configurations."""
    rows: list[Any] = []
    for number in range(40):
        messages = [
            {"role": "user", "content": f"Say the number {number}."},
            {"role": "assistant", "content": f"It is {number}.", "reasoning_content": "Easy." if number % 2 else ""},
        ]
        for text, prompt in chat.turns(messages):
            about = {"id": f"{SOURCE}/{number}", "text": text, "source": SOURCE, "license": "CC0-1.0", "origin": "x"}
            digest = content_hash(text)
            row = about | {"content_hash": digest, "prompt_chars": prompt, "split": split_of(digest, 0.2)}
            rows.append(row)
    write_rows(folder / "kept" / SOURCE / "part-00000.parquet", KEPT, rows)
    (folder / "sources").mkdir()
    (folder / "sources" / f"{SOURCE}.json").write_text(json.dumps({"kind": "chat"}))
    list(write_messages(folder))
    configs = [_config_of_messages(SOURCE, ["train", "heldout"])]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")


def make_model(folder: Path, architecture: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from stages.formats.tokenizer import bpe_trainer

    torch.manual_seed(0)
    common = {**SIZES, "vocab_size": 300, "intermediate_size": 64, "max_position_embeddings": 128, "eos_token_id": 3}
    common |= {"pad_token_id": 0, "tie_word_embeddings": True}
    if architecture == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**common))
    model.save_pretrained(folder)
    tokenizer = untrained()
    tokenizer.train_from_iterator(["It is a number. Say it."] * 9, bpe_trainer(len(SPECIAL_TOKENS) + 260))
    save(tokenizer, folder)


@pytest.mark.parametrize("architecture", ["qwen3_moe", pytest.param("qwen3", marks=at_length("release", 60))])
def test_an_adapter_learns_reloads_and_merges(architecture: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, data, out = tmp_path / "model", tmp_path / "data", tmp_path / "out"
    make_model(model, architecture)
    (model / "LICENSE").write_text("of the weights")
    data.mkdir()
    make_data(data)
    splits = load_dataset(str(data), f"{SOURCE}-messages", cache_dir=str(tmp_path / "cache"))
    assert set(splits) == {"train", "heldout"} and sum(map(len, splits.values())) == 40
    script = shutil.copyfile(ROOT / "examples/lora.py", tmp_path / "lora.py")  # as a user would
    arguments = [str(model), str(data), f"{SOURCE}-messages", str(out), "--steps", "12", "--rate", "0.02"]
    process = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr[-3000:]
    first, last = map(float, re.findall(r"(\d+\.\d+) in the", process.stdout))
    assert last < first - 0.2, process.stdout

    ids = torch.randint(6, 266, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(model)(ids).logits
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out / "adapter")(ids).logits
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "merged")(ids).logits
    assert torch.equal(adapted, again) and (adapted - base).abs().max() > 0.01
    assert (adapted - merged).abs().max() < 1e-4
    settings = json.loads((out / "adapter/adapter_config.json").read_text())
    experts = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert set(settings["target_parameters"] or ()) == (experts if architecture == "qwen3_moe" else set())
    for name in ("LICENSE", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / "merged" / name).read_bytes() == (model / name).read_bytes()
