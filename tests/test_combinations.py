"""The matrix of pairs: it is what the code gives, and a technique that stops working is noticed."""

from __future__ import annotations

import itertools
import json

import pytest

from leantrain import combinations, paths
from leantrain.catalog import load_catalog
from leantrain.combinations import CHAPTERS, EPOCHS, MARK, pairs, stored, try_out
from leantrain.sphinx_ext import combinations_html
from leantrain.studies.stacking import SWITCHES, Stack
from leantrain.techniques.gqkva import group_attention
from leantrain.techniques.skipvit import skip_tokens

STORED = {outcome.techniques: outcome for outcome in stored()}


def agree(found, kept):
    assert (found.trains, found.share, found.traces, found.reason) == (
        kept.trains, kept.share, kept.traces, kept.reason,
    )  # fmt: skip
    # Rounding differs between processors, and a run of a hundred steps enlarges it.
    assert found.loss == pytest.approx(kept.loss, abs=0.15)


def test_every_pair_stands_in_the_book_once():
    assert list(STORED) == pairs()
    assert len(pairs()) == 1 + len(SWITCHES) + len(SWITCHES) * (len(SWITCHES) - 1) // 2
    head = json.loads(paths.COMBINATIONS.read_text(encoding="utf-8"))
    assert (head["mark"], head["epochs"], head["chapters"]) == (round(MARK, 4), EPOCHS, CHAPTERS)


def test_every_technique_has_a_chapter():
    assert list(CHAPTERS) == list(SWITCHES)
    assert set(CHAPTERS.values()) <= {paper.slug for paper in load_catalog().built()}


def test_what_trains_has_a_low_loss_and_all_its_traces():
    for names, outcome in STORED.items():
        if outcome.trains:
            assert outcome.loss < MARK
            assert set(outcome.traces) == set(names)
        assert bool(outcome.reason) != outcome.trains
    assert all(STORED[(name,)].trains for name in SWITCHES), "alone, each technique trains"


@pytest.mark.parametrize(
    "names", [(), ("SkipViT", "GQKVA"), ("layer dropping", "sharpness-aware"), ("low rank", "Adan"), ("Adan", "CLARS")]
)
def test_some_of_them_tried_again(names):
    agree(try_out(names), STORED[names])


@pytest.mark.slow
@pytest.mark.parametrize("names", pairs(), ids=lambda names: " + ".join(names) or "plain")
def test_all_of_them_tried_again(names):
    agree(try_out(names), STORED[names])


def test_a_technique_that_has_silently_stopped_is_noticed(monkeypatch):
    def wrong_order(self, model, seed=0):
        return group_attention(skip_tokens(model, split=self.split, rejoin=self.rejoin), self.grouping)

    monkeypatch.setattr(Stack, "apply", wrong_order)
    monkeypatch.setattr(combinations, "EPOCHS", 2)
    monkeypatch.setattr(combinations, "SHARES", (1.0,))
    outcome = try_out(["SkipViT", "GQKVA"])
    assert not outcome.trains
    assert outcome.reason == "SkipViT left no trace"


def test_an_unknown_technique_is_refused():
    with pytest.raises(ValueError, match="unknown technique 'Adam'"):
        try_out(["Adam"])


def test_the_page_shows_every_pair_and_why_some_do_not_train():
    found = json.loads(paths.COMBINATIONS.read_text(encoding="utf-8"))
    markup = combinations_html(found, lambda slug: f"doc:{slug}")
    names = list(CHAPTERS)
    tried = list(itertools.combinations(names, 2))
    assert markup.count("role='img'") == len(names) + len(tried)
    fitting = [names for names in tried if STORED[names].trains]
    assert f"{len(fitting)} of {len(tried)} pairs train" in markup
    assert markup.count("<li>") == len(tried) - len(fitting)
    assert "Adan and CLARS both take the place of the optimizer" in markup
    assert all(f'href="doc:{slug}"' in markup for slug in CHAPTERS.values())
