"""The rows of the catalogue: complete, cited, and with rules that decide known measurements as they should."""

from __future__ import annotations

import math
import re

import pytest

from leantrain import paths
from leantrain.catalog import Catalog, Claim, Condition, Quantity, Verdict, load_catalog

SLUGS = {
    "adan",
    "clars",
    "compressed-gpt2",
    "conv3d-4d",
    "fasthebb",
    "fastmim",
    "few-shot-ptf",
    "fgsm-sdi",
    "fpraker",
    "gqkva",
    "gradient-sparsity",
    "hardware-aware-lrd",
    "hardware-aware-resnet9",
    "lrd-rank-freeze",
    "lrd-study",
    "orepa",
    "plrd",
    "procrustes",
    "progressive-layer-dropping",
    "pruning-bitwidth",
    "skipvit",
    "swiftlearn",
    "tensordash",
}

PARTS = {
    "transformers": ["skipvit", "swiftlearn", "progressive-layer-dropping", "compressed-gpt2", "gqkva"],
    "low-rank": ["lrd-study", "hardware-aware-lrd", "lrd-rank-freeze", "plrd", "conv3d-4d"],
    "better-steps": ["adan", "clars", "fgsm-sdi", "hardware-aware-resnet9", "pruning-bitwidth"],
    "representations": ["fastmim", "fasthebb", "orepa", "few-shot-ptf"],
    "accelerators": ["tensordash", "fpraker", "gradient-sparsity", "procrustes"],
    "combinations": [],
}

CATALOG: Catalog = load_catalog()
CLAIMS: list[Claim] = [claim for paper in CATALOG.papers for claim in paper.claims]
PAPERS = pytest.mark.parametrize("paper", CATALOG.papers, ids=lambda paper: paper.slug)
EACH_CLAIM = pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)


def claim_of(claim_id: str) -> Claim:
    return CATALOG.paper(claim_id.partition(".")[0]).claim(claim_id)


def region(conditions: tuple[Condition, ...], of: str, side: str) -> tuple[float, float] | None:
    """The interval that all conditions on one side of one quantity leave; None where there is none."""
    bounds = [c for c in conditions if (c.of, c.side) == (of, side)]
    if not bounds:
        return None
    return (
        max(-math.inf if c.at_least is None else c.at_least for c in bounds),
        min(math.inf if c.at_most is None else c.at_most for c in bounds),
    )


def decided(claim_id: str, **quantities: float | tuple[float, float, float]) -> Verdict:
    """The verdict on values (exact) or (value, low, high) triples, each from ten runs."""
    measured = {}
    for name, given in quantities.items():
        value, low, high = given if isinstance(given, tuple) else (given, given, given)
        measured[name] = Quantity(value=value, low=low, high=high, n=10)
    return claim_of(claim_id).decide(measured).verdict


def test_the_papers_of_the_book() -> None:
    assert {paper.slug for paper in CATALOG.papers} == SLUGS
    assert len(CATALOG.papers) == len(SLUGS) == 23


def test_studies_are_the_books_own_and_no_papers() -> None:
    assert [(study.slug, study.part, study.kind) for study in CATALOG.studies] == [
        ("stacking", "combinations", "study")
    ]
    assert CATALOG.entries == (*CATALOG.papers, *CATALOG.studies)
    for study in CATALOG.studies:
        assert 3 <= len(study.claims) <= 7
        assert 1 <= sum(claim.headline for claim in study.claims) <= 2
        assert all(claim.min_n >= 3 for claim in study.claims if claim.tested != "exact")


@pytest.mark.parametrize(
    ("claim_id", "quantities", "expected"),
    [
        ("stacking.pays", {"main": (2.0, 0.1, 3.9)}, Verdict.REPRODUCED),
        ("stacking.pays", {"main": (2.0, -0.1, 4.1)}, Verdict.PARTLY),
        ("stacking.pays", {"main": (-0.1, -1.0, 0.8)}, Verdict.NOT_REPRODUCED),
        ("stacking.adds-up", {"main": (0.9, -3.0, 4.8), "over_best": 1.0}, Verdict.REPRODUCED),
        ("stacking.adds-up", {"main": (-2.5, -4.0, -1.0), "over_best": 0.5}, Verdict.PARTLY),
        ("stacking.adds-up", {"main": (-2.5, -4.0, -1.0), "over_best": -0.5}, Verdict.NOT_REPRODUCED),
        ("stacking.each-helps", {"main": 3}, Verdict.PARTLY),
        ("stacking.all-needed", {"main": 4}, Verdict.REPRODUCED),
        ("stacking.step-time", {"main": 0.85}, Verdict.PARTLY),
        ("stacking.macs", {"main": 1.02}, Verdict.NOT_REPRODUCED),
        ("stacking.memory", {"main": 1.3}, Verdict.NOT_REPRODUCED),
    ],
)
def test_known_measurements_of_a_study(claim_id: str, quantities: dict, expected: Verdict) -> None:
    assert decided(claim_id, **quantities) == expected


def test_parts_hold_their_papers_in_order() -> None:
    assert [part.slug for part in CATALOG.parts] == list(PARTS)
    found = {part: [p.slug for p in CATALOG.papers if p.part == part] for part in PARTS}
    assert found == PARTS
    assert [p.slug for p in CATALOG.papers] == [slug for slugs in PARTS.values() for slug in slugs]


def test_emulators_are_the_accelerators() -> None:
    assert {p.slug for p in CATALOG.papers if p.kind == "emulator"} == set(PARTS["accelerators"])


@PAPERS
def test_number_of_claims_and_headlines(paper) -> None:
    assert 3 <= len(paper.claims) <= 7
    assert 1 <= sum(claim.headline for claim in paper.claims) <= 2


@PAPERS
def test_claim_ids_are_unique_and_carry_the_slug(paper) -> None:
    ids = [claim.id for claim in paper.claims]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(re.escape(paper.slug) + r"\.[a-z0-9]+(-[a-z0-9]+)*", i) for i in ids)


@PAPERS
def test_sentences_are_single_and_closed(paper) -> None:
    sentences = [paper.problem, paper.idea, paper.tests, *(claim.sentence for claim in paper.claims)]
    for sentence in sentences:
        assert sentence.endswith("."), sentence
        assert sentence[0].isupper() or sentence[0].isdigit(), sentence
        assert not re.search(r"[.!?] +[A-Z]", sentence), f"one sentence, please: {sentence}"
        assert not re.search(r"\s{2}|\n", sentence), sentence
    assert len(set(sentences)) == len(sentences)


@EACH_CLAIM
def test_how_and_reasons_are_sentences(claim: Claim) -> None:
    for text in (claim.how, *claim.out_of_reach.values()):
        assert re.fullmatch(r"[`A-Z0-9].*\.", text), text
    assert not claim.conditions.endswith(".")


@EACH_CLAIM
def test_a_published_value_has_a_source(claim: Claim) -> None:
    """Words or a number where a source is named; nothing is called published without a value."""
    if claim.stated != "unverified":
        assert claim.paper is not None
    if isinstance(claim.paper, str):
        assert claim.paper.strip()
    elif claim.paper is not None:
        assert math.isfinite(claim.paper)


# Values that could not be checked against the paper: no row may give them a source.
UNVERIFIED = {
    "tensordash.random-sparsity-90",
    "tensordash.rows-16-over-1",
    "tensordash.dense-dgrad-bn",
    "tensordash.no-slowdown",
    "fpraker.training-speed-up",
    "fpraker.four-bit",
    "fpraker.term-sparsity",
    "fpraker.accuracy",
    "fpraker.energy",
    "fpraker.rows-cost",
    "fpraker.exponents",
    "fgsm-sdi.no-collapse",
    "fgsm-sdi.cost",
    "fgsm-sdi.cheaper-than-multi-step",
    "fgsm-sdi.cifar10",
    "lrd-rank-freeze.rank-step",
    "lrd-rank-freeze.ranks",
    "lrd-rank-freeze.order",
    "clars.variance-falls",
    "procrustes.accuracy-fifth",
    "procrustes.balance",
}


def test_unverified_values_are_marked() -> None:
    marked = {claim.id for claim in CLAIMS if claim.stated == "unverified" and claim.paper is not None}
    assert marked == UNVERIFIED


@EACH_CLAIM
def test_rule_regions_are_proper(claim: Claim) -> None:
    """Bounds leave an interval, and what counts as reproduced counts at least as partly."""
    for conditions in (claim.rule.reproduced, claim.rule.partly):
        for condition in conditions:
            low, high = region(conditions, condition.of, condition.side) or (0.0, 0.0)
            assert low <= high, claim.id
            if condition.at_least is not None and condition.at_most is not None:
                single = claim.unit in ("", "of 7", "%") and claim.tested == "exact"
                assert condition.at_least < condition.at_most or single, claim.id
    for condition in claim.rule.partly:
        inner = region(claim.rule.reproduced, condition.of, condition.side)
        outer = region(claim.rule.partly, condition.of, condition.side)
        if inner is not None and outer is not None:
            assert outer[0] <= inner[0] <= inner[1] <= outer[1], claim.id


@EACH_CLAIM
def test_partly_can_be_reached(claim: Claim) -> None:
    """Some condition of `reproduced` is missing from `partly` or weaker there; otherwise nothing would be partly."""
    if claim.rule.partly:
        assert not set(claim.rule.reproduced) <= set(claim.rule.partly)


@EACH_CLAIM
def test_named_quantities_do_not_mix_with_the_main_one(claim: Claim) -> None:
    names = claim.rule.quantities
    assert names == {"main"} or "main" not in names


@EACH_CLAIM
def test_quantities_in_the_explanation_are_those_of_the_rule(claim: Claim) -> None:
    """Names in backquotes belong to the rule, so that a reader finds what is measured."""
    explained = set(re.findall(r"`([a-z0-9_]+)`", claim.how))
    assert explained <= claim.rule.quantities | {"dense"}, claim.id


@EACH_CLAIM
def test_smallest_number_of_runs(claim: Claim) -> None:
    if claim.tested == "exact":
        assert claim.min_n == 1
    if claim.tested == "scaled":
        assert claim.min_n >= 3


@EACH_CLAIM
def test_the_paper_profile_reaches_every_claim(claim: Claim) -> None:
    assert set(claim.out_of_reach) <= {"quick", "book"}
    if "book" in claim.out_of_reach:
        assert "quick" in claim.out_of_reach


@EACH_CLAIM
def test_exact_claims_are_in_reach_everywhere(claim: Claim) -> None:
    if claim.tested == "exact":
        assert not claim.out_of_reach


@PAPERS
def test_some_claim_is_in_reach_at_book(paper) -> None:
    assert any("book" not in claim.out_of_reach for claim in paper.claims)


@pytest.mark.parametrize("slug", ["gqkva", "adan", "tensordash"])
def test_first_chapters_test_something_at_quick(slug: str) -> None:
    assert any("quick" not in claim.out_of_reach for claim in CATALOG.paper(slug).claims)


@pytest.fixture(scope="module")
def bibliography():
    from pybtex.database import parse_file

    return parse_file(str(paths.CATALOG.parent / "references.bib"), bib_format="bibtex")


@PAPERS
def test_citation_agrees_with_the_row(paper, bibliography) -> None:
    entry = bibliography.entries[paper.slug]
    assert entry.fields["year"] == str(paper.year)
    assert entry.fields["eprint"] == paper.arxiv
    assert entry.fields["title"].replace("{", "").replace("}", "") == paper.title
    names = [" ".join(a.first_names + a.middle_names + a.prelast_names + a.last_names) for a in entry.persons["author"]]
    assert names == list(paper.authors)


def test_bibliography_is_well_formed(bibliography) -> None:
    others = set(bibliography.entries) - SLUGS
    assert all(re.fullmatch(r"[a-z]+(19|20)\d\d[a-z0-9]+", key) for key in others)
    for key, entry in bibliography.entries.items():
        assert entry.persons["author"], key
        assert entry.fields["title"], key
        assert re.fullmatch(r"\d{4}", entry.fields["year"]), key
        if key in others:
            assert entry.fields["year"] in key
    numbers = [entry.fields["eprint"] for entry in bibliography.entries.values() if "eprint" in entry.fields]
    assert len(set(numbers)) == len(numbers)


def test_glossary_terms_are_sorted_and_unique() -> None:
    page = (paths.CATALOG.parent / "glossary.md").read_text(encoding="utf-8")
    body = re.search(r"```\{glossary\}\n(.*?)\n```", page, re.DOTALL)
    assert body is not None
    terms = [line for line in body.group(1).splitlines() if line and not line.startswith(" ")]
    assert terms == sorted(set(terms), key=str.casefold)
    assert len(terms) >= 40


R, P, N = Verdict.REPRODUCED, Verdict.PARTLY, Verdict.NOT_REPRODUCED


@pytest.mark.parametrize(
    ("claim_id", "quantities", "expected"),
    [
        # gqkva: the exact counts of ViT-small, and values that a wrong variant would give
        ("gqkva.size-gkva3", {"main": 4.02}, R),
        ("gqkva.size-gkva3", {"main": 3.4}, P),
        ("gqkva.size-gkva3", {"main": 6.70}, N),
        ("gqkva.size-gqkva32", {"main": 14.75}, R),
        ("gqkva.size-gqkva32", {"main": 13.41}, P),
        ("gqkva.size-gqkva32", {"main": 4.02}, N),
        ("gqkva.accuracy-gkva3", {"difference": 0.1, "in_standard_errors": 0.3}, R),
        ("gqkva.accuracy-gkva3", {"difference": -0.2, "in_standard_errors": -0.9}, R),
        ("gqkva.accuracy-gkva3", {"difference": -0.5, "in_standard_errors": -1.4}, N),
        ("gqkva.accuracy-gkva3", {"difference": -3.0, "in_standard_errors": -0.9}, N),
        ("gqkva.accuracy-gqkva32", {"main": (-1.9, -4.0, 0.2)}, R),
        ("gqkva.accuracy-gqkva32", {"main": -2.1}, N),
        ("gqkva.step-time", {"main": (0.91, 0.88, 0.94)}, R),
        ("gqkva.step-time", {"main": (0.98, 0.95, 1.01)}, N),
        ("gqkva.step-time-bf16", {"main": (0.99, 0.95, 1.03)}, N),
        # adan: equal at half the epochs; equal only at equal epochs; behind at both
        ("adan.half-the-epochs", {"half": (-0.2, -0.8, 0.4), "same": 0.5}, R),
        ("adan.half-the-epochs", {"half": (-0.2, -1.6, 1.2), "same": 0.5}, P),
        ("adan.half-the-epochs", {"half": -8.0, "same": -0.4}, P),
        ("adan.half-the-epochs", {"half": -8.0, "same": -0.6}, N),
        ("adan.state-memory", {"main": 352.8 / 176.4}, R),
        ("adan.state-memory", {"main": 1.5}, N),
        ("adan.step-cost", {"main": (1.08, 1.02, 1.15)}, R),
        ("adan.step-cost", {"main": (1.20, 1.10, 1.40)}, P),
        ("adan.batch-size-tolerance", {"main": (1.5, 0.2, 2.8)}, R),
        ("adan.batch-size-tolerance", {"main": (0.5, -2.0, 3.0)}, P),
        # tensordash: trained nets without batch normalisation, at the start of training, and with it
        ("tensordash.speedup-training", {"main": 2.14}, R),
        ("tensordash.speedup-training", {"main": 1.65}, P),
        ("tensordash.speedup-training", {"main": 2.4}, P),
        ("tensordash.speedup-training", {"main": 1.23}, N),
        ("tensordash.random-sparsity-90", {"main": 2.933}, R),
        ("tensordash.random-sparsity-90", {"main": 2.787}, P),
        ("tensordash.random-sparsity-90", {"main": 1.998}, N),
        ("tensordash.rows-16-over-1", {"main": 1.97 / 2.34}, R),
        ("tensordash.rows-16-over-1", {"main": 1.0}, N),
        ("tensordash.energy-compute", {"main": 1.95 * 13957 / 14205}, R),
        ("tensordash.energy-total", {"main": 1.6}, R),
        ("tensordash.dense-dgrad-bn", {"main": 1.01}, R),
        ("tensordash.dense-dgrad-bn", {"main": 1.86}, N),
        ("tensordash.no-slowdown", {"main": 1.0}, R),
        ("tensordash.no-slowdown", {"main": 0.999}, N),
        # known counts of other papers
        ("skipvit.throughput", {"main": 17.0}, R),
        ("skipvit.throughput", {"main": 7.4}, P),
        ("skipvit.throughput", {"main": 35.9}, P),
        ("skipvit.no-parameters", {"main": 0}, R),
        ("skipvit.no-parameters", {"main": 1}, N),
        ("swiftlearn.accuracy-drop", {"drop": 1.1, "drop_less_one_error": 0.8}, R),
        ("swiftlearn.accuracy-drop", {"drop": 3.0, "drop_less_one_error": 0.8}, N),
        ("progressive-layer-dropping.flops", {"main": 22.9}, R),
        ("progressive-layer-dropping.flops", {"main": 13.8}, P),
        ("compressed-gpt2.student-size", {"main": 81.912576}, R),
        ("compressed-gpt2.truncated-beats-distilled", {"equal_time": (0.98, 0.96, 0.99), "equal_tokens": 1.1}, R),
        ("compressed-gpt2.truncated-beats-distilled", {"equal_time": (0.98, 0.96, 1.02), "equal_tokens": 1.1}, N),
        ("compressed-gpt2.truncated-beats-distilled", {"equal_time": 1.02, "equal_tokens": 0.99}, P),
        ("lrd-study.merged-size", {"resnet50": 51.493, "resnet101": 56.405, "resnet152": 58.119}, R),
        ("lrd-study.merged-size", {"resnet50": 51.55, "resnet101": 56.405, "resnet152": 58.119}, P),
        ("conv3d-4d.add-size", {"main": 16.255}, R),
        ("conv3d-4d.add-size", {"main": 15.93}, P),
        ("conv3d-4d.table-rows", {"parameters": 0.045, "macs": 0.07}, R),
        ("conv3d-4d.p3d-rows", {"main": 7.9}, N),
        ("plrd.gpt2-size", {"main": 31.73}, R),
        ("plrd.gpt2-size", {"main": 60.68}, N),
        ("plrd.vit-size", {"main": 85.81 / 32.69}, R),
        ("fastmim.operations", {"main": 105.8 / 34.2}, R),
        ("fastmim.memory", {"main": 113.7 / 38.4}, R),
        ("fastmim.acceleration", {"main": 2.6}, P),
        ("fgsm-sdi.no-collapse", {"advantage": 10.0, "baseline_collapses": 100.0, "sdi_collapses": 0.0}, R),
        ("fgsm-sdi.no-collapse", {"advantage": 1.0, "baseline_collapses": 0.0, "sdi_collapses": 0.0}, P),
        ("fgsm-sdi.no-collapse", {"advantage": 10.0, "baseline_collapses": 100.0, "sdi_collapses": 33.3}, N),
        ("clars.no-warmup", {"over_sgd": 1.6, "over_lars": -0.4}, R),
        ("clars.no-warmup", {"over_sgd": 1.6, "over_lars": -0.6}, P),
        ("clars.no-warmup", {"over_sgd": -0.1, "over_lars": 2.0}, N),
        ("fasthebb.equal-updates", {"main": 5e-16}, R),
        ("fasthebb.equal-updates", {"main": 1e-7}, N),
        ("gradient-sparsity.backpropagation", {"smallest": 1.69, "largest": 5.51, "vgg16_over_others": 2.74}, R),
        ("gradient-sparsity.backpropagation", {"smallest": 1.69, "largest": 3.0, "vgg16_over_others": 1.5}, P),
        ("procrustes.compression", {"resnet18": 11.689512, "mobilenetv2": 3504872 / 350000}, R),
        ("procrustes.speed-up", {"main": 3.63}, R),
        ("fpraker.four-bit", {"main": 1.96}, R),
        ("fpraker.four-bit", {"main": 0.81}, N),
        ("orepa.step-time", {"main": 2.03}, R),
        ("orepa.step-time", {"main": 1.12}, P),
    ],
)
def test_known_measurements_get_the_expected_verdict(claim_id: str, quantities: dict, expected: Verdict) -> None:
    assert decided(claim_id, **quantities) == expected


def test_few_runs_are_only_indicative() -> None:
    claim = claim_of("tensordash.speedup-training")
    two = Quantity(value=1.95, low=1.9, high=2.0, n=2)
    assert claim.decide({"main": two}).indicative
    assert not claim.decide({"main": two.model_copy(update={"n": 3})}).indicative
