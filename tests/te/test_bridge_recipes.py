"""Megatron-Bridge's recipes for H100 and GB200 and ours differ in the settings of REASONS, and in no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.fixtures import layout_fixtures
from tests.te.bridge_recipes import PAIRS, differences

REASONS: dict[str, str] = {
    "the layout that `atom plan --search` finds, with alltoall in a node": (
        "model.expert_model_parallel_size model.tensor_model_parallel_size model.pipeline_model_parallel_size "
        "model.virtual_pipeline_model_parallel_size model.sequence_parallel "
        "model.microbatch_group_size_per_vp_stage"
    ),
    "as the pipeline is interleaved here, and NVIDIA's has none or the other kind": (
        "model.overlap_p2p_comm model.batch_p2p_comm"
    ),
    "layers that do not divide are dealt by pipeline_model_parallel_layout here, which counts embedding and loss too": (
        "model.account_for_embedding_in_pipeline_split model.account_for_loss_in_pipeline_split"
    ),
    "makes room for micro-batches of two rows": (
        "model.recompute_granularity model.recompute_method model.recompute_modules model.recompute_num_layers"
    ),
    "HybridEP is not supported here, and an alltoall reads none of its settings": (
        "model.moe_token_dispatcher_type model.moe_flex_dispatcher_backend model.moe_flex_dispatcher_num_sms "
        "model.moe_hybridep_num_sms"
    ),
    "loses the mask of padding, which packed rows need": (
        "model.cuda_graph_impl model.cuda_graph_modules model.use_te_rng_tracker model.overlap_moe_expert_parallel_comm"
    ),
    "only with the overlap of the experts' exchange": "model.delay_wgrad_compute ddp.delay_wgrad_compute",
    "a setting here, off until a GPU has shown its gain: gradient_precision, overlap_weights": (
        "ddp.grad_reduce_in_fp32 ddp.overlap_param_gather ddp.align_param_gather optimizer.overlap_param_gather"
    ),
    "gradients are scaled before their sum here, which gloo can do too, instead of averaged by NCCL": (
        "ddp.average_in_collective"
    ),
    "Megatron's default; no GPU has shown which size is faster": "ddp.bucket_size",
    "of Megatron-FSDP, which neither uses": "ddp.data_parallel_sharding_strategy",
    "of Megatron's own attention, which neither uses in bf16 with Transformer Engine": (
        "model.attention_softmax_in_fp32 model.masked_softmax_fusion"
    ),
    "the bridge lets Megatron free what a stage has sent; here it is kept until the backward pass": (
        "model.deallocate_pipeline_outputs"
    ),
    "of dense layers, of which there are none": "model.ffn_hidden_size",
    "another way to write that every layer has experts": "model.moe_layer_freq",
    "read with FP8 only": (
        "model.fp8_recipe optimizer.fp8_recipe model.num_layers_at_start_in_bf16 model.num_layers_at_end_in_bf16"
    ),
    "by Apex's extension here, which the project's images lack": "model.gradient_accumulation_fusion",
    "Qwen3's coefficient in the terms of Megatron; the bridge takes that of transformers as it is": (
        "model.moe_aux_loss_coeff"
    ),
    "a choice of the recipe: more stable routers": "model.moe_z_loss_coeff model.moe_router_dtype",
    "for benchmarks: each expert gets equally many tokens": "model.moe_router_force_load_balancing",
    "another way to write that there is none": "model.offload_modules model.wgrad_deferral_limit",
    "the engine draws the same weights in every layout": "model.perform_initialization",
    "the recipe's own rate; its schedule is this project's": "optimizer.lr optimizer.min_lr",
    "not offered here; its states are fp32 in the bridge's recipe, too": "optimizer.use_precision_aware_optimizer",
}
"""Of the differences: why, and the fields that differ for this reason in some of PAIRS."""
EXPLAINED = {field for fields in REASONS.values() for field in fields.split()}


def test_every_difference_is_explained(tmp_path: Path) -> None:
    settings: dict[str, Any] = {}
    for kind in ("theirs", "ours"):
        out = tmp_path / f"{kind}.json"
        codes, logs = layout_fixtures.end(
            layout_fixtures.spawn("tests.te.bridge_recipes", [kind, str(out)], 1), timeout=900
        )
        assert codes == [0], logs[0][-3000:]
        settings[kind] = json.loads(out.read_text())
    differing = {
        pair: differences(settings["theirs"][pair], settings["ours"][source[0]]) for pair, source in PAIRS.items()
    }
    compared = settings["theirs"]["30B, H100"].keys() & settings["ours"]["atom-30b-a3b"].keys()
    assert len(compared) == 401, "as docs/gpu.md says"
    unexplained = {pair: {k: v for k, v in fields.items() if k not in EXPLAINED} for pair, fields in differing.items()}
    assert not any(unexplained.values()), unexplained
    assert set().union(*differing.values()) == EXPLAINED, "these do not differ any more"
