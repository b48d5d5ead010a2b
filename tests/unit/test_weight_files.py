"""Files of weights whose names and headers are hostile: a problem in words, and no error of ours."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from pipeline.core.errors import CheckFailed
from release import untrusted
from release.checks import weights
from release.opened_release import Release


def file_of(shape: object) -> bytes:
    """A safetensors file of one number."""
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 4


@pytest.mark.parametrize("stem", ["a+", "model(", "model[0", "."])
def test_any_name_of_a_file_of_weights_is_text(stem: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    (tmp_path / f"{stem}.safetensors").write_bytes(file_of(shape=[1]))
    assert isinstance(weights.shards(Release(tmp_path, "variant")).problems, list)


@pytest.mark.parametrize("shape", ["", {}, None, [True]])
def test_a_shape_is_a_list_of_numbers(shape: object, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(shape))
    with pytest.raises(CheckFailed, match=r"model\.safetensors"):
        untrusted.tensor_header(path)
