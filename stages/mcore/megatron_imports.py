"""The only import of megatron-core: the CPU patches are applied before any of its names is imported.

Every module of this project imports Megatron's names from here, so that no import order can load Megatron first.
"""

from stages.mcore import megatron_cpu_patches

megatron_cpu_patches.enable()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.fusions.fused_bias_geglu import quick_gelu  # noqa: E402
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding  # noqa: E402
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.layers import RowParallelLinear  # noqa: E402
from megatron.core.transformer.cuda_graphs import delete_cuda_graphs  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.module import Float16Module, MegatronModule  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402
from megatron.core.transformer.utils import is_layer_window_attention  # noqa: E402

__all__ = [
    "AttnMaskType",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "Float16Module",
    "GPTModel",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "MLATransformerConfig",
    "MegatronModule",
    "OptimizerConfig",
    "PackedSeqParams",
    "RotaryEmbedding",
    "RouterReplay",
    "RouterReplayAction",
    "RowParallelLinear",
    "TopKRouter",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "YarnRotaryEmbedding",
    "delete_cuda_graphs",
    "finalize_model_grads",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_gpt_layer_with_transformer_engine_spec",
    "get_megatron_optimizer",
    "get_num_layers_to_build",
    "get_transformer_layer_offset",
    "gpt_layer_specs",
    "is_layer_window_attention",
    "parallel_state",
    "quick_gelu",
    "tensor_parallel",
]
