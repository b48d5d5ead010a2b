"""The parity check of an export: plain transformers in an interpreter of its own.

    python -P parity.py MODEL_FOLDER [--by-layer] < EXPECTED

EXPECTED is a line of JSON, `rows` (token ids), `steps` (of each row, the distance of its neighbors' positions) and
`positions` (of a slice), and then Megatron's logits: for each row, slices of so many positions, fp32 [positions,
vocabulary]. The last printed line is one JSON object: keys that were
missing, left over or of another shape, the largest logit difference and its location. With --by-layer, one layer of the
model is in memory at a time. Neither this file nor the one beside it, which it loads by its path, imports a module of
this project, on purpose: the CPU patches of Megatron must not affect the compared model.
"""

from __future__ import annotations

import atexit
import gc
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

gc.set_threshold(20_000)  # the imports leave half a million objects that never end
atexit.register(gc.freeze)  # nor does the end of the process walk over them

import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

spec: Any = spec_from_file_location("streamed_model", Path(__file__).with_name("streamed_model.py"))
streamed_model: Any = module_from_spec(spec)
spec.loader.exec_module(streamed_model)


@torch.no_grad()
def compare(model: Any, states: list[torch.Tensor], positions: int) -> dict[str, float | int]:
    """The largest difference to the logits on standard input."""
    worst: dict[str, float | int] = {"delta": 0.0, "row": 0, "position": 0}
    for row, state in enumerate(states):
        for first in range(0, state.shape[1], positions):
            logits = model.get_output_embeddings()(state[:, first : first + positions])[0].float()
            content = sys.stdin.buffer.read(4 * logits.numel())
            expected = torch.frombuffer(bytearray(content), dtype=torch.float32).view(logits.shape)
            # No comparison with NaN is true, so that it would pass for no difference.
            deltas = torch.nan_to_num((logits - expected).abs().amax(-1), nan=float("inf"))
            place = int(deltas.argmax())
            if float(deltas[place]) > worst["delta"]:
                worst = {"delta": float(deltas[place]), "row": row, "position": first + place}
    return worst


def main(folder: str, by_layer: bool) -> None:
    logging.disable_progress_bar()
    request = json.loads(sys.stdin.buffer.readline())
    source = (streamed_model.ByLayer if by_layer else streamed_model.Whole)(folder)
    states = [] if source.keys else streamed_model.hidden_states(source, request["rows"], request["steps"])
    print(json.dumps({"keys": source.keys, **compare(source.model, states, request["positions"])}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], "--by-layer" in sys.argv[2:])
