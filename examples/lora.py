"""Fine-tune a chat model of a release by LoRA, with TRL and PEFT.

    python lora.py NAMESPACE/atom-tiny NAMESPACE/atom-tiny-data courtesies-messages OUT --steps 100

MODEL and DATA are repositories of the Hub or folders. The configuration SOURCE-messages of the data has conversations
as `messages`, by the splits train and heldout. OUT gets `adapter/` and `merged/`: the model with the adapter in its
weights, which programs load as the original, also those that know no adapters for experts.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""Tensors with all experts of a layer: parameters and no modules, so that `target_modules` does not find them."""
DENSE = ["gate_proj", "up_proj", "down_proj"]
KEPT = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "training_chat_template.jinja", "LICENSE",
)  # fmt: skip
"""Files beside the weights, which a merged model has as they are: transformers 5 would write settings under names that
other programs do not read, such as `num_local_experts`."""


def lora_config(model: Any, rank: int) -> LoraConfig:
    """LoRA of attention and of the feed-forward layers, which are experts or dense."""
    has_experts = bool(getattr(model.config, "num_experts", None))
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        task_type="CAUSAL_LM",
        target_modules=ATTENTION if has_experts else [*ATTENTION, *DENSE],
        target_parameters=EXPERTS if has_experts else None,
    )


def fine_tune(folder: Path, data: Dataset, out: Path, steps: int, rank: int, rate: float, batch: int) -> Any:
    """Trains an adapter for the model in a folder, and writes it to `out`/adapter. Returns the model with it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    # the template with marks around the assistant's tokens, where there are two
    training = folder / "training_chat_template.jinja"
    if training.is_file():
        tokenizer.chat_template = training.read_text("utf-8")
    settings = SFTConfig(
        output_dir=str(out / "state"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        bf16=torch.cuda.is_available(),
        lr_scheduler_type="constant",
        max_length=model.config.max_position_embeddings,
        assistant_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=lora_config(model, rank)
    )
    trainer.train()
    trainer.model.save_pretrained(out / "adapter")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"loss: {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last of {len(losses)}")
    return trainer.model


def merge(folder: Path, out: Path) -> None:
    """Writes the model with the adapter in its weights to `out`/merged, beside the other files of the model."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out / "adapter")
    model.merge_and_unload().save_pretrained(out / "merged")
    for name in KEPT:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / "merged" / name)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("configuration", help="such as courtesies-messages")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(arguments)
    folder = Path(options.model) if Path(options.model).is_dir() else Path(snapshot_download(options.model))
    data = load_dataset(options.data, options.configuration, split="train")
    fine_tune(folder, data, options.out, options.steps, options.rank, options.rate, options.batch)
    merge(folder, options.out)


if __name__ == "__main__":
    main()
