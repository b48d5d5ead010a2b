"""Imports a published model as the beginning of training: its weights and its tokenizer.

    atom run RECIPE --until import

`start_from` of the recipe names the model's repository on the Hub and the SHA-256 of its `SHA256SUMS`, which lists the
digest of every file. The tensors go through the inverse of the export's mapping; rows that pad the vocabulary are zero,
and no token has them. Optimizer states are not part of a model's repository: the optimizer starts fresh.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml

from pipeline.core.bounds import License, Line, LongLine, Words, spdx
from pipeline.core.environment import machine_paths
from pipeline.core.errors import AtomError, CheckFailed, RecipeError
from pipeline.core.stage import TORCH, Config, Estimate, Inputs, Report, Stage, operational
from pipeline.core.store import home_folder, sha256_file
from pipeline.core.text import escaped, printable, shown
from stages.formats.table import write_json
from stages.formats.tokenizer import PAD, STOPS, TOKENIZER_FILES
from stages.models.base import PositiveInt
from stages.models.registry import Model
from stages.train.checkpoint import SHARD_BYTES

if TYPE_CHECKING:
    import torch


VERSION = 1
NAME = "base.json"
TOKENIZER = "tokenizer.json"
FREE = ("bos_token_id", "dtype", "initializer_range", "torch_dtype", "use_cache")
"""Entries of config.json that may differ from the recipe's model: they say nothing of its tensors."""
SUMS_BYTES = 32 << 20
Digest = Annotated[str, Words(71, "digest: sha256:<64 hex digits>", r"sha256:[0-9a-f]{64}")]
Repo = Annotated[str, Words(96, "model of the Hub, such as local/atom-tiny", r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")]
SUMS = "SHA256SUMS"
CARD = "README.md"
CONFIG = "config.json"
CARD_BYTES, CONFIG_BYTES = 4 << 20, 4 << 20
REPOSITORY = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


class StartFrom(Config):
    """A published model from which training begins, with its tokenizer."""

    digest: Digest
    """SHA-256 of the SHA256SUMS of its repository, which has those of its files"""
    repo: Repo
    """repository of the model on the Hub, for the cards of the new models"""
    license: License
    """SPDX license of its weights, which its card must state"""
    revision: Line = operational("main")
    """branch, tag or commit of the repository"""
    folder: LongLine | None = operational(None)
    """folder that holds the repository, from that of the recipe; null: it is pulled from HF_ENDPOINT to
    $ATOM_HOME/models"""

    def resolve(self, beside: Path, home: Path) -> StartFrom:
        """With the path of its folder from that of the recipe.

        home: $ATOM_HOME. Raises ValueError for a folder that no release may name, since the recipe is published
        as it is written.
        """
        if self.folder is None:
            return self
        path = (beside / self.folder).resolve()
        plain = Path(os.path.normpath(self.folder))
        if machine := next((p for p in machine_paths(home) if plain.is_relative_to(p)), None):
            raise ValueError(
                f"start_from.folder = {escaped(self.folder)} names {machine} of this machine, and a recipe is "
                "published as it is written; write it from the folder of the recipe: "
                f"{os.path.relpath(path, beside.resolve())}"
            )
        return self.model_copy(update={"folder": str(path)})

    def place(self, home: Path) -> Path:
        """The folder of the repository on this machine, which may be missing."""
        return Path(self.folder) if self.folder else home / "models" / self.digest.removeprefix("sha256:")


class ImportConfig(StartFrom):
    model: Model
    """model section, which must describe the imported model"""
    padded_vocab_size: PositiveInt
    """rows of the embedding matrix"""
    dtype: Literal["float32", "bfloat16"] | None = operational(None)
    """type of the weights that the release has of the model; null: it has none"""


def run(config: ImportConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Imports a published model as the first phase of a recipe.

    Fills `out` with step-000000/ as pre-training does, the tokenizer's files, and base.json: repository, license
    and the digest of each imported file.

    Raises CheckFailed for files that are not those of the digest, RecipeError for a model that is another than the
    recipe's.
    """
    from stages.mcore.hf_mapping import hf_config
    from stages.train.checkpoint import release_checkpoint

    folder = config.place(home_folder())
    if config.folder is None:
        _pull(config, folder)
    digests = _verified(config, folder)
    _require_license(config, folder / CARD)
    if problem := require_dtype(config.repo, dtype_of(folder), config.dtype):
        raise RecipeError(problem)
    stated = _json(folder / CONFIG)
    ids = _special_ids(folder / TOKENIZER)
    missing = [token for token in (PAD, *STOPS) if token not in ids]
    if missing:
        raise RecipeError(
            f"{config.repo}: its tokenizer has no {missing[0]}; only models that atom exported are imported"
        )
    # The config that this recipe's model would be exported with: any other entry means another model.
    expected = hf_config(config.model, int(stated.get("vocab_size", 0)), ids[STOPS[0]], ids[PAD], "float32")
    for name, value in expected.items():
        if name not in FREE and stated.get(name) != value:
            raise RecipeError(
                f"{config.repo} is another model than the recipe's: its config.json has {name} = "
                f"{printable(str(stated.get(name)))}, the model section gives {value}"
            )
    count = write_checkpoint(folder, config, out / release_checkpoint.name_of(0))
    for name in TOKENIZER_FILES:
        if name in digests:
            shutil.copyfile(folder / name, out / name)
    about = {"repo": config.repo, "license": config.license, "digest": config.digest, "files": digests}
    write_json(out / NAME, about)
    report.note(f"imported {count} tensors of {config.repo}, {config.digest}")


def write_checkpoint(folder: Path, config: ImportConfig, step: Path) -> int:
    """Writes the checkpoint of step 0 from the exported model in `folder`.

    Returns the number of its tensors. Raises RecipeError for a model that is another than the config's.
    """
    from stages.mcore.hf_mapping import from_hf
    from stages.mcore.model import check_tensors
    from stages.train.checkpoint import release_checkpoint

    tensors = release_checkpoint.Tensors(folder)
    shapes = config.model.shapes(config.padded_vocab_size)
    step.mkdir(parents=True)
    try:
        # The inverse of the export, so that an export of the import has the same bytes.
        mapped = from_hf(tensors, config.model)
        release_checkpoint.write_shards(step, release_checkpoint.MODEL, _padded(mapped, shapes))
    except (KeyError, ValueError) as error:
        raise RecipeError(
            f"{config.repo} does not have the tensors of the recipe's model ({error}); copy the "
            "section model from its recipe"
        ) from None
    check_tensors(shapes, release_checkpoint.Tensors(step).shapes(), config.repo)
    state = {"phase": "import", "step": 0, "tokens": 0, "optimizer_step": 0}
    write_json(step / release_checkpoint.STATE, state)
    return len(shapes)


def _pull(config: ImportConfig, target: Path) -> None:
    """Pulls the files of the repository if they are not here. Raises AtomError."""
    from pipeline.hub.client import RemoteRepository, api, is_unsafe, online, translate_errors

    # The sums are pulled last, so the other files are here too. Each is compared with them later.
    if (target / SUMS).is_file() and _digest(target / SUMS) == config.digest:
        return
    remote, name = RemoteRepository(config.repo, "model"), f"{config.repo}@{config.revision}"
    with translate_errors(f"pulling {name}"), online():
        commit = remote.commit(config.revision)
        files = {path: file for path, file in remote.files(commit).items() if _is_needed(path)}
        if unsafe := [path for path in files if is_unsafe(path)]:
            raise CheckFailed(f"{name} has a file {printable(unsafe[0])}, which no release has")
        size = sum(file.size for file in files.values())
        target.mkdir(parents=True, exist_ok=True)
        if size > (free := shutil.disk_usage(target).free):
            raise AtomError(f"{name} has {size} bytes, and {target} has room for {free}; make room")
        for path in sorted(files, key=lambda path: path == SUMS):  # last: it marks what is complete
            api().hf_hub_download(config.repo, path, repo_type="model", revision=commit, local_dir=target)


def _is_needed(path: str) -> bool:
    """Returns True if a file of the repository is imported or read."""
    if path in (SUMS, CARD, CONFIG, *TOKENIZER_FILES, "model.safetensors.index.json"):
        return True
    return re.fullmatch(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors", path) is not None


def _verified(config: ImportConfig, folder: Path) -> dict[str, str]:
    """{path: SHA-256} of the needed files, each compared. Raises CheckFailed."""
    sums = folder / SUMS
    # The sums are bounded before they are read: the repository is a stranger's.
    if not sums.is_file() or sums.stat().st_size > SUMS_BYTES:
        raise CheckFailed(f"{folder} has no {SUMS}, which every model that atom published has; check start_from")
    # The recipe pins the sums, and the sums pin each file.
    if (digest := _digest(sums)) != config.digest:
        raise CheckFailed(
            f"{SUMS} of {config.repo} has the digest {digest}, and start_from.digest is {config.digest}; compare it "
            "with what the maker of the model states, then change the recipe"
        )
    listed = {}
    for line in sums.read_text("utf-8").splitlines():
        digest, _, path = line.partition("  ")
        listed[path] = digest
    needed = {path: digest for path, digest in sorted(listed.items()) if _is_needed(path)}
    for path, digest in needed.items():
        if not (folder / path).is_file() or sha256_file(folder / path) != digest:
            problem = f"{printable(path)} of {config.repo} is missing, or not the file that {SUMS} lists"
            raise CheckFailed(f"{problem}; get it again")
    return needed


def _digest(path: Path) -> str:
    return f"sha256:{sha256_file(path)}"


def _require_license(config: ImportConfig, card: Path) -> None:
    """Raises RecipeError unless the card states the recipe's license of the weights."""
    if (stated := license_of(card)).lower() != config.license.lower():
        raise RecipeError(
            f"start_from.license = {config.license}, but the card of {config.repo} states {printable(stated)}; give "
            "the license that its weights have"
        )


def _padded(
    tensors: Iterator[tuple[str, torch.Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in fp32, those of the vocabulary with rows of zeros up to their shape."""
    import torch

    for name, tensor in tensors:
        # Exports leave out the rows that pad the vocabulary.
        missing = shapes[name][0] - tensor.shape[0] if name in shapes else 0
        full = tensor.float()
        yield name, torch.cat([full, full.new_zeros(missing, *full.shape[1:])]) if missing > 0 else full


def _special_ids(path: Path) -> dict[str, int]:
    content = _json(path)
    return {token["content"]: int(token["id"]) for token in content["added_tokens"]}


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def estimate(config: ImportConfig) -> Estimate:
    total = 4 * config.model.parameters(config.padded_vocab_size)["total"]
    # An interpreter with its libraries, and the tensors of one file.
    memory = 700_000_000 + min(total, SHARD_BYTES)
    return Estimate(cpu_seconds=10 + total / 2e8, memory_bytes=memory, disk_bytes=2 * total)


def start_from_section(model: str) -> dict[str, str]:
    """The section start_from for a published model.

    A published model is a model's folder of a release, such as RELEASE/model, or a repository of the Hub, with @ and a
    revision if it is not `main`. Raises AtomError.
    """
    if Path(model).is_dir():
        return _stated(Path(model), _repository_of(Path(model))) | {"folder": _portable(model)}
    if (match := REPOSITORY.fullmatch(model)) is None:
        raise AtomError(f"{shown(model)} is neither a folder here nor a repository of the Hub such as local/atom-tiny")
    revision = match["revision"] or "main"
    with tempfile.TemporaryDirectory() as folder:
        _pull_statement(match["repo"], revision, Path(folder))
        return _stated(Path(folder), match["repo"]) | ({} if revision == "main" else {"revision": revision})


def license_of(card: Path) -> str:
    """The license that the metadata of a card state; `None` if they state none, or are no YAML."""
    text = card.read_text("utf-8", "replace") if card.is_file() and card.stat().st_size <= CARD_BYTES else ""
    head = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        metadata = None
    fields: Mapping[str, Any] = metadata if isinstance(metadata, Mapping) else {}
    return str(fields.get("license_name") if fields.get("license") == "other" else fields.get("license"))


def dtype_of(folder: Path) -> str | None:
    """The type of the weights that config.json in a folder states; None if it is not there, or says nothing of it."""
    path = folder / CONFIG
    try:
        stated = json.loads(path.read_text("utf-8")) if path.stat().st_size <= CONFIG_BYTES else None
    except (OSError, ValueError):
        return None  # the stage `import` says what is wrong with it
    dtype = (stated.get("dtype") or stated.get("torch_dtype")) if isinstance(stated, dict) else None
    return dtype if isinstance(dtype, str) else None


def require_dtype(repo: str, published: str | None, dtype: str | None) -> str | None:
    """A sentence if the first phase would publish its weights in another type than those of the model.

    None if not, or if one of them is not known.
    """
    if None in (published, dtype) or published == dtype:
        return None
    return (
        f"start_from: {repo} is published in {printable(str(published))}, and after the first phase of this recipe "
        f"models are published in {dtype}, while a release holds the model that it begins with bit for bit; set the "
        f"precision of that phase to {'fp32' if published == 'float32' else 'bf16'}"
    )


def _stated(folder: Path, repo: str) -> dict[str, str]:
    """The fields that the files of a repository give. Raises CheckFailed."""
    if not (folder / SUMS).is_file():
        raise CheckFailed(f"{folder} has no {SUMS}, which every model that atom published has; name such a model")
    stated = license_of(folder / CARD)
    try:
        license = spdx(stated)
    except ValueError:
        raise CheckFailed(f"the card of {repo} states no license that SPDX knows: {printable(stated)}") from None
    return {"repo": repo, "digest": f"sha256:{sha256_file(folder / SUMS)}", "license": license}


def _portable(folder: str) -> str:
    """A path as a recipe in the present folder may have it, which is published as it is written."""
    is_of_machine = any(Path(folder).is_relative_to(path) for path in machine_paths(home_folder()))
    return os.path.relpath(folder) if is_of_machine else folder


def _repository_of(folder: Path) -> str:
    """The repository of a model's folder of a release, by the release's own statement. Raises AtomError."""
    path, kind = folder.resolve().parent / "evidence/release.json", re.fullmatch("model(|-.+)", folder.resolve().name)
    try:
        about = json.loads(path.read_text("utf-8"))
        return f"{about['namespace']}/{about['name']}{kind[1]}"  # type: ignore[index]
    except (OSError, ValueError, KeyError, TypeError):
        raise AtomError(
            f"{folder} is no model's folder of a release, such as RELEASE/model; name such a folder, or the repository "
            "on the Hub"
        ) from None


def _pull_statement(repo: str, revision: str, target: Path) -> None:
    """Pulls what states the model, not its weights. Raises AtomError."""
    from pipeline.hub.client import RemoteRepository, api, translate_errors

    remote, name = RemoteRepository(repo, "model"), f"{repo}@{revision}"
    with translate_errors(f"reading {name}"):
        commit = remote.commit(revision)
        for path in sorted({SUMS, CARD} & remote.files(commit).keys()):
            api().hf_hub_download(repo, path, repo_type="model", revision=commit, local_dir=target)


STAGE = Stage("import", VERSION, ImportConfig, run, estimate=estimate, libraries=TORCH)
