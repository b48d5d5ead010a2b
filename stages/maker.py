"""The section `release.maker` of a recipe: what only the maker of a release knows, for the documents of its standards.

Nothing here enters a key. Each field that is left out is published as "not stated".
"""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Flag, Line, LongLine, Range, SourceName, Text, Words
from pipeline.core.stage import Config

Category = Literal["public", "licensed", "third-party", "crawled", "user", "synthetic", "other"]
"""The kinds of data of the EU's template: sections 2.1 to 2.6."""


def _date(value: str) -> str | None:
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        return "is no date of the calendar; use such as 2026-08-02"
    return None


Date = Annotated[str, Words(10, "date, such as 2026-08-02", r"[0-9]{4}-[0-9]{2}-[0-9]{2}", test=_date)]


class Carbon(Config):
    """The factor from energy to carbon dioxide."""

    grams_per_kwh: Annotated[float, Range(0, 2000, "g CO2e per kWh; coal: about 1,000")] = Field(
        description="carbon intensity of the electricity, in grams of CO2 equivalent per kWh"
    )
    source: Text = Field(description="who publishes this factor, of which grid and year")
    overhead: Annotated[float, Range(1, 10, "PUE of data centers: 1.1 to 2")] = Field(
        1.0, description="power usage effectiveness: all energy of the site for each unit of the machines"
    )


class Crawler(Config):
    """How the provider's crawler collected the crawled sources."""

    name: Line = Field(description="name or user agent of the crawler")
    purpose: Text = Field(description="purpose of the crawler")
    behavior: Text = Field(description="how it treats robots.txt, logins and paywalls")
    period: Line = Field(description="first and last month of collection")
    content: Text | None = Field(None, description="the types of content and of online sources, in words")


class Maker(Config):
    """Statements of the maker, published as such; null: not stated."""

    provider: Line | None = Field(None, description="legal name of the provider")
    address: LongLine | None = Field(None, description="postal address and contact of the provider")
    representative: LongLine | None = Field(
        None, description="authorized representative in the EU, if the provider is established elsewhere"
    )
    market_date: Date | None = Field(None, description="date of placement on the market of the EU")
    continuous_training: Flag | None = Field(
        None, description="whether the model is trained further on data collected after its release"
    )
    characteristics: Text | None = Field(
        None, description="characteristics of the training data that no file states, such as regions or groups"
    )
    code_of_practice: Flag | None = Field(
        None, description="whether the provider signed the EU's code of practice for general-purpose AI"
    )
    rights_reservations: Text | None = Field(
        None, description="measures that respect reservations of rights against text and data mining"
    )
    illegal_content: Text | None = Field(None, description="measures against illegal content in the training data")
    user_data: Text | None = Field(None, description="whether data of users was used for training, and which")
    user_interactions: tuple[Literal["model", "services"], ...] | None = Field(
        None,
        max_length=2,
        description="what the sources whose category is user come from: interactions with the model, or with services",
    )
    comments: Text | None = Field(None, description="further information for the EU summary")
    crawler: Crawler | None = Field(None, description="the crawler of the sources whose category is crawled")
    sources: dict[SourceName, Category] = Field(
        default_factory=dict,
        max_length=MOST_SOURCES,
        description="category of sources in the EU summary; without an entry it follows from reader and origin",
    )
    technical_report: LongLine | None = Field(None, description="address of a technical report")
    research_paper: LongLine | None = Field(None, description="address of a research paper")
    carbon: Carbon | None = Field(None, description="factor from energy to carbon; null: no carbon is computed")
