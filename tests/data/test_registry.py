"""The registry and the data cards, held against each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from leantrain.data import registry

ROOT = Path(__file__).resolve().parents[2]
SETS = list(registry.DATASETS.values())
HEX = re.compile(r"[0-9a-f]{64}")


@pytest.mark.parametrize("one", SETS, ids=lambda one: one.name)
def test_an_entry_is_complete(one):
    assert registry.DATASETS[one.name] is one
    assert all((one.title, one.home, one.terms, one.citation))
    assert bool(one.files) == (one.kind == "download") == bool(one.sources)
    assert bool(one.arrays) == (one.kind == "embedded")
    assert bool(one.folders) == (one.kind == "manual")
    assert all(HEX.fullmatch(digest) for digest in one.checksums.values())
    assert all(file.bytes > 0 for file in one.files.values())


@pytest.mark.parametrize("one", SETS, ids=lambda one: one.name)
def test_the_sources_give_every_file_once_over_https(one):
    given = [path for source in one.sources for path in source.members.values()]
    assert sorted(given) == sorted(one.files)
    for source in one.sources:
        assert all(url.startswith("https://") for url in source.urls)
        assert source.sha256 is None or HEX.fullmatch(source.sha256)
        assert (list(source.members) == [""]) == (source.kind in {"file", "gz"})


def test_no_two_sets_share_a_file():
    every = [path for one in SETS for path in one.files]
    assert len(set(every)) == len(every)
    assert not any(path.startswith("/") or ".." in path.split("/") for path in every)


@pytest.mark.parametrize("one", SETS, ids=lambda one: one.name)
def test_the_card_states_what_the_registry_knows(one):
    card = (ROOT / one.card).read_text(encoding="utf-8")
    assert card.startswith(f"# {one.title}\n")
    for heading in ("What it is", "Splits", "Origin", "Terms", "Citation", "Checksums", "Caveats"):
        assert f"\n## {heading}\n" in card
    assert set(HEX.findall(card)) == set(one.checksums.values()) | {s.sha256 for s in one.sources if s.sha256}
    for path, file in one.files.items():
        assert f"| `{path}` | {file.bytes:,} | `{file.sha256}` |" in card
    flat = " ".join(card.split())
    assert one.terms in flat
    assert one.citation in flat
    assert all(url in card for source in one.sources for url in source.urls)


def test_every_card_has_a_set():
    assert {path.name for path in (ROOT / "data/cards").glob("*.md")} == {one.card.name for one in SETS}
