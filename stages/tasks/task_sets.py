"""Task sets of lm-evaluation-harness by name: their tasks, and the data that these read with its license.

A further set is one entry of `TASK_SETS`. Each license was read from the page that `license_evidence` names, each
revision from that page or from public code that pins the dataset. The numbers of items are those of the splits that the
tasks evaluate, by `dataset_info` in the READMEs of the datasets on the Hub: tests of cais/mmlu (14,042) and
openai/gsm8k (1,319), the validation split of truthfulqa/truthful_qa (817, for each of two tasks); of ARC, by
tensorflow.org/datasets/catalog/ai2_arc (1,172 and 2,376). A recipe may also bring its own tasks, in a folder of
the harness's YAML files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from pipeline.core.bounds import Key, License, Range, SourceName, Text, Words
from pipeline.core.errors import RecipeError
from pipeline.core.stage import Config, operational
from pipeline.core.store import sha256_file
from stages.formats.file_digests import TreeDigest, tree_digest

# Of a folder of tasks.
MOST_FILES = 10_000
# Assumed items of a task of one's own, and tokens of an item, once with each of its choices. The test set of MMLU has
# 6,967,453 bytes, 496 an item (README of cais/mmlu on the Hub), so 125 tokens of four bytes, read with four choices.
TASK_ITEMS, ITEM_TOKENS = 2000, 500


class TaskSet(Config):
    """Tasks of the harness that read the same data."""

    name: SourceName
    """name of the set"""
    tasks: Annotated[tuple[Key, ...], Field(min_length=1, max_length=1000)]
    """tasks of the harness"""
    license: License
    """SPDX license of the data"""
    license_evidence: Text
    """text or URL that shows the license"""
    revision: Text | None = None
    """revision of the dataset on the Hub; null: data of a folder"""
    folder: Text | None = operational(None)
    """folder of the YAML files; null: the harness has the tasks"""
    folder_digest: TreeDigest | None = Field(default=None)
    """digest of the files of the folder; null: no folder"""
    items: Annotated[int, Range(1, 1e9)] | None = operational(None)
    """items that the tasks evaluate together, for `atom plan` alone; null: assumed"""
    letters: Annotated[int, Range(1, 100)] = operational(1)
    """choices of an item that are one token each, which transformers reads in one row, for `atom plan` alone"""


MMLU_SUBJECTS = """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
professional_accounting professional_law professional_medicine professional_psychology public_relations
security_studies sociology us_foreign_policy virology world_religions
"""
TASK_SETS = {
    task_set.name: task_set
    for task_set in (
        TaskSet(
            name="arc",
            tasks=("arc_easy", "arc_challenge"),
            license="CC-BY-SA-4.0",
            license_evidence="https://huggingface.co/datasets/allenai/ai2_arc/tree/210d026faf9955653af8916fad021475a3f00453",
            revision="210d026faf9955653af8916fad021475a3f00453",
            items=3548,
        ),
        TaskSet(
            name="gsm8k",
            tasks=("gsm8k",),
            license="MIT",
            license_evidence="https://huggingface.co/datasets/openai/gsm8k/blame/main/README.md",
            revision="740312add88f781978c0658806c59bc2815b9866",
            items=1319,
        ),
        TaskSet(
            name="mmlu",
            tasks=tuple(f"mmlu_{subject}" for subject in MMLU_SUBJECTS.split()),
            license="MIT",
            license_evidence="https://github.com/hendrycks/test/blob/0aff600098ffa002d8e9f1ffe4d6e05475edd28e/LICENSE",
            revision="c30699e8356da336a370243923dbaf21066bb9fe",
            items=14042,
            letters=4,
        ),
        TaskSet(
            name="truthfulqa",
            tasks=("truthfulqa_mc1", "truthfulqa_mc2"),
            license="Apache-2.0",
            license_evidence="https://huggingface.co/datasets/truthful_qa/resolve/main/README.md",
            revision="741b8276f2d1982aa3d5b832d3ee81ed3b896490",
            items=1634,
        ),
    )
}


def _set_error(name: str) -> str | None:
    return None if name in TASK_SETS else f"is an unknown task set; known are {', '.join(sorted(TASK_SETS))}"


class TaskFolder(Config):
    """Your own tasks: YAML files in the form of the harness, and data files beside them."""

    name: SourceName
    """name of the set"""
    path: Text
    """folder of the YAML files, from that of the recipe; data files are named from it"""
    tasks: Annotated[tuple[Key, ...], Field(min_length=1, max_length=1000)]
    """tasks in the folder"""
    license: License
    """SPDX license of the data"""
    license_evidence: Text
    """text or URL that shows the license"""
    digest: TreeDigest = "auto"
    """expected digest of the files; auto: computed from the files"""


class HarnessSection(Config):
    """Task sets of lm-evaluation-harness; needs the extra `harness`."""

    sets: Annotated[tuple[Annotated[str, Words(40, test=_set_error)], ...], Field(max_length=100)] = ()
    """task sets by name"""
    folders: Annotated[tuple[TaskFolder, ...], Field(max_length=100)] = ()
    """task sets from your own folders"""
    limit: Annotated[int, Range(2, 1e6)] | None = None
    """first items of a task; null: all"""

    @model_validator(mode="after")
    def _check_names(self) -> HarnessSection:
        names = [*self.sets, *(folder.name for folder in self.folders)]
        if not names:
            raise ValueError("evaluation.harness names no task set; give `sets` or `folders`, or leave it out")
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"evaluation.harness has the task set {repeated} twice; names must differ")
        return self

    def tokens(self, served: bool) -> int:
        """Returns the number of tokens that the evaluation of one model reads, as assumed for `atom plan`.

        If `served`, the evaluator is vLLM, which reads an item once with each choice.
        """
        total = 0
        for tasks, items, letters in (
            *((len(known.tasks), known.items, known.letters) for known in map(TASK_SETS.__getitem__, self.sets)),
            *((len(folder.tasks), None, 1) for folder in self.folders),
        ):
            most = items or tasks * TASK_ITEMS
            read = most if self.limit is None else min(most, tasks * self.limit)
            total += read * ITEM_TOKENS // (1 if served else letters)
        return total

    def tasks(self) -> int:
        """Returns the number of all tasks."""
        return sum(len(TASK_SETS[name].tasks) for name in self.sets) + sum(len(folder.tasks) for folder in self.folders)

    def task_sets(self, base: Path, where: str) -> tuple[TaskSet, ...]:
        """Returns the sets with the digests of their folders.

        `base` is the folder of the recipe. Raises RecipeError if a folder is missing, has no YAML file, or differs
        from its pin.
        """
        return (*(TASK_SETS[name] for name in self.sets), *(_of_folder(tasks, base, where) for tasks in self.folders))


def _of_folder(tasks: TaskFolder, base: Path, where: str) -> TaskSet:
    folder = (base / tasks.path).resolve()
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not any(path.suffix == ".yaml" for path in files) or len(files) > MOST_FILES:
        raise RecipeError(
            f"{where}: task set {tasks.name} needs a folder of at most {MOST_FILES:,} files with a YAML file for each "
            f"task, and {folder} is none; correct its path"
        )
    digest = tree_digest((path.relative_to(folder).as_posix(), sha256_file(path)) for path in files)
    # The tasks of a folder can change without a new name; the digest in the key notices that.
    if tasks.digest not in ("auto", digest):
        raise RecipeError(
            f"{where}: task set {tasks.name} is pinned to {tasks.digest}, but {folder} has {digest}; restore the "
            "files, or change the pin"
        )
    fields = tasks.model_dump(include={"name", "tasks", "license", "license_evidence"})
    return TaskSet(**fields, folder=str(folder), folder_digest=digest)
