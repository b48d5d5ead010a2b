"""The environment of a stage: the variables needed for computing, and no secrets.

A stage and its children (a sandbox, a server) never see a token of the user, a login profile, a module, a prolog or a
container image. A variable reaches the stage only if its name is listed here or in the cluster profile (`forward`,
`environment`). A variable whose name or value looks like a secret never does.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.core.errors import RecipeError

# Variables of the submitting process that a Slurm job gets, beside `forward` of the profile. Their values are in its
# script.
_TAKEN_OVER = """
PATH HOME USER LOGNAME LANG LC_ALL SLURM_CONF MODULEPATH LD_LIBRARY_PATH HF_ENDPOINT
ATOM_HUB_SLOTS ATOM_HUB_MB_PER_SECOND ATOM_HUB_REQUESTS_PER_MINUTE
"""
TAKEN_OVER = tuple(_TAKEN_OVER.split())
# Shell patterns of the names of allowed variables: of the system, of Slurm and MPI, of modules and containers, of atom
# and its libraries, of threads and arithmetic, of GPUs and networks.
_ALLOWED = """
PATH HOME USER LOGNAME SHELL SHLVL PWD OLDPWD _ TERM TZ TMPDIR LANG LANGUAGE LC_* HOSTNAME CC CXX CPATH LIBRARY_PATH
MANPATH PKG_CONFIG_PATH LD_LIBRARY_PATH LD_PRELOAD VIRTUAL_ENV CONDA_PREFIX XDG_CACHE_HOME XDG_RUNTIME_DIR PYTHON*
SLURM* _SLURM* SRUN_* SPANK_* SUBMITIT_* PMI* OMPI_* HYDRA_BOOTSTRAP HYDRA_LAUNCHER_EXTRA_ARGS I_MPI_HYDRA_*
PRTE_MCA_plm_* ENVIRONMENT
MODULEPATH MODULESHOME MODULES_* LOADEDMODULES _LMFILES_ LMOD_* __LMOD_* __MODULES_* _ModuleTable* ENROOT_* PYXIS_*
APPTAINER* SINGULARITY*
ATOM_* MLFLOW_* HF_ENDPOINT HF_HOME HF_HUB_* TRANSFORMERS_* TOKENIZERS_* SSL_CERT_*
OMP_* KMP_* GOMP_* MKL_* OPENBLAS_* ONEDNN_* DNNL_* ATEN_* RAYON_* NUMEXPR_* MALLOC_* ARROW_DEFAULT_MEMORY_POOL
TORCH* PYTORCH_* TRITON_* MEGATRON_* NVTE_* VLLM_* CUDA* CUBLAS* CUDNN_* NVIDIA_* GPU_DEVICE_ORDINAL
ROCR_VISIBLE_DEVICES ZE_AFFINITY_MASK NCCL_* GLOO_* UCX_* FI_*
"""
ALLOWED = tuple(_ALLOWED.split())
# Shell patterns of the names of secrets, in capitals: most words match anywhere in a name.
_SECRET_NAMES = """
*TOKEN* *SECRET* *PASSW* *PASSPHRASE* *PASSCODE* *PASS *PASS[_0-9]* *?PWD* *KEY* *PAT *PAT[_0-9]* *CRED* *JWT* *AUTH*
*COOKIE* *BEARER*
"""
SECRET_NAMES = tuple(_SECRET_NAMES.split())
# Parts of names that are ignored when a name is compared with these patterns.
_NON_SECRET_PARTS = "TOKENIZER NCCL_IB_PKEY UCX_IB_PKEY OLDPWD APPTAINER_PWD SINGULARITY_PWD COMPAT BYPASS"
NON_SECRET_PARTS = tuple(_NON_SECRET_PARTS.split())
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_VALUE = re.compile(
    r"://[^/\s@]*:[^/\s@]*@|\b(?:hf|ghp|gho|ghs|github_pat|glpat|xox[abp]|sk)[_-][A-Za-z0-9_-]{16,}|\bAKIA[A-Z0-9]{16}"
)
_USER_OF_URL = re.compile(r"://[^/\s@]+@")
# Has the id of a process that `require` has restarted.
_RESTARTED_BY = "ATOM_BEGUN_ANEW"


def is_secret(name: str, value: str = "") -> bool:
    """Returns True if a variable looks like a secret, by a word in its name, or by a password or token in its value."""
    upper_name = name.upper()
    for part in NON_SECRET_PARTS:
        upper_name = upper_name.replace(part, "_")
    return any(fnmatchcase(upper_name, pattern) for pattern in SECRET_NAMES) or _SECRET_VALUE.search(value) is not None


def is_allowed(name: str, value: str = "", profile_names: Collection[str] = ()) -> bool:
    """Returns True if a stage may have a variable.

    Args:
        name: Its name.
        value: Its value.
        profile_names: The variables that the cluster profile names.
    """
    # In a variable of the profile, the part before the @ of a URL may be a user name; elsewhere it counts as a token.
    if name not in profile_names:
        is_computing_name = _NAME.fullmatch(name) is not None and any(fnmatchcase(name, pattern) for pattern in ALLOWED)
        if not is_computing_name or _USER_OF_URL.search(value) is not None:
            return False
    return not is_secret(name, value)


def denied_names(environment: Mapping[str, str], profile_names: Collection[str] = ()) -> list[str]:
    """Returns the names of the variables that a stage may not have."""
    return sorted(name for name, value in environment.items() if not is_allowed(name, value, profile_names))


def forwarded_variables(environment: Mapping[str, str], forward: Iterable[str]) -> dict[str, str]:
    """Returns the variables that a Slurm job gets. Raises RecipeError for one that looks like a secret."""
    forwarded = {name: environment[name] for name in (*TAKEN_OVER, *forward) if name in environment}
    for name, value in forwarded.items():
        if is_secret(name, value):
            raise RecipeError(
                f"variable {name}, which a job would take over, looks like a secret, and no secret travels; leave it "
                "out of slurm.forward, and give MLflow its user and password in ~/.mlflow/credentials"
            )
    return forwarded


def require(profile_names: Collection[str]) -> None:
    """Removes denied variables that came from a module, a prolog, an image or `setup` of the profile.

    If this process started with one, it restarts itself, because a variable that is only removed from `os.environ` is
    still in /proc.

    Args:
        profile_names: The variables that the cluster profile names.
    """
    for name in denied_names(os.environ, profile_names):
        del os.environ[name]
    if os.environ.pop(_RESTARTED_BY, None) == str(os.getpid()):
        return  # /proc does not change after a restart: restart only once
    pairs = (entry.partition("=") for entry in os.fsdecode(Path("/proc/self/environ").read_bytes()).split("\0"))
    if denied_at_start := denied_names({name: value for name, _, value in pairs if name}, profile_names):
        print(f"restarts without {', '.join(denied_at_start)}: no secret reaches a stage", flush=True)
        clean = {**os.environ, _RESTARTED_BY: str(os.getpid())}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], clean)
