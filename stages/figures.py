"""The figures: one style, colour-blind safe, PNG and SVG, no date inside."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from defense.diagnostics import mean_logit_draws
from defense.pixels import to_pixels
from stages.artifacts import AttackResult
from stages.files import Whole
from stages.rows import accuracies

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
TITLES = {"convergent": "convergent (Adam, then SGD)", "nonconvergent": "non-convergent (Adam)"}


def save(figure: Figure, stem: Path, kinds: Sequence[str] = ("png", "svg")) -> None:
    """``stem``.png and ``stem``.svg, the same bytes for the same numbers."""
    for kind in kinds:
        metadata = {"Software" if kind == "png" else "Date": None}
        with Whole(stem.with_name(f"{stem.name}.{kind}")) as partial:
            figure.savefig(partial, format=kind, metadata=metadata)


def _figure(
    rows: int, columns: int, size: tuple[float, float], *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(axes.flat)


def over_steps(curve: pd.DataFrame, chosen: int) -> Figure:
    """Figure 4: accuracy over K, convergent and non-convergent side by side."""
    figure, axes = _figure(1, 2, (8.0, 3.2))
    for ax, (model, title) in zip(axes, TITLES.items(), strict=True):
        for images, (label, colour, marker) in CURVES.items():
            part = curve[(curve.model == model) & (curve.images == images)]
            if part.empty:
                continue
            first = part.iloc[0]
            updates = f", N={first.N}" if first.N else ""
            label = f"{label} (n={first.n}, H={first.H}{updates})"
            ax.plot(
                part.K, part.accuracy, color=colour, marker=marker, ms=4, label=label, clip_on=False
            )
            ax.fill_between(part.K, part.low, part.high, color=colour, alpha=0.15, lw=0)
        ax.axvline(chosen, color=GREY, ls=":", lw=1)
        ax.annotate(
            f"K={chosen}",
            (chosen, 0.02),
            xytext=(3, 0),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
        )
        ax.set(title=title, ylim=(0, 1.02), ylabel="accuracy")
        _steps_axis(ax, sorted(set(curve.K)))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _steps_axis(ax: Axes, steps: list[int]) -> None:
    """Langevin steps with a tick at each measured K."""
    ax.set_xscale("function", functions=(np.sqrt, np.square))
    ax.set_xticks(steps, [str(k) for k in steps])
    ax.set(xlabel="Langevin steps K (square-root scale)", xlim=(0, 1.05 * steps[-1]))


def energy_over_steps(compared: dict[str, Tensor]) -> Figure:
    """Mean energy along the chains of Figure 4; the bands hold 80 % of the images."""
    figure, axes = _figure(1, 2, (8.0, 2.8), sharey=True)
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
        _steps_axis(ax, steps.tolist())
    axes[0].legend()
    return figure


IMAGES_SHOWN = {"natural images": BLUE, "PGD images": ORANGE, "noise": GREY}


def energies_of_images(levels: dict[str, dict[str, Tensor]]) -> Figure:
    """Figure 7: energies (n,) of natural, adversarial and noise images under each energy."""
    figure, axes = _figure(1, len(levels), (4.0 * len(levels), 2.6))
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


ATTACK_COLOURS = [BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "k"]


def over_attack_steps(results: dict[str, list[AttackResult]]) -> Figure:
    """Figure 6, over N: the accuracy that each attack has left, one panel an energy."""
    figure, axes = _figure(1, len(results), (4.2 * len(results), 3.0), sharey=True)
    names = list(dict.fromkeys(str(r.about["attack"]) for found in results.values() for r in found))
    for ax, (energy, found) in zip(axes, results.items(), strict=True):
        for result in found:
            name, labels = str(result.about["attack"]), result.images.labels
            steps = range(int(result.about["steps"]) + 1)
            robust = [result.record.robust(labels, steps=n) for n in steps]
            left = [float(right.float().mean()) for right in robust]
            colour = ATTACK_COLOURS[names.index(name) % len(ATTACK_COLOURS)]
            ax.plot(steps, left, color=colour, label=name.replace("_", " "), drawstyle="steps-post")
        ax.set(ylim=(0, 1.02), xlabel="attack steps N", ylabel="accuracy (Algorithm 1)")
        ax.set_title(f"{energy.replace('_', ' ')} energy (n={len(found[0].images.labels)})")
    handles, labels_shown = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels_shown, loc="outside right center")
    return figure


FRESH_MARKERS = {
    "mean_logits": ("mean logits", BLUE, "o"),
    "average": ("average of {draws}", ORANGE, "s"),
    "majority": ("majority of {draws}", GREEN, "^"),
    "worst": ("worst of {draws}", GREY, "x"),
}


def evaluation(results: dict[str, list[AttackResult]], draws: int) -> Figure:
    """Accuracy by attack, one panel an energy: Algorithm 1 as bars, fresh noise as markers."""
    longest = max(len(found) for found in results.values())
    figure, axes = _figure(1, len(results), (4.5 * len(results), 0.33 * longest + 1.4))
    for ax, (energy, found) in zip(axes, results.items(), strict=True):
        scores = [accuracies(result, draws) for result in found]
        places = range(len(found))
        robust = [score["adversarial"] for score in scores]
        ends = np.array([accuracy.interval for accuracy in robust]).T
        values = np.array([accuracy.value for accuracy in robust])
        spread = np.abs(ends - values)
        ax.barh(
            places, values, xerr=spread, color="#CFE3F1", error_kw={"lw": 0.8}, label="Algorithm 1"
        )
        for metric, (label, colour, marker) in FRESH_MARKERS.items():
            suffix = "" if metric == "mean_logits" else f"_{metric}"
            fresh = [score[f"adversarial_afresh{suffix}"].value for score in scores]
            ax.scatter(
                fresh, places, s=18, color=colour, marker=marker, label=label.format(draws=draws)
            )
        natural = scores[0]["natural"]
        ax.axvline(natural.value, color=GREY, ls=":", lw=1, label="natural images")
        names = [str(result.about["attack"]).replace("_", " ") for result in found]
        ax.set_yticks(places, names)
        ax.invert_yaxis()
        activation = str(found[0].about["activation"]).replace("_", " ")
        title = f"{energy.replace('_', ' ')} energy, {activation} (n={natural.n})"
        ax.set(title=title, xlim=(0, 1.02), xlabel="accuracy")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def logit_histograms(diagnosed: dict[str, Tensor], sizes: Sequence[int]) -> Figure:
    """Figure 3: draws of F_H for a safe and a borderline image, right class against runner-up."""
    figure, axes = _figure(len(sizes), 2, (7.0, 1.5 * len(sizes) + 0.5))
    logits, labels = diagnosed["replica_logits"], diagnosed["labels"].tolist()
    for column, (name, label) in enumerate(zip(("safe", "borderline"), labels, strict=True)):
        mean = logits[:, column].mean(0)
        rival = int(mean.scatter(0, torch.tensor(label), -torch.inf).argmax())
        for row, size in enumerate(sizes):
            ax = axes[2 * row + column]
            draws = mean_logit_draws(logits[:, column], size)
            wrong = float((draws.argmax(1) != label).float().mean())
            bins = np.linspace(
                float(logits[:, column, [label, rival]].min()),
                float(logits[:, column, [label, rival]].max()),
                50,
            )
            for j, colour, who in ((label, BLUE, "right class"), (rival, ORANGE, "runner-up")):
                ax.hist(
                    draws[:, j].numpy(),
                    bins=bins.tolist(),
                    density=True,
                    color=colour,
                    alpha=0.6,
                    label=f"{who}: {j}",
                )
                ax.axvline(float(mean[j]), color=colour, ls="--", lw=1)
            ax.set(yticks=[], title=f"{name} image, H={size}: {wrong:.1%} of {len(draws)} wrong")
            if row == 0:
                ax.legend()
            if row == len(sizes) - 1:
                ax.set_xlabel("mean logit (dashed: mean of all replicas)")
    return figure


def _show(ax: Axes, states: Tensor, title: str) -> None:
    """A row of images, (S,C,H,W) in net range."""
    pixels = to_pixels(states).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    strip = np.concatenate(
        [np.pad(image, ((0, 0), (0, 1), (0, 0)), constant_values=1.0) for image in pixels], axis=1
    )
    ax.imshow(strip.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=8)


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
    for i in (grid.index(defense), -1):
        for start in ("test images", "noise"):
            said = " (the defense)" if grid[i] == defense else ""
            title = f"from {start}, after {grid[i]:,} steps{said}"
            strips.append((title, inspected[f"{start}/states"][i]))
    figure = Figure(figsize=(9.0, 7.2))
    figure.text(0.01, 0.99, fill(verdict, 120), fontsize=9, weight="bold", va="top")
    # Fixed places: a layout that is solved for differs in its last digits from run to run.
    above = figure.add_gridspec(2, 2, left=0.07, right=0.99, top=0.89, bottom=0.40, hspace=0.5)
    below = figure.add_gridspec(len(strips) // 2, 2, left=0.01, right=0.99, top=0.31, bottom=0)
    gap, norm, along, levels = np.ravel(np.asarray(above.subplots()))
    _training(gap, norm, history)
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
    kinds = {"training images": GREY, **STARTS_SHOWN}
    values = {name: inspected[f"{name}/levels"].numpy() for name in kinds}
    values[f"chains of {grid[-1]:,} steps"] = np.concatenate(
        [inspected[f"{start}/energies"][-1].numpy() for start in STARTS_SHOWN]
    )
    colours = [*kinds.values(), "k"]
    for (name, level), colour in zip(values.items(), colours, strict=True):
        if name == "training images":
            name = "training images, with their noise"
        level = level[np.isfinite(level)]
        if len(level) == 0:
            continue
        low, high = np.quantile(level, (0.01, 0.99))
        bins = np.linspace(low, high, 25).tolist()
        levels.hist(level, bins=bins, density=True, histtype="step", color=colour, label=name)
    levels.set(xlabel="U  [nats]", yticks=[], title="energies")
    levels.legend()
    for ax, (title, states) in zip(np.ravel(np.asarray(below.subplots())), strips, strict=True):
        _show(ax, states, title)
    return figure


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
    gap.set_title("energy gap: hovers around 0 when learning is stable")
    norm.set_title("gradient norm along the training chains: should level off")


def two_models(compared: dict[str, Tensor]) -> Figure:
    """Chains from the same test images under both energies, at four lengths."""
    steps = compared["K"].tolist()
    picks = sorted({0, len(steps) // 2, 3 * len(steps) // 4, len(steps) - 1})
    figure, axes = _figure(len(picks), 2, (9.0, 0.75 * len(picks)))
    for column, (model, title) in enumerate(TITLES.items()):
        samples = compared[f"{model}/natural/samples"]
        for row, i in enumerate(picks):
            _show(axes[2 * row + column], samples[i], f"{title}, K={steps[i]}")
    return figure


ENGINE_COLOURS = {
    "usual float32": GREY,
    "usual tf32": GREY,
    "backward float32": "#999999",
    "backward tf32": "#999999",
    "plain float32": "#CC79A7",
    "compiled float32": BLUE,
    "compiled tf32": GREEN,
    "compiled bfloat16": ORANGE,
}


def speed(rows: pd.DataFrame) -> Figure:
    """Bars of the speed-up and of the fraction of the machine's convolution rate."""
    figure = Figure(figsize=(8.0, 0.75 + 0.17 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    place, ticks, labels = 0.0, [], []
    for (task, image, batch), group in rows.groupby(["task", "image", "batch"], sort=False):
        places = [place + i for i in range(len(group))]
        names = group["engine"] + " " + group["precision"]
        colours = [ENGINE_COLOURS[name] for name in names]
        quartiles = np.array(group["ms_quartiles"].tolist())
        speedup, baseline = group["speedup"].to_numpy(), group["baseline_ms"].to_numpy()
        slow, fast = baseline / quartiles[:, 1], baseline / quartiles[:, 0]
        spread = np.array([speedup - slow, fast - speedup]).clip(0)
        left.barh(places, speedup, xerr=spread, color=colours, error_kw={"lw": 0.8})
        right.barh(places, 100 * group["limit_fraction"], color=colours)
        ticks.append(place + (len(group) - 1) / 2)
        labels.append(f"{task}\n{image}, batch {batch}")
        place += len(group) + 1
    left.set(xlabel="times as fast as the usual loop (bars: quartiles of its own time)")
    left.axvline(1, color="k", lw=0.8)
    right.set(xlabel="% of the machine's convolution rate in that precision")
    left.set_yticks(ticks, labels)
    left.invert_yaxis()
    shown = [
        name for name in ENGINE_COLOURS if (rows["engine"] + " " + rows["precision"] == name).any()
    ]
    handles = [left.barh(0, 0, color=ENGINE_COLOURS[name], label=name) for name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(shown))
    return figure
