"""Lay down the files of a new chapter: module, tests, notebook, profiles."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from leantrain import paths
from leantrain.catalog import Paper

__all__ = ["SECTIONS", "lay_down", "sections"]

#: The headings of every chapter, in order; the title card and the parameters stand before them.
SECTIONS = (
    "The idea",
    "The code",
    "Does it work?",
    "The experiment",
    "What the paper says, what we found",
    "Why, and when it fails",
    "Exercises",
    "Provenance",
)

_PARAMETERS = """\
profile: str = "quick"  # scale of the run; one of quick, book, paper
seeds: list[int] = [0, 1, 2]  # one training run per seed and arm; each 0 to 2147483647, unique
dry_run: bool = False  # two batches of stand-in data, to test a profile"""


def sections(paper: Paper) -> tuple[str, ...]:
    """The headings of a chapter, in order: a study has asked its claims itself."""
    if paper.kind != "study":
        return SECTIONS
    return tuple(heading.replace("What the paper says", "What we asked") for heading in SECTIONS)


def lay_down(paper: Paper) -> list[Path]:
    """Write the files of a paper's chapter; they run and pass before any content is in them.

    Args:
        paper: A paper of the catalogue.

    Returns:
        The files written.

    Raises:
        FileExistsError: If one of them is there already; then nothing is written.
    """
    room = paper.room
    name = paper.slug.replace("-", "_")
    words = {"authors": ", ".join(paper.authors), "module": paper.module}
    words |= {field: str(getattr(paper, field)) for field in ("slug", "short", "title", "idea", "venue", "year")}
    templates = resources.files("leantrain") / "templates"
    files = {
        paths.ROOT / "lib" / "leantrain" / room / f"{name}.py": _fill(templates / "module.py.txt", words),
        paths.ROOT / "tests" / room / f"test_{name}.py": _fill(templates / "test.py.txt", words),
        paper.notebook_path: json.dumps(_notebook(paper), indent=1, ensure_ascii=False) + "\n",
        paths.PROFILES / "book" / f"{paper.slug}.yml": "profile: book\nseeds: [0, 1, 2, 3, 4]\n",
        paths.PROFILES / "paper" / f"{paper.slug}.yml": "profile: paper\nseeds: [0, 1, 2]\n",
    }
    there = [str(path.relative_to(paths.ROOT)) for path in files if path.exists()]
    if there:
        raise FileExistsError(f"{', '.join(there)} exists already; remove it first if you mean to begin again")
    for path, content in files.items():
        paths.write_atomically(path, content)
    return list(files)


def _fill(template: Any, words: dict[str, str]) -> str:
    return Template(template.read_text(encoding="utf-8")).substitute(words)


def _notebook(paper: Paper) -> dict[str, Any]:
    citation = "" if paper.kind == "study" else f"\n\n{{cite:t}}`{paper.slug}`"
    cells: list[tuple[str, str, list[str]]] = [
        ("markdown", f"# {paper.short}{citation}", []),
        ("code", _PARAMETERS, ["parameters"]),
        (
            "code",
            f'from leantrain.chapter import Chapter\n\nchapter = Chapter("{paper.slug}", globals())\nchapter.card()',
            [],
        ),
    ]
    code = {
        "The code": f"import {paper.module} as technique\n\nprint(technique.__doc__.splitlines()[0])",
        "Does it work?": "# NBVAL_CHECK_OUTPUT\nprint(seeds)",
        # A draft leaves no record, so the chapter cannot be published by mistake.
        sections(paper)[4]: "chapter.verdicts(draft=True)",
        "Provenance": "chapter.provenance()",
    }
    for section in sections(paper):
        cells.append(("markdown", f"## {section}", []))
        if section in code:
            cells.append(("code", code[section], []))
    made = []
    for number, (kind, source, tags) in enumerate(cells):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {"tags": tags} if tags else {}}
        cell["source"] = source.splitlines(keepends=True)
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
