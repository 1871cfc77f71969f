"""Plots of the page: accuracy against the strength of each transformation, and differences."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .nets import ARMS
from .results import COLUMNS, Results
from .spread import Estimate
from .training import STRENGTHS, TRAINED_STRENGTH
from .transforms import ALL, KINDS

# Colours that colour-blind people can tell apart; plain arms are grey.
COLOURS = {
    "plain": "0.6",
    "plain-size": "0.3",
    "plain-time": "0.1",
    "dilated": "#999933",
    "transformer": "#CC79A7",
    "modulation": "#56B4E9",
    "dcn": "#E69F00",
    "dcnv2": "#0072B2",
    "dcnv2-groups": "#009E73",
    "dcnv4": "#D55E00",
    "branch": "0.3",
    "norm": "0.6",
}


def strengths(results: Results, lines: Sequence[tuple[str, str]], title: str) -> Figure:
    """Accuracy against strength, a panel for each transformation.

    Args:
        results: of which there are some for every line.
        lines: parts and arms. Those of the first part are solid, others dashed.
        title: of the figure.
    """
    figure = Figure(figsize=(10.5, 6.2), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for ax, kind in zip(panels.flat, (*KINDS, ALL)):
        for part, arm in lines:
            _line(ax, results, part, arm, kind, "-" if part == lines[0][0] else "--")
        ax.axvspan(TRAINED_STRENGTH, max(STRENGTHS) + 0.05, color="0.95", zorder=0)
        ax.set(title=kind, xlim=(-0.05, max(STRENGTHS) + 0.05))
        ax.grid(color="0.9", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in panels[1]:
        ax.set_xlabel("strength")
    for ax in panels[:, 0]:
        ax.set_ylabel("accuracy, %")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _line(ax: Axes, results: Results, part: str, arm: str, kind: str, style: str) -> None:
    tests = [("upright", 0), *((kind, strength) for strength in STRENGTHS)]
    found = [results.accuracy(part, arm, test) for test in tests]
    label = ARMS[arm].title + ("" if style == "-" else f" ({part})")
    draw_estimates(ax, [test[1] for test in tests], found, COLOURS[arm], label, style)


def draw_estimates(
    ax: Axes, x: Sequence[float], found: Sequence[Estimate], colour: str, label: str, style: str
) -> None:
    """Means of percentages, and their intervals, as far as there can be such percentages."""
    y = [each.mean for each in found]
    ax.plot(x, y, style, color=colour, label=label, marker="o", markersize=3, linewidth=1.4)
    if all(each.half_width is not None for each in found):
        low = [max(each.low, 0) for each in found]
        high = [min(each.high, 100) for each in found]
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def differences(
    results: Results, part: str, baseline: str, arms: Sequence[str], title: str
) -> Figure:
    """What each arm has beyond a baseline, seed by seed, with the interval of 95 %."""
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    ax = figure.subplots()
    for number, arm in enumerate(arms):
        shift = (number - (len(arms) - 1) / 2) * 0.8 / len(arms)
        for place, test in enumerate(COLUMNS.values()):
            found = results.difference((part, arm), (part, baseline), test)
            if found is not None:
                style = dict(color=COLOURS[arm], fmt="o", markersize=4, capsize=2, linewidth=1.2)
                label = ARMS[arm].title if place == 0 else None
                ax.errorbar(place + shift, found.mean, yerr=found.half_width, label=label, **style)
    ax.axhline(0, color="0.3", linewidth=1)
    ax.set_xticks(range(len(COLUMNS)), labels=list(COLUMNS))
    ax.set_ylabel("points of accuracy")
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set_title(title, fontsize=11)
    return figure
