"""Megatron's CPU support changes nothing for other libraries of its process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fixtures import ROOT

pytestmark = pytest.mark.numeric


def test_cpu_support_leaves_torch_alone() -> None:
    """transformers computes the same before and after it came into the process (a global patch once broke this)."""
    code = (
        "import sys, torch, tempfile; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
        "from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM\n"
        "c = Qwen3MoeConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,\n"
        "  num_key_value_heads=1, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)\n"
        "with tempfile.TemporaryDirectory() as d:\n"
        "  Qwen3MoeForCausalLM(c).save_pretrained(d)\n"
        "  logits = lambda: Qwen3MoeForCausalLM.from_pretrained(d)(torch.arange(20)[None]).logits\n"
        "  before = logits()\n"
        "  import stages.mcore.megatron_imports\n"
        "  assert torch.equal(before, logits())\n"
        "assert not torch.cuda.is_available() and torch.zeros(1).type() == 'torch.FloatTensor'\n"
        "try: torch.zeros(1, device='cuda')\n"
        "except (AssertionError, RuntimeError): pass\n"
        "else: raise SystemExit('cuda means cpu outside Megatron')\n"
    )
    root = str(ROOT)
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, root], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
