"""The charts of a report, as SVG for its page. Their colours are readable on white and on black."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

GRAY = "#8a8a8a"
COLORS = ("#3b82c4", "#e08a2e", "#4ca66b", "#b565a7", "#c9524a", "#7a7fd0", "#8f9a3a", "#4fb0b8", "#d17ba0")

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "monoedge",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": GRAY,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.titlecolor": GRAY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "grid.color": GRAY,
    "grid.alpha": 0.25,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "legend.frameon": False,
}


def divergence_chart(divergences: Mapping[str, npt.NDArray[np.float64]]) -> str:
    """Draws how the KL divergence of all positions is distributed, by kind of question."""
    with _chart() as (axes, svg):
        bins = np.logspace(-10, 1, 67).tolist()
        for kind, values in divergences.items():
            if len(values):
                axes.hist(np.maximum(values, 1e-10), bins=bins, histtype="step", linewidth=1.5, label=kind)
        axes.set(xscale="log", yscale="log", xlabel="KL divergence of a position, nats", ylabel="positions")
        _legend(axes)
    return svg[0]


def layer_chart(matrices: Sequence[Mapping[str, Any]], value: str, label: str, log: bool = True) -> str:
    """Draws one value of the matrices by layer, one line for each kind of matrix, without the head."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for matrix in matrices:
        if matrix["layer"] is not None and matrix[value] is not None and any(matrix["rows"]):
            kind = str(matrix["name"]).split(".", 2)[2]
            lines.setdefault(kind, []).append((matrix["layer"], matrix[value]))
    if not lines:
        return ""
    with _chart() as (axes, svg):
        for kind, points in lines.items():
            layers, values = zip(*points, strict=True)
            axes.plot(layers, values, marker="o", markersize=3.5, linewidth=1.2, label=kind)
        axes.set(xlabel="layer", ylabel=label)
        if log and any(y > 0 for points in lines.values() for _, y in points):
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
    return svg[0]


def range_chart(matrices: Sequence[Mapping[str, Any]]) -> str:
    """Draws the ranges of the activations in front of the text expert's matrices, by layer."""
    with _chart() as (axes, svg):
        for offset, ending in ((-0.15, "text_gate_up"), (0.15, "text_down")):
            rows = [matrix for matrix in matrices if str(matrix["name"]).endswith(ending)]
            if rows:
                layers = [matrix["layer"] + offset for matrix in rows]
                lows, highs = [matrix["low"] for matrix in rows], [matrix["high"] for matrix in rows]
                axes.vlines(layers, lows, highs, linewidth=4, color=COLORS[0 if offset < 0 else 1], label=ending)
        axes.set_yscale("symlog", linthresh=1)
        axes.set(xlabel="layer", ylabel="range of the input")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)
    return svg[0]


def sensitivity_chart(sensitivity: Mapping[str, float], kept: Sequence[str]) -> str:
    """Draws the mean KL with only one layer quantized; layers that were left unquantized are red."""
    with _chart() as (axes, svg):
        names = list(sensitivity)
        colors = [COLORS[4] if name in kept else COLORS[0] for name in names]
        axes.bar(range(len(names)), [max(sensitivity[name], 1e-12) for name in names], color=colors)
        axes.set_xticks(range(len(names)), [name.removeprefix("layer ") for name in names], fontsize=7)
        label = "the only quantized layer (red: not quantized in the end)"
        axes.set(yscale="log", xlabel=label, ylabel="mean KL, nats")
    return svg[0]


def _legend(axes: Axes) -> None:
    """Puts the legend beside the chart, where it hides no line."""
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


@contextmanager
def _chart() -> Iterator[tuple[Axes, list[str]]]:
    """Gives axes to draw on. Afterwards the list holds the SVG."""
    svg: list[str] = []
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 2.8), layout="constrained")
        yield figure.subplots(), svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg.append(text[text.index("<svg") :])  # without the XML declaration, which only a file has
