"""Draw the picture in README.md from the results of the theme `growth`.

python -m benchmarks --only growth --write benchmarks && python -m benchmarks.picture

The picture shows the time and the memory of the norms and the clipped sum of per-example gradients against
B × parameters. Its background is transparent, and its colors are legible on white and on black.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.report import RESULTS

HERE = Path(__file__).parent
TARGET = HERE.parent / "docs" / "cost.png"
GREY, BLUE, RED = "#7d8590", "#2f81f7", "#e5534b"
SECONDS = {1e-4: "0.1 ms", 1e-3: "1 ms", 1e-2: "10 ms", 1e-1: "0.1 s", 1.0: "1 s"}
BYTES = {2.0**15: "32 KiB", 2.0**20: "1 MiB", 2.0**25: "32 MiB", 2.0**30: "1 GiB"}
NUMBERS = {1e5: "10⁵", 1e7: "10⁷", 1e9: "10⁹"}


def series(rows: list[dict[str, Any]], column: str, kind: str) -> tuple[list[float], list[float]]:
    """(B × parameters, seconds or bytes) of the rows with a measurement."""
    measured = [row for row in rows if column in row[kind]]
    return [float(row["labels"]["B × parameters"]) for row in measured], [row[kind][column] for row in measured]


def panel(axes: Axes, rows: list[dict[str, Any]], kind: str, title: str, ticks: dict[float, str]) -> None:
    x, plain = series(rows, "plain", kind)
    _, factored = series(rows, "jaxgrad", kind)
    x_materialized, materialized = series(rows, "vmap(grad)", kind)
    axes.loglog(x, plain, color=GREY, linewidth=6, alpha=0.45, solid_capstyle="round")
    axes.loglog(x, factored, color=BLUE, linewidth=1.8, marker="o", markersize=4)
    axes.loglog(x_materialized, materialized, color=RED, linewidth=1.8, marker="o", markersize=4)
    annotate(axes, x_materialized[-1], materialized[-1], "vmap(jax.grad)", RED, (-8, 0), "right", "center")
    if len(x_materialized) < len(x):
        annotate(
            axes, x_materialized[-1], materialized[-1], "does not fit into 2 GiB", RED, (8, 0), "left", "center", 8
        )
    annotate(axes, x[-3], factored[-3], "jaxgrad", BLUE, (-4, 9), "right", "bottom")
    annotate(axes, x[-3], plain[-3], "plain gradient", GREY, (12, -8), "left", "top")
    axes.set_title(title, loc="left", fontsize=11, color=GREY, fontweight="bold")
    axes.set_xlabel("B × parameters", color=GREY)
    axes.set_xticks(list(NUMBERS), list(NUMBERS.values()))
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_xlim(x[0] / 2, x[-1] * 12)


def annotate(
    axes: Axes, x: float, y: float, text: str, color: str, offset: tuple[int, int], ha: Any, va: Any, size: int = 10
) -> None:
    axes.annotate(text, (x, y), offset, textcoords="offset points", ha=ha, va=va, color=color, fontsize=size)


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    panel(left, rows, "seconds", "Norms + clipped sum: time", SECONDS)
    panel(right, rows, "bytes", "Norms + clipped sum: memory", BYTES)
    for axes in (left, right):
        axes.minorticks_off()
        axes.tick_params(colors=GREY, length=3)
        axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.patch.set_alpha(0)
    figure.savefig(target, dpi=150, transparent=True)
    plt.close(figure)


if __name__ == "__main__":
    results = json.loads((HERE / RESULTS if len(sys.argv) < 2 else Path(sys.argv[1])).read_text(encoding="utf-8"))
    draw(results["growth"]["rows"], TARGET if len(sys.argv) < 3 else Path(sys.argv[2]))
