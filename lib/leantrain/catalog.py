"""The catalogue: one row a paper, with the claims that the book tests and the rules that decide them.

The rows stand in `book/papers.yml`. Everything that lists papers — the table of contents, the scoreboard,
the command line, the tests — reads them through `load_catalog`, which refuses a row that is not sound.
A study of the book's own has a row too, apart from the papers: its claims are the book's, and nobody else stated them.
A rule is fixed before the run that it judges; `Claim.decide` is the only place where a verdict is made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from leantrain import paths
from leantrain.strict_yaml import UnreadableYaml, read_yaml

__all__ = [
    "Catalog",
    "CatalogError",
    "Claim",
    "Condition",
    "Decision",
    "Paper",
    "Part",
    "Quantity",
    "Rule",
    "Study",
    "UnknownPaper",
    "Verdict",
    "load_catalog",
]

PROFILES = ("quick", "book", "paper")
Profile = Literal["quick", "book", "paper"]
Sentence = Annotated[str, Field(pattern=r"^\S[\s\S]*[.?!]$")]


class CatalogError(ValueError):
    """The catalogue is not sound; the message names the row, the field and what was expected."""


class UnknownPaper(CatalogError, KeyError):
    """A slug that no paper has."""

    def __str__(self) -> str:
        return str(self.args[0])


class Verdict(StrEnum):
    """The closed set of words for what became of a claim."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    NOT_REPRODUCED = "not reproduced"
    OUT_OF_REACH = "out of reach here"
    PLANNED = "planned"

    @property
    def sign(self) -> str:
        """One character that stands for the word."""
        return dict(zip(Verdict, "✓◐✗–…", strict=True))[self]


class Decision(NamedTuple):
    """A verdict; `indicative` when fewer runs than the claim's `min_n` stand behind it."""

    verdict: Verdict
    indicative: bool = False

    def __str__(self) -> str:
        return f"{self.verdict} (indicative)" if self.indicative else str(self.verdict)


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class Quantity(_Row):
    """One measured quantity as a record stores it: a value with its interval.

    Attributes:
        value: Point estimate, in the claim's unit.
        low: Lower end of the interval; equal to `value` where the quantity is exact.
        high: Upper end.
        n: Number of independent runs or repeats behind it.
        level: Confidence level of the interval, in (0, 1).
        method: How the interval was found.
    """

    value: float
    low: float
    high: float
    n: int = Field(ge=1)
    level: float = Field(default=0.95, gt=0, lt=1)
    method: str = ""

    @model_validator(mode="after")
    def _ordered(self) -> Quantity:
        if not all(math.isfinite(x) for x in (self.value, self.low, self.high)):
            raise ValueError(f"a measured quantity must be finite, not {self.value} [{self.low}, {self.high}]")
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the interval [{self.low}, {self.high}] does not hold the value {self.value}")
        return self


class Condition(_Row):
    """One bound on one side of one measured quantity.

    Attributes:
        of: Name of the quantity; `main` is the claim's own.
        side: `value`, or the `low` or `high` end of its interval.
        at_least: Smallest value that passes, if any.
        at_most: Largest value that passes, if any.
    """

    of: str = Field(default="main", pattern=r"^[a-z][a-z0-9_]*$")
    side: Literal["value", "low", "high"] = "value"
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Condition:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a condition needs at_least, at_most, or both")
        bounds = [b for b in (self.at_least, self.at_most) if b is not None]
        if not all(math.isfinite(b) for b in bounds) or bounds != sorted(bounds):
            raise ValueError(f"at_least {self.at_least} and at_most {self.at_most} do not make an interval")
        return self

    def holds(self, measured: Mapping[str, Quantity]) -> bool:
        """Whether the measured quantity lies within the bounds (both ends count)."""
        x = getattr(measured[self.of], self.side)
        return (self.at_least is None or x >= self.at_least) and (self.at_most is None or x <= self.at_most)

    def __str__(self) -> str:
        name = "" if self.of == "main" else f"{self.of.replace('_', ' ')} "
        end = {"value": "", "low": "lower end ", "high": "upper end "}[self.side]
        if self.at_least is None:
            bound = f"≤ {self.at_most:g}"
        elif self.at_most is None:
            bound = f"≥ {self.at_least:g}"
        else:
            bound = f"from {self.at_least:g} to {self.at_most:g}"
        return f"{name}{end}{bound}"


class Rule(_Row):
    """What decides a claim: all conditions of `reproduced`, else all of `partly`, else neither."""

    reproduced: tuple[Condition, ...] = Field(min_length=1)
    partly: tuple[Condition, ...] = ()

    @property
    def quantities(self) -> frozenset[str]:
        """Names of the quantities that the rule needs."""
        return frozenset(c.of for c in (*self.reproduced, *self.partly))


class Claim(_Row):
    """One statement of a paper and how the book decides whether it holds here.

    `book/papers.yml` explains the fields. `units` gives the unit of a named quantity where it is not the claim's own.
    """

    id: str = Field(pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$")
    headline: bool = False
    sentence: Sentence
    metric: str = Field(min_length=1)
    unit: str
    units: dict[str, str] = {}
    paper: float | str | None
    conditions: str = Field(min_length=1)
    stated: Literal["abstract", "repository", "summary", "text", "unverified", "own"]
    tested: Literal["exact", "full-size", "scaled"]
    how: Sentence
    min_n: int = Field(ge=1)
    rule: Rule
    out_of_reach: dict[Profile, Sentence] = {}

    @cached_property
    def digest(self) -> str:
        """Changes when the rule, the unit or the minimal n changes: an older run is then stale."""
        fixed = self.model_dump(include={"id", "unit", "min_n", "rule", "out_of_reach", "tested"})
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def paper_text(self) -> str:
        """The paper's value as text, a number with its unit; a dash where none is known, and what has no paper."""
        if self.paper is None:
            return "the book's own question" if self.stated == "own" else "–"
        return self.paper if isinstance(self.paper, str) else f"{self.paper:g} {self.unit}".rstrip()

    def unit_of(self, quantity: str) -> str:
        """The unit of a measured quantity: its own where `units` names one, else the claim's."""
        return self.units.get(quantity, self.unit)

    def decide(self, measured: Mapping[str, Quantity] | None) -> Decision:
        """Apply the rule to a measurement.

        Args:
            measured: Quantities by name, `main` for the claim's own; None when the claim was not measured.

        Returns:
            The verdict; `out of reach here` for None.

        Raises:
            ValueError: If a quantity that the rule needs is missing.
        """
        if measured is None:
            return Decision(Verdict.OUT_OF_REACH)
        missing = sorted(self.rule.quantities - set(measured))
        if missing:
            raise ValueError(f"claim {self.id} needs the measured quantities {missing}, got {sorted(measured)}")
        indicative = min(measured[name].n for name in self.rule.quantities) < self.min_n
        if all(c.holds(measured) for c in self.rule.reproduced):
            return Decision(Verdict.REPRODUCED, indicative)
        if self.rule.partly and all(c.holds(measured) for c in self.rule.partly):
            return Decision(Verdict.PARTLY, indicative)
        return Decision(Verdict.NOT_REPRODUCED, indicative)


class Part(_Row):
    """A part of the book."""

    slug: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str
    blurb: Sentence


class Paper(_Row):
    """One paper: its citation, its place in the book, its claims.

    `room` is the folder of the library and of the tests that its module and its tests are in.
    """

    slug: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: str
    short: str
    authors: tuple[str, ...] = Field(min_length=1)
    year: int = Field(ge=2010, le=2100)
    venue: str
    arxiv: str | None = Field(default=None, pattern=r"^\d{4}\.\d{4,5}$")
    part: str
    kind: Literal["technique", "emulator", "study"]
    problem: Sentence
    idea: Sentence
    tests: Sentence
    claims: tuple[Claim, ...] = Field(min_length=1)

    @field_validator("claims")
    @classmethod
    def _headline(cls, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
        if not any(c.headline for c in claims):
            raise ValueError("one claim must be the headline (headline: true)")
        return claims

    @model_validator(mode="after")
    def _ids(self) -> Paper:
        for claim in self.claims:
            if not claim.id.startswith(self.slug + "."):
                raise ValueError(f"claim {claim.id!r} must begin with {self.slug + '.'!r}")
            if (claim.stated == "own") != (self.kind == "study") or (claim.stated == "own" and claim.paper is not None):
                raise ValueError(
                    f"claim {claim.id!r} is stated {claim.stated!r} with the value {claim.paper!r}: the claims of a "
                    "study, and no others, are the book's 'own', and have no paper's value"
                )
        return self

    @property
    def room(self) -> str:
        """Folder of the library and of the tests."""
        return {"technique": "techniques", "emulator": "hardware", "study": "studies"}[self.kind]

    @property
    def module(self) -> str:
        """Dotted name of the paper's module."""
        return f"leantrain.{self.room}.{self.slug.replace('-', '_')}"

    @property
    def notebook_path(self) -> Path:
        """The chapter's source, with its reference outputs at `quick`."""
        return paths.NOTEBOOKS / f"{self.slug}.ipynb"

    @property
    def chapter_path(self) -> Path:
        """The executed chapter that the book shows."""
        return paths.CHAPTERS / f"{self.slug}.ipynb"

    @property
    def built(self) -> bool:
        """Whether the paper has a chapter yet."""
        return self.notebook_path.exists()

    def claim(self, claim_id: str) -> Claim:
        """The claim with this id (`slug.name`).

        Raises:
            CatalogError: If the paper has no such claim.
        """
        for claim in self.claims:
            if claim.id == claim_id:
                return claim
        known = ", ".join(c.id for c in self.claims)
        raise CatalogError(f"paper {self.slug!r} has no claim {claim_id!r}; it has {known}")


class Study(Paper):
    """A study of the book's own: a chapter like a paper's, without a citation, about claims that the book made."""

    authors: tuple[str, ...] = Field(default=(), max_length=0)
    venue: Literal["A study of this book"] = "A study of this book"
    arxiv: None = None
    kind: Literal["study"] = "study"


class Catalog(_Row):
    """All parts, papers and studies, in the order of the book.

    `papers` are what the book replicates, and what is counted as such; `entries` is everything that has a chapter.
    """

    parts: tuple[Part, ...]
    papers: tuple[Paper, ...]
    studies: tuple[Study, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Catalog:
        for what, names in (
            ("part", [p.slug for p in self.parts]),
            ("slug", [p.slug for p in self.entries]),
            ("claim", [c.id for p in self.entries for c in p.claims]),
        ):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{what} {', '.join(twice)} stands twice")
        known = {p.slug for p in self.parts}
        for paper in self.entries:
            if paper.part not in known:
                raise ValueError(f"paper {paper.slug!r} is in part {paper.part!r}; the parts are {sorted(known)}")
            if (paper.kind == "study") != isinstance(paper, Study):
                raise ValueError(f"{paper.slug!r} is a study: its row belongs under 'studies', not under 'papers'")
        return self

    @property
    def entries(self) -> tuple[Paper, ...]:
        """The papers, then the studies."""
        return (*self.papers, *self.studies)

    def paper(self, slug: str) -> Paper:
        """The paper or study with this slug.

        Raises:
            UnknownPaper: If there is none; the message lists the nearest slugs.
        """
        for paper in self.entries:
            if paper.slug == slug:
                return paper
        import difflib

        slugs = [p.slug for p in self.entries]
        near = difflib.get_close_matches(slug, slugs, n=3, cutoff=0.5) or slugs
        raise UnknownPaper(
            f"no paper has the slug {slug!r}; did you mean {' or '.join(near)}? `leantrain list` shows all"
        )

    def built(self) -> tuple[Paper, ...]:
        """The papers and studies that have a chapter."""
        return tuple(p for p in self.entries if p.built)


def load_catalog(path: Path | None = None) -> Catalog:
    """Read and check the catalogue.

    Args:
        path: The file; by default `book/papers.yml`.

    Raises:
        CatalogError: If the file is missing, is no YAML, gives a key twice, or a row is not sound; all unsound rows
            are named at once.
    """
    path = path or paths.CATALOG
    try:
        raw = read_yaml(path, "the catalogue")
    except UnreadableYaml as error:
        raise CatalogError(str(error)) from None
    if not isinstance(raw, dict):
        raise CatalogError(f"{path.name} must hold a mapping with 'parts' and 'papers', not {type(raw).__name__}")
    try:
        return Catalog.model_validate(raw)
    except ValidationError as error:
        faults = [f"  {_place(raw, e['loc'])}: {e['msg']} (got {e['input']!r:.80})" for e in error.errors()]
        raise CatalogError(f"{path.name} is not sound:\n" + "\n".join(faults)) from None


def _place(raw: dict, loc: tuple[int | str, ...]) -> str:
    """Name a fault's place by slug and claim id instead of by list index."""
    names: list[str] = []
    node: Any = raw
    for step in loc:
        try:
            node = node[step]
        except (KeyError, IndexError, TypeError):
            node = None
        label = node.get("slug") or node.get("id") if isinstance(node, dict) else None
        names.append(str(label or step))
    return " / ".join(names) or "catalogue"
