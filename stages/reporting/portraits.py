"""Single images side by side: before and after purification, and those that an attack broke."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from stages.reporting.style import panels

LOUDER = 4.0  # factor on differences, around gray


def before_and_after(before: Tensor, after: Tensor, said: Sequence[str]) -> Figure:
    """Images (n,C,H,W) in [0, 1], one purified copy of each, what changed, and the predictions."""
    titles = [f"predicted: {name}" for name in said]
    return _rows(
        {"as it came": before, "one purified copy": after, **_change(before, after)}, titles
    )


def failures(before: Tensor, after: Tensor, said: Sequence[str]) -> Figure:
    """Natural and attacked images (n,C,H,W) in [0, 1], the change, and what they were called."""
    return _rows({"natural": before, "attacked": after, **_change(before, after)}, said)


def _change(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    return {f"{LOUDER:g} x change": (0.5 + LOUDER * (after - before)).clamp(0, 1)}


def _rows(rows: dict[str, Tensor], titles: Sequence[str]) -> Figure:
    """A row of images for each name, a title above each column."""
    height, width = next(iter(rows.values())).shape[2:]
    size = 1.2 * len(titles) + 0.8, 1.2 * len(rows) * height / width + 0.4
    figure, axes = panels(len(rows), len(titles), size)
    for i, (name, images) in enumerate(rows.items()):
        for j, image in enumerate(images):
            ax = axes[i * len(titles) + j]
            pixels = np.asarray(image.permute(1, 2, 0)).squeeze()
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            for side in ax.spines.values():
                side.set_visible(False)
            if i == 0:
                ax.set_title(titles[j], fontsize=7)
            if j == 0:
                ax.set_ylabel(name, fontsize=7)
    return figure
