"""The facts that a model repository proves of its model: architecture, parameters, scores and training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from release.facts import forecast, training
from release.facts.forecast import Outcome, Prediction
from release.facts.published_tables import read_json
from release.facts.score_facts import (
    BASELINES,
    CHAT_BENCHMARKS,
    CONTAMINATION,
    HARNESS,
    ChatScores,
    HarnessFacts,
    read_harness,
)
from release.facts.training import PhaseLog
from release.layout import CHAT, GOLDENS, MERGE, when
from release.untrusted import tensor_header
from stages.evaluation.scores import BaselineReport, ContaminationReport, ModelScores
from stages.train.imported_weights import NAME as BASE

CONFIG_KEYS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts",
    "num_experts_per_tok", "moe_intermediate_size", "max_position_embeddings", "vocab_size", "n_routed_experts",
    "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
"""Fields of config.json, if the architecture has them."""
EXPERTS = ("num_experts", "n_routed_experts")
"""The fields of these that state the number of experts of a layer."""


@dataclass
class Parameters:
    """The number of parameters.

    Attributes:
        total: All.
        active: Those that are active for one token.
        tensors: Tensors that hold them.
    """

    total: int
    active: int
    tensors: int


@dataclass
class ModelFacts:
    """The facts that a model repository proves of its model.

    Attributes:
        architecture: The class in transformers.
        config: CONFIG_KEYS of config.json.
        dtype: The type of the weights.
        parameters: Their numbers.
        scores: By model: the last are those of the model itself, the earlier ones those of the models that it
            descends from.
        chat: The same by benchmark.
        contamination: The report; None without one.
        baselines: Those of bits per byte, for all models; None if they were not measured.
        training: By phase.
        merges: The contents of merge.json of the phases whose checkpoints were averaged.
        harness: Its results on task sets; None if it was not measured.
        prediction: The prediction that was sealed before training; None without one.
        outcomes: Its forecasts with the measured figures.
        base: The published model that training began with; None without one.
        rendered_chat: A question in the chat template, as the published goldens have it; "" without them.
    """

    architecture: str
    config: dict[str, Any]
    dtype: str | None
    parameters: Parameters
    scores: dict[str, ModelScores]
    chat: dict[str, ChatScores] = field(default_factory=dict)
    contamination: ContaminationReport | None = None
    baselines: BaselineReport | None = None
    training: dict[str, PhaseLog] = field(default_factory=dict)
    merges: dict[str, dict[str, Any]] = field(default_factory=dict)
    harness: HarnessFacts | None = None
    prediction: Prediction | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    base: dict[str, Any] | None = None
    rendered_chat: str = ""

    def own_scores(self) -> ModelScores:
        """Returns the scores of the model itself, the last ones, because a card compares only with earlier models."""
        return self.scores[self.name()]

    @property
    def has_experts(self) -> bool:
        return any(key in self.config for key in EXPERTS)

    @property
    def attention_modules(self) -> list[str]:
        """The names of the linear modules of attention in its class of transformers."""
        if "kv_lora_rank" in self.config:
            queries = ["q_a_proj", "q_b_proj"] if "q_lora_rank" in self.config else ["q_proj"]
            return [*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
        linear = ["in_proj_qkvz", "in_proj_ba", "out_proj"] if "linear_num_value_heads" in self.config else []
        return ["q_proj", "k_proj", "v_proj", "o_proj", *linear]

    @property
    def is_chat(self) -> bool:
        """True if it was trained to converse."""
        return any(phase in self.training for phase in CHAT)

    @property
    def on_published(self) -> bool:
        """True if it was trained on a published model as it is, which is the release's base, or is that base."""
        return self.base is not None and "init" not in self.scores

    @property
    def is_copy(self) -> bool:
        """True if it is the published model itself, which no phase trained."""
        return self.on_published and not self.training

    def license(self, release: str) -> str:
        """Returns the license of the model's weights.

        A copy has the license of its original, and others that of the release's weights.
        """
        return str(self.base["license"]) if self.base and self.is_copy else release

    def name(self) -> str:
        """Returns the name of this exported model."""
        return list(self.scores)[-1]


def read_model_facts(model: Path) -> ModelFacts:
    """Reads the facts from one model repository alone."""
    config, report, folder = read_json(model / "config.json"), model / CONTAMINATION, model / "evaluation"
    logs = training.logs(model).items()
    scores = _scores_by_model(folder)
    prediction = forecast.read(model / forecast.FILE) if (model / forecast.FILE).exists() else None
    return ModelFacts(
        architecture=config["architectures"][0],
        config={key: config[key] for key in _config_keys(config) if config.get(key) is not None},
        dtype=config.get("dtype") or config.get("torch_dtype"),
        parameters=_count_parameters(model, config),
        scores=scores,
        chat={name: _scores_by_model(folder / name) for name in CHAT_BENCHMARKS if (folder / name).is_dir()},
        contamination=read_json(report) if report.exists() else None,
        baselines=read_json(model / BASELINES) if (model / BASELINES).exists() else None,
        training={phase: training.log_facts(training.read(log, training.FIGURES)) for phase, log in logs},
        merges=_merges(model / "training"),
        harness=read_harness(folder / HARNESS),
        prediction=prediction,
        outcomes=forecast.outcomes(prediction, _measured(model, scores)) if prediction else [],
        base=read_json(model / BASE) if (model / BASE).exists() else None,
        rendered_chat=rendered_chat(read_json(model / GOLDENS)) if (model / GOLDENS).exists() else "",
    )


def _merges(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns {phase: content of its merge.json} of a model repository, in the order of training."""
    files = {path.stem.removeprefix(MERGE): path for path in folder.glob(f"{MERGE}*.json")}
    return {phase: read_json(files[phase]) for phase in sorted(files, key=when)}


def rendered_chat(goldens: Mapping[str, Any]) -> str:
    """Returns the last text of goldens.json: its messages in the chat template. "" for an empty one."""
    rows = goldens.get("rows") or [{"text": ""}]
    return str(rows[-1]["text"])


def _measured(model: Path, scores: dict[str, ModelScores]) -> dict[str, float]:
    """Returns {figure: value} of a prediction's model: its scores, and the last held-out loss of its phase."""
    figures = {name: scores[forecast.MODEL][name]["value"] for name in (forecast.BITS, forecast.ACCURACY)}  # type: ignore[literal-required]
    if (log := training.logs(model).get(forecast.PHASE)) is not None:
        # Only the fields that are needed are kept, since logs may be long.
        lines = training.read(log, ("step", forecast.LOSS))
        losses = [line[forecast.LOSS] for line in lines if forecast.LOSS in line]
        figures |= {forecast.LOSS: losses[-1]} if losses else {}
    return figures


def _config_keys(config: dict[str, Any]) -> tuple[str, ...]:
    """Returns the fields that the card shows. The layers of a mixture of experts have no `intermediate_size`."""
    return CONFIG_KEYS if any(key in config for key in EXPERTS) else (*CONFIG_KEYS, "intermediate_size")


def _count_parameters(model: Path, config: dict[str, Any]) -> Parameters:
    shapes: dict[str, list[int]] = {}
    for path in sorted(model.glob("*.safetensors")):
        # The header alone is read: weights may be larger than the memory.
        shapes |= tensor_shapes(path)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)
    count = next((config[key] for key in EXPERTS if key in config), None)
    if experts and not (count and "num_experts_per_tok" in config):
        raise CheckFailed(f"{model.name}/config.json does not state num_experts and num_experts_per_tok")
    # A token passes through the chosen experts only.
    idle = experts and experts * (count - config["num_experts_per_tok"]) // count
    return Parameters(total, total - idle, len(shapes))


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Returns {tensor: shape} from the header of a safetensors file, without reading the tensors.

    Raises CheckFailed.
    """
    return {name: entry["shape"] for name, entry in tensor_header(path, follow=True).items()}


def _scores_by_model(folder: Path) -> dict[str, Any]:
    files = {path.stem: path for path in folder.glob("*.json")}
    return {model: read_json(files[model]) for model in sorted(files, key=when)}


SERVE_FILE = "serve.yaml"


def serve_config(folder: Path, repo: str, version: str) -> str:
    """Returns the content of serve.yaml of the model in a folder, whose repository on the Hub is `repo`.

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
    return "\n".join([f"# vllm serve --config {SERVE_FILE}", *lines]) + "\n"
