"""The book's one visual style: what a figure looks like, and the two plots that nearly every chapter draws.

The palette's eight colours differ in lightness by at least 8 steps of CIELAB's L* (0 to 100), so they stay apart in
greyscale, and in hue so that they stay apart for colour-blind readers; markers and line styles say it a second time.
The plotting functions draw on the axes that they are given and return them. Axis labels, with their units, are the
caller's to set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from pandas.api import types as pd_types

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from leantrain.measure.statistics import Estimate

LineStyle: TypeAlias = str | tuple[float, tuple[float, ...]]

__all__ = ["PALETTE", "ArmStyle", "arm_style", "figure", "plot_estimates", "plot_seeds", "use_style"]

PALETTE = ("#202225", "#ed9419", "#0566aa", "#a00119", "#e66593", "#0d8b54", "#611569", "#53cff9")
"""Colours in the order of use: the baseline is nearly black, neighbours differ strongly."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Five line styles against eight colours: forty arms before a pair repeats.
LINE_STYLES: tuple[LineStyle, ...] = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)), (0, (6, 1, 1, 1, 1, 1)))

TEXT_COLOUR = "#202225"
GRID_COLOUR = "#e2e2e2"
BAND_COLOUR = "#d9e8df"

STYLE: dict[str, Any] = {
    "figure.figsize": (7.0, 4.0),
    "figure.dpi": 120,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 120,
    "savefig.facecolor": "white",
    "font.size": 11.0,
    "axes.labelsize": 11.0,
    "axes.titlesize": 12.0,
    "axes.titlelocation": "left",
    "axes.facecolor": "white",
    "axes.edgecolor": "#555555",
    "axes.labelcolor": TEXT_COLOUR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE[:5]) + cycler(linestyle=LINE_STYLES),
    "grid.color": GRID_COLOUR,
    "grid.linewidth": 0.7,
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.0,
    "legend.fontsize": 10.0,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "text.color": TEXT_COLOUR,
}

# Matplotlib types its settings by a literal of all their names, which a dictionary of our own cannot satisfy.
_SETTINGS = cast("MutableMapping[str, Any]", mpl.rcParams)

WIDTHS = {"text": 7.0, "wide": 10.0}  # inches


class ArmStyle(TypedDict):
    """How an arm is drawn; fits ``ax.plot(x, y, **style)``."""

    color: str
    marker: str
    linestyle: LineStyle


class _Restore:
    """Puts settings back when a ``with`` block ends; does nothing outside of one."""

    def __init__(self, before: dict[str, Any]) -> None:
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *reason: object) -> None:
        _SETTINGS.update(self._before)


def use_style() -> _Restore:
    """Set the book's style, for good or for a ``with`` block.

    Returns:
        A context manager that puts the former settings back at the end of its block. Ignore it to keep the style.

    Example:
        >>> before = mpl.rcParams["axes.spines.top"]
        >>> with use_style():
        ...     mpl.rcParams["axes.spines.top"]
        False
        >>> mpl.rcParams["axes.spines.top"] == before
        True
    """
    before = {name: _SETTINGS[name] for name in STYLE}
    _SETTINGS.update(STYLE)
    return _Restore(before)


def figure(
    width: Literal["text", "wide"] = "text", aspect: float = 4 / 7, *, rows: int = 1, cols: int = 1
) -> tuple[Figure, Any]:
    """A figure in one of the book's two widths.

    Args:
        width: ``"text"`` is 7 inches wide, as the text is; ``"wide"`` is 10 inches, for several plots in a row.
        aspect: Height of the whole figure relative to its width, above 0.
        rows: Rows of plots.
        cols: Columns of plots.

    Returns:
        The figure, and its axes: one Axes, or an array of them with the shape that ``plt.subplots`` gives.

    Raises:
        ValueError: If the width is unknown or the aspect is not above 0.
    """
    if width not in WIDTHS:
        raise ValueError(f"width must be one of {', '.join(WIDTHS)}, got {width!r}")
    if not (math.isfinite(aspect) and aspect > 0):
        raise ValueError(f"aspect is height over width and must be above 0, got {aspect}")
    inches = WIDTHS[width]
    return plt.subplots(rows, cols, figsize=(inches, inches * aspect), layout="constrained")


def arm_style(names: Iterable[str]) -> dict[str, ArmStyle]:
    """Colour, marker and line style of each arm of a comparison.

    The style depends on an arm's place in the list alone: the first is the baseline. Give all figures of a chapter
    the same list, so that an arm looks the same in all of them.

    Args:
        names: Names of the arms, all different, at most 40.

    Returns:
        Name to style.

    Raises:
        ValueError: If a name comes twice or there are more arms than styles.

    Example:
        >>> arm_style(["MHA", "MQA"])["MHA"]
        {'color': '#202225', 'marker': 'o', 'linestyle': '-'}
    """
    arms = list(names)
    if len(set(arms)) != len(arms):
        raise ValueError(f"every arm needs a name of its own, got {arms}")
    most = len(PALETTE) * len(LINE_STYLES)
    if len(arms) > most:
        raise ValueError(f"there are styles for {most} arms, got {len(arms)}; spread them over several figures")
    return {
        arm: ArmStyle(
            color=PALETTE[i % len(PALETTE)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=LINE_STYLES[i % len(LINE_STYLES)],
        )
        for i, arm in enumerate(arms)
    }


def plot_seeds(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str,
    arm_col: str = "arm",
    seed_col: str = "seed",
    *,
    styles: Mapping[str, ArmStyle] | None = None,
) -> Axes:
    """Draw every seed of every arm as a thin line and each arm's mean as a thick one, named at its end.

    The mean goes over the first rows of all seeds, then over the second rows, and so on, in `x` and in `y`: with epochs
    on the x axis this is the mean of each epoch, and it works for wall time too, which differs from seed to seed. It
    stops where a seed is missing or not finite, so that a diverged run is never left out of it silently.

    Args:
        ax: Where to draw.
        frame: A tidy table, one row per arm, seed and point, in the order of the points.
        x: Column of the horizontal axis.
        y: Column of the vertical axis.
        arm_col: Column of the arms' names.
        seed_col: Column of the seeds.
        styles: Style of each arm, from `arm_style`. Without it, arms are styled in their order in the table.

    Returns:
        `ax`.

    Raises:
        ValueError: If a column is missing, the table is empty or an arm has no style.
    """
    missing = [column for column in (arm_col, seed_col, x, y) if column not in frame.columns]
    if missing:
        raise ValueError(f"the table has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise ValueError("the table is empty: there is no run to draw")
    arms = list(frame[arm_col].unique())
    styles = arm_style(arms) if styles is None else styles
    unstyled = [arm for arm in arms if arm not in styles]
    if unstyled:
        raise ValueError(f"styles has no entry for {', '.join(unstyled)}")
    ends: list[tuple[float, float, str]] = []
    for arm in arms:
        runs = frame[frame[arm_col] == arm]
        color = styles[arm]["color"]
        for _, run in runs.groupby(seed_col, sort=False):
            ax.plot(run[x], run[y], color=color, linestyle="-", linewidth=0.9, alpha=0.35, label="_seed")
        point = runs.groupby(seed_col, sort=False).cumcount()
        complete = runs.assign(point=point).pivot(index="point", columns=seed_col, values=[x, y])
        # cumprod: once a point is incomplete, so is all that follows.
        complete = complete[np.isfinite(complete.astype(float)).all(axis=1).cumprod().astype(bool)]
        mean_x, mean_y = (complete[column].mean(axis=1).to_numpy() for column in (x, y))
        every = max(1, len(mean_x) // 8)
        ax.plot(mean_x, mean_y, **styles[arm], linewidth=2.4, markevery=every, label=arm)
        drawn = runs[np.isfinite(runs[[x, y]].astype(float)).all(axis=1)]
        if len(mean_x):
            ends.append((mean_x[-1], mean_y[-1], arm))
        elif len(drawn):
            ends.append((drawn[x].iloc[-1], drawn[y].iloc[-1], arm))
    _name_ends(ax, ends, styles)
    if pd_types.is_integer_dtype(frame[x]):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def plot_estimates(
    ax: Axes,
    estimates: Mapping[str, Estimate],
    reference: float | None = None,
    band: tuple[float | None, float | None] | None = None,
) -> Axes:
    """Draw estimates as points with their intervals, one below the other.

    Args:
        ax: Where to draw; the vertical axis gets the names.
        estimates: Name to estimate, from top to bottom. An exact value is drawn as a diamond.
        reference: The paper's value, drawn as a dashed line.
        band: Lowest and highest value that count as reproduced, shaded; None is an open end.

    Returns:
        `ax`.

    Raises:
        ValueError: If there is no estimate, `reference` is not finite or `band` is empty or open at both ends.
    """
    if not estimates:
        raise ValueError("estimates is empty: there is nothing to draw")
    if reference is not None and not math.isfinite(reference):
        raise ValueError(f"reference must be a finite number or None, got {reference}")
    for row, estimate in enumerate(estimates.values()):
        exact = estimate.method == "exact"
        arms = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
        ax.errorbar(
            estimate.value,
            row,
            xerr=None if exact else arms,
            color=PALETTE[0],
            marker="D" if exact else "o",
            linestyle="none",
            elinewidth=1.8,
            capsize=4,
        )
    ax.set_yticks(range(len(estimates)), list(estimates))
    ax.set_ylim(len(estimates) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    if reference is not None:
        ax.axvline(reference, color=PALETTE[3], linestyle="--", linewidth=1.6, label=f"the paper: {reference:g}")
    if band is not None:
        _shade(ax, *band)
    if reference is not None or band is not None:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.3)
    return ax


def _shade(ax: Axes, low: float | None, high: float | None) -> None:
    given = [edge for edge in (low, high) if edge is not None]
    if not given or not all(math.isfinite(edge) for edge in given) or given != sorted(given):
        raise ValueError(f"band must be (lowest, highest) with at most one None for an open end, got {(low, high)}")
    for edge in given:  # invisible, so that the axis shows the edge
        ax.update_datalim([(edge, 0.0)], updatey=False)
    ax.autoscale_view(scaley=False)
    left, right = ax.get_xlim()
    start, stop = (left if low is None else low), (right if high is None else high)
    ax.axvspan(start, stop, color=BAND_COLOUR, zorder=0, label="counts as reproduced")
    ax.set_xlim(left, right)


def _name_ends(ax: Axes, ends: list[tuple[float, float, str]], styles: Mapping[str, ArmStyle]) -> None:
    """Write name and marker beside the ends of lines, moved apart by as little as keeps them legible."""
    from scipy.optimize import isotonic_regression

    ends = sorted(ends, key=lambda end: end[1])
    if not ends:
        return
    ax.autoscale_view()
    inches = cast("Figure", ax.get_figure(root=True)).dpi_scale_trans
    size = float(STYLE["legend.fontsize"])
    points = 72 * inches.inverted().transform(ax.transData.transform([(x, y) for x, y, _ in ends]))[:, 1]
    # Least squares under the condition that neighbours keep their distance.
    gaps = 1.25 * size * np.arange(len(ends))
    moved = isotonic_regression(points - gaps).x + gaps - points
    for (x, y, name), shift in zip(ends, moved, strict=True):
        color, marker = styles[name]["color"], styles[name]["marker"]
        beside = ax.transData + ScaledTranslation(18 / 72, shift / 72, inches)
        ax.add_artist(Line2D([x], [y], color=color, marker=marker, transform=beside, clip_on=False, label="_end"))
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 11, "shrinkB": 3, "relpos": (0, 0.5)}
        ax.annotate(
            name,
            xy=(x, y),
            xytext=(25, shift),
            textcoords="offset points",
            va="center",
            fontsize=size,
            annotation_clip=False,
            arrowprops=line if abs(shift) > 1 else None,
        )
