"""Replays with the code that a release carries, if the present code differs from the code that trained the phase.

The files of `code/` are compared with the checksums, and those that trained the phase with the statement about it. They
are copied to a temporary folder and run by the Python and the packages of this installation, in a process of its own
under bubblewrap: without network, with Python, its libraries and the release to read, with the temporary folder to
write, and with an empty environment except for settings of arithmetic. The code of this version compares the result.

This executes code of the release's publisher, and that code can report false results. Read it first if you do not trust
the publisher.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import provenance
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.source_code import PACKAGES, code_digests
from pipeline.core.store import canonical, sha256_bytes
from pipeline.core.text import printable
from pipeline.graph import registry
from release.audit import rebuild
from release.audit.replay.retraining import Progress, Retrained
from release.audit.replay.source import Source

ARITHMETIC = re.compile(r"(OMP|MKL|ATEN|ONEDNN|DNNL|CUBLAS|CUDA|NCCL|NVTE|PYTORCH|TORCH)_[A-Z0-9_]+")
"""Settings that decide how numbers are added, and those that a GPU needs, which a replay inherits."""
RESULT_BYTES = 10_000_000
RESULT = "result.json"
FIELDS: dict[str, Any] = {
    "made": str,
    "state": list,
    "diverges": (int, type(None)),
    "ranks": int,
    "environment": list,
    "fingerprint": str,
    "materials": dict,
    "subject": dict,
}
"""The fields of the result that carried code writes, and their types."""
DRIVER = """
import os, sys
from pathlib import Path

release, phase, first, last, folder = sys.argv[1:]
import release as carried
code = os.path.realpath(os.environ["PYTHONPATH"])
if not os.path.realpath(carried.__file__).startswith(code + os.sep):
    sys.exit("the code that ran is not the one that the release carries")

from release.audit import replay

replay.replay_into(Path(release), phase, int(first), int(last), Path(folder))
"""
"""Replays steps by the code that a release of format 1 carries: `release.audit.replay` has this function."""


@dataclass(frozen=True)
class Code:
    """The code that trained a phase, as the release carries it.

    Attributes:
        source: The release.
        modules: {module: SHA-256} of the code.
        changed: The modules that differ here.
    """

    source: Source
    modules: dict[str, str]
    changed: list[str]

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of the modules."""
        return sha256_bytes(canonical(self.modules))

    def extract(self, folder: Path) -> Path:
        """Copies the packages to `folder`/code and returns it.

        Raises CheckFailed for a file that differs from the checksums, or that would lie outside the folder.
        """
        for package in PACKAGES:
            for path in self.source.digests(f"code/{package}"):
                target = folder / path
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise CheckFailed(f"{printable(path)} leads out of the folder of the code")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.source.file(path), target)
        return folder / "code"


def find(source: Source, phase: str, last: int) -> Code | None:
    """Returns the code that the release carries, if a replay needs it; else None.

    It is needed if the present code differs from the code that trained the phase or tokenized its documents. None also
    stands for a release that does not carry that code. Raises CheckFailed if the release does not state which code it
    was.
    """
    try:
        origin = source.origins[f"checkpoints/{phase}-step-{last}/state.json"]["artifact"]
        bodies = [source.statement(origin)[1]]
        # A replay tokenizes the documents again, so the code of that stage counts as well.
        if (tokens := provenance.material_keys(bodies[0]).get("tokens")) is not None:
            bodies.append(source.statement(source.manifests[tokens].node)[1])
        stages = [provenance.parameters_of(body)["stage"] for body in bodies]
        recorded = {name: digest for body in bodies for name, digest in provenance.code_of(body).items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckFailed(
            f"{source.folder} does not state which code trained {phase} "
            f"({type(error).__name__}: {printable(str(error))}); verify it"
        ) from error
    current: dict[str, str] = {}
    for stage in stages:
        current |= code_digests(registry.stages()[stage]) if stage in registry.stages() else {}
    changed = sorted(name for name in recorded if current.get(name) != recorded[name])
    # Code that differs from what the statements name did not train the phase, and running it would prove nothing.
    if not changed or not recorded or any(_carried_digest(source, name) != digest for name, digest in recorded.items()):
        return None
    return Code(source, recorded, changed)


def _carried_digest(source: Source, module: str) -> str | None:
    """Returns the digest of the file of a module that the release lists."""
    stem = f"code/{module.replace('.', '/')}"
    return next((source.sums[path] for path in (f"{stem}.py", f"{stem}/__init__.py") if path in source.sums), None)


def run(code: Code, phase: str, first: int, last: int, folder: Path, unconfined: bool, progress: Progress) -> Retrained:
    """Trains the steps in `folder` by the carried code.

    Raises AtomError if bubblewrap cannot run, CheckFailed if the code fails or leaves a malformed result.
    """
    code_folder, work = code.extract(folder), folder / "work"
    work.mkdir()
    # -s and -P keep the packages of the user and the working folder off the path, where other code could be imported.
    command = [sys.executable, "-s", "-P", "-c", DRIVER]
    command += [str(code.source.folder), phase, str(first), str(last), str(work)]
    variables = _variables(code_folder, work)
    if not unconfined:
        command = [*confined(code.source.folder, code_folder, work, variables), *command]
    progress(
        f"{len(code.changed)} of {len(code.modules)} modules that trained {phase} differ here, first "
        f"{printable(code.changed[0])}: running the code that the release carries, sha256:{code.digest}, "
        + ("unconfined" if unconfined else "under bubblewrap, without network")
    )
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=variables,
        cwd=work,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        final = ""
        for line in _lines(process.stdout):
            if line.startswith("ATOM "):
                progress(line.removeprefix("ATOM "))
            elif line.strip():
                final = line
    if process.returncode:
        raise CheckFailed(
            f"the code that the release carries ended with exit code {process.returncode}: {final or 'no message'}"
        )
    return _read_result(work)


def _lines(stream: Any) -> Iterator[str]:
    """Yields lines of bounded length, without control characters."""
    # The code is not trusted, and may print a line without an end.
    while text := stream.readline(4096):
        yield "".join(c if c.isprintable() else " " for c in text.rstrip("\n"))


def write_result(retrained: Retrained, folder: Path) -> None:
    """Writes a result to `folder` for `run` of a later version, with the fields of FIELDS."""
    result = {
        "made": str(retrained.checkpoint.relative_to(folder)),
        "state": list(retrained.state),
        "diverges": retrained.diverges,
        "ranks": retrained.ranks,
        "environment": list(retrained.environment),
        "fingerprint": retrained.fingerprint,
        "materials": retrained.materials,
        "subject": retrained.subject,
    }
    (folder / RESULT).write_text(json.dumps(result))


def _read_result(work: Path) -> Retrained:
    path = work / RESULT
    try:
        # The carried code wrote this file, and could have linked it to one outside of its folder.
        if path.is_symlink() or path.stat().st_size > RESULT_BYTES:
            raise ValueError("it is a link, or too long")
        result = json.loads(path.read_bytes())
        mistyped = [name for name, kind in FIELDS.items() if not isinstance(result[name], kind)]
        checkpoint = (work / result["made"]).resolve()
        # The checkpoint is read outside of the sandbox, so its path must not lead out of the folder.
        if mistyped or not checkpoint.is_relative_to(work.resolve()) or not checkpoint.is_dir():
            raise ValueError(f"{(mistyped or ['made'])[0]} has another type")
        texts = [*result["state"], *result["environment"]]
        texts += [part for name in ("materials", "subject") for pair in result[name].items() for part in pair]
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise ValueError("a text is not printable")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = printable(f"{type(error).__name__}: {error}")
        raise CheckFailed(f"the code that the release carries left a malformed result ({reason})") from None
    return Retrained(
        checkpoint=checkpoint,
        state=tuple(result["state"]),
        diverges=result["diverges"],
        ranks=result["ranks"],
        environment=tuple(result["environment"]),
        fingerprint=result["fingerprint"],
        materials=result["materials"],
        subject=result["subject"],
    )


def _variables(code: Path, work: Path) -> dict[str, str]:
    """Returns the environment variables of the carried code."""
    inherited = {name: value for name, value in os.environ.items() if ARITHMETIC.fullmatch(name)}
    # The sandbox mounts the code read-only; what the code writes goes to its work folder.
    fixed = {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(work), "TMPDIR": str(work)}
    return inherited | fixed | {"PATH": os.defpath, "LANG": "C.UTF-8", "USER": "atom", "LOGNAME": "atom"}


def confined(release: Path, code: Path, work: Path, variables: dict[str, str]) -> list[str]:
    """Returns the bwrap command, without the program to run.

    `variables` is the program's environment. Raises AtomError if bwrap is missing or cannot start.
    """
    if shutil.which("bwrap") is None:
        raise AtomError(
            "the code that this release carries runs under bubblewrap, and bwrap is not on PATH; apt-get install "
            "bubblewrap, or give --unconfined if you trust whoever made the release"
        )
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in sorted(variables.items()):
        command += ["--setenv", name, value]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    # `--dev` makes a minimal /dev, which has no GPUs.
    for device in sorted(glob.glob("/dev/nvidia*")):
        command += ["--dev-bind", device, device]
    for path in _python_paths():
        command += ["--ro-bind-try", path, path]
    command += ["--ro-bind", str(release), str(release), "--ro-bind", str(code), str(code)]
    # Texts that a release has by reference are in a folder beside it.
    rebuilt = str(rebuild.folder_of(release))
    command += ["--ro-bind-try", rebuilt, rebuilt]
    command += ["--bind", str(work), str(work), "--chdir", str(work)]
    # Many machines forbid what bwrap needs, and that shows only when it starts.
    probe = subprocess.run([*command, "true"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if probe.returncode:
        from stages.rl.sandbox.cell import remedy  # which Linux alone can import

        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise AtomError(
            "the code that this release carries runs under bubblewrap, which cannot start here: "
            f"{reason}{remedy(reason)}; replay on another machine, or give --unconfined if you trust whoever made the "
            "release"
        )
    return command


def _python_paths() -> list[str]:
    """Returns folders and files that Python and its packages need.

    No other folders of sys.path: the working folder can be one of them, and with it a home.
    """
    system_paths = ["/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/ld.so.conf", "/sys"]
    system_paths += ["/etc/ld.so.conf.d", "/etc/localtime", "/etc/passwd", "/etc/nsswitch.conf"]
    python_paths = [sys.prefix, sys.base_prefix, str(Path(os.path.realpath(sys.executable)).parent.parent)]
    python_paths += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys([*system_paths, *(path for path in python_paths if path not in ("/", ""))]))
