"""The figures of the report on systems: what the strongest attack leaves, and what attacks cost."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from stages.core.records import AttackResult
from stages.reporting.style import BLUE, GREEN, GREY, ORANGE, panels

COLOURS = [GREY, GREEN, ORANGE, BLUE, "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def arrows(systems: Sequence[tuple[str, float, float, float]]) -> Figure:
    """(name, natural accuracy, under its own paper's attack, under all attacks), a row each.

    Sorted by what is left. NaN: its own paper attacks it with nothing that was run here.
    """
    ordered = sorted(systems, key=lambda system: (system[3], system[1]))
    rows = range(len(ordered))
    figure, (ax,) = panels(1, 1, (7, 0.9 + 0.36 * len(ordered)))
    names, naturals, owns, worsts = zip(*ordered, strict=True)
    ax.plot(naturals, rows, "o", color=BLUE, label="natural images")
    ax.plot(owns, rows, "s", color=ORANGE, mfc="white", label="attacked as in its own paper")
    for row, own, worst in zip(rows, owns, worsts, strict=True):
        if own > worst:
            arrow = {"arrowstyle": "-|>", "color": ORANGE, "shrinkA": 3, "shrinkB": 0}
            ax.annotate("", (worst, row), (own, row), arrowprops=arrow)
    ax.plot(worsts, rows, "|", color=ORANGE, ms=12, mew=2, label="after all attacks")
    ax.set_yticks(rows, names)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(ordered) - 0.4), xlabel="accuracy")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def costs(systems: Mapping[str, Mapping[str, AttackResult]]) -> Figure:
    """Robust accuracy over what an attacker spent on an image: a panel each, all attacks in it.

    One unit is a forward pass of the classifier.
    """
    columns = 4
    count = -(-len(systems) // columns)
    figure, axes = panels(count, columns, (10, 2.1 * count + 0.4), sharey=True)
    names = list(dict.fromkeys(name for results in systems.values() for name in results))
    for ax, (system, results) in zip(axes, systems.items(), strict=False):
        for attack, result in results.items():
            about, labels = result.about, result.images.labels
            steps = range(about["steps"] + 1) if "gradient" in about else [about["steps"]]
            robust = [float(result.record.robust(labels, steps=k).float().mean()) for k in steps]
            spent = [about["cost"] * (k + 1) for k in steps]
            colour = COLOURS[names.index(attack) % len(COLOURS)]
            mark = "-" if len(spent) > 1 else "D"
            ax.plot(spent, robust, mark, ms=4, color=colour, label=attack)
        ax.set(xscale="log", ylim=(-0.03, 1.03), title=system)
    for ax in axes[len(systems) :]:
        ax.set_axis_off()
    found = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    shown = {label: handle for handle, label in found}
    figure.legend(
        handles=list(shown.values()),
        labels=list(shown),
        loc="outside upper center",
        ncols=len(shown),
    )
    figure.supxlabel("cost of the attack on an image, in forward passes of the classifier")
    figure.supylabel("robust accuracy")
    return figure
