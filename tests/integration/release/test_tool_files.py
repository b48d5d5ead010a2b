"""Files that people run or rely on are those that this tool writes: `verify` says so of each, and of what it cannot
compare; a check that finds nothing to compare does not hold, and none ends in a traceback."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from release.cards.plots import entries as entries_of
from release.checks import cards, check_runner, evidence, loading, order, scores, source_code, tool_files, weights
from release.checks.check import Findings
from release.checks.check_runner import CheckRunner, guarded, run_check
from release.checks.loading import load_models
from release.checks.verdict import CheckResult, answer
from release.facts import model_facts
from release.facts.published_tables import to_json
from release.opened_release import Release
from release.untrusted import Tree
from stages.export.hf import generation_config, model_tokenizer_config
from stages.formats.tokenizer import tokenizer_config
from stages.train.checkpoint import release_checkpoint
from tests.fixtures import release_fixtures
from tests.fixtures.audit_fixtures import verify
from tests.fixtures.forgery_fixtures import forge, sum_again


@pytest.fixture
def model(built: Path, tmp_path: Path) -> Path:
    """A repository of a model alone."""
    return Path(shutil.copytree(built / "model", tmp_path / "alone"))


@pytest.fixture
def chat_model(model: Path) -> Path:
    """The same of a model that converses."""
    log = release_fixtures.training_lines("sft", 2)
    (model / "training/sft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    ids = {token: number for number, token in enumerate(release_fixtures.SPECIAL)}
    (model / "generation_config.json").write_bytes(generation_config(True, ids))
    config = model_tokenizer_config(tokenizer_config(), release_fixtures.CONTEXT, converses=True)
    release_fixtures.write_json(model / "tokenizer_config.json", config)
    (model / model_facts.SERVE_FILE).write_text(model_facts.serve_config(model, "local/tiny", "0.1.0"))
    return model


def problems(model: Path) -> list[str]:
    return tool_files.tool_files(Release(model, "model")).problems


@pytest.mark.parametrize(
    "option",
    ["trust-remote-code: true", "tool-parser-plugin: evil.py", "middleware: evil.Spy", "hf-overrides: {}"],
)
def test_another_option_of_a_server_is_named(option: str, chat_model: Path) -> None:
    assert problems(chat_model) == []
    path = chat_model / model_facts.SERVE_FILE
    own = path.read_text()
    path.write_text(f"{own}{option}\n")
    assert problems(chat_model) == ["serve.yaml is not what this atom writes for the model"]
    path.write_text(own.replace("model: local/tiny", "model: evil/tiny"))
    assert problems(chat_model) == ["serve.yaml is not what this atom writes for the model"]
    path.unlink()
    assert problems(chat_model) == ["serve.yaml is not what this atom writes for the model"]


@pytest.mark.parametrize("name", ["chat_template.jinja", "training_chat_template.jinja", "tokenizer_config.json"])
def test_a_template_of_another_model_is_skipped_and_no_other_one(name: str, model: Path) -> None:
    text = (model / name).read_text()
    (model / name).write_text(text.replace("<|im_end|>", "<|pad|>"))
    assert problems(model) == [f"{name} is not what this atom writes"]
    release_fixtures.write_json(model / "base.json", {"repo": "local/other", "license": "MIT", "files": {}})
    findings = tool_files.tool_files(Release(model, "model"))
    assert findings.problems == []
    assert findings.skipped["templates"] == f"{name}: taken over from local/other, and not as this atom writes them"


def test_the_license_is_the_one_that_the_card_states(model: Path) -> None:
    stub = "SPDX-License-Identifier: MIT\n\nThe text of this license: https://spdx.org/licenses/MIT.html\n"
    (model / "LICENSE").write_text(stub)
    assert problems(model) == ["README.md states another license than LICENSE, which is the text of MIT"]
    (model / "LICENSE").write_text(f"{stub}And you owe us money.\n")
    assert problems(model) == ["LICENSE is not the text that this atom writes"]


def test_attributes_of_git_name_large_files_and_nothing_else(model: Path) -> None:
    path = model / ".gitattributes"
    path.write_text("# large files\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n\n")
    assert verify(model).ok
    path.write_text("* filter=evil\n")
    bad = [check for check in verify(model).checks if check.ok is False]
    assert [check.name for check in bad] == ["formats"] and bad[0].wrong == [
        ".gitattributes has other lines than those by which a Hub says which files are large"
    ]


def grey(png: bytes, **entries: str) -> bytes:
    """A grey picture with the text entries of another one."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    image, info, out = Image.open(io.BytesIO(png)), PngInfo(), io.BytesIO()
    for name, value in ((entries_of(png) or {}) | entries).items():
        info.add_text(name, value)
    Image.new("RGBA", image.size, "grey").save(out, "PNG", pnginfo=info)
    return out.getvalue()


@pytest.mark.parametrize("name", ["training.png", "progress.png"])
def test_a_picture_is_drawn_again_and_compared(name: str, model: Path) -> None:
    subject, path = Release(model, "model"), model / name
    assert run_check("plots", lambda: cards.drawn_plots(subject)).ok
    published = path.read_bytes()
    path.write_bytes(grey(published))
    assert cards.drawn_plots(subject).problems == [f"alone/{name} does not show the numbers beside it"]
    path.write_bytes(grey(published, Software="Matplotlib version1.0.0, https://matplotlib.org/"))
    findings = cards.drawn_plots(subject)
    assert findings.problems == [] and findings.skipped["plots"].startswith("plots: drawn by Matplotlib version1.0.0")


def test_a_picture_of_the_same_look_is_the_same(model: Path) -> None:
    """Another processor rounds a color here and there."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path = model / "training.png"
    entries, image = entries_of(path.read_bytes()) or {}, Image.open(path).convert("RGBA")
    info = PngInfo()
    for name, value in entries.items():
        info.add_text(name, value)
    for difference, same in ((cards.ROUNDED, True), (cards.ROUNDED + 1, False)):
        other = image.copy()
        other.putpixel((3, 3), (255 - difference, 255, 255, 255))
        other.save(path, pnginfo=info)
        assert (cards.drawn_plots(Release(model, "model")).problems == []) is same


def in_shards(model: Path) -> list[str]:
    """Writes the weights of a model in shards. Returns their names."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    most = sum(tensor.nbytes for tensor in tensors.values()) // 2
    files = release_checkpoint.write_files(model, "model", sorted(tensors.items()), most)
    size = sum(tensor.nbytes for tensor in tensors.values())
    release_checkpoint.write_index(model, "model", files, {"total_size": size})
    return sorted(set(files.values()))


def test_shards_and_their_index_agree(model: Path) -> None:
    names = in_shards(model)
    assert len(names) == 3 and weights.shards(Release(model, "model")).problems == []
    index = model / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    stated = "model.safetensors.index.json does not list the tensors of its files, and these alone"
    for change in ({"metadata": {"total_size": 1}}, {"weight_map": {**body["weight_map"], "more": names[0]}}, {"x": 1}):
        release_fixtures.write_json(index, body | change)
        assert weights.shards(Release(model, "model")).problems == [stated]
    release_fixtures.write_json(index, body)
    shutil.copyfile(model / names[0], model / "model-00004-of-00004.safetensors")
    assert "are not one file or the shards of one index" in weights.shards(Release(model, "model")).problems[0]
    (model / "model-00004-of-00004.safetensors").unlink()
    tensors = load_file(model / names[2])
    save_file({name: tensor for name, tensor in tensors.items() if name != sorted(tensors)[0]}, model / names[2])
    assert weights.shards(Release(model, "model")).problems == [stated]
    (model / names[2]).unlink()
    assert "are not one file or the shards of one index" in weights.shards(Release(model, "model")).problems[0]
    for name in [*names[:2], index.name]:
        (model / name).unlink()
    assert weights.shards(Release(model, "model")).problems == ["model.safetensors is missing"]


def nothing_ran(folder: Path) -> None:
    skipped = {"runtime": "vLLM", "status": "skipped", "reason": "it is not here"}
    runs = [{"folder": "model", **skipped, "runtime": name} for name in ("transformers 4", "vLLM")]
    runs.append({"folder": "model", "runtime": "transformers 5", "status": "reference", "version": "5"})
    release_fixtures.write_json(folder / "evidence/runtimes.json", runs)


def no_nodes(folder: Path) -> None:
    about = {**release_fixtures.release_info().to_json(), "nodes": {}}
    release_fixtures.write_json(folder / "evidence/release.json", about)


EMPTY: dict[Callable[[Release], Findings], Callable[[Path], None]] = {
    loading.chat_templates: lambda folder: None,
    evidence.manifest_digests: lambda folder: None,
    order.segments: lambda folder: None,
    weights.runtimes: nothing_ran,
    scores.scores: lambda folder: None,
    source_code.source_files: no_nodes,
    weights.tensors: lambda folder: None,
}
"""Checks, and what leaves them nothing to compare."""


@pytest.mark.parametrize("check", EMPTY, ids=lambda check: check.__name__)
def test_a_check_that_finds_nothing_to_compare_does_not_hold(
    check: Callable[[Release], Findings], tmp_path: Path
) -> None:
    EMPTY[check](tmp_path)
    result = run_check("it", lambda: check(Release(tmp_path, "evidence")))
    assert result.ok is None and result.detail != "holds" and result.wrong == []


class Panic(BaseException):
    """As PyO3's PanicException."""


def panic() -> CheckResult:
    raise Panic("retry-limit-in-match over")


def test_a_panic_of_a_parser_is_a_finding(tmp_path: Path) -> None:
    expected = answer("it", ["cannot be checked: Panic: retry-limit-in-match over"])
    assert guarded("it", panic) == expected
    assert CheckRunner(Release(tmp_path), Tree(), False).run("it", panic) == expected
    with pytest.raises(KeyboardInterrupt):
        guarded("it", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert check_runner.run_check("it", lambda: loading.compile_template("{{").render()).ok is False  # type: ignore[arg-type]


ENDLESS = {"type": "Split", "pattern": {"Regex": "(?:a|aa)+c"}, "behavior": "Isolated", "invert": False}
"""A pre-tokenizer whose regular expression gives up: the library panics."""


def test_a_tokenizer_that_panics_ends_in_a_verdict(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    steps = {"type": "Sequence", "pretokenizers": [ENDLESS, tokenizer["pre_tokenizer"]]}
    content = json.dumps(tokenizer | {"pre_tokenizer": steps}, ensure_ascii=False, separators=(",", ":"))
    forge(model, "tokenizer.json", content.encode())
    goldens = json.loads((model / "goldens.json").read_text())
    goldens["conversations"][0]["text"] = goldens["rows"][0]["text"] = "a" * 64 + "!"
    forge(model, "goldens.json", to_json(goldens, sort_keys=False))
    sum_again(model)
    bad = {check.name: check.detail for check in verify(model).checks if check.ok is False}
    assert bad.keys() == {"chat_templates"} and "PanicException: Onig" in bad["chat_templates"]
    (report,) = load_models([model])
    assert ["PanicException" in problem.text for problem in report.problems] == [True]
