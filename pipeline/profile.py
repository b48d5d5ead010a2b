"""Cluster profiles: where and with what a run runs. Pure data, never part of a key."""

from __future__ import annotations

from pydantic import Field, ValidationError

from pipeline.recipe import explain, find, parse_yaml
from pipeline.stage import Config


class Local(Config):
    """How `atom run` uses this machine."""

    jobs: int = Field(ge=1, description="ranks that may run at once; each computes with one thread")
    stop_grace_seconds: float = Field(gt=0, description="time that a stopped stage gets to leave a clean work folder")


class Power(Config):
    """What the energy estimate is made of."""

    watts_per_core: float = Field(ge=0, description="power of one busy core")


class Profile(Config):
    """One file of `pipeline/clusters/`."""

    name: str
    local: Local
    power: Power


def load(reference: str) -> Profile:
    """A packaged profile by name, or a file by path. Raises RecipeError in one sentence."""
    path = find(reference, "pipeline.clusters", "cluster profile")
    title = f"cluster profile {path.stem}"
    try:
        return Profile.model_validate(parse_yaml(path.read_bytes(), title))
    except ValidationError as error:
        raise explain(error, Profile, title) from None
