"""The layout of a release folder, and the names of phases and models in it.

    model/ model-<name>/ dataset/      one repository each: the final model, the earlier ones, the data
    variant-<name>/                    one repository each: the final model's weights in another form
    checkpoints/<phase>-step-<n>/      one branch each of the checkpoint repository, whose main branch is checkpoints/*
    README.md code/ evidence/ site/    the evidence repository: the root of the release folder itself

Every repository (and every checkpoint branch) carries its own `SHA256SUMS`, so that a pulled copy can be checked alone,
and once it is signed a `model.sig`.
`evidence/SHA256SUMS` covers every file of the release except itself and the root's, and the root's covers it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

SUMS = "SHA256SUMS"
"""In each repository, the checksums of its files."""
ALL_SUMS = f"evidence/{SUMS}"
"""The checksums of the whole release."""
ORIGINS = "evidence/origins.json"
"""How each file of the release was made."""
RELEASE = "evidence/release.json"
STATEMENTS = "evidence/statements"
"""The folder of the provenance statements."""
RECIPE = "evidence/recipe.json"
"""The recipe with all defaults."""
CODE_README = "code/README.md"
SECOND_VERIFIER = "evidence/independent_verifier.py"
STANDARDS = "evidence/standards"
"""The folder of the documents in the forms of standards."""
GATES = "evidence/gates.json"
GATES_STATED = "evidence/attestations/gates.json"
SITE = "site"
"""The folder of the page for people, made from all other files; a release may lack it."""
PAGE = f"{SITE}/index.html"
ROOTS = "merkle.json"
"""In the dataset repository, the Merkle root of each of its tables."""
GOLDENS = "goldens.json"
"""In a model repository, token ids, text, logits and greedy continuations of fixed inputs."""
FILTER_AGREEMENT = "filter_agreement.json"
"""In the dataset repository, the agreement of the filters with their reference, by rule."""
NOTICE = "NOTICE"
"""In the dataset repository, the names and notices that the licenses of its documents ask for."""
LICENSE_TEXTS = "license_texts"
"""In the dataset repository, the folder of the texts of licenses that ask to be kept with the documents."""
OPT_OUTS = "opt_out.json"
"""In the dataset repository, the requests of the deny-list, if the corpus had one."""
REFERENCES = "references.json"
"""In the dataset repository, the sources whose texts are by reference, if there are any."""
RETRACTED = "retracted.json"
"""In each repository from which documents were taken back, the tombstone."""
CANARY = "evaluation/canary.json"
SIGNATURE, PUBLIC_KEY = "model.sig", "model.pub"
"""In each repository, but in no checksum file: the signature covers the checksum files, and the fingerprint identifies
the key."""
MODEL, BASE = "model", "model-base"
"""The folders of the final model and of the base model."""
VARIANT = "variant"
"""The beginning of the folders of the final model in other forms."""
LOSS = "loss.json"
"""In a variant's repository, its loss against the original."""
RUNTIMES = "evidence/runtimes.json"
"""The outputs of other programs for the final model and its variants."""
PARTS = (MODEL, BASE, "dataset", "checkpoints")
"""The parts of every release beside its root; `model_folders` and `variant_folders` are further ones."""
TRAINING = ("pretrain", "midtrain", "longcontext", "sft", "rlvr", "dpo", "reward", "online-rlhf")
"""Kinds of phases, as `stages.graph` names them, in the order of training."""
EXPORTED = ("init", "base", "mid", "long", "sft", "rlvr", "dpo", "online-rlhf")
"""Kinds of exported models, as `stages.graph` names them, in the order of training."""
CHAT = EXPORTED[EXPORTED.index("sft") :]
"""Phases that train conversation, and the models after them."""
ORDER = (
    "init", "pretrain", "size", "base", "midtrain", "mid", "longcontext", "long", "sft", "rlvr", "dpo", "reward",
    "online-rlhf",
)  # fmt: skip
"""Kinds of phases and of exported models in one order: a model comes after the phase that made it."""
WITHOUT_ORDER = ("rlvr", "dpo", "reward", "online-rlhf")
"""Phases that sample their training data; only their replayed data has an order."""
SIZE = "size"
"""The kind of phases that train smaller models of the recipe: size-1, size-2, …"""
IMPORT = "import"
"""The node of the published model that training begins with; after it, the recipe may leave out phases."""
REWARD_EXPORT = "export-reward"
"""The node that exports the reward model, which is published with the scores that it made and not as a model."""


def when(name: str) -> tuple[int, int, str]:
    """Returns the sort key of a phase, or of an exported model.

    Numbers are compared as numbers: longcontext-2 comes before longcontext-10. Unknown names come last.
    """
    kind, number = numbered(name)
    if kind in ORDER:
        return ORDER.index(kind), number, name
    return len(ORDER), 0, name


def numbered(name: str) -> tuple[str, int]:
    """Returns the kind of a phase or an exported model, and its number.

    For longcontext-2 these are longcontext and 2. The number is 0 for a single one, such as online-rlhf.
    """
    match = re.fullmatch(r"(.+)-([0-9]{1,9})", name)
    return (match[1], int(match[2])) if match else (name, 0)


def phases_of(nodes: Iterable[str]) -> list[str]:
    """Returns the training phases among a graph's nodes, in order."""
    return sorted((node for node in nodes if numbered(node)[0] in TRAINING), key=when)


def sizes_of(nodes: Iterable[str]) -> list[str]:
    """Returns the smaller models of the recipe among a graph's nodes, in order."""
    return sorted((node for node in nodes if numbered(node)[0] == SIZE), key=when)


def order_of(phase: str) -> str:
    """Returns the phase whose order of documents a phase reads: a smaller model reads that of pre-training."""
    return "pretrain" if numbered(phase)[0] == SIZE else phase


def models_of(nodes: Iterable[str]) -> list[str]:
    """Returns the models that nodes export or evaluate, in the order of training.

    The last one is the model of the release.
    """
    models = set()
    for node in nodes:
        stage, _, model = node.partition("-")
        if stage in ("export", "evaluate") and node != REWARD_EXPORT:
            models.add(model)
    return sorted(models, key=when)


def model_name(folder: str, final: str) -> str:
    """Returns the name of the exported model in a folder. `final` is the name of the last one."""
    return final if folder == MODEL else folder.removeprefix(f"{MODEL}-")


def folders_of(models: Sequence[str]) -> dict[str, str]:
    """Returns {exported model: its folder} of models in the order of training.

    The untrained one is only published as a checkpoint.
    """
    folders = {}
    for model in models:
        if model != "init":
            folders[model] = MODEL if model == models[-1] else f"{MODEL}-{model}"
    return folders
