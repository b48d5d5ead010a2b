"""The check of GPUs before a stage, with a program in the place of nvidia-smi: nobody has broken GPUs at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.launch import preflight

SOUND = "0, No, No, Not Active, None"


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> str | None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    failure = preflight.gpu_problem("n7", ["0", "1"])
    assert failure is None or failure.bad_node == "n7"
    return failure and failure.text


@pytest.mark.parametrize(
    ("second", "field"),
    [
        (SOUND, None),
        ("[N/A], [N/A], [N/A], [Not Supported], [N/A]", None),
        ("2, No, No, Not Active, None", "ecc.errors.uncorrected.volatile.total: 2"),
        ("0, Yes, No, Not Active, None", "remapped_rows.pending: Yes"),
        ("0, No, Yes, Not Active, None", "remapped_rows.failure: Yes"),
        ("0, No, No, Active, None", "clocks_throttle_reasons.hw_slowdown: Active"),
        ("0, No, No, Not Active, Drain and Reset", "gpu_recovery_action: Drain and Reset"),
    ],
)
def test_a_gpu_that_is_not_sound_is_named(
    second: str, field: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = answer(tmp_path, monkeypatch, f"echo '0, {SOUND}'; echo '1, {second}'")
    expected = f"GPU 1 of node n7 is not sound ({field}); have it reset or repaired"
    assert text == (None if field is None else expected)


def test_fields_that_an_older_driver_lacks_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """case "$*" in
        *gpu_recovery_action*) echo 'Field "gpu_recovery_action" is not a valid field to query.'; exit 2 ;;
        *) echo "0, 5, No, No, Not Active" ;;
    esac"""
    assert "(ecc.errors.uncorrected.volatile.total: 5)" in (answer(tmp_path, monkeypatch, script) or "")


def test_a_driver_that_fails_or_hangs_is_the_nodes_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = "Unable to determine the device handle for GPU0000:18:00.0: Unknown Error"
    text = answer(tmp_path, monkeypatch, f"echo '{lost}'; exit 15")
    assert text == f"nvidia-smi failed on node n7 ({lost}); have its GPUs and their driver checked"
    monkeypatch.setattr(preflight, "SMI_SECONDS", 0.2)
    text = answer(tmp_path, monkeypatch, "exec sleep 20")
    assert text == "nvidia-smi gave no answer within 0 s on node n7; have its GPUs and their driver checked"


def test_one_rank_of_a_node_with_gpus_checks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preflight.check_node(tmp_path, 0.0, None) is None and not capsys.readouterr().err, "no GPU, no check"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert preflight.check_node(tmp_path, 0.0, None) is None and not capsys.readouterr().err
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert preflight.check_node(tmp_path, 0.0, None) is None and "has no nvidia-smi here" in capsys.readouterr().err


def test_only_the_gpus_of_the_job_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"""case "$*" in
        *"--id=2,3 "*) echo '2, {SOUND}'; echo '3, 7, No, No, Not Active, None' ;;
        *) echo '0, 9, No, No, Not Active, None' ;;
    esac"""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    failure = preflight.gpu_problem("n7", ["2", "3"])
    assert failure and failure.text.startswith(
        "GPU 3 of node n7 is not sound (ecc.errors.uncorrected.volatile.total: 7)"
    )


def test_a_rank_with_a_part_of_the_gpus_checks_that_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/dev/nvidia0"), Path("/dev/nvidia1")]))
    for name, value in {"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert preflight.check_node(tmp_path, 0.0, None) is None and "has no nvidia-smi here" in capsys.readouterr().err
