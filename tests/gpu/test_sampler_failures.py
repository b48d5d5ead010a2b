"""Points 11 and 12: the in-process sampler at the vocabulary of a large model, and what a run says when it cannot go on."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from stages.generation.in_process import InProcess
from stages.generation.protocols import Prompt
from stages.mcore.hf_mapping import hf_config, to_hf
from stages.mcore.model import full_tensor
from tests.fixtures import gpu_fixtures, layout_fixtures, train_fixtures
from tests.gpu.conftest import Report

VOCABULARY, ROWS, NEW = (151_936, 256, 128) if gpu_fixtures.ON_GPU else (512, 8, 16)


@pytest.fixture(scope="module")
def sampler() -> InProcess:
    model = gpu_fixtures.cut_recipe()[0] if gpu_fixtures.ON_GPU else gpu_fixtures.SMALL
    engine = InProcess(hf_config(model, VOCABULARY, 1, 0, "float32"), (), NEW)
    weights = {name: full_tensor(name, shape, model, 0) for name, shape in model.shapes(VOCABULARY).items()}
    engine.load(dict(to_hf(weights, model, VOCABULARY)))
    return engine


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    return [Prompt(tuple(torch.randint(6, VOCABULARY, (n % 16 + 1,), generator=generator).tolist()), n) for n in range(ROWS)]  # fmt: skip


@pytest.mark.numeric
@pytest.mark.point(11)
def test_drawn_tokens_have_their_probabilities(sampler: InProcess, prompts: list[Prompt], report: Report) -> None:
    """Against a whole forward pass by transformers, on the same device."""
    gaps = []
    for prompt, completion in zip(prompts[:8], sampler.generate(prompts[:8]), strict=True):
        ids = torch.tensor([[*prompt.ids, *completion.ids]], device=sampler.model.device)
        with torch.inference_mode():
            logits = sampler.model(ids).logits[0, len(prompt.ids) - 1 : -1].float()
        expected = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt.ids) :, None])[:, 0].cpu()
        gaps.append(float((torch.tensor(completion.logprobs) - expected).abs().max()))
    name = f"log-probabilities of drawn tokens, {VOCABULARY:,} in the vocabulary"
    report(name, f"largest gap {max(gaps):.1e}", "< 1e-3", max(gaps) < 1e-3)


@pytest.mark.point(11)
def test_the_sampler_is_fast(sampler: InProcess, prompts: list[Prompt], report: Report) -> None:
    sampler.generate(prompts[:8])
    began = time.perf_counter()
    count = sum(len(completion.ids) for completion in sampler.generate(prompts))
    rate = count / (time.perf_counter() - began)
    name, figure = f"tokens drawn for {ROWS} prompts at once", f"{rate:,.0f} a second"
    if gpu_fixtures.ON_GPU:
        report(name, figure, "> 2,000 a second", rate > 2000)
    else:
        report(name, figure, "measured; 2,000 a second are asked of a GPU", count == ROWS * NEW)


@gpu_fixtures.at_length(30)
@pytest.mark.point(12)
def test_a_stopped_rank_is_named(corpus: Path, tmp_path: Path, report: Report) -> None:
    """Two ranks on the CPU: NCCL takes one rank for each GPU."""
    settings = layout_fixtures.settings_of({}, 2, watchdog_timeout_seconds=8.0)
    env = {"TEST_DISTURB": "1 7 SIGSTOP", "CUDA_VISIBLE_DEVICES": ""}
    processes = layout_fixtures.start(corpus, tmp_path, settings, **env)
    log = processes[0].communicate(timeout=200)[0]
    processes[1].kill()
    processes[1].wait()
    spoke = re.search("no step was finished for 8 s; no sign of rank 1", log)
    report("one of two ranks is stopped", spoke[0] if spoke else log[-200:], "the watchdog names it", spoke is not None)


@pytest.mark.point(12)
@gpu_fixtures.needs_gpu("it is a kernel that never ends")
def test_a_gpu_that_hangs_is_found(corpus: Path, tmp_path: Path, report: Report) -> None:
    process = train_fixtures.fresh(corpus, tmp_path, env={"TEST_DISTURB": "0 7 kernel"}, watchdog_timeout_seconds=8.0)
    log = "".join(process.communicate(timeout=200))
    spoke = re.search("abandoned: pretrain: no step was finished for 8 s", log)
    is_found = spoke is not None and "in step_or_not" in log and process.returncode == 1
    report("a kernel that never ends", spoke[0] if spoke else log[-200:], "the watchdog shows where", is_found)


@gpu_fixtures.at_length(5)
@pytest.mark.point(12)
def test_full_memory_is_one_sentence(corpus: Path, tmp_path: Path, report: Report) -> None:
    """A table of embeddings of 2 GiB under a limit of half of that."""
    model = {**train_fixtures.MODEL, "hidden_size": 128}
    settings = {**train_fixtures.config(), "model": model, "padded_vocab_size": 2**22}
    process = train_fixtures.fresh(corpus, tmp_path, settings=settings, env={"TEST_MEMORY": str(2**30)})
    errors = process.communicate(timeout=200)[1]
    last = (errors.strip().splitlines() or [""])[-1]
    sentence = re.fullmatch(r"pretrain: rank 0 has no memory left on (CPU|cuda:\d of [\d.]+ GiB) for [\d.]+ GiB more.*; `atom plan` .*", last)  # fmt: skip
    is_one = sentence is not None and "Traceback" not in errors and process.returncode == 1
    report("memory that is full", last[:300], "one sentence", is_one)
