"""The figures of accuracy: over Langevin steps, attacks, radii and replicas; and of speed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from defense.verdict import mean_logit_draws
from stages.core.records import AttackResult
from stages.reporting.rows import accuracies, count
from stages.reporting.style import BLUE, CURVES, GREEN, GREY, ORANGE, TITLES, panels, steps_axis


def over_steps(curve: pd.DataFrame, chosen: int) -> Figure:
    """Figure 4: accuracy over K, convergent and non-convergent side by side."""
    figure, axes = panels(1, 2, (8.0, 3.2))
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
        steps_axis(ax, sorted(set(curve.K)))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


ATTACK_COLOURS = [BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "k"]


def over_attack_steps(results: dict[str, list[AttackResult]]) -> Figure:
    """Figure 6, left: the accuracy that each attack has left after N steps, a panel a key."""
    figure, axes = panels(1, len(results), (4.2 * len(results), 3.0), sharey=True)
    names = list(dict.fromkeys(str(r.about["attack"]) for found in results.values() for r in found))
    for ax, (title, found) in zip(axes, results.items(), strict=True):
        for result in found:
            name, labels = str(result.about["attack"]), result.images.labels
            steps = range(int(result.about["steps"]) + 1)
            robust = [result.record.robust(labels, steps=n) for n in steps]
            left = [float(right.float().mean()) for right in robust]
            colour = ATTACK_COLOURS[names.index(name) % len(ATTACK_COLOURS)]
            label = name.replace("_", " ") + ("" if "n=" in title else f" (n={len(labels)})")
            ax.plot(steps, left, color=colour, label=label, drawstyle="steps-post")
            low, high = count(robust[-1]).interval
            ax.plot([steps[-1]] * 2, [low, high], color=colour, lw=0.8, marker="_", ms=4)
        ax.set(ylim=(0, 1.02), xlabel="attack steps N", ylabel="accuracy (Algorithm 1)")
        ax.set_title(title)
        ax.legend()
    return figure


SYSTEMS = {
    "defense": ("EBM defense, BPDA+EOT", BLUE, "o"),
    "natural": ("bare classifier, PGD", GREY, "x"),
    "adversarial": ("PGD, adversarially trained", ORANGE, "s"),
}


def over_radius(curve: pd.DataFrame, usual: tuple[str, float], trained: float) -> Figure:
    """Figure 5: accuracy over the radius in both norms.

    ``usual`` are the norm and radius of the tables, ``trained`` the l_inf radius of the baseline.
    """
    norms = {"linf": "$l_\\infty$", "l2": "$l_2$"}
    figure, axes = panels(1, 2, (8.0, 3.2), sharey=True)
    for ax, (norm, symbol) in zip(axes, norms.items(), strict=True):
        for who, (label, colour, marker) in SYSTEMS.items():
            part = curve[(curve.norm == norm) & (curve.system == who)]
            if part.empty:
                continue
            label += f" at {trained:g}/255" if who == "adversarial" else ""
            ax.plot(part.eps_255, part.accuracy, color=colour, marker=marker, ms=4, label=label)
            ax.fill_between(part.eps_255, part.low, part.high, color=colour, alpha=0.15, lw=0)
        if norm == usual[0]:
            ax.axvline(usual[1], color=GREY, ls=":", lw=1)
        ax.set(xlabel=f"radius of the {symbol} ball  [1/255 of the pixel range]", ylim=(0, 1.02))
        about = f"N={curve.N.max()}, n={curve.n.max()}, dotted: Tables 1-3"
        ax.set(ylabel="accuracy", title=f"{symbol} attacks ({about})", xlim=(0, None))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def over_replicas(curve: pd.DataFrame, usual: dict[str, int]) -> Figure:
    """Figure 6, right: accuracy over H_adv and over H_def; ``usual`` are those of the tables."""
    figure, axes = panels(1, 2, (8.0, 2.8), sharey=True)
    for ax, (side, colour, who) in zip(
        axes, (("H_adv", ORANGE, "attacker"), ("H_def", BLUE, "defender")), strict=True
    ):
        part = curve[curve.side == side]
        spread = np.abs(np.array([part.low, part.high]) - np.array(part.accuracy))
        ax.errorbar(part.replicas, part.accuracy, spread, color=colour, marker="o", ms=4, capsize=3)
        ax.axvline(usual[side], color=GREY, ls=":", lw=1)
        ax.set_xscale("log")
        ax.set_xticks(list(part.replicas), [str(count) for count in part.replicas])
        ax.minorticks_off()
        first = part.iloc[0]
        other = f"H_def={first.H_def}" if side == "H_adv" else f"H_adv={first.H_adv}"
        ax.set(xlabel=f"{side}, replicas of the {who}", ylim=(0, 1.02))
        ax.set(ylabel="accuracy (Algorithm 1)", title=f"{other}, N={first.N}, n={first.n}")
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
    figure, axes = panels(1, len(results), (4.5 * len(results), 0.33 * longest + 1.4))
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
    figure, axes = panels(len(sizes), 2, (7.0, 1.5 * len(sizes) + 0.5))
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


ENGINE_COLOURS = {
    "usual float32": GREY,
    "usual tf32": GREY,
    "backward float32": "#999999",
    "backward tf32": "#999999",
    "plain float32": "#CC79A7",
    "fast float32": BLUE,
    "fast tf32": GREEN,
    "fast bfloat16": ORANGE,
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


ENGINES_SHOWN = {"fast": "fast engine", "plain": "plain loop"}


def sampling_times(timed: list[dict[str, Any]], machine: str) -> Figure:
    """Figure 10, right: how long Langevin sampling takes; the rows of `stochsec bench-networks`.

    Milliseconds a step are seconds per 1,000 steps. Bars are medians, their ends quartiles.
    ``machine`` is named in the title.
    """
    rows = pd.DataFrame(timed)
    figure = Figure(figsize=(7.0, 0.9 + 0.42 * len(rows)), layout="constrained")
    ax = figure.subplots()
    names = rows["network"] + "\n" + rows["engine"].map(ENGINES_SHOWN.get)
    colours = [ENGINE_COLOURS[name] for name in rows["engine"] + " " + rows["precision"]]
    spread = [rows["ms"] - rows["ms_low"], rows["ms_high"] - rows["ms"]]
    places = range(len(rows))
    ax.barh(places, rows["ms"], xerr=spread, color=colours, error_kw={"lw": 0.8, "capsize": 2})
    for place, row in zip(places, rows.to_dict("records"), strict=True):
        ax.annotate(
            f"{row['times_plain']:.3g} x our plain loop, "
            f"{row['times_fast']:.3g} x our fast engine\n"
            f"{row['parameters'] / 1e6:.1f}M parameters",
            (row["ms_high"], place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xscale("log")
    first, last = float(rows["ms_low"].min()) / 2, float(rows["ms_high"].max())
    ax.set_xlim(first, first * (last / first) ** 1.6)  # room for what is written at the bars
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel(f"seconds per 1,000 Langevin steps of {rows['batch'].iloc[0]} images (log scale)")
    ax.set_title(f"{machine}; bars: medians, ends: quartiles")
    return figure
