"""The log of a run as a picture: loss and share of right answers over the steps of every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer import LOG_FILE

CURVE_FILE = "curve.png"
_WINDOW = 10
"""Records that a point is the mean of."""


def draw_curve(folder: Path) -> None:
    """Draws ``log.jsonl`` of a run into ``curve.png`` beside it, one panel a stage; nothing where nothing is logged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    stages = list(dict.fromkeys(record["stage"] for record in records))
    if not stages:
        return
    figure, panels = pyplot.subplots(1, len(stages), figsize=(4 * len(stages), 3), squeeze=False, layout="constrained")
    for panel, stage in zip(panels[0], stages, strict=True):
        own = [record for record in records if record["stage"] == stage]
        panel.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        panel.plot(*_smooth(own, "loss"), color="tab:blue")
        if "right" in own[0]:
            right = panel.twinx()
            right.set(ylim=(0, 1), ylabel="faultless conversations")
            right.plot(*_smooth(own, "right"), color="tab:green")
    figure.savefig(folder / CURVE_FILE, dpi=100)
    pyplot.close(figure)


def _smooth(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    windows = [records[start : start + _WINDOW] for start in range(0, len(records), _WINDOW)]
    return (
        [sum(record["step"] for record in window) / len(window) for window in windows],
        [sum(record[key] for record in window) / len(window) for window in windows],
    )
