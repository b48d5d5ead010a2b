"""Classes of settings by the names of their modules, as READERS and FILTERS list them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, Union

from pydantic import BeforeValidator, Field


def classes(registry: Mapping[str, str], attribute: str) -> list[type[Any]]:
    """The class that each module of a registry has under `attribute`, in the order of the registry."""
    return [getattr(import_module(module), attribute) for module in registry.values()]


def union(registry: Mapping[str, str], attribute: str, discriminator: str) -> Any:
    """The union type of these classes of settings, by the value of the field `discriminator`.

    Settings with a `block` are those of a class of datatrove, and need not state the field.
    """

    def state_datatrove(value: Any) -> Any:
        is_block = isinstance(value, dict) and "block" in value and discriminator not in value
        return {discriminator: "datatrove", **value} if is_block else value

    return Annotated[
        Union[tuple(classes(registry, attribute))],  # noqa: UP007
        Field(discriminator=discriminator),
        BeforeValidator(state_datatrove),
    ]
