"""The supply of sources against what the phases ask for: epochs, where they are refused, and what has to be probed."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import recipe_commands
from pipeline.core.errors import RecipeError
from pipeline.graph import recipe as recipes
from pipeline.graph import supply
from pipeline.graph.supply import SourceSupply
from stages import graph
from stages.data.acquire import hub_files
from stages.data.acquire.hub_files import LockedSource
from stages.data.acquire.source_probe import Probe
from stages.data.recipe import load
from tests.fixtures import ROOT


def row(tokens: float | None, **changes: Any) -> SourceSupply:
    fields = {"basis": "stated", "where": "the card", "asked": {"pretrain": 90.0, "sft": 10.0}}
    return SourceSupply(
        **{"source": "web", "tokens": tokens, "most_epochs": 4.0, "lacks_probe": False} | fields | changes
    )


def test_more_epochs_than_the_recipe_takes_are_refused() -> None:
    assert supply.unserved([row(25.0), row(None, basis="unknown")]) == []
    (sentence,) = supply.unserved([row(24.0)])
    assert "100 tokens are asked for by pretrain, sft, and 24 are stated: 4.2 epochs, more than 4" in sentence
    acknowledged = float(re.findall(r"acknowledged_epochs: {web: ([\d.]+)}", sentence)[0])
    assert supply.unserved([row(24.0, most_epochs=acknowledged)]) == []
    (nothing,) = supply.unserved([row(0.0, basis="probed", most_epochs=1e6)])
    assert "curation leaves none of its sample (the card)" in nothing
    assert (row(50.0).epochs, row(0.0).epochs, row(None).epochs) == (2.0, math.inf, None)
    assert row(0.0).json()["epochs"] is None
    with pytest.raises(RecipeError, match=r"recipe x: source web: .* \(and 1 more\)$"):
        supply.require_served("recipe x", [row(1.0), row(2.0)])
    with pytest.raises(RecipeError, match=r"the supply of web is not probed.*supply.acknowledged_unprobed"):
        supply.require_probed("recipe x", [row(50.0, lacks_probe=True)])
    assert supply.origins([row(1.0), row(2.0, source="code"), row(None, basis="unknown", where="")]) == [
        "stated supply of web, code: the card", "unknown supply of web",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["atom-1b-a300m", "atom-30b-a3b", "atom-235b-a22b"])
def test_cluster_recipes_ask_for_what_is_stated(name: str) -> None:
    recipe = recipes.load(name)
    data: Any = recipe.data
    rows = {each.source: each for each in graph.supply(recipe)}

    assert supply.unserved(list(rows.values())) == []
    extracted = {"math_forum", "math_papers", "math_medicine", "explained_forum", "explained_code"}
    # Of the videos, most texts are machine translations of others. Nobody counted the answers without reasoning, nor the
    # rows of these files.
    uncounted = extracted | {"videos", "math_direct", "science", "tools"}
    assert {each.source for each in rows.values() if each.basis == "unknown"} <= uncounted
    # Tokens of the phases, by hand: a ramp has smaller steps.
    config: Any = recipe.config
    pretrain = config.pretrain
    tokens = pretrain.steps * pretrain.batch.global_tokens
    ends = [0, *(part.until_step for part in pretrain.batch.ramp)]
    for part, before in zip(pretrain.batch.ramp, ends, strict=False):
        tokens -= (part.until_step - before) * (pretrain.batch.global_tokens - part.global_tokens)
    assert rows["code"].asked["pretrain"] == pytest.approx(pretrain.mix["code"] * tokens)
    assert rows["code"].asked.keys() >= {"pretrain", "midtrain", "longcontext-1", "longcontext-2", "sft"}
    # All that could be probed is to be probed; what is drawn cannot be.
    assert {each.source for each in rows.values() if each.lacks_probe} == {
        source.name for source in data.sources if source.reader.reader == "hub"
    }


def test_the_supply_of_drawn_documents_is_computed() -> None:
    rows = {each.source: each for each in graph.supply(recipes.load("atom-tiny"))}
    assert {name for name, each in rows.items() if each.basis == "unknown"} == {"docstrings", "code"}
    sums = rows["sums"]
    assert sums.basis == "computed" and sums.tokens and sums.epochs and sums.epochs > 4
    # Repeats of them are shown, and not refused.
    assert supply.unserved([sums]) == [] and sums.json()["most_epochs"] is None


def test_different_documents_are_counted() -> None:
    """Against drawing them all: texts that differ, and their tokens if each digit is one and other text four bytes."""
    recipe: Any = recipes.load("atom-tiny").data
    sources = {each.name: each for each in recipe.sources}
    for name in ("sums", "worked", "chat_problems", "courtesies"):
        source = sources[name]
        reader = source.reader.model_copy(update={"count": 3000})
        texts = {each.text for each in reader.documents(name, 0, ())}
        assert reader.different == pytest.approx(len(texts), rel=0.1)
        tokens = sum(1 + sum(max(1, len(each) / 4) for each in re.findall(r"\d|\D+", text)) for text in texts)
        assert reader.expected_tokens(4) == pytest.approx(tokens, rel=0.15)


def test_a_probe_goes_before_what_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` and `submit` by a lock file: probed, with other settings, with a problem, acknowledged."""
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "home"))
    smoke = yaml.safe_load((ROOT / "data_recipes/smoke.yaml").read_text())
    body = yaml.safe_load((ROOT / "pipeline/recipes/atom-smoke.yaml").read_text())
    reader = {"reader": "hub", "repo": "a/b", "pattern": "*.gz", "format": "jsonl"}
    common = {"kind": "prose", "license": "MIT", "license_evidence": "card", "origin": "here", "reader": reader}
    stated = {"tokens": 1000, "where": "the card, 2026"}
    smoke["sources"].append({"name": "web", **common, "heldout_fraction": 0.5, "supply": stated})
    body["data"] = "mine.yaml"
    first = next(iter(body["pretrain"]["mix"]))
    body["pretrain"]["mix"] |= {first: body["pretrain"]["mix"][first] / 2, "web": body["pretrain"]["mix"][first] / 2}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(smoke))
    path, lock = tmp_path / "release.yaml", tmp_path / "mine.lock.yaml"

    def write(tokens: int, section: dict[str, Any], **changes: Any) -> SourceSupply:
        source = next(each for each in load(tmp_path / "mine.yaml").sources if each.name == "web")
        fields: dict[str, Any] = {
            "settings": source.probe_settings,
            "sampled": "heads",
            "pieces": 2,
            "sampled_documents": 7,
        }
        probe = Probe(
            **fields
            | {
                "kept_tokens": tokens,
                "documents": 9,
                "bytes": 70,
                "sampled_documents": 7,
                "bytes_per_token": 4.0,
                "tokens_by": "bytes_per_token",
            }
            | changes
        )
        locked = LockedSource(
            repo="a/b", requested="main", revision="1" * 40, pattern="*.gz", probe=probe,
            files=f"sha256:{'a' * 64} 5 x.gz\n",
        )  # fmt: skip
        hub_files.write(lock, {"web": locked})
        assert hub_files.read(lock)["web"].probe == probe
        path.write_text(yaml.safe_dump(body | {"supply": section}))
        return next(each for each in graph.supply(recipes.load(str(path))) if each.source == "web")

    other = write(10**9, {}, settings="sha256:" + "0" * 64)
    assert (other.basis, other.tokens, other.lacks_probe) == ("stated", 500.0, True)
    probed = write(10**9, {})
    assert (probed.basis, probed.tokens, probed.lacks_probe) == ("probed", 5e8, False)
    assert write(10**9, {}, problem="cut").lacks_probe
    assert not write(10**9, {"acknowledged_unprobed": {"web": "a look by hand"}}, problem="cut").lacks_probe
    smoke["sources"][-1]["reader"] = {**reader, "limit": 3}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(smoke))
    assert write(9 * 10**8, {}).tokens == pytest.approx(1.5e8), "three of nine documents, half of them held out"
    smoke["sources"][-1]["reader"] = reader
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(smoke))

    def submit() -> None:
        recipe_commands.submit(str(path), "h100-pyxis", ignore_fit=True)

    write(10, {})
    for command in (submit, lambda: recipe_commands.plan(str(path), as_json=True)):
        with pytest.raises(
            RecipeError, match="source web: .* tokens are asked for by pretrain, and 5 are probed"
        ) as caught:
            command()
        assert caught.value.exit_code == 2
    write(10**9, {}, problem="cut by the network")
    with pytest.raises(RecipeError, match="the supply of web is not probed"):
        submit()
    path.write_text(yaml.safe_dump(body | {"supply": {"acknowledged_epochs": {"wep": 9}}}))
    with pytest.raises(RecipeError, match="supply.acknowledged_epochs names wep.*did you mean web"):
        recipe_commands.plan(str(path))
