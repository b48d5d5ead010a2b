"""An extension of vLLM's worker (`--worker-extension-cls atom_reload.Reload`) that loads new weights.

vLLM's own `reload_weights` suffices on a GPU. On CPU, 0.32 packs the experts' weights for its kernel at the first load
but not at a reload, and then reads plain weights as packed ones without an error.
"""

from __future__ import annotations

from typing import Any


class Reload:
    """Mixed into the worker by vLLM."""

    model_runner: Any
    update_config: Any
    reload_weights: Any

    def renew(self, folder: str) -> None:
        """Loads the safetensors in `folder`, for any initial weights of the server (also `--load-format dummy`)."""
        from vllm.platforms import current_platform  # type: ignore[import-not-found]

        if current_platform.is_cpu():
            for module in self.model_runner.get_model().modules():
                method = getattr(module, "quant_method", None)
                if method is not None and hasattr(method, "moe_kernel"):
                    method.moe_kernel = None  # it is then created again, which packs the weights
        self.update_config({"load_config": {"load_format": "safetensors"}})
        self.reload_weights(weights_path=folder)
