"""The roofline: operations a second over operations for each byte of weights read, with the machine's roofs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.floors import best
from bench.limits import Limit

MARKERS = "osD^vP*Xhp<>"
KINDS = ("fp32", "bf16", "int8")


def roofs(axes: Axes, limits: Sequence[Limit], low: float, high: float) -> None:
    """The slope of the memory, and the level of each data type, where it is the lower one."""
    read = best(limits, "read").median
    kinds = [kind for kind in KINDS if any(limit.kind == kind for limit in limits)]
    peaks = {kind: best(limits, kind) for kind in kinds}
    top = max(peak.median for peak in peaks.values())
    axes.plot([low, top / read], [low * read, top], color="black", linewidth=1.5)
    middle = (low * top / read) ** 0.5
    axes.text(
        middle, 1.15 * middle * read, f"DRAM read {read:.1f} GB/s", fontsize=9, ha="center", va="bottom",
        rotation=math.degrees(math.atan(read)), rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip
    for kind, peak in peaks.items():
        axes.plot([peak.median / read, high], [peak.median] * 2, color="black", linewidth=1.5)
        axes.annotate(
            f"{kind} {peak.median:.0f} Gop/s ({peak.name})", (high, peak.median), ha="right",
            textcoords="offset points", xytext=(-4, 4), fontsize=9,
        )  # fmt: skip


def draw(rows: Sequence[dict[str, Any]], limits: Sequence[Limit], title: str, path: Path) -> None:
    """rows: cells that have a floor. One panel a shape, a row of them a mode, one line a method and pass."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    size = (8.5 * len(shapes), 6.5 * len(modes))
    figure, panels = pyplot.subplots(len(modes), len(shapes), figsize=size, squeeze=False, sharey=True)
    intensities = [row["floor"]["intensity"] for row in rows]
    low, high = min(intensities) / 2.5, max(*intensities, 100.0) * 3
    for axes, (mode, shape) in zip(panels.flat, itertools.product(modes, shapes), strict=True):
        roofs(axes, limits, low, high)
        of_shape = [row for row in rows if (row["mode"], row["shape"]) == (mode, shape)]
        lines = list(dict.fromkeys((row["impl"], row["pass"]) for row in of_shape))
        for index, (impl, pass_) in enumerate(lines):
            line = [row for row in of_shape if (row["impl"], row["pass"]) == (impl, pass_)]
            xs, ys = [row["floor"]["intensity"] for row in line], [row["gops"] for row in line]
            label = impl.removeprefix("ktmoe:") + (f", {pass_}" if pass_ != "forward" else "")
            color = f"C{index % 10}"
            axes.plot(xs, ys, marker=MARKERS[index % len(MARKERS)], label=label, color=color, linewidth=1, markersize=7)
            for x, y, row in zip(xs, ys, line, strict=True):
                axes.annotate(
                    str(row["tokens"]), (x, y), textcoords="offset points", xytext=(6, -11), fontsize=8, color=color
                )
        axes.set(xscale="log", yscale="log", xlabel="operations / byte of touched weights", title=f"{shape}, {mode}")
        axes.set_xlim(low, high)
        axes.set_ylim(top=2 * max(limit.median for limit in limits if limit.kind in KINDS))
        axes.grid(True, which="both", alpha=0.2)
        if lines:
            axes.legend(loc="lower right", title="method (labels: tokens)", fontsize=9)
    for axes in panels[:, 0]:
        axes.set_ylabel("Gop/s achieved")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
