"""Texts that a model writes from the documents of another source: their records, licenses and dispositions, the same
bytes after a kill and for any number of tasks, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.core.errors import AtomError, CheckFailed, RecipeError
from pipeline.core.store import Artifact, write_manifest
from release import published_files
from release.cards import document_tables
from release.facts import data_facts
from stages import graph
from stages.data.acquire import generate_stage
from stages.data.acquire.licenses.expressions import forbids_derivatives
from stages.data.acquire.readers.generated import Generated
from stages.data.curate import dedup_stage, duplicates_stage, filter_stage, representatives_stage
from stages.data.recipe import load
from stages.formats.table import TOKENIZED, write_rows
from stages.recipe import ReleaseRecipe
from stages.scorers import answer_of
from stages.tasks import eval_set
from tests.fixtures import ROOT, release_fixtures
from tests.fixtures.generated_source_fixtures import READER, TEXTS, acquire_notes, digest_of, rows, run, write_recipe
from tests.fixtures.home_fixtures import SMOKE
from tests.fixtures.run_fixtures import RecordingReport


def test_texts_from_a_source_by_reference_are_published_for_a_stated_reason(tmp_path: Path) -> None:
    data = write_recipe(tmp_path, f"sha256:{'0' * 64}")
    body = yaml.safe_load(SMOKE.read_text())

    def problems(**release: Any) -> str:
        config = ReleaseRecipe.model_validate({**body, "release": {**body["release"], **release}})
        return " ".join(graph._problems_of_generated(config, data))

    agreed = {"rewritten": "the publisher of notes agreed"}
    assert not problems() and not problems(by_reference=["notes"], publish_generated=agreed)
    assert "rewritten is generated from them; state in release.publish_generated why" in problems(
        by_reference=["notes"]
    )
    assert "publish_generated names rewritten, which is not generated from a source by" in problems(
        publish_generated=agreed
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a generator and a recipe that pins it."""
    folder = tmp_path_factory.mktemp("generated")
    release_fixtures.save_model(folder / "model", seed=3, context=128)
    acquire_notes(folder)
    return folder


@pytest.fixture(scope="module")
def calm(place: Path) -> Artifact:
    run("generate", place, "rewritten", place / "calm-work", place / "calm")
    return write_manifest(place / "calm", "acquire-rewritten")


def test_each_text_states_its_origin(calm: Artifact, place: Path) -> None:
    records, documents = rows(calm, "generated"), {row["id"]: row for row in rows(calm, "documents")}
    refused = {row["id"]: row for row in rows(calm, "failed")}
    parents = [f"notes/{name}:{n}" for name, texts in TEXTS.items() for n in range(1, len(texts) + 1)]
    assert [row["parent"] for row in records] == parents and len(documents) > 3
    assert {row["id"] for row in records} == documents.keys() | refused.keys() and not documents.keys() & refused.keys()
    assert len({row["seed"] for row in records}) == len(records)
    stated = {"generator": "tiny", "generator_digest": digest_of(place), "prompt": "Rewrite: {text}", "form": "chat",
              "temperature": 1.0, "max_new_tokens": 16}  # fmt: skip
    assert all({name: row[name] for name in stated} == stated for row in records)
    licenses = dict(zip(parents, [license for texts in TEXTS.values() for _, license in texts], strict=True))
    for row in documents.values():
        assert row["license"] == f"{licenses[row['origin'].partition('#')[2]]} AND MIT" and row["text"]
    by_number = {id.rpartition("b.jsonl:")[2]: row for id, row in refused.items()}
    assert by_number["1"]["reason"] == "derivatives: CC-BY-NC-ND-4.0 forbids derived texts"
    assert by_number["1"]["license"] == "CC-BY-NC-ND-4.0"
    assert "<|im_end|>" in by_number["2"]["reason"] and "context of 128 tokens" in by_number["3"]["reason"]
    assert [row["parent"] for row in rows(calm, "derived")] == [row["parent"] for row in records
                                                              if row["id"] in documents]  # fmt: skip
    declared = json.loads((calm / "source.json").read_text())
    assert declared["generated"]["generator_terms"] == "outputs are free" and declared["documents_no_derivatives"] == 1
    assert declared["tree_digest"] == digest_of(place)


def test_a_text_is_what_the_model_draws_alone(calm: Artifact, place: Path) -> None:
    """Without datatrove and batches: the same text up to rounding, of which 16 tokens of a random model show none."""
    from transformers import AutoTokenizer

    from stages.generation.in_process import InProcess
    from stages.generation.protocols import Prompt

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = InProcess(place / "model", (1, 3), 16)
    documents = {row["id"]: row["text"] for row in rows(calm, "documents")}
    texts = {f"notes/{name}:{n}": text for name, lines in TEXTS.items() for n, (text, _) in enumerate(lines, 1)}
    for row in rows(calm, "generated"):
        if row["id"] not in documents:
            continue
        message = {"role": "user", "content": f"Rewrite: {texts[row['parent']]}"}
        prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        (completion,) = model.generate([Prompt(tuple(tokenizer(prompt).input_ids), row["seed"])])
        ids = completion.ids[:-1] if completion.finished else completion.ids
        assert answer_of(tokenizer.decode(ids)) == documents[row["id"]], row["id"]
        assert (row["tokens"], row["finished"]) == (len(completion.ids), completion.finished)


def test_a_killed_run_ends_in_the_same_bytes(calm: Artifact, place: Path, tmp_path: Path) -> None:
    """SIGKILL in the third batch; and the parts by two tasks, the last one first."""
    script = (
        "import os, signal, sys; from pathlib import Path; from stages.data.acquire.generate_stage import Generator\n"
        "draw, calls = Generator.draw, []\n"
        "def killed(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return draw(*arguments)\n"
        "Generator.draw = killed\n"
        "from tests.fixtures.generated_source_fixtures import run\n"
        "run('generate', *map(lambda x: x if x == 'rewritten' else Path(x), sys.argv[1:]))\n"
    )
    work, out = tmp_path / "work", tmp_path / "out"
    arguments = [str(place), "rewritten", str(work), str(out)]
    process = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, env={**os.environ}, check=False)
    assert process.returncode == -signal.SIGKILL
    sealed = {path.name for path in work.glob("rewritten-*")}
    assert sealed == {"rewritten-00000-000000", "rewritten-00000-000001"}
    times = {name: (work / name / "texts.parquet").stat().st_mtime_ns for name in sealed}
    run("generate", place, "rewritten", work, out)
    assert {name: (work / name / "texts.parquet").stat().st_mtime_ns for name in sealed} == times
    assert write_manifest(out, "again").digest == calm.digest
    run("generate", place, "rewritten", tmp_path / "other-work", tmp_path / "other", shards=(1, 0))
    assert write_manifest(tmp_path / "other", "other").digest == calm.digest


def publish(folder: Path, artifacts: dict[str, Artifact]) -> Path:
    """The dataset of a release with these artifacts, and ten tokens for each kept document."""
    for node, artifact in artifacts.items():
        for file, target in published_files.placement(node, artifact):
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact / file, folder / target)
    for path in (folder / "dataset/kept").glob("*/*.parquet"):
        kept = pq.read_table(path).to_pylist()
        place = {"part": 0, "ordinal": 0, "bytes": 0, "tokens": 10, "loss_from": 0}
        tokens = [{name: row[name] for name in TOKENIZED if name in row} | place for row in kept]
        write_rows(folder / "dataset/tokens/documents" / path.parent.name / path.name, TOKENIZED, tokens)
    return folder / "dataset"


def test_curation_marks_them_and_the_card_counts_them(calm: Artifact, place: Path, tmp_path: Path) -> None:
    recipe = load(place / "data.yaml").resolved()
    inputs = {"notes": Artifact.open(place / "notes-out"), "rewritten": calm}

    def sealed(stage: Any, config: dict[str, Any], **inputs: Artifact) -> Artifact:
        out = tmp_path / stage.name
        out.mkdir()
        stage.run(stage.config.model_validate(config), inputs, out, out, RecordingReport())
        return write_manifest(out, stage.name)

    inputs["items"] = sealed(eval_set.STAGE, {"problems": {"add": 2}, "seed": 0})
    filtered = sealed(filter_stage.STAGE, recipe.filter_config(0), **inputs)
    searched = {
        "filter": filtered,
        "duplicates": sealed(duplicates_stage.STAGE, recipe.duplicates_config(), filter=filtered),
    }
    copies = sealed(representatives_stage.STAGE, recipe.representatives_config(), **searched)
    kept = sealed(dedup_stage.STAGE, recipe.dedup_config(), **searched, representatives=copies)
    for artifact in (filtered, kept):
        (first, second) = sorted((artifact / "dispositions/rewritten").glob("*.parquet"))
        marked = [row for path in (first, second) for row in pq.read_table(path).to_pylist()]
        assert len(marked) == 11 and {row["generator"] for row in marked} == {"tiny"}
        assert {row["rule"] for row in marked} >= {"license/no-derivatives", "generation/unusable"}
        assert "generator" not in pq.read_schema(artifact / "dispositions/notes/part-00000.parquet").names
    dataset = publish(tmp_path, {"dedup": kept, "acquire-notes": inputs["notes"], "acquire-rewritten": calm})
    sources = data_facts._read_sources(dataset)
    *_, line = document_tables.synthetic(data_facts.DataFacts(sources))
    count, others = sources["rewritten"].kept, sources["notes"].kept
    origin = "made from notes. Its license: Apache-2.0. Its terms for outputs: outputs are free."
    assert (
        count
        and others
        and line
        == (
            f"- **tiny**: {count} documents, {10 * count} tokens ({count / (count + others):.1%} of all), {origin} Digest of "
            f"its files: `{digest_of(place)}`."
        )
    )
    (dataset / "generated/rewritten/part-00001.parquet").unlink()
    with pytest.raises(CheckFailed, match="generated/rewritten has records of 7 texts, and 11 documents"):
        data_facts._read_sources(dataset)


def test_a_generator_with_other_weights_is_refused(place: Path, calm: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(place / "notes", folder / "notes")
    release_fixtures.save_model(folder / "model", seed=4, context=128)
    recipe = write_recipe(folder, pinned := digest_of(place))
    words = f"rewritten: the generator tiny is pinned to {pinned}, but its files at .* have sha256:"
    with pytest.raises(RecipeError, match=words):
        recipe.resolved()  # what a plan does
    shutil.rmtree(folder / "model")
    shutil.copytree(place / "model", folder / "model")
    config = generate_stage.STAGE.config.model_validate(
        load(folder / "data.yaml").resolved().acquire_config("rewritten", 0)
    )
    release_fixtures.save_model(folder / "model", seed=4, context=128)
    with pytest.raises(RecipeError, match=words):  # after the plan
        generate_stage.STAGE.run(
            config, {"parent": Artifact.open(place / "notes-out")}, tmp_path, tmp_path, RecordingReport()
        )


def test_a_generator_that_cannot_answer_is_one_sentence(place: Path, tmp_path: Path) -> None:
    def generator(folder: Path, **settings: Any) -> None:
        reader = {**READER, "path": str(folder), **settings}
        generate_stage.Generator(Generated.model_validate(reader), tmp_path)

    with pytest.raises(AtomError, match="max_new_tokens = 128 leaves none for a prompt"):
        generator(place / "model", max_new_tokens=128)
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    with pytest.raises(AtomError, match="has no chat template; use form: text"):
        generator(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{")
    with pytest.raises(AtomError, match="the generator tiny at .* cannot be loaded: "):
        generator(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"from_source": "nowhere"}, "rewritten is made from nowhere, which is no source"),
        ({"from_source": "rewritten"}, "which is a source of generated; name a source of plain text"),
        ({"prompt": "Rewrite."}, r"prompt has \{text\} 0 times"),
    ],
)
def test_settings_that_make_no_texts_are_refused(
    place: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        write_recipe(tmp_path, "sha256:" + "0" * 64, **change)


def test_a_source_that_forbids_derivatives_is_refused(place: Path) -> None:
    text = (place / "data.yaml").read_text()
    forbidden = text.replace('"license": "CC-BY-4.0"', '"license": "CC-BY-ND-4.0"')
    path = place / "forbidden.yaml"
    path.write_text(forbidden)
    with pytest.raises(RecipeError, match="notes, whose license CC-BY-ND-4.0 forbids derived texts"):
        load(path)


@pytest.mark.parametrize(
    ("expression", "forbidden"),
    [
        ("CC-BY-4.0", False),
        ("CC-BY-ND-4.0", True),
        ("CC-BY-NC-ND-3.0-DE", True),
        ("CC-BY-ND-4.0 OR MIT", False),
        ("CC-BY-ND-4.0 AND MIT", True),
        ("(CC-BY-ND-4.0 OR MIT) AND Apache-2.0", False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("LicenseRef-unknown-web", False),
        ("", True),
        ("MIT AND", True),
    ],
)
def test_licenses_that_forbid_derived_texts(expression: str, forbidden: bool) -> None:
    assert forbids_derivatives(expression) is forbidden
