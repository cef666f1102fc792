"""What the `paper` profiles cost."""

from __future__ import annotations

import pytest

from leantrain.catalog import load_catalog
from leantrain.records import profile_parameters
from leantrain.replication import (
    NETWORKS,
    PLANS,
    Assumptions,
    Measured,
    Training,
    cost_of,
    fgsm_passes,
    measure,
    measured_networks,
    replication_costs,
)
from leantrain.sphinx_ext import replication_html

PLAIN = Assumptions(peak=1e12, convolutional=0.5, transformer=0.25, watts=100.0, overhead=2.0)
KNOWN = {"ResNet-50": Measured(10**9, 1000, 5000), "ViT-S/16": Measured(10**10, 500, 70)}


def test_hours_energy_and_memory_by_hand():
    trainings = [Training("ResNet-50", 9000.0, batch=4, states=1), Training("ViT-S/16", 100.0, passes=9)]
    cost = cost_of(trainings, KNOWN, PLAIN)
    assert cost.operations == 2 * 1e9 * 3 * 9000 + 2 * 1e10 * 9 * 100
    assert cost.hours == pytest.approx((5.4e13 / 0.5e12 + 1.8e13 / 0.25e12) / 3600)
    assert cost.energy == pytest.approx(cost.hours * 0.1 * 2)
    assert cost.memory == 4 * 3 * 1000 + 4 * 5000
    assert cost.networks == ("ResNet-50", "ViT-S/16"), "largest share first"


def test_half_as_many_bytes_halve_the_activations_alone():
    trainings = [Training("ViT-S/16", 1.0, batch=10)]
    assert cost_of(trainings, KNOWN, PLAIN, bytes_a_number=2).memory == 4 * 4 * 500 + 10 * 70 / 2


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        cost_of([], KNOWN)


@pytest.mark.parametrize("wrong", [{"peak": 0.0}, {"transformer": 0.0}, {"convolutional": 1.1}, {"overhead": 0.9}])
def test_impossible_assumptions_are_refused(wrong):
    with pytest.raises(ValueError, match="expected a positive peak"):
        Assumptions(**wrong)


def test_every_chapter_has_a_plan_and_every_plan_a_chapter():
    assert {paper.slug for paper in load_catalog().built()} == set(PLANS)


@pytest.mark.parametrize("paper", load_catalog().built(), ids=lambda paper: paper.slug)
def test_a_plan_grows_with_its_seeds_and_names_known_networks(paper):
    parameters = profile_parameters(paper, "paper")
    one, two = ({**parameters, "seeds": seeds} for seeds in ([0], [0, 1]))
    small, large = (list(PLANS[paper.slug](p)) for p in (one, two))
    assert {t.network for t in small} <= set(NETWORKS)
    assert all(t.samples >= 0 and t.passes > 0 for t in small)
    assert any(t.batch for t in small), "one training says how much memory it needs"
    assert sum(t.samples for t in small) <= sum(t.samples for t in large)


def test_nine_variants_of_a_vision_transformer_by_hand():
    cost, five = replication_costs(load_catalog())["gqkva"]
    macs = measured_networks()["ViT-S/16"].macs
    assert cost.operations == pytest.approx(9 * 3 * 300 * 1_281_167 * macs * 2 * 3)
    assert five.operations == pytest.approx(cost.operations * 5 / 3)


@pytest.mark.parametrize(("steps", "every"), [(10, 20), (2, 1)])
def test_passes_of_adversarial_training_are_those_of_its_chapter(steps, every):
    from leantrain.techniques.fgsm_sdi import step_cost

    found = fgsm_passes(steps, every)
    assert found == pytest.approx({start: step_cost(start, steps=steps, every=every) for start in found})


@pytest.mark.parametrize(
    ("name", "macs", "parameters"),
    [("ResNet-50", 4.089e9, 25_557_032), ("ViT-S/16", 4.60e9, 22_050_664), ("VGG-16", 15.47e9, 138_357_544),
     ("BERT-base, 128 tokens", 14.25e9, 109_219_386)],
)  # fmt: skip
def test_stored_measurements_agree_with_the_literature(name, macs, parameters):
    stored = measured_networks()[name]
    assert stored.macs == pytest.approx(macs, rel=2e-3)
    assert stored.parameters == parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_stored_measurements_are_those_of_the_networks(name):
    assert set(measured_networks()) == set(NETWORKS)
    assert measure(name) == measured_networks()[name]


def test_the_page_shows_each_chapter_and_the_sum():
    catalog = load_catalog()
    costs = replication_costs(catalog)
    markup = replication_html(catalog, costs, Assumptions())
    assert markup.count("<tr>") == len(costs) + 2
    hours = sum(cost.hours for cost, _ in costs.values())
    assert f"<td>{hours:,.0f}</td>" in markup
    assert "10% by convolutional networks" in markup
