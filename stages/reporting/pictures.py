"""The figures of energies, chains and samples."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from stages.reporting.style import (
    BLUE,
    CURVES,
    GREEN,
    GREY,
    ORANGE,
    TITLES,
    panels,
    show,
    steps_axis,
)


def energy_over_steps(compared: dict[str, Tensor]) -> Figure:
    """Mean energy along the chains of Figure 4; the bands hold 80 % of the images."""
    figure, axes = panels(1, 2, (8.0, 2.8), sharey=True)
    steps = compared["K"].numpy()
    for ax, (model, title) in zip(axes, TITLES.items(), strict=True):
        start = compared[f"{model}/natural/energies"][0].mean()
        for images in ("natural", "transfer"):
            label, colour, marker = CURVES[images]
            levels = compared[f"{model}/{images}/energies"] - start
            ax.plot(
                steps, levels.mean(1), color=colour, marker=marker, ms=4, label=label, clip_on=False
            )
            low, high = np.quantile(levels.numpy(), (0.1, 0.9), axis=1)
            ax.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        ax.set(title=title, ylabel="U(chain) - mean U(natural)  [nats]")
        steps_axis(ax, steps.tolist())
    axes[0].legend()
    return figure


IMAGES_SHOWN = {"natural images": BLUE, "PGD images": ORANGE, "noise": GREY}


def energies_of_images(levels: dict[str, dict[str, Tensor]]) -> Figure:
    """Figure 7: energies (n,) of natural, adversarial and noise images under each energy."""
    figure, axes = panels(1, len(levels), (4.0 * len(levels), 2.6))
    for ax, (model, values) in zip(axes, levels.items(), strict=True):
        everything = torch.cat(list(values.values())).numpy()
        bins = np.linspace(everything.min(), everything.max(), 60).tolist()
        for name, level in values.items():
            ax.hist(
                level.numpy(),
                bins=bins,
                density=True,
                color=IMAGES_SHOWN[name],
                alpha=0.55,
                label=f"{name} (n={len(level)})",
            )
        natural, adversarial = (values[name] for name in ("natural images", "PGD images"))
        higher = float((adversarial[:, None] > natural[None, :]).float().mean())
        ax.set(xlabel="U  [nats]", yticks=[])
        ax.set_title(f"{TITLES[model]}\na PGD image lies higher than a natural one: {higher:.0%}")
    axes[0].legend()
    return figure


STARTS_SHOWN = {"test images": BLUE, "persistent chains": GREEN, "noise": ORANGE}


def energy_page(
    history: pd.DataFrame, inspected: dict[str, Tensor], defense: int, verdict: str
) -> Figure:
    """Is an energy convergent? Its training, the energies of long chains, and their states.

    ``history``: batch, energy_gap, gradient_norm and phase. ``defense`` is the K of the defense.
    """
    grid = inspected["grid"].tolist()
    strips = [
        ("test images", inspected["test images/states"][0]),
        ("persistent chains, as training left them", inspected["persistent chains/states"][0]),
    ]
    for i, after in enumerate((defense, grid[-1]), start=1):
        for start in ("test images", "noise"):
            said = " (the defense)" if after == defense else ""
            title = f"from {start}, after {after:,} steps{said}"
            strips.append((title, inspected[f"{start}/states"][i]))
    figure = Figure(figsize=(9.0, 7.2))
    figure.text(0.01, 0.94, fill(verdict, 120), fontsize=9, weight="bold", va="bottom")
    # Fixed places: a layout that is solved for differs in its last digits from run to run.
    above = figure.add_gridspec(
        2, 3, left=0.07, right=0.99, top=0.89, bottom=0.40, hspace=0.5, wspace=0.35
    )
    below = figure.add_gridspec(len(strips) // 2, 2, left=0.01, right=0.99, top=0.31, bottom=0)
    gap, norm, change = (figure.add_subplot(above[0, i]) for i in range(3))
    along, levels = figure.add_subplot(above[1, :2]), figure.add_subplot(above[1, 2])
    _training(gap, norm, history)
    _changes(change, inspected)
    for start, colour in STARTS_SHOWN.items():
        energies = inspected[f"{start}/energies"].numpy()
        along.plot(grid, energies.mean(1), color=colour, marker="o", ms=3, label=f"from {start}")
        low, high = np.quantile(energies, (0.1, 0.9), axis=1)
        along.fill_between(grid, low, high, color=colour, alpha=0.15, lw=0)
    along.axvline(defense, color=GREY, ls=":", lw=1)
    along.set_xscale("symlog", linthresh=grid[1])
    along.set(xlabel="Langevin steps (dotted: the defense)", ylabel="U  [nats]", xlim=(0, None))
    along.set_title("energy along chains: one level, from wherever they start")
    along.legend()
    _levels(levels, inspected)
    for ax, (title, states) in zip(np.ravel(np.asarray(below.subplots())), strips, strict=True):
        show(ax, states, title)
    return figure


def _levels(ax: Axes, inspected: dict[str, Tensor]) -> None:
    """Energies of images, of noise, and at the ends of the chains: medians, 10 to 90 %."""
    rows = {"training images, with their noise": (GREY, inspected["training images/levels"])}
    for start, colour in STARTS_SHOWN.items():
        rows[start] = colour, inspected[f"{start}/levels"]
    steps = int(inspected["grid"][-1])
    for start, colour in STARTS_SHOWN.items():
        rows[f"from {start}, {steps:,} steps on"] = colour, inspected[f"{start}/energies"][-1]
    noisy = inspected["training images/levels"].numpy()
    for row, (name, (colour, energies)) in enumerate(rows.items()):
        if not len(finite := energies[energies.isfinite()].numpy()):
            continue
        low, middle, high = np.quantile(finite - noisy.mean(), (0.1, 0.5, 0.9))
        ax.plot([low, high], [row, row], color=colour, lw=3, alpha=0.4)
        ax.plot(middle, row, color=colour, marker="o", ms=4)
        ax.text(0.02, row - 0.2, name, transform=ax.get_yaxis_transform(), fontsize=7)
    ax.axvline(0, color=GREY, ls=":", lw=1)
    # Noise may lie a thousand times as far away as all the rest.
    ax.set_xscale("symlog", linthresh=10 ** np.ceil(np.log10(noisy.std())))
    ax.set(yticks=[], ylim=(len(rows) - 0.6, -0.8), title="energies")
    ax.set_xlabel("U - mean U(noisy training images)  [nats]")


def _changes(ax: Axes, inspected: dict[str, Tensor]) -> None:
    """How far chains from noisy images leave the level of these, for images of several kinds."""
    steps = inspected["levels_grid"].tolist()
    colours = {"images of the bank": GREEN, "training images": BLUE, "test images": ORANGE}
    for who, colour in colours.items():
        if f"{who}/changes" in inspected:
            values = inspected[f"{who}/changes"].tolist()
            ax.plot(steps, values, color=colour, marker="o", ms=3, label=who)
    ax.axhline(0, color=GREY, ls=":", lw=1)
    ax.set_xscale("log")
    ax.set(xlabel="Langevin steps", ylabel="U - U(noisy images)  [nats]")
    ax.set_title("level of chains from noisy images")
    ax.legend()


def _training(gap: Axes, norm: Axes, history: pd.DataFrame) -> None:
    """Energy gap and gradient norm over the batches of all phases, and their running medians."""
    if history.empty:
        gap.set_title("energy gap: no history of the training")
        norm.set_title("gradient norm: no history of the training")
        return
    for ax, column, label in (
        (gap, "energy_gap", "U(data) - U(chains)  [nats]"),
        (norm, "gradient_norm", "|df/dx|"),
    ):
        values = history[column]
        rows = max(1, len(values) // 15)
        median = values.rolling(rows, center=True, min_periods=1).median()
        ax.plot(history["batch"], values, color=BLUE, lw=0.5, alpha=0.3)
        ax.plot(history["batch"], median, color=BLUE, lw=1.2)
        for start in history.groupby("phase", sort=False)["batch"].min().iloc[1:]:
            ax.axvline(start, color=GREY, ls=":", lw=1)
        ax.set(xlabel="batches of training (dotted: next phase)", ylabel=label)
        low, high = np.quantile(values, (0.02, 0.98))
        room = 0.3 * max(high - low, 1e-6)
        ax.set_ylim(low - room, high + room)
    gap.axhline(0, color="k", lw=0.8)
    gap.set_title("energy gap: around 0 when stable")
    norm.set_title("gradient norm of training chains")


def two_models(compared: dict[str, Tensor]) -> Figure:
    """Chains from the same test images under both energies, at four lengths."""
    steps = compared["K"].tolist()
    picks = sorted({0, len(steps) // 2, 3 * len(steps) // 4, len(steps) - 1})
    figure, axes = panels(len(picks), 2, (9.0, 0.75 * len(picks)))
    for column, (model, title) in enumerate(TITLES.items()):
        samples = compared[f"{model}/natural/samples"]
        for row, i in enumerate(picks):
            show(axes[2 * row + column], samples[i], f"{title}, K={steps[i]}")
    return figure


LINES = ("-", "--", ":", "-.")  # one a separation
PHASE_TITLES = {"adam": "phase 1", "convergent": "convergent", "nonconvergent": "non-convergent"}


def over_training(seen: dict[str, Tensor], long_steps: int) -> Figure:
    """Figure 2: the training's own chains at some moments, and the same ``long_steps`` later.

    The paper does not say where its long runs start (the authors' code: from data). Ours start from
    the persistent chains.
    """
    phases = [phase for phase in PHASE_TITLES if f"{phase}/batches" in seen]
    moments = [(phase, i) for phase in phases for i in range(len(seen[f"{phase}/batches"]))]
    figure, axes = panels(2, len(moments), (1.15 * len(moments), 3.6))
    for column, (phase, i) in enumerate(moments):
        before = 0 if phase == "adam" else int(seen["adam/batches"][-1])
        batches = before + int(seen[f"{phase}/batches"][i])
        change = float(seen[f"{phase}/energy_change"][i].mean())
        above, below = axes[column], axes[len(moments) + column]
        heading = PHASE_TITLES[phase] if i == 0 else ""
        show(above, seen[f"{phase}/short"][i], f"{heading}\nbatch {batches:,}", columns=3)
        show(below, seen[f"{phase}/long"][i], f"U {change:+.0f} nats", columns=3)
    for ax, label in ((axes[0], "in training"), (axes[len(moments)], f"{long_steps:,} steps on")):
        ax.text(-0.12, 0.5, label, rotation=90, transform=ax.transAxes, ha="right", va="center")
    return figure


ENERGY_LINES = {"convergent": ("piecewise linear", BLUE), "smooth_convergent": ("smooth", GREEN)}


def order_and_chaos(found: dict[str, Tensor], separations: Sequence[float], steps: int) -> Figure:
    """Figure 8: exponents over the strength of the noise for each energy and separation.

    Beside them what chains of the defense's energy end as, after ``steps`` steps.
    """
    eta, states = found["eta"].tolist(), found["convergent/states"]
    figure = Figure(figsize=(8.5, 0.8 + 0.5 * len(eta)), layout="constrained")
    halves = np.ravel(np.asarray(figure.subfigures(1, 2, width_ratios=(1.1, 1))))
    ax, right = halves[0].subplots(), halves[1]
    for energy, (kind, colour) in ENERGY_LINES.items():
        for distance, line, marker in zip(separations, LINES, "os^v", strict=False):
            exponents = found[f"{energy}/{distance:.12g}"].numpy()
            half = 1.96 * exponents.std(1, ddof=1) / exponents.shape[1] ** 0.5
            label = f"{kind} energy, {distance:g} apart"
            style = {"color": colour, "ls": line, "marker": marker, "ms": 4, "capsize": 3}
            ax.errorbar(eta, exponents.mean(1), half, label=label, **style)
    ax.axhline(0, color="k", lw=0.8)
    ax.axvline(1, color=GREY, ls=":", lw=1)
    ax.set_xscale("log")
    ax.set_xticks(eta, [f"{value:g}" for value in eta])
    ax.minorticks_off()
    ax.set(xlabel="strength of the noise, eta (dotted: the chain itself)")
    ax.set(ylabel="maximal Lyapunov exponent  [1/step]")
    ax.set_title(f"above 0: chaos (mean of n={states.shape[1]} chains, 1.96 standard errors)")
    ax.legend()
    rows = np.ravel(np.asarray(right.subplots(len(eta), 1, squeeze=False)))
    for row, value, ends in zip(rows, eta, states, strict=True):
        show(row, ends[:12], "")
        row.text(-0.02, 0.5, f"eta {value:g}", transform=row.transAxes, ha="right", va="center")
    right.suptitle(f"chains of the defense's energy after {steps:,} steps", fontsize=8)
    return figure


def distance_from_data(found: dict[str, Tensor], about: dict[str, object], chosen: int) -> Figure:
    """Figure 9: Frechet distance to the training images along chains that start from them."""
    figure, axes = panels(1, 1, (5.0, 3.2))
    ax, steps = axes[0], found["K"].tolist()
    for model, colour, marker in (("convergent", BLUE, "o"), ("nonconvergent", ORANGE, "s")):
        ax.plot(steps, found[model], color=colour, marker=marker, ms=4, label=TITLES[model])
    label = f"as many test images: {float(found['test']):.3g}"
    ax.axhline(float(found["test"]), color=GREY, ls="--", lw=1, label=label)
    ax.axvline(chosen, color=GREY, ls=":", lw=1)
    kind = about["measured_with"]
    inception = str(kind).startswith("inception")
    name = "FID" if inception else f"squared Frechet distance, features of the {kind}"
    ax.set(
        ylabel=name,
        ylim=(0, None),
        title=f"chains from n={about['images']} training images, to these",
    )
    steps_axis(ax, steps)
    ax.legend()
    return figure


def idea(found: dict[str, Tensor]) -> Figure:
    """Figure 1: an attacked image, its purified copies, their logits and the mean of these."""
    label, states, grid = int(found["label"]), found["states"], found["grid"].tolist()
    shown = states.shape[1]
    figure = Figure(figsize=(9.0, 3.4))
    images = figure.add_gridspec(2, 1, left=0.01, right=0.15, top=0.86, bottom=0.04, hspace=0.45)
    chains = figure.add_gridspec(
        shown, len(grid), left=0.22, right=0.62, top=0.86, bottom=0.04, wspace=0.1, hspace=0.15
    )
    bars = figure.add_gridspec(shown, 1, left=0.655, right=0.77, top=0.86, bottom=0.04, hspace=0.35)
    mean = figure.add_gridspec(1, 1, left=0.83, right=0.99, top=0.80, bottom=0.16)
    for row, (name, x) in enumerate((("test image", "natural"), ("after PGD", "adversarial"))):
        ax = figure.add_subplot(images[row])
        said = int(found[f"{x}_logits"].argmax())
        show(ax, found[x][None], "")
        ax.set_title(f"{name}\nclassified {said}: {_verdict(said, label)}", fontsize=8)
    for replica in range(shown):
        for column, steps in enumerate(grid):
            ax = figure.add_subplot(chains[replica, column])
            show(ax, states[column, replica][None], "")
            if replica == 0:
                ax.set_title(f"K={steps}" if column else "copies", fontsize=8)
        ax = figure.add_subplot(bars[replica])
        _logit_bars(ax, found["replica_logits"][replica], label)
        ax.set(xticks=[], yticks=[])
        if replica == 0:
            ax.set_title("logits", fontsize=8)
    ax = figure.add_subplot(mean[0])
    averaged = found["replica_logits"].mean(0)
    _logit_bars(ax, averaged, label)
    said = int(averaged.argmax())
    count = len(found["replica_logits"])
    ax.set_title(
        f"mean logits of H={count}\nclassified {said}: {_verdict(said, label)}", fontsize=8
    )
    ax.set(xticks=range(len(averaged)), xlabel="class")
    return figure


def _verdict(said: int, label: int) -> str:
    return "right" if said == label else "wrong"


def _logit_bars(ax: Axes, logits: Tensor, label: int) -> None:
    """One bar a class; the right one is blue, another that wins orange."""
    colours = [GREY] * len(logits)
    colours[int(logits.argmax())] = ORANGE
    if int(logits.argmax()) == label:
        colours[label] = BLUE
    ax.bar(range(len(logits)), logits.tolist(), color=colours)
    ax.axhline(0, color="k", lw=0.5)
    ax.grid(visible=False)
