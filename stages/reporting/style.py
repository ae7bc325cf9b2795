"""What all figures share: one style, colour-blind safe, and files without a date inside."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from defense.pixels import to_pixels
from stages.core.files import Whole

# Okabe & Ito's palette.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
plt.rcParams.update(
    {
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "savefig.dpi": 150,
        "savefig.bbox": "tight",
        "svg.hashsalt": "stochsec",  # the same figure is the same file
    }
)
CURVES = {
    "natural": ("natural images", BLUE, "o"),
    "transfer": ("PGD images of the bare classifier", ORANGE, "s"),
    "bpda_eot": ("BPDA+EOT", GREEN, "^"),
}
TITLES = {"convergent": "convergent learning", "nonconvergent": "non-convergent learning"}


vector = False  # set by the command line: every figure of a report also as an SVG


def draw(figure: Figure, out: Path, name: str) -> None:
    """A figure of the report folder ``out``: figures/``name``.png, if asked vector/``name``.svg.

    They lie apart because `dvc plots` shows every image of a folder.
    """
    save(figure, out / "figures" / f"{name}.png")
    if vector:
        save(figure, out / "vector" / f"{name}.svg")


def save(figure: Figure, path: Path) -> None:
    """A .png or .svg, the same bytes for the same numbers."""
    kind = path.suffix[1:]
    metadata = {"Software" if kind == "png" else "Date": None}
    with Whole(path) as partial:
        figure.savefig(partial, format=kind, metadata=metadata)


def panels(
    rows: int, columns: int, size: tuple[float, float], *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of ``size`` inches, and its axes row by row."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(axes.flat)


def steps_axis(ax: Axes, steps: list[int]) -> None:
    """Langevin steps with a tick at each measured K."""
    ax.set_xscale("function", functions=(np.sqrt, np.square))
    ax.set_xticks(steps, [str(k) for k in steps])
    ax.set(xlabel="Langevin steps K (square-root scale)", xlim=(0, 1.05 * steps[-1]))


def show(ax: Axes, states: Tensor, title: str, *, columns: int | None = None) -> None:
    """Images (S,C,H,W) in net range, in rows of ``columns``, else in one row."""
    pixels = to_pixels(states).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    framed = [np.pad(image, ((0, 1), (0, 1), (0, 0)), constant_values=1.0) for image in pixels]
    columns = columns or len(framed)
    rows = [framed[i : i + columns] for i in range(0, len(framed), columns)]
    blank = np.ones_like(framed[0])
    rows[-1] += [blank] * (columns - len(rows[-1]))
    whole = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    ax.imshow(whole.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=8)
