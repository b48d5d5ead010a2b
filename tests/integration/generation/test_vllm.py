"""vLLM gives the log-probabilities of an exported model with scaled rotary frequencies, at the full length of its context.

vLLM wants an environment of its own: `make test-vllm` makes one and names its interpreter in ATOM_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.export import hf
from stages.models.base import Yarn
from stages.models.mixture import Qwen3MoeConfig
from tests.fixtures import train_fixtures

PYTHON = os.environ.get("ATOM_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="vLLM needs an environment of its own; see `make test-vllm`")
# vLLM's kernels for the CPU know heads of 32 and more
MODEL = Qwen3MoeConfig(
    **{**train_fixtures.MODEL, "hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 32, "context_length": 1024, "rope_theta": 5e4,
       "yarn": Yarn(factor=8.0, original_length=128)}
)  # fmt: skip
VLLM = """
import json, os, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], dtype="float32", max_model_len=1024, enforce_eager=True, seed=0)
    ids = json.loads(open(sys.argv[2]).read())
    (out,) = llm.generate([{"prompt_token_ids": ids}], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    found = [x[i].logprob for x, i in zip(out.prompt_logprobs[1:], ids[1:])]
    open(sys.argv[3], "w").write(json.dumps(found))
"""


def test_log_probabilities_at_full_length(tmp_path: Path) -> None:
    inputs = {"tokenizer": train_fixtures.tokenizer(tmp_path / "t")}
    (tmp_path / "out").mkdir()
    config = hf.ExportConfig(model=MODEL, padded_vocab_size=train_fixtures.VOCAB, seed=3)
    hf.run(config, inputs, tmp_path, tmp_path / "out", train_fixtures.Reporter())  # type: ignore[arg-type]
    ids = torch.randint(6, 64, (1023,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    (tmp_path / "vllm_run.py").write_text(VLLM)
    env = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    places = [str(tmp_path / name) for name in ("out/model", "ids.json", "vllm.json")]
    process = subprocess.run(
        [str(PYTHON), str(tmp_path / "vllm_run.py"), *places], env=env, capture_output=True, text=True, timeout=500
    )
    assert process.returncode == 0, process.stderr[-3000:]
    code = (
        "import json, sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "m, ids = A.from_pretrained(sys.argv[1], dtype=torch.float32), json.loads(open(sys.argv[2]).read())\n"
        "p = m(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]\n"
        "open(sys.argv[3], 'w').write(json.dumps(p.tolist()))\n"
    )
    subprocess.run([sys.executable, "-c", code, *places[:2], str(tmp_path / "hf.json")], check=True)
    ours, theirs = (torch.tensor(json.loads((tmp_path / n).read_text())) for n in ("hf.json", "vllm.json"))
    assert len(ours) == len(theirs) == 1022
    assert (ours - theirs).abs().max() < 1e-3
    print(f"largest difference of {len(ours)} log-probabilities: {(ours - theirs).abs().max():.2g}")
