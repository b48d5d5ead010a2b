"""How the stage `variant` grows with the model: memory and seconds of its parts, at sizes over two decades.

    .venv/bin/python bench/variant.py

Each size is a random mixture of experts and a process for each part: the conversion to INT8 and back to fp32, and the
divergence on one text of 512 tokens, for which the original and the variant are in memory. Memory is the largest
resident size beside that of the smallest model. The last line is one JSON object.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

WIDTHS = (64, 192, 640)
TOKENS = 512


def sizes(width: int) -> dict[str, int]:
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": 1, "head_dim": 32}
    return {"hidden_size": width, "moe_intermediate_size": width, "num_experts": 8, "num_hidden_layers": 2, **heads}


def part(name: str, folder: Path) -> None:
    """Runs one part, and prints its seconds, its resident bytes, and the parameters of the model."""
    from stages.export.variants import conversion, stage

    began = time.monotonic()
    if name == "convert":
        conversion.write("int8", folder / "model", folder / "variant")
        conversion.write_dequantized("int8", folder / "model", folder / "variant", folder / "dequantized")
    else:
        models = stage._load(folder / "model", folder / "dequantized")
        began = time.monotonic()
        stage._divergence(models, "text", [5 + n % 300 for n in range(TOKENS)])
    seconds = time.monotonic() - began
    parameters = stage.weight_bytes(folder / "model") / 4
    print(json.dumps([parameters, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def main() -> None:
    from tests.fixtures import variant_fixtures

    rows = []
    with tempfile.TemporaryDirectory() as place:
        for width in WIDTHS:
            folder = Path(place) / str(width)
            variant_fixtures.save_model(folder / "model", context=TOKENS, **sizes(width))
            for name in ("convert", "divergence"):
                command = [sys.executable, "-P", __file__, name, str(folder)]
                answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                parameters, seconds, size = json.loads(answer.splitlines()[-1])
                rows.append({"part": name, "parameters": parameters, "seconds": seconds, "bytes": size})
                print(f"{name:10} {parameters:12,.0f} parameters {seconds:8.2f} s {size / 2**20:8.0f} MiB", flush=True)
    slopes = {}
    for name in ("convert", "divergence"):
        first, *_, last = (row for row in rows if row["part"] == name)
        slopes[name] = (last["bytes"] - first["bytes"]) / (last["parameters"] - first["parameters"])
        print(f"{name}: {slopes[name]:.2f} bytes a parameter")
    print(json.dumps({"rows": rows, "bytes_a_parameter": slopes}))


if __name__ == "__main__":
    part(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) == 3 else main()
