"""The variables that a stage gets: those that computing needs, and no secret.

A stage, and what it starts (a sandbox, a server), never sees a token: neither one of whoever runs or submits, nor one
of a login profile, a module, a prolog or a container image. So a variable travels by its name only if it stands here or
in `forward` of the cluster profile; and one whose name or value looks like a secret never does.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from pipeline.errors import RecipeError

TAKEN_OVER = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "SLURM_CONF", "MODULEPATH", "LD_LIBRARY_PATH")
"""What a Slurm job takes over from whoever submits, beside `forward` of the profile. The value stands in its script."""
ALLOWED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "TERM", "TZ", "TMPDIR", "LANG", "LANGUAGE", "LC_*", "HOSTNAME",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_PREFIX", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "PYTHON*",
    "SLURM*", "_SLURM*", "SPANK_*", "SUBMITIT_*", "PMI*", "OMPI_*", "ENVIRONMENT", "MODULEPATH", "MODULESHOME",
    "MODULES_*", "LOADEDMODULES", "_LMFILES_", "LMOD_*", "__LMOD_*", "__MODULES_*", "_ModuleTable*", "ENROOT_*",
    "PYXIS_*", "APPTAINER*", "SINGULARITY*",
    "ATOM_*", "MLFLOW_*", "HF_HOME", "HF_HUB_*", "TRANSFORMERS_*", "TOKENIZERS_*", "SSL_CERT_*",
    "OMP_*", "KMP_*", "GOMP_*", "MKL_*", "OPENBLAS_*", "ONEDNN_*", "DNNL_*", "ATEN_*", "RAYON_*", "NUMEXPR_*",
    "MALLOC_*",
    "TORCH*", "PYTORCH_*", "TRITON_*", "MEGATRON_*", "NVTE_*", "VLLM_*", "CUDA*", "CUBLAS*", "CUDNN_*", "NVIDIA_*",
    "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "NCCL_*", "GLOO_*", "UCX_*", "FI_*",
)  # fmt: skip
"""Names that a stage may have, as patterns of a shell."""
WORDS = (
    "TOKEN", "TOKENS", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "PASS", "KEY", "KEYS", "APIKEY", "PAT",
    "CREDENTIAL", "CREDENTIALS", "CREDS", "JWT", "AUTH", "AUTHORIZATION", "COOKIE", "COOKIES", "BEARER",
)  # fmt: skip
"""Words, between underscores, by which a name is that of a secret."""
_SECRET_NAME = re.compile(rf"(?:^|_)(?:{'|'.join(WORDS)})(?:_|$)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_VALUE = re.compile(
    r"://[^/\s@]*:[^/\s@]*@|\b(?:hf|ghp|gho|ghs|github_pat|glpat|xox[abp]|sk)[_-][A-Za-z0-9_-]{16,}|\bAKIA[A-Z0-9]{16}"
)


def secret(name: str, value: str = "") -> bool:
    """Whether a variable looks like a secret: by a word of its name, or a password or a token in its value."""
    return _SECRET_NAME.search(name) is not None or _SECRET_VALUE.search(value) is not None


def allowed(name: str, value: str = "") -> bool:
    """Whether a stage may have a variable."""
    named = _NAME.fullmatch(name) is not None and any(fnmatchcase(name, pattern) for pattern in ALLOWED)
    return named and not secret(name, value)


def denied(environment: Mapping[str, str]) -> list[str]:
    """The names of those variables that a stage may not have."""
    return sorted(name for name, value in environment.items() if not allowed(name, value))


def taken_over(environment: Mapping[str, str], forward: Iterable[str]) -> dict[str, str]:
    """What a Slurm job takes over of `environment`. Raises RecipeError for what looks like a secret."""
    chosen = {}
    for name in (*TAKEN_OVER, *forward):
        if name not in environment:
            continue
        if secret(name, environment[name]):
            raise RecipeError(
                f"variable {name}, which a job would take over, looks like a secret, and no secret travels; leave it "
                "out of slurm.forward, and give MLflow its user and password in ~/.mlflow/credentials"
            )
        chosen[name] = environment[name]
    return chosen


def shell() -> list[str]:
    """Lines of bash that leave a script only the variables that are allowed. Functions stay, for itself alone."""
    words = "|".join(f"{word}|{word}_*|*_{word}|*_{word}_*" for word in WORDS)
    return [
        "# no secret, and nothing else of a login, reaches the stage",
        'for name in $(compgen -A function); do export -nf "$name"; done',
        "for name in $(compgen -e); do",
        "    case ${name^^} in",
        f'        {words}) unset -v "$name" ;;',
        "        *) case $name in",
        f"            {'|'.join(ALLOWED)}) ;;",
        '            *) unset -v "$name" ;;',
        "        esac ;;",
        "    esac",
        "done",
    ]


def require() -> None:
    """Begins this process anew if a secret is among its variables after all, by a module, a prolog or an image: what is
    only removed from `os.environ` is still in /proc."""
    bad = [name for name, value in os.environ.items() if secret(name, value) or not _NAME.fullmatch(name)]
    if bad:
        print(f"begins anew without {', '.join(bad)}: no secret reaches a stage", flush=True)
        clean = {name: value for name, value in os.environ.items() if name not in bad}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], clean)
