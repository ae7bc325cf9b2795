"""The picture of `stochsec tune`."""

import pandas as pd
from matplotlib.figure import Figure

from stages.reporting.style import CURVES, panels, steps_axis


def over_settings(rows: pd.DataFrame, chosen: int) -> Figure:
    """Accuracy over the length of the chain, without and with denoising, on the tuning half."""
    shown = rows[(rows.half == "tuning") & (rows.replicas == rows.replicas.max())]
    kinds = sorted(shown.denoise.unique())
    figure, axes = panels(1, len(kinds), (4.0 * len(kinds), 2.8), sharey=True)
    for ax, denoise in zip(axes, kinds, strict=True):
        # Without a step nothing is denoised.
        own = shown[(shown.denoise == denoise) | (shown.K == 0)].sort_values("K")
        for name in ("natural", "transfer"):
            label, colour, marker = CURVES[name]
            ax.plot(own.K, own[name], color=colour, marker=marker, ms=4, label=label)
            low, high = own[f"{name}_low"], own[f"{name}_high"]
            ax.fill_between(own.K, low, high, color=colour, alpha=0.15, lw=0)
        attacked = own.dropna(subset=["bpda_eot"])
        label, colour, marker = CURVES["bpda_eot"]
        if len(attacked):
            ax.plot(attacked.K, attacked.bpda_eot, color=colour, marker=marker, ls="", label=label)
        ax.axvline(chosen, color="0.6", lw=1, ls=":")
        ax.set(title="denoised" if denoise else "not denoised", ylabel="accuracy", ylim=(0, 1.02))
        steps_axis(ax, own.K.tolist())
    axes[0].legend()
    return figure
