"""The definitions of images are twins, and the check inside an image finds what it must."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from containers import smoke
from tests.fixtures import ROOT

FOLDER = ROOT / "containers"


def sections(definition: str) -> dict[str, list[str]]:
    """The lines of an Apptainer definition by section, without comments; those before the first belong to `header`."""
    lines: dict[str, list[str]] = {"header": []}
    name = "header"
    for line in definition.splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            assert name in {"files", "post", "test", "environment"} and name not in lines, line
            lines[name] = []
        elif line.strip() and not line.startswith("#"):
            lines[name].append(line.strip())
    return lines


def test_both_definitions_have_the_same_base_files_steps_check_and_path() -> None:
    apptainer = sections((FOLDER / "atom.def").read_text())
    docker = [line.split(maxsplit=1) for line in (FOLDER / "Dockerfile").read_text().splitlines() if line[:1].isupper()]
    arguments = dict(argument.replace('"', "").split("=", 1) for name, argument in docker if name == "ARG")
    (copied,) = (argument.rstrip("/") for name, argument in docker if name == "COPY")
    install, check = (argument for name, argument in docker if name == "RUN")
    (path,) = (argument for name, argument in docker if name == "ENV")
    assert [name for name, _ in docker] == ["ARG", "FROM", "ARG", "COPY", "RUN", "RUN", "ENV"]
    assert apptainer == {
        "header": ["Bootstrap: docker", f"From: {arguments['BASE']}"],
        "files": [copied],
        "post": [install.replace("${ENVIRONMENTS}", arguments["ENVIRONMENTS"])],
        "test": [check],
        "environment": [f"export {path}"],
    }
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch@sha256:[0-9a-f]{64}", arguments["BASE"])
    assert (FOLDER / install.split()[0].rsplit("/", 1)[1]).is_file() and (FOLDER / check.rsplit("/", 1)[1]).is_file()


def test_an_image_has_every_part_of_the_project_but_what_its_base_brings() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [text for extra in smoke.EXTRAS for text in project["optional-dependencies"][extra]]
    wanted = {Requirement(text).name.lower() for text in (*project["dependencies"], *texts)}
    locked = {name.lower() for name in smoke.pins(ROOT / "requirements/image.lock")}
    assert wanted - locked == {"torch"}
    assert not [name for name in locked if re.match("torch|triton|nvidia|cuda", name)]
    assert set(smoke.EXTRAS) == set(project["optional-dependencies"]) - {"test"}
    assert smoke.pins(ROOT / "requirements/image.lock")["megatron-core"].startswith("0.19.")
    assert "vllm" in smoke.pins(ROOT / "requirements/vllm.lock")


def test_an_environment_that_does_not_exist_is_refused() -> None:
    for arguments in ([], ["gpu"], ["cpu", "vlm"]):
        process = subprocess.run([FOLDER / "install", *arguments], capture_output=True, text=True, check=False)
        assert process.returncode == 2 and "name nvidia or cpu" in process.stderr


def test_the_check_finds_a_wrong_and_a_missing_version(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    lock.write_text(f"# head\npytest=={pytest.__version__} \\\n    --hash=sha256:0\n")
    assert smoke.check_versions(Path(sys.executable), lock) == "1 packages of x.lock"
    lock.write_text(
        lock.read_text() + "PyYAML==1.0 \\\n    --hash=sha256:0\nno-such-thing==2 \\\n    --hash=sha256:0\n"
    )
    with pytest.raises(smoke.CheckFailed, match=r"PyYAML [\d.]+ instead of 1.0; no-such-thing none instead of 2"):
        smoke.check_versions(Path(sys.executable), lock)


def test_the_check_follows_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert smoke.check_requirements("pytest", ()).startswith("of ")
    for name, requires in ("outer", ['inner; extra == "more"']), ("inner", ["numpy<1", "no-such-thing"]):
        (tmp_path / f"{name}-1.dist-info").mkdir()
        lines = [f"Name: {name}", "Version: 1", *(f"Requires-Dist: {text}" for text in requires)]
        (tmp_path / f"{name}-1.dist-info/METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert smoke.check_requirements("outer", ()) == "of 1 packages"
    with pytest.raises(smoke.CheckFailed, match=r"inner needs numpy<1, not [\d.]+; inner needs no-such-thing, which"):
        smoke.check_requirements("outer", ("more",))


def test_the_check_compares_the_nccl_of_the_environments(tmp_path: Path) -> None:
    """By what each interpreter says; here scripts are in their place."""
    pythons = [tmp_path / "one", tmp_path / "two"]
    for version in ("2.30.4", "2.29.7"):
        for python in pythons:
            python.write_text(f"#!/bin/sh\necho {'2.30.4' if python == pythons[0] else version}\n")
            python.chmod(0o755)
        if version == "2.30.4":
            assert smoke.check_nccl(pythons) == version
    with pytest.raises(smoke.CheckFailed, match=r"one has 2.30.4; \S+two has 2.29.7"):
        smoke.check_nccl(pythons)
    assert (ROOT / smoke.WORKER / "atom_group.py").is_file()


def test_one_failed_check_fails_all_and_each_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        ("python", lambda: smoke.run(sys.executable, "-c", "print(1); print(2)")),
        ("exit", lambda: smoke.run(sys.executable, "-c", "raise SystemExit('no')")),
    ]
    assert smoke.report(checks[:1]) == 0 and smoke.report(checks) == 1
    assert re.fullmatch(
        r"ok      python: 2\nok      python: 2\nFAILED  exit: .* ended with 1: no\n\n", capsys.readouterr().out
    )


NOTES = """#!/bin/sh
echo "$(basename "$0") $*" | sed "s#$PWD#WORK#g" >> {calls}
case "$(basename "$0") $1" in
    "enroot import") ls source/containers > "$3" ;;
    "apptainer build") ls source/containers > "$2" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A commit with the script, beside programs that note how they are called."""
    for name in ("docker", "enroot", "apptainer"):
        (tmp_path / name).write_text(NOTES.format(calls=tmp_path / "calls"))
        (tmp_path / name).chmod(0o755)
    folder = tmp_path / "checkout"
    (folder / "containers").mkdir(parents=True)
    (folder / "containers/build").write_bytes((FOLDER / "build").read_bytes())
    (folder / "containers/build").chmod(0o755)
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "A"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def build(checkout: Path, *names: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path or f"{checkout.parent}:/usr/local/bin:/usr/bin:/bin"}
    return subprocess.run([checkout / "containers/build", *names], env=environment, cwd=checkout.parent,
                          capture_output=True, text=True, check=False)  # fmt: skip


def test_the_script_builds_the_commit_and_prints_the_line_of_a_profile(checkout: Path) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=checkout, capture_output=True, text=True,
                            check=True).stdout.strip()  # fmt: skip
    (checkout / "untracked").touch()
    for name in ("atom.sqsh", "atom.sif"):
        made = build(checkout, name)
        assert made.returncode == 0, made.stderr
        file = checkout.parent / name
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert made.stdout.splitlines() == [f"commit {commit}, sha256 {digest}", f"image: {file}"]
        assert file.read_text() == "build\n", "the files of the commit"
    assert (checkout.parent / "calls").read_text().splitlines() == [
        f"docker build --tag atom:{commit} --build-arg ENVIRONMENTS=nvidia vllm --file source/containers/Dockerfile .",
        f"enroot import --output WORK/image.sqsh dockerd://atom:{commit}",
        "apptainer build WORK/image.sif source/containers/atom.def",
    ]
    assert not list(checkout.parent.glob(".atom-image.*"))


def test_the_script_says_in_one_sentence_why_it_builds_nothing(checkout: Path) -> None:
    def sentence(*names: str, path: str | None = None) -> str:
        made = build(checkout, *names, path=path)
        assert made.returncode == 2 and not (checkout.parent / "calls").exists()
        return made.stderr.removeprefix("containers/build: ").strip()

    assert sentence() == sentence("atom.img") == "name the file to write: FILE.sqsh for pyxis, FILE.sif for Apptainer"
    assert sentence("a/atom.sif") == "there is no folder a; make it first"
    assert sentence("atom.sif", path="/usr/bin:/bin").startswith("there is no apptainer here; build on a machine")
    (checkout.parent / "atom.sif").touch()
    assert sentence("atom.sif") == "atom.sif exists, and is not overwritten; remove it, or name another file"
    (checkout / "containers/build").write_text((checkout / "containers/build").read_text() + "# changed")
    assert sentence("b.sif") == "the checkout has changes; commit them, for the image is of a commit"
