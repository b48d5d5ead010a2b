"""Speed of a step of reinforcement learning on one CPU core: ours against TRL's GRPOTrainer, same model and questions.

    .venv/bin/python bench/rl.py            # two to ten minutes
    .venv/bin/python bench/rl.py --quick    # a tiny model, to see that it works; its figures mean nothing

A step draws a group of answers to each of 32 questions, scores them, and updates the weights once by DAPO's loss. Ours
is the step of `stages.rl.algorithms.grpo.GrpoTrainer` as a stage runs it, with what it writes to disk and the digest of
the policy; without max_resample_rounds, replay or validation. The peer is `GRPOTrainer.training_step` and its
optimizer's step, without logging and checkpoints, with the fastest of transformers' expert implementations here. Both
start from the same weights and ask the same questions in every step, at temperature 1, with the same load-balancing
loss (ours counts a question once), optimizer, clip and advantages.

The same work, measured with two distributions of lengths. Real ones: answers end at the lengths of those of a small
release, as many of each on both sides; the token that ends them is set there, and possible nowhere else. Equal ones:
the token that ends an answer is, on both sides, one beyond the vocabulary, which the model has no logit for, so every
answer has exactly as many tokens as allowed. Ours are set to count as finished, since a stage learns nothing from
answers that were cut off. The reward is the share of letters among an answer's characters, which differs within every
group, so no group is left out.

The two take steps in turn in one process; a round's ratio is TRL's seconds by ours. Seconds are CPU seconds of the
process. The last line is one JSON object: `ratio`, `low` and `high` with real lengths, `equal` with equal ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peer_kernels import plain_kernels
from quiet import Quiet

from pipeline.core.store import Artifact, write_manifest
from stages.formats.chat import render
from stages.formats.table import ITEMS, write_jsonl, write_rows
from stages.formats.tokenizer import END, PAD, bpe_trainer, untrained
from stages.generation.in_process import InProcess
from stages.generation.protocols import Completion, Prompt
from stages.mcore.hf_mapping import hf_config, to_hf
from stages.mcore.model import named_tensors
from stages.rl.algorithms.grpo import GrpoTrainer
from stages.rl.config import RlTrainConfig
from stages.rl.protocols import Parts, Response
from stages.rl.rollout.task_sources.procedural_tasks import ProblemTasks
from stages.tasks import Row
from stages.train.engine import Engine
from stages.train.parallel import session

TARGET = 2.0
ROOT = Path(__file__).parent.parent
RATE, BETAS, CLIP = 2e-4, (0.9, 0.99), 1.0


@dataclass(frozen=True)
class Size:
    """What is measured: `groups` questions a step, `samples` answers of `new` tokens to each, or of at most that many
    if `lengths` names how many they have: as often each number, in random order."""

    model: Mapping[str, Any]
    vocab: int
    groups: int
    samples: int
    new: int
    micro_batches: int  # of an update, ours
    pieces: tuple[int, ...]  # of an update, the peer's; the quicker number of them is taken
    rounds: int
    lengths: tuple[int, ...] = ()

    def draw_lengths(self) -> list[int]:
        """The tokens of each answer of a step."""
        count, numbers = self.groups * self.samples, self.lengths or (self.new,)
        lengths = [numbers[n % len(numbers)] for n in range(count)]
        random.Random(0).shuffle(lengths)
        return lengths


# 20 quantiles of 200 answers of a phase of preferences that allows 72 tokens
LENGTHS = (6, 10, 13, 16, 18, 21, 24, 25, 29, 31, 34, 37, 42, 45, 52, 56, 63, 72, 72, 72)
FULL = Size(
    dict(layers=3, hidden_size=96, heads=4, kv_heads=2, head_dim=32, experts=4, num_experts_per_tok=2,
         moe_intermediate_size=96, context_length=512, tie_embeddings=True, aux_loss=6.67e-3, init_std=0.08),
    vocab=512, groups=32, samples=8, new=48, micro_batches=4, pieces=(1, 4), rounds=12,
)  # fmt: skip
REAL = replace(FULL, new=72, lengths=LENGTHS)
QUICK = Size(
    dict(layers=1, hidden_size=32, heads=4, kv_heads=2, head_dim=8, experts=4, num_experts_per_tok=2,
         moe_intermediate_size=16, context_length=128, tie_embeddings=True, aux_loss=6.67e-3, init_std=0.08),
    vocab=300, groups=2, samples=4, new=8, micro_batches=1, pieces=(1,), rounds=3,
)  # fmt: skip
QUICK_REAL = replace(QUICK, lengths=(2, 3, 5, 8))


def reward(text: str) -> float:
    """The share of letters among the characters of an answer."""
    return sum(map(str.isalpha, text)) / max(1, len(text))


class Letters:
    """`reward` as a verifier of ours."""

    name, version = "letters", "1"

    def score(self, answers: Sequence[tuple[Row, Response]]) -> list[Parts]:
        return [{"reward": reward(response.text)} for _, response in answers]

    def close(self) -> None:
        """Holds nothing."""


class SetLengths(InProcess):
    """Our sampler, whose answers have the lengths that a size says, and count as finished."""

    lengths: Sequence[int]

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        self.length_of = {prompt.seed: length for prompt, length in zip(prompts, self.lengths, strict=True)}
        return [replace(completion, finished=True) for completion in super().generate(prompts, greedy)]

    def _noise(self, prompts: list[Prompt]) -> torch.Tensor:
        """A number above 1 where an answer ends."""
        noise = super()._noise(prompts)
        for row, prompt in zip(noise, prompts, strict=True):
            if max(self.stops) < self.model.config.vocab_size:
                row[self.length_of[prompt.seed] - 1] = 2.0
        return noise

    def _choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert noise is not None
        (end,), ended = self.stops, noise > 1
        if end >= logits.shape[1]:
            return super()._choose(logits, noise)
        possible = logits.clone()
        possible[:, end] = -torch.inf
        tokens = super()._choose(possible, noise.masked_fill(ended, 0.5))[0].masked_fill(ended, end)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def end_at(lengths: Sequence[int], end: int) -> Any:
    """The same for transformers' `generate`, whose rows are the answers in order."""
    from transformers import LogitsProcessor

    class EndAt(LogitsProcessor):
        def __init__(self) -> None:
            self.lengths, self.question = torch.tensor(lengths), 0

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.question = self.question or ids.shape[1]
            scores[:, end] = -torch.inf
            ended = self.lengths == ids.shape[1] - self.question + 1
            scores[ended] = -torch.inf
            scores[ended, end] = 0.0
            return scores

    return EndAt()


def make_inputs(folder: Path, size: Size) -> tuple[dict[str, Artifact], list[dict[str, Any]]]:
    """Tasks, items and tokenizer under `folder`, and the rows of the tasks: as many as a step asks."""
    bpe = untrained()
    texts = (path.read_text("utf-8") for path in sorted((ROOT / "stages").rglob("*.py")))
    bpe.train_from_iterator(texts, bpe_trainer(size.vocab))
    assert bpe.get_vocab_size() == size.vocab
    for name in ("tokenizer", "tasks", "items"):
        (folder / name).mkdir()
    bpe.save(str(folder / "tokenizer" / "tokenizer.json"))
    source = ProblemTasks(source="problems", task="add", levels=(2,), count=size.groups)
    rows = list(source.rows(0, set()))[: size.groups]
    assert len(rows) == size.groups
    write_jsonl(folder / "tasks" / "tasks.jsonl", rows)
    write_rows(folder / "items" / "items.parquet", ITEMS, [])
    write_jsonl(folder / "items" / "chat.jsonl", [])
    return {name: write_manifest(folder / name, f"{name}-bench") for name in ("tokenizer", "tasks", "items")}, rows


def ours(size: Size, inputs: Mapping[str, Artifact], work: Path, engine: Engine, config: Any) -> GrpoTrainer:
    trainer = GrpoTrainer("rlvr", config, inputs, work, Quiet(), engine, None)
    engine.initialize()
    policy = trainer.policy
    policy.sampler.close()
    model_config = hf_config(config.model, size.vocab, size.vocab, policy.chat.pad, "float32")
    policy.sampler = SetLengths(model_config, (policy.chat.end if size.lengths else size.vocab,), size.new)
    policy.sampler.lengths = size.draw_lengths()
    policy.verifiers.by_name = {name: Letters() for name in policy.verifiers.by_name}
    return trainer


def peer_model(engine: Engine, config: Any, vocab: int, pad: int) -> Any:
    """transformers' model with the engine's weights, by the way that a release goes."""
    from safetensors.torch import save_file
    from transformers import Qwen3MoeForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        tensors = dict(to_hf({k: v.detach() for k, v in named_tensors(engine.chunks)}, config.model, vocab))
        save_file({k: v.contiguous() for k, v in tensors.items()}, f"{folder}/model.safetensors", {"format": "pt"})
        # the stop token is one beyond the vocabulary: it is never drawn
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(config.model, vocab, vocab, pad, "float32")))
        model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # a leaf of its own in memory, not the mapped file
    return model


def peer(size: Size, model: Any, tokenizer: Path, prompts: list[str], work: Path, pieces: int, steps: int) -> Any:
    """TRL's trainer, which takes `steps` steps when asked to train."""
    from datasets import Dataset, disable_progress_bars
    from transformers import LogitsProcessorList, PreTrainedTokenizerFast
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import GRPOConfig, GRPOTrainer

    disable_progress_bars()
    fast_tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), pad_token=PAD, padding_side="left")
    fast_tokenizer.add_special_tokens({"eos_token": END if size.lengths else "<|never|>"})
    if size.lengths:
        generate, lengths, end = model.generate, size.draw_lengths(), fast_tokenizer.eos_token_id
        model.generate = lambda **words: generate(**words, logits_processor=LogitsProcessorList([end_at(lengths, end)]))
    else:
        assert fast_tokenizer.eos_token_id == size.vocab

    def rewards(completions: list[str], **kwargs: Any) -> list[float]:
        return [reward(text) for text in completions]

    settings = GRPOConfig(
        output_dir=str(work), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", seed=0,
        per_device_train_batch_size=size.groups * size.samples // pieces, gradient_accumulation_steps=pieces,
        num_generations=size.samples, max_completion_length=size.new, temperature=1.0, beta=0.0, loss_type="dapo",
        scale_rewards="none", epsilon=0.2, epsilon_high=0.28, learning_rate=RATE, lr_scheduler_type="constant",
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=0.0, max_grad_norm=CLIP, max_steps=steps,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, rewards, settings, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=fast_tokenizer
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


Seconds = tuple[float, float]
"""CPU seconds of this process, and seconds by the clock."""


def read_clock() -> Seconds:
    return time.process_time(), time.perf_counter()


def elapsed_since(start: Seconds) -> Seconds:
    return time.process_time() - start[0], time.perf_counter() - start[1]


def drive(trainer: Any, after: Callable[[Seconds], None]) -> None:
    """Lets TRL's trainer take its steps, with a call after each that gets how long the step took."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = read_clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            after(elapsed_since(self.start))

    trainer.add_callback(Turns())
    with plain_kernels():
        trainer.train()


def quickest(size: Size, model: Any, make: Callable[[Any, int, int], Any]) -> tuple[str, int, str]:
    """TRL's experts and number of pieces here, by the second of two steps of a copy; and what was tried."""
    timings = {}
    for experts in ("grouped_mm", "eager"):
        for pieces in size.pieces:
            other = copy.deepcopy(model)
            other.set_experts_implementation(experts)
            elapsed: list[Seconds] = []
            drive(make(other, pieces, 2), elapsed.append)
            timings[experts, pieces] = elapsed[-1][0]
    best = min(timings, key=lambda name: timings[name])
    return *best, ", ".join(f"{experts} in {pieces} {elapsed:.2f} s" for (experts, pieces), elapsed in timings.items())


def measure(size: Size) -> dict[str, float]:
    """Runs the rounds and prints the table; gives the ratio and its quartiles.

    Raises SystemExit if the work is not the same.
    """
    optimizer = dict(
        lr=RATE, final_lr=RATE, warmup_steps=0, weight_decay=0.0, beta1=BETAS[0], beta2=BETAS[1], clip=CLIP
    )
    phase = dict(
        tasks=[{"source": "problems", "task": "add", "levels": [2], "count": size.groups}], steps=10**6,
        prompts_per_step=size.groups, num_generations=size.samples,
        sampling={"max_new_tokens": size.new}, micro_batches=size.micro_batches,
        optimizer=optimizer, validate_every=10**6, release_checkpoint_interval=10**6, max_resample_rounds=0,
    )  # fmt: skip
    config = RlTrainConfig(model=size.model, phase=phase, padded_vocab_size=size.vocab, seed=0)
    with tempfile.TemporaryDirectory() as place, session(0) as ranks:
        folder = Path(place)
        inputs, rows = make_inputs(folder, size)
        trainer = ours(size, inputs, folder / "work", Engine(config, ranks, size.vocab), config)
        chat = trainer.policy.chat
        prompts = [render(row["responses_create_params"]["input"], ask=True) for row in rows]
        model = peer_model(trainer.engine, config, size.vocab, chat.pad)

        def make(model: Any, pieces: int, steps: int) -> Any:
            tokenizer = folder / "tokenizer" / "tokenizer.json"
            return peer(size, model, tokenizer, prompts, folder / "trl", pieces, steps)

        experts, pieces, comparison = quickest(size, model, make)
        model.set_experts_implementation(experts)
        theirs = make(model, pieces, size.rounds + 1)
        for row, prompt in zip(rows, prompts, strict=True):
            if list(chat.encode_prompt(row)) != theirs.processing_class(prompt)["input_ids"]:
                raise SystemExit("not the same questions: the tokenizers differ")
        trainer.policy.load()
        ids = torch.tensor([chat.encode_prompt(rows[0])])
        with torch.inference_mode():
            apart = (trainer.policy.sampler.model(ids).logits - model(ids).logits).abs().max().item()
        if not apart < 1e-4:
            raise SystemExit(f"not the same model: logits differ by {apart}")
        lengths = size.draw_lengths()
        shown = f"{min(lengths)} to {max(lengths)} (on average {statistics.fmean(lengths):.1f})"
        print(f"{config.model.parameters(size.vocab)['total']:,} parameters; {size.groups} questions, {size.samples} "
              f"answers of {shown} tokens to each; fp32, one thread; TRL: {experts} experts, update in {pieces} "
              f"(tried: {comparison})")  # fmt: skip

        timings: dict[str, list[Seconds]] = {"ours": [], "trl": []}
        lines: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}

        def turn(seconds: Seconds) -> None:
            metrics = theirs._metrics["train"]
            lines["trl"].append({"tokens": metrics["completions/mean_length"][-1], "reward": metrics["reward"][-1]})
            torch.use_deterministic_algorithms(True)
            start = read_clock()
            line = trainer.train_step(len(timings["ours"]) + 1)
            timings["ours"].append(elapsed_since(start))
            timings["trl"].append(seconds)
            torch.use_deterministic_algorithms(False)
            lines["ours"].append({"tokens": line["completion_length"], "reward": line["reward"]})
            apart = max(abs(each[-1]["tokens"] - statistics.fmean(lengths)) for each in lines.values())
            if line["groups"] != size.groups or apart > 1e-3:
                raise SystemExit(f"not the same work: {line['groups']} groups, {lines}")

        drive(theirs, turn)
        trainer.close()

    ratios = [
        trl[0] / atom[0] for atom, trl in zip(*(each[1:] for each in timings.values()), strict=True)
    ]  # 1: warm-up
    clock = statistics.median(
        trl[1] / atom[1] for atom, trl in zip(*(each[1:] for each in timings.values()), strict=True)
    )
    print(f"{'':6}{'CPU s a step, median':>22}{'lowest':>8}{'highest':>9}{'by clock':>10}{'first reward':>14}"
          f"{'last reward':>13}")  # fmt: skip
    for name, each in timings.items():
        used, passed = ([step[n] for step in each[1:]] for n in (0, 1))
        print(f"{name:6}{statistics.median(used):22.3f}{min(used):8.3f}{max(used):9.3f}{statistics.median(passed):10.3f}"
              f"{lines[name][0]['reward']:14.4f}{lines[name][-1]['reward']:13.4f}")  # fmt: skip
    low, ratio, high = statistics.quantiles(ratios, n=4)
    print(f"ratio by round: median {ratio:.3f}, quartiles {low:.3f} to {high:.3f}, lowest {min(ratios):.3f}, "
          f"highest {max(ratios):.3f} ({size.rounds} rounds of a step); median by the clock {clock:.3f}")  # fmt: skip
    return {"ratio": round(ratio, 4), "low": round(low, 4), "high": round(high, 4)}


def measure_both(quick: bool) -> dict[str, Any]:
    """The measurements with equal and with real lengths."""
    equal, real = (measure(size) for size in ((QUICK, QUICK_REAL) if quick else (FULL, REAL)))
    return {
        "name": "rl", **real, "equal": equal["ratio"], "equal_low": equal["low"], "equal_high": equal["high"],
        "target": TARGET,
        "unit": "TRL's CPU seconds a step by ours, one thread each; low and high: quartiles over rounds",
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}, fp32",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, for tests")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print(json.dumps(measure_both(parser.parse_args().quick)))
