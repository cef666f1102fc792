"""The visual style: a palette that everyone can tell apart, settings that do not leak, plots that carry the data."""

import itertools
import math

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from leantrain.measure.statistics import Estimate
from leantrain.plotting import LINE_STYLES, PALETTE, arm_style, figure, plot_estimates, plot_seeds, use_style

mpl.use("Agg")

# How linear RGB looks to a dichromat, severity 1 (Machado, Oliveira and Fernandes, 2009).
VISION = {
    "normal": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def cielab(color, vision="normal"):
    """CIELAB coordinates (D65) of a colour, as seen."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    ratio = np.array(to_xyz) @ seen / [0.95047, 1.0, 1.08883]
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.fixture
def axes():
    with use_style():
        fig, ax = figure()
        yield ax
        mpl.pyplot.close(fig)


def runs(**finals):
    """Three seeds of every arm over five epochs, ending at the given value plus the seed."""
    return pd.DataFrame(
        [
            {"arm": arm, "seed": seed, "epoch": epoch, "accuracy": final + seed - 5.0 / epoch}
            for arm, final in finals.items()
            for seed in range(3)
            for epoch in range(1, 6)
        ]
    )


def line(ax, label):
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return found


def test_colours_stay_apart_in_greyscale():
    lightness = [cielab(color)[0] for color in PALETTE]
    assert min(abs(a - b) for a, b in itertools.combinations(lightness, 2)) >= 8
    assert max(lightness) <= 80, "a line must stand out from white paper"


@pytest.mark.parametrize("vision", VISION)
def test_colours_stay_apart_for_the_colour_blind(vision):
    # A distance of 2.3 is about one just noticeable difference; thin lines need several.
    seen = [cielab(color, vision) for color in PALETTE]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) >= 12


def test_the_style_leaves_no_trace_after_its_block():
    before = dict(mpl.rcParams)
    with use_style():
        assert mpl.rcParams["axes.spines.top"] is False
        assert mpl.rcParams["figure.dpi"] == 120
    assert dict(mpl.rcParams) == before

    def fail():
        with use_style():
            raise RuntimeError("in a figure")

    with pytest.raises(RuntimeError, match="in a figure"):
        fail()
    assert dict(mpl.rcParams) == before


def test_the_style_stays_without_a_block():
    with mpl.rc_context():
        use_style()
        assert mpl.rcParams["figure.figsize"] == [7.0, 4.0]
        assert mpl.rcParams["axes.prop_cycle"].by_key()["color"] == list(PALETTE[:5])


def test_figures_have_two_widths():
    for width, inches in (("text", 7.0), ("wide", 10.0)):
        fig, axes = figure(width, 0.5, cols=2)
        assert list(fig.get_size_inches()) == [inches, inches / 2]
        assert axes.shape == (2,)
        mpl.pyplot.close(fig)
    with pytest.raises(ValueError, match="text, wide"):
        figure("huge")
    with pytest.raises(ValueError, match="aspect"):
        figure(aspect=0.0)


def test_arms_are_styled_by_their_place_and_never_alike():
    names = [f"arm {i}" for i in range(len(PALETTE) * len(LINE_STYLES))]
    styles = arm_style(names)
    assert len({(s["color"], s["marker"], s["linestyle"]) for s in styles.values()}) == 40
    assert arm_style(names[:3]) == {name: styles[name] for name in names[:3]}
    first = [styles[name] for name in names[:8]]
    assert len({s["color"] for s in first}) == len({s["marker"] for s in first}) == 8
    with pytest.raises(ValueError, match="40 arms, got 41"):
        arm_style([*names, "one more"])
    with pytest.raises(ValueError, match="name of its own"):
        arm_style(["A", "A"])


def test_every_seed_is_drawn_and_the_mean_is_theirs(axes):
    frame = runs(MHA=90.0, MQA=80.0)
    assert plot_seeds(axes, frame, "epoch", "accuracy") is axes
    thin = [line for line in axes.lines if line.get_label() == "_seed"]
    assert len(thin) == 6
    drawn = np.sort(np.concatenate([line.get_ydata() for line in thin]))
    np.testing.assert_array_equal(drawn, np.sort(frame["accuracy"]))
    for arm in ("MHA", "MQA"):
        mean = line(axes, arm)
        expected = frame[frame["arm"] == arm].groupby("epoch")["accuracy"].mean()
        np.testing.assert_allclose(mean.get_xdata(), expected.index)
        np.testing.assert_allclose(mean.get_ydata(), expected)
        assert mean.get_linewidth() > 2 * thin[0].get_linewidth()
        assert mean.get_color() == arm_style(["MHA", "MQA"])[arm]["color"]
    named = {text.get_text(): text.xy for text in axes.texts}
    assert named["MHA"] == pytest.approx((5, 90.0))
    assert named["MQA"] == pytest.approx((5, 80.0))


def test_a_diverged_seed_ends_the_mean_and_is_not_left_out_of_it(axes):
    frame = runs(MHA=90.0)
    gone = (frame["seed"] == 1) & (frame["epoch"] >= 4)
    frame.loc[gone & (frame["epoch"] == 4), "accuracy"] = math.nan
    plot_seeds(axes, frame, "epoch", "accuracy")  # a value that comes back after a NaN does not revive the mean
    assert list(line(axes, "MHA").get_xdata()) == [1, 2, 3]
    other = axes.figure.add_subplot()
    plot_seeds(other, frame[~gone], "epoch", "accuracy")  # the same with the rows missing
    assert list(line(other, "MHA").get_xdata()) == [1, 2, 3]


def test_over_wall_time_the_mean_goes_over_both_axes(axes):
    frame = runs(MHA=90.0)
    frame["seconds"] = frame["epoch"] * (1.0 + frame["seed"])
    plot_seeds(axes, frame, "seconds", "accuracy")
    np.testing.assert_allclose(line(axes, "MHA").get_xdata(), [2, 4, 6, 8, 10])


def test_names_of_lines_that_end_together_do_not_overlap(axes):
    plot_seeds(axes, runs(**{f"arm {i}": 90 + 0.01 * i for i in range(6)}), "epoch", "accuracy")
    axes.figure.canvas.draw()
    # The extent of the words alone: that of an annotation includes its leader line.
    boxes = sorted((Text.get_window_extent(name) for name in axes.texts), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in itertools.pairwise(boxes))
    assert all(box.x1 <= axes.figure.bbox.x1 + 1 for box in boxes), "the names must fit on the figure"


def test_given_styles_are_kept(axes):
    styles = arm_style(["MHA", "GKVA", "MQA"])
    plot_seeds(axes, runs(MQA=80.0), "epoch", "accuracy", styles=styles)
    assert line(axes, "MQA").get_color() == PALETTE[2]
    with pytest.raises(ValueError, match="no entry for XYZ"):
        plot_seeds(axes, runs(XYZ=80.0), "epoch", "accuracy", styles=styles)


def test_tables_that_cannot_be_drawn_are_refused(axes):
    with pytest.raises(ValueError, match="no column loss; it has arm, seed, epoch, accuracy"):
        plot_seeds(axes, runs(MHA=90.0), "epoch", "loss")
    with pytest.raises(ValueError, match="empty"):
        plot_seeds(axes, runs(MHA=90.0).iloc[:0], "epoch", "accuracy")


ESTIMATES = {"GKVA-3": Estimate(4.1, 3.5, 4.8, n=5), "MQA": Estimate.exact(13.4)}


def test_estimates_are_drawn_with_their_intervals_from_top_to_bottom(axes):
    assert plot_estimates(axes, ESTIMATES, reference=4.0, band=(3.5, 4.5)) is axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["GKVA-3", "MQA"]
    assert axes.yaxis_inverted()
    first, second = axes.containers
    assert (first[0].get_xdata()[0], first[0].get_ydata()[0]) == (4.1, 0)
    ((left, right),) = (segment[:, 0] for segment in first[2][0].get_segments())
    assert (left, right) == pytest.approx((3.5, 4.8))
    assert second[0].get_xdata()[0] == 13.4
    assert not second.has_xerr
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((3.5, 4.5))
    assert line(axes, "the paper: 4").get_xdata()[0] == 4.0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["the paper: 4", "counts as reproduced"]


@pytest.mark.parametrize(("band", "edge"), [((20.0, None), 20.0), ((None, -5.0), -5.0)])
def test_an_open_band_reaches_the_end_of_the_axis_and_its_edge_is_in_view(axes, band, edge):
    plot_estimates(axes, ESTIMATES, band=band)
    left, right = axes.get_xlim()
    assert left < edge < right
    (patch,) = axes.patches
    expected = (edge, right) if band[1] is None else (left, edge)
    assert (patch.get_x(), patch.get_x() + patch.get_width()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("estimates", "options", "message"),
    [
        ({}, {}, "nothing to draw"),
        (ESTIMATES, {"reference": math.nan}, "reference"),
        (ESTIMATES, {"band": (None, None)}, "band"),
        (ESTIMATES, {"band": (2.0, 1.0)}, "band"),
        (ESTIMATES, {"band": (math.nan, 1.0)}, "band"),
    ],
)
def test_estimates_that_cannot_be_drawn_are_refused(axes, estimates, options, message):
    with pytest.raises(ValueError, match=message):
        plot_estimates(axes, estimates, **options)
