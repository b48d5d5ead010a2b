"""A recipe of one's own: written as a copy of a packaged one, and checked for every problem. Nothing is run.

Problems are those of its files, of its graph, and of a cluster profile that is to run it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.core.bounds import ReleaseName
from pipeline.core.errors import AtomError, MissingData, RecipeError
from pipeline.core.store import Store
from pipeline.core.text import escaped, shown
from pipeline.core.yaml_text import line_of, parse_yaml, read_file
from pipeline.graph import budget, dag, recipe, registry, supply
from pipeline.graph.dag import Graph
from pipeline.graph.plan import is_small, plan
from pipeline.launch import cluster_profile
from pipeline.operations import fit
from pipeline.operations.fit import estimate_costs

RANKS = re.compile(r"(?<=\branks: )[1-9][0-9]*")
HEAD = """\
# {name}: a copy of {source} to begin with. `description` and `data` are the first lines to change.
#
#     atom validate {file}         every mistake, with file, line and field
#     atom diff {source} {file}    which stages your changes run again, and what they cost
#     atom plan {file}             stages, keys, memory and costs
#
# docs/configuration.md explains every setting. One that is left out has its default. `data` is the name of a packaged
# data recipe, or the path of one of your own from here.
#
# What {source} says of itself:
#
"""
MINIATURE_HEAD = """\
# {name}: the miniature of {source}, by `atom init {name} --from {source} --miniature`. It has the sections, stages,
# gates and options of {source}, with small sizes. docs/operators.md, "Miniatures", has the rule, what such a run can
# show, and how far one has been run.
#
#     atom pin {file}              sizes and digests of the sources, from the Hub that HF_ENDPOINT names
#     atom run {file}
#
"""


def write_recipe(name: str, source: str, folder: Path, start_from: str | None = None, ranks: int | None = None) -> Path:
    """Writes `<folder>/<name>.yaml` from a packaged recipe. Returns its path.

    Args:
        name: The name of the release, and of the file.
        source: The name of the packaged recipe.
        folder: The folder for the file.
        start_from: The published model with which it begins, for a packaged recipe with that section.
        ranks: Ranks of the largest phase, in proportion to which the others get theirs; None: those of the recipe.

    Raises:
        AtomError: The name is none of a release or is that of a packaged recipe, no packaged recipe is called `source`,
            the model cannot be read, or the recipe cannot be written or exists already.
    """
    origin = _packaged(name, source)
    path = folder / f"{name}.yaml"
    # The name is the first field of a packaged recipe; the comments before it stay.
    comments, _, fields = _with_start(origin, start_from).partition("\nname: ")
    head = HEAD.format(name=name, source=origin.stem, file=path.name)
    fields = fields.partition("\n")[2]
    if ranks is not None:
        fields = _with_ranks(fields, ranks, origin.stem)
    text = f"{head}{comments}\nname: {name}\n{fields}"
    _write_new(path, text)
    return path


def write_miniature(name: str, source: str, folder: Path) -> Path:
    """Writes the miniature of a packaged recipe, `<folder>/<name>.yaml`, and `<name>-data.yaml`. Returns the path.

    Raises:
        AtomError: As `write_recipe` does.
    """
    origin = _packaged(name, source)
    raw = parse_yaml(read_file(origin, "recipe"), "recipe")
    data_path = recipe.find(raw["data"], "data_recipes", "data recipe", origin.parent)
    data = parse_yaml(read_file(data_path, "data recipe"), "data recipe")
    small, corpus, switched = registry.definition().miniature(raw, data)
    path, corpus_path = folder / f"{name}.yaml", folder / f"{name}-data.yaml"
    head = MINIATURE_HEAD.format(name=name, source=origin.stem, file=path.name)
    notes = "".join(f"# switched: {line}\n" for line in switched)
    # In one form, without aliases, so that each setting stands where it counts.
    about = f"The miniature of {origin.stem}: made to see whether its stages run, and not for what the model learns."
    bodies = {
        corpus_path: corpus | {"name": f"{name}-data"},
        path: small | {"name": name, "description": about, "data": corpus_path.name},
    }
    for place, body in bodies.items():
        text = json.dumps(body)  # yaml.safe_dump would name an object that occurs twice
        lines = yaml.safe_dump(json.loads(text), sort_keys=False, allow_unicode=True, width=120)
        _write_new(place, f"{head}{notes if place == path else ''}{lines}")
    return path


def _packaged(name: str, source: str) -> Path:
    """Returns the file of a packaged recipe that becomes one of another name.

    Raises:
        AtomError: The name is none of a release or is that of a packaged recipe, or no packaged recipe is called
            `source`.
    """
    try:
        TypeAdapter(ReleaseName).validate_python(name)
    except ValidationError as error:
        raise AtomError(f"{shown(name)} {error.errors()[0]['msg']}") from None
    origin = recipe.find(source, "pipeline.recipes", "recipe")
    if origin.parent != Path(str(resources.files("pipeline.recipes"))):
        raise AtomError(f"{escaped(source, 80)} is no packaged recipe; copy your own file, and change its name")
    if (origin.parent / f"{name}.yaml").exists():
        raise AtomError(f"{name} is the name of a packaged recipe; choose another name")
    return origin


def _write_new(path: Path, text: str) -> None:
    """Writes a file that must not exist. Raises AtomError if it does, or cannot be written."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise AtomError(f"{escaped(str(path))} exists, and is not overwritten; choose another name") from None
    except OSError as error:
        raise AtomError(f"{escaped(str(path))} cannot be written ({error.strerror}); go to another folder") from None


def _with_ranks(fields: str, ranks: int, title: str) -> str:
    """Returns the text of a recipe whose largest phase gets so many ranks, and the others in proportion."""
    numbers = [int(number) for number in RANKS.findall(fields)]
    if not numbers:
        raise AtomError(f"{title} states no ranks; leave --ranks out")
    for number in numbers:
        if number * ranks % max(numbers):
            raise AtomError(
                f"--ranks {ranks} gives no whole number to the phases of {title} with {number} ranks, beside those "
                f"with {max(numbers)}; name a multiple or a fraction of that"
            )
    return RANKS.sub(lambda match: str(int(match[0]) * ranks // max(numbers)), fields)


def sampling_ranks(path: Path, store: Store) -> int:
    """Returns the most ranks of a phase of a recipe beside which servers run; 0 without such a phase."""
    nodes = dag.compose(recipe.load(str(path)), store, without_data=True).nodes.values()
    return max((node.stage.ranks(node.config) for node in nodes if node.stage.takes_servers(node.config)), default=0)


def _with_start(origin: Path, model: str | None) -> str:
    """Returns the text of a packaged recipe, which begins with this published model, if it begins with one."""
    text = origin.read_text(encoding="utf-8")
    match = re.search(r"(?<=\n)(start_from:.*\n)( .*\n)+", text)
    if match is None and model is not None:
        raise AtomError(f"{origin.stem} begins with random weights; leave --start-from out, or copy another recipe")
    if match is None:
        return text
    if model is None:
        raise AtomError(f"{origin.stem} begins with a published model; name it: --start-from RELEASE/model")
    fields = registry.definition().start_from(model)
    lines = "".join(f"  {field}: {json.dumps(value)}\n" for field, value in fields.items())
    return f"{text[: match.start()]}{match[1]}{lines}{text[match.end() :]}"


@dataclass(frozen=True)
class Problem:
    """One sentence, and where it applies: the file, with line and field if they are known."""

    file: str
    text: str
    line: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


@dataclass(frozen=True)
class Findings:
    """The result of a check."""

    # `plan`, `run` or `submit` would refuse them.
    problems: tuple[Problem, ...]
    # On what is no mistake of the recipe, such as data that is not here.
    notes: tuple[str, ...] = ()


def check(reference: str, store: Store, cluster: str | None = None) -> Findings:
    """Checks a recipe and the data recipe that it names.

    Args:
        reference: The recipe as the user wrote it.
        store: The home.
        cluster: A cluster profile that is checked too, with the fit of the recipe to it; None: no profile.
    """
    path, problems = _load(reference, "pipeline.recipes", "recipe", None)
    raw = _mapping(path)
    if path is not None and isinstance(data := raw.get("data"), str):
        problems += _data_problems(data, path)
    if cluster is not None:
        problems += _load(cluster, "pipeline.clusters", "cluster profile", cluster_profile.Profile)[1]
    # Contradictions between sections and limits of the graph follow once all files are in order.
    if problems or path is None:
        return Findings(tuple(problems))
    try:
        loaded = recipe.load(reference)
    except RecipeError as error:
        return Findings((_located(error, "recipe", path),))
    contradictions = [RecipeError(f"{loaded.title}: {text}") for text in dag.problems(loaded)]
    try:
        graph = None if contradictions else dag.compose(loaded, store, without_data=True)
    except RecipeError as error:
        contradictions.append(error)
    if contradictions or graph is None:
        return Findings(tuple(_located(error, "recipe", path) for error in contradictions))
    refused, notes = _of_graph(graph, store, cluster)
    # The imports that a config names: a missing package or file of this machine is no mistake of the recipe.
    for node in graph.nodes.values():
        try:
            notes += node.stage.inspect(node.config)
        except MissingData as error:
            notes.append(f"stage {node.name}: {error}")
        except RecipeError as error:
            refused.append(f"stage {node.name}: {error}")
    return Findings(tuple(Problem(str(path), text) for text in refused), (*graph.absent, *notes))


def _load(
    reference: str, package: str, kind: str, model: type[BaseModel] | None, base: Path | None = None
) -> tuple[Path | None, list[Problem]]:
    """Returns the file of a recipe or a profile, None if there is none, and the fields that its schema refuses.

    Without a model, the file is a recipe.
    """
    try:
        path = recipe.find(reference, package, kind, base)
    except RecipeError as error:
        return None, [Problem(reference, str(error))]
    try:
        content = read_file(path, kind)
        raw = parse_yaml(content, kind)
        if model is None:
            # Before the schema, which has the names that the extensions of the recipe add.
            recipe.install_extensions(raw, path)
            model = recipe.schema()
    except RecipeError as error:
        return path, [_located(error, kind, path)]
    try:
        model.model_validate(raw)
    except ValidationError as error:
        mistakes = recipe.mistakes(error, model, raw)
        problems = [Problem(str(path), m.text, line_of(content, m.location), m.field or None) for m in mistakes]
        return path, sorted(problems, key=lambda problem: problem.line or 0)
    return path, []


def _data_problems(reference: str, recipe_path: Path) -> list[Problem]:
    kind, definition = "data recipe", registry.definition()
    path, problems = _load(reference, "data_recipes", kind, definition.DATA_RECIPE, recipe_path.parent)
    if path is None:
        line = line_of(recipe_path.read_bytes(), ("data",))
        return [Problem(str(recipe_path), problem.text, line, "data") for problem in problems]
    if not problems:
        try:
            definition.load_data_recipe(read_file(path, kind), path)
        except RecipeError as error:
            return [_located(error, kind, path)]
    return problems


def _mapping(path: Path | None) -> dict[str, Any]:
    """Returns the fields of a file; none if it is no YAML, which is a problem already."""
    try:
        return {} if path is None else parse_yaml(read_file(path, "recipe"), "recipe")
    except RecipeError:
        return {}


def _located(error: AtomError, kind: str, path: Path) -> Problem:
    """Returns an error whose sentence begins with the kind and name of its file, and then with a line or a field."""
    text = re.sub(rf"^{kind}( {re.escape(path.stem)})?(: |, )", "", str(error))
    if match := re.match(r"line (\d+) ", text):
        return Problem(str(path), text, int(match[1]))
    match = re.match(r"[a-z_]+(\.[a-z_0-9-]+)*(?=[ :])", text)
    parts = match[0].split(".") if match else []
    raw = _mapping(path)
    if match is None or not parts or parts[0] not in raw:
        return Problem(str(path), text)
    location = [int(part) if part.isdigit() else part for part in parts]
    return Problem(str(path), text, line_of(path.read_bytes(), location), match[0])


def _of_graph(graph: Graph, store: Store, cluster: str | None) -> tuple[list[str], list[str]]:
    """Returns the sentences on what the Hub or the profile would not take, and notes."""
    profile = None if cluster is None else cluster_profile.load(cluster)
    other_python = profile is not None and profile.other_python
    rows = plan(graph, dag.states(graph, store), graph.select(None, None), other_python)
    problems, notes = [*fit.unpublishable(rows), *supply.unserved(dag.supply(graph))], []
    obstacles = dict.fromkeys(row.obstacle for row in rows if row.obstacle)
    notes += [f"on this machine: {text}" for text in obstacles]
    notes += [f"{row.state.name}: {row.state.damage}" for row in rows if row.state.damage]
    if profile is not None:
        try:
            costs = estimate_costs(rows, profile, is_small(graph))
            misfits = fit.fits(rows, {use.name: use for use in costs.uses}, profile)
        except RecipeError as error:  # ranks that do not fill nodes
            return [*problems, str(error)], notes
        problems += [f"cluster profile {profile.name}: {misfit.sentence}" for misfit in misfits if misfit.reasons]
        spent = budget.used(store, (node.key for node in graph.nodes.values()))
        notes += budget.foreseen(budget.limits_of(graph.recipe.config), spent, costs.hours)
    return problems, notes
