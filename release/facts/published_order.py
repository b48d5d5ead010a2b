"""The function of a published order, from its meta.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.data.order.chunks import Cut
from stages.data.order.computed_order import FUNCTION_VERSION
from stages.data.order.order_config import OrderConfig
from stages.data.order.row_draw import DataCursor
from stages.data.order.streams import Place

Meta = Mapping[str, Any]


def is_function(meta: Meta) -> bool:
    """Whether this code computes the rows of the order."""
    return bool(meta.get("function", {}).get("version") == FUNCTION_VERSION)


def config_of(meta: Meta) -> OrderConfig:
    return OrderConfig.model_validate({name: meta[name] for name in OrderConfig.model_fields if name in meta})


def cut_of(meta: Meta) -> Cut:
    long = meta.get("long_documents")
    return Cut(meta["sequence_length"], long["over"] if long else None)


def cursor_of(meta: Meta) -> DataCursor:
    return DataCursor(**meta["walk"]) if "walk" in meta else DataCursor(1, meta["seed"])


def starts_of(meta: Meta) -> dict[int, dict[str, Place]]:
    """Where each stream of a packed phase stands at each block and at the end; nothing for other phases."""
    if not meta.get("pack"):
        return {}
    places = [*(part["start"] for part in meta["parts"]), meta["end"]]
    return {n: {name: Place(*place) for name, place in start.items()} for n, start in enumerate(places)}
