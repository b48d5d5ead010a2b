"""Checks the files that this tool writes without measuring anything.

These are programs, options of servers, chat templates and texts of licenses. Each must be, byte for byte, the file that
this tool writes, since people run them and rely on them.

config.json and adapter_config.json, by which loaders choose the code that they run, have the keys that this tool writes
and no others: a key such as `attn_implementation` names a kernel on the Hub, which transformers would download and run.
Numbers are not compared here, since `--deep` loads the model and compares its outputs.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import release
from pipeline.core.environment import code_root
from pipeline.core.text import escaped
from pipeline.hub.client import load
from release import schema
from release.cards import render
from release.cards.results import FOLDER as RESULTS
from release.checks.check import Findings
from release.facts import model_facts
from release.facts.published_tables import read_json
from release.layout import (
    CODE_README,
    LOSS,
    MODEL,
    NOTICE,
    RECIPE,
    RELEASE,
    SECOND_VERIFIER,
    STANDARDS,
)
from release.opened_release import Release
from release.published_files import CODE_LICENSE, code_license_text, license_text
from release.schema import CARD
from release.standards import bundle
from stages.export.hf import generation_config, model_tokenizer_config
from stages.export.variants.registry import QUANTIZATION_CONFIG, STACKED, VARIANTS, adapter_config
from stages.formats.tokenizer import (
    CONFIG_FILE,
    INFERENCE_FILE,
    TRAINING_FILE,
    inference_template,
    tokenizer_config,
    training_template,
)
from stages.train.imported_weights import NAME as BASE

OWN_VERIFIER = Path(release.__path__[0], Path(SECOND_VERIFIER).name)
WITH_CARD = {"dataset": [NOTICE], "evidence": [f"{STANDARDS}/"]}
"""Further texts of a repository, by its kind, that follow from the whole release."""
ALONE = {
    "dataset": (
        "croissant.json",
        "evaluation/canary.json",
        "evaluation/harness/*/tasks.json",
        "order/*/meta.json",
        "summary.json",
        "tokens/meta.json",
        "tokens/tokenizer_stats.json",
    ),
    "evidence": ("evidence/attestations/evaluation-*.json",),
    "model": ("the numbers of config.json", "evaluation/harness/tasks.json"),
    "variant": ("the numbers of config.json",),
    "repository": ("index.json",),
    "checkpoint": ("state.json",),
}
"""Files of a repository, by its kind, whose values nothing beside them shows."""
LICENSE_FIELDS = ("license", "license_name", "license_link")
"""Fields of a card's metadata."""
TAG = re.compile(r"/tree/v([0-9.]+)/evaluation/")
"""The version of a release in the sources of a model's results."""


def tool_files(release: Release) -> Findings:
    """Checks these files of a folder, as far as it shows what they follow from."""
    findings = Findings(summary="programs, options, templates and licenses are as this atom writes them")
    if names := ALONE.get(release.kind):
        findings.skipped["alone"] = f"values: nothing in this repository alone shows those of {', '.join(names)}"
    if release.kind == "checkpoint":  # it has no card
        reason = "LICENSE: nothing in the branch of a checkpoint states the license of its weights"
        return Findings(list(_licenses(release, findings)), {"LICENSE": reason} | findings.skipped)
    if not release.is_whole:
        texts = ", ".join([CARD, *WITH_CARD.get(release.kind, ())])
        findings.skipped["words"] = f"words: those of {texts} are compared where all files of the release are there"
    findings.problems += _problems(release, findings)
    return findings


def _problems(release: Release, findings: Findings) -> Iterator[str]:
    kind = release.kind
    if kind in ("release", "evidence"):
        yield from _of_evidence(release)
    for model in release.model_folders if kind in ("release", "model") else ():
        prefix = f"{model.name}/" if release.is_whole else ""
        yield from (prefix + text for text in _of_model(release, model, findings))
    if release.is_whole:
        for name in release.variant_names:
            yield from (f"{name}/{text}" for text in _of_loader(release.root / name, None, findings))
    elif kind == "variant":
        yield from _of_loader(release.root, None, findings)
    if kind in ("release", "dataset"):
        prefix = "dataset/" if release.is_whole else ""
        yield from (prefix + text for text in _of_data(release, findings))
    yield from _licenses(release, findings)


def _of_evidence(release: Release) -> Iterator[str]:
    """Yields the problems of the verifier, of the README of the code, and of release.json.

    release.json must follow from the recipe.
    """
    if _differs(release.root / SECOND_VERIFIER, OWN_VERIFIER.read_bytes()):
        yield f"{SECOND_VERIFIER} is not the verifier of this atom"
    if _differs(release.root / CODE_README, render.code_readme(release.info).encode()):
        yield f"{CODE_README} is not what this atom writes"
    for name, value in schema.stated_by_recipe(release.recipe).items():
        if getattr(release.info, name) != value:
            yield f"{RELEASE} states another {name} than {RECIPE}"


def _of_model(release: Release, model: Path, findings: Findings) -> Iterator[str]:
    """Yields the problems of the files of one model's repository."""
    is_chat = release.models[model.name].is_chat
    repo, version = _names(release, model)
    expected = model_facts.serve_config(model, repo, version).encode() if is_chat else None
    if _differs(model / model_facts.SERVE_FILE, expected):
        if is_chat:
            yield f"{model_facts.SERVE_FILE} is not what this atom writes for the model"
        else:
            yield f"{model_facts.SERVE_FILE} is there, and the model was not trained to converse"
    yield from _of_loader(model, is_chat, findings)


def _names(release: Release, model: Path) -> tuple[str, str]:
    """Returns the repository of a model, and the version of its release.

    For a model repository alone, these are as its card and its results state them.
    """
    if release.is_whole:
        return f"{release.info.repository}{model.name.removeprefix(MODEL)}", release.info.version
    card = (model / CARD).read_text()
    data: Any = load().ModelCard(card).data
    results = "".join(path.read_text() for path in sorted((model / RESULTS).glob("*.yaml")))
    version = TAG.search(results)
    return f"{render.data_of(card).partition('/')[0]}/{data.model_name}", version[1] if version else ""


def _of_loader(folder: Path, is_chat: bool | None, findings: Findings) -> Iterator[str]:
    """Yields the problems of the files that loaders read beside the weights.

    `is_chat` tells whether the model converses; it is None for a variant, which may be either.
    """
    yield from loader_config_problems(folder)
    if not (folder / CONFIG_FILE).is_file():  # GGUF, whose file has their content
        return
    templates = {INFERENCE_FILE: inference_template(), TRAINING_FILE: training_template()}
    differing = [name for name, text in templates.items() if _differs(folder / name, text.encode())]
    context = read_json(folder / CONFIG_FILE).get("model_max_length")
    if (folder / "config.json").is_file():
        context = read_json(folder / "config.json")["max_position_embeddings"]
    # A variant's repository does not say whether its model converses: either form is right.
    kinds = (True, False) if is_chat is None else (is_chat,)
    configs = [model_tokenizer_config(tokenizer_config(), context, kind) for kind in kinds]
    texts = [json.dumps(config, indent=1, sort_keys=True) + "\n" for config in configs]
    differing += [CONFIG_FILE] if all(_differs(folder / CONFIG_FILE, text.encode()) for text in texts) else []
    # The tokenizer of a published model is taken over as it is, with its own templates.
    if differing and (folder / BASE).is_file():
        repo = escaped(str(read_json(folder / BASE).get("repo")))
        findings.skipped["templates"] = (
            f"{', '.join(differing)}: taken over from {repo}, and not as this atom writes them"
        )
        differing = []
    yield from (f"{name} is not what this atom writes" for name in differing)
    ids = {token["content"]: int(token["id"]) for token in read_json(folder / "tokenizer.json")["added_tokens"]}
    if all(_differs(folder / "generation_config.json", generation_config(kind, ids)) for kind in kinds):
        yield "generation_config.json is not what this atom writes"


def _of_data(release: Release, findings: Findings) -> Iterator[str]:
    path = release.dataset / bundle.PYTHON_LICENSE
    if not path.is_file() or not _differs(path, bundle.python_license()):
        return
    python = read_json(release.root / "evidence/environment.json").get("python") if release.is_whole else None
    if python == platform.python_version():
        yield f"{bundle.PYTHON_LICENSE} is not the license of Python {python}"
    else:
        findings.skipped[bundle.PYTHON_LICENSE] = (
            f"{bundle.PYTHON_LICENSE}: it is not the license of Python {platform.python_version()}, which runs here"
        )


def _licenses(release: Release, findings: Findings) -> Iterator[str]:
    """Yields the problems of the license of each repository: its text must be that of the license that is stated."""
    folder = release.root
    if release.kind in ("release", "evidence"):
        for place in [place.folder for place in release.repositories] if release.is_whole else [""]:
            spdx, path = release.license_of(place), f"{place}/LICENSE".lstrip("/")
            if _differs(folder / path, license_text(spdx, release.info.license.code, folder / "code")):
                yield f"{path} is not the text of {spdx}"
        return
    text = (folder / "LICENSE").read_bytes()
    stated = re.match(rb"SPDX-License-Identifier: (\S+)\n", text)
    spdx = stated[1].decode() if stated else CODE_LICENSE
    # A license without its full text begins with its SPDX identifier.
    if stated and text != license_text(spdx, "", code_root()):
        yield "LICENSE is not the text that this atom writes"
    elif not stated and text != code_license_text(code_root()):
        findings.skipped["LICENSE"] = "LICENSE: its text is not one that this atom writes; read it"
    elif (folder / CARD).is_file():
        card: Any = load().RepoCard((folder / CARD).read_text()).data.to_dict()
        expected = render.license_fields(spdx)
        if expected != {name: card[name] for name in LICENSE_FIELDS if name in card}:
            yield f"{CARD} states another license than LICENSE, which is the text of {spdx}"


def _differs(path: Path, expected: bytes | None) -> bool:
    """Returns True if a file is not the expected one; None: it must not be there."""
    return (path.read_bytes() if path.is_file() else None) != expected


CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
QUANTIZATION = "quantization_config"
COMMON = """
    architectures attention_bias attention_dropout bos_token_id dtype eos_token_id hidden_act hidden_size
    initializer_range intermediate_size max_position_embeddings model_type num_attention_heads num_hidden_layers
    num_key_value_heads pad_token_id rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings
    torch_dtype transformers_version use_cache vocab_size
"""
GROUPED_QUERY = "head_dim max_window_layers sliding_window use_sliding_window"
EXPERTS = "moe_intermediate_size num_experts num_experts_per_tok output_router_logits router_aux_loss_coef"
SIGMOID_EXPERTS = """
    first_k_dense_replace moe_intermediate_size n_group n_routed_experts n_shared_experts norm_topk_prob
    num_experts_per_tok num_nextn_predict_layers routed_scaling_factor topk_group
"""
KEYS = {
    "qwen3": ("Qwen3ForCausalLM", GROUPED_QUERY),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        f"{GROUPED_QUERY} {EXPERTS} decoder_sparse_step mlp_only_layers norm_topk_prob",
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", f"{GROUPED_QUERY} {SIGMOID_EXPERTS} partial_rotary_factor use_qk_norm"),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        f"""
        {SIGMOID_EXPERTS} kv_lora_rank moe_layer_freq q_lora_rank qk_nope_head_dim qk_rope_head_dim rope_interleave
        scoring_func topk_method v_head_dim
        """,
    ),
}
"""{model_type: (the class in transformers, the keys beside COMMON)} of the architectures that this tool exports, as
`tests/unit/test_loader_configs.py` compares with the exporters."""
ROPE = """
    rope_theta rope_type factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim
    attention_factor partial_rotary_factor
"""
"""Keys of `rope_parameters` and `rope_scaling`."""
WORD = re.compile(r"[A-Za-z0-9_.]+")
"""A string in config.json. Names of repositories have a slash."""


def loader_config_problems(folder: Path) -> Iterator[str]:
    """Yields sentences about the configs in the folder of a model or of a variant."""
    if (folder / CONFIG).is_file():
        yield from _config_problems(read_json(folder / CONFIG), _quantization(folder))
    if (folder / ADAPTER_CONFIG).is_file() and not _is_adapter_config(
        read_json(folder / ADAPTER_CONFIG), read_json(folder / BASE)["repo"]
    ):
        yield f"{ADAPTER_CONFIG} is not what this atom writes for an adapter of the model that {BASE} names"


def _quantization(folder: Path) -> dict[str, Any] | None:
    """Returns the `quantization_config` that a folder's config.json should have; None if it should have none."""
    if not (folder / LOSS).is_file():
        return None
    variant = VARIANTS.get(read_json(folder / LOSS)["variant"])
    return QUANTIZATION_CONFIG if variant and variant.writer == "compressed-tensors" else None


def _config_problems(config: dict[str, Any], quantization: dict[str, Any] | None) -> Iterator[str]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in KEYS:
        yield f"{CONFIG} states model_type {escaped(str(model_type))}, and this atom exports no such model"
        return
    architecture, further = KEYS[model_type]
    if config.get("architectures") != [architecture]:
        yield f"{CONFIG} states other architectures than {architecture}, the class of {model_type}"
    if config.get(QUANTIZATION) != quantization:
        yield f"{CONFIG} has another {QUANTIZATION} than this atom writes for the weights"
    known = {*COMMON.split(), *further.split(), QUANTIZATION}
    for key, value in sorted(config.items()):
        if key not in known:
            yield f"{CONFIG} has the key {escaped(key)}, which this atom does not write for {model_type}"
        elif key != QUANTIZATION and not _is_plain(value, key in ("rope_parameters", "rope_scaling")):
            yield f"{CONFIG} has a value of {key} that this atom does not write"


def _is_plain(value: Any, is_rope: bool) -> bool:
    """Returns True for numbers, words, and lists of them; of the rotary embedding also for its table."""
    if isinstance(value, dict):
        return is_rope and value.keys() <= set(ROPE.split()) and all(_is_scalar(part) for part in value.values())
    return all(map(_is_scalar, value)) if isinstance(value, list) else _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return WORD.fullmatch(value) is not None
    return value is None or isinstance(value, int | float)


def _is_adapter_config(config: dict[str, Any], repo: str) -> bool:
    """Returns True if an adapter's config is what this tool writes for any rank, scale and linear layers."""
    rank, alpha, modules = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    parameters = config.get("target_parameters")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        return False
    if modules is not None and not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
        return False
    if any(not WORD.fullmatch(name) for name in modules or ()) or parameters not in (None, list(STACKED)):
        return False
    # Made again from the values that may vary, so that every other key is as this tool writes it.
    return config == adapter_config(repo, rank, alpha, modules, parameters)
