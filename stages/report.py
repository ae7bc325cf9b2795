"""Stage 7: rows, Tables 1-3 and figures, all pure functions of the records."""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import binomtest

from defense.attack import is_right
from defense.pixels import from_bytes
from defense.threat import ThreatModel
from stages import StageError, figures
from stages.artifacts import AttackResult, load_tensors
from stages.console import console, say
from stages.files import Paths, write_text
from stages.params import ATTACKS, MODELS, Params

PUBLISHED = Path(__file__).parent / "published.csv"
FULL_SCALE = {1: ("cifar10",), 2: ("cifar10",), 3: ("svhn", "cifar100")}
NOT_RUN = "not run"
EMPTY = "-"  # the source gives no number


@dataclass(frozen=True)
class Accuracy:
    """k of n right, with the Wilson 95 % interval."""

    right: int
    n: int

    @property
    def value(self) -> float:
        """The share that is right."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson (1927) score interval at 95 %."""
        ci = binomtest(self.right, self.n).proportion_ci(0.95, method="wilson")
        return float(ci.low), float(ci.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.4f} [{low:.3f}, {high:.3f}]"


def count(right: torch.Tensor) -> Accuracy:
    """(n,) bool -> accuracy."""
    return Accuracy(int(right.sum()), len(right))


def run(params: Params, out: Path) -> None:
    """Judge the records, write tables and figures, print the tables."""
    results = {
        (dataset, attack): judged(Paths(params.run, dataset).record(attack), params, attack)
        for dataset in params.datasets
        for attack in ATTACKS
    }
    compared, _ = load_tensors(Paths(params.run, params.compare_dataset).record("compare"))
    diagnosed = {
        dataset: load_tensors(Paths(params.run, dataset).record("diagnose"))[0]
        for dataset in params.datasets
    }
    rows = pd.DataFrame([row for key, result in results.items() for row in rows_of(*key, result)])
    write_text(out / "rows.csv", rows.to_csv(index=False, lineterminator="\n"))
    curve = accuracy_over_steps(compared, params)
    write_text(out / "accuracy_over_steps.csv", curve.to_csv(index=False, lineterminator="\n"))
    write_text(out / "curves.csv", curves(curve).to_csv(index=False, lineterminator="\n"))
    summary = summarise(params, rows, curve)
    write_text(out / "metrics.json", json.dumps(summary, indent=2) + "\n")

    published = pd.read_csv(PUBLISHED, dtype=str).fillna(EMPTY)
    for number, make in ((1, table1), (2, table2), (3, table3)):
        table, caption = make(params, rows, published)
        write_table(out, number, table, caption)
        show(table, caption)

    write_text(out / "summary.md", summary_table(params, rows, published))

    for dataset, tensors in diagnosed.items():
        histogram = figures.logit_histograms(tensors, params.diagnose.H)
        figures.save(histogram, out / f"figures/figure3_logits_{dataset}")
        grid = figures.sample_grid(tensors, params.langevin.K)
        figures.save(grid, out / f"figures/figure2_samples_{dataset}")
    figures.save(figures.over_steps(curve, params.langevin.K), out / "figures/figure4_accuracy")
    figures.save(figures.two_models(compared), out / "figures/figure4_samples")
    figures.save(figures.energy_over_steps(compared), out / "figures/figure4_energies")
    say(f"report: {out}")


def judged(path: Path, params: Params, attack: str) -> AttackResult:
    """A record whose conditions, ball, box and finiteness were checked on the file itself."""
    result = AttackResult.load(path)
    for name, value in params.conditions(attack).items():
        if result.about.get(name) != value:
            found = result.about.get(name)
            raise StageError(f"{path}: expected {name} = {value} as in params.yaml, got {found}")
    x, x_adv = from_bytes(result.images.images), result.record.adversarial
    threat = ThreatModel(params.attack.norm, params.attack.eps_255)
    if not torch.isfinite(x_adv).all():
        raise StageError(f"{path}: adversarial images that are not finite")
    if x_adv.min() < 0 or x_adv.max() > 1:
        raise StageError(f"{path}: adversarial pixels outside [0, 1]")
    farthest = float(threat.distance(x_adv, x).max())
    if farthest > threat.eps + 1e-6:
        raise StageError(f"{path}: expected distance <= {threat.eps:.6f}, got {farthest:.6f}")
    return result


def rows_of(dataset: str, attack: str, result: AttackResult) -> list[dict[str, object]]:
    """Natural and adversarial accuracy of one record, and the saved images judged afresh."""
    labels, record, about = result.images.labels, result.record, result.about
    afresh = is_right(record.adversarial_logits, labels)
    measured = {
        "natural": record.clean_correct(labels),
        "adversarial": record.robust(labels),
        "adversarial_afresh": record.clean_correct(labels) & afresh,
    }
    conditions = {
        name: about.get(name, "")
        for name in ("K", "H_adv", "H_def", "norm", "eps_255", "step_255", "steps", "restarts")
    }
    rows = []
    for metric, right in measured.items():
        accuracy = count(right)
        low, high = accuracy.interval
        row = {"dataset": dataset, "attack": attack, "metric": metric}
        numbers = {
            "right": accuracy.right,
            "n": accuracy.n,
            "accuracy": round(accuracy.value, 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
        rows.append({**row, **numbers, **conditions})
    return rows


def accuracy_over_steps(compared: dict[str, torch.Tensor], params: Params) -> pd.DataFrame:
    """Figure 4 as rows: model, images, K, accuracy with interval, and what it depends on.

    As everywhere, an attacked image counts only if its clean image was right too.
    """
    rows: list[tuple[str, str, int, Accuracy, int, int | str]] = []
    labels = compared["labels"]
    replicas, attack = params.compare.replicas, params.compare.bpda_eot
    for model in MODELS:
        for i, steps in enumerate(compared["K"].tolist()):
            clean, transferred = (
                is_right(compared[f"{model}/{images}/logits"][i], labels)
                for images in ("natural", "transfer")
            )
            rows.append((model, "natural", steps, count(clean), replicas, ""))
            rows.append((model, "transfer", steps, count(clean & transferred), replicas, ""))
            survived = compared.get(f"{model}/bpda_eot/{steps}/robust")
            if survived is not None:
                rows.append((model, "bpda_eot", steps, count(survived), attack.H_def, attack.steps))
    return pd.DataFrame(
        {
            "model": model,
            "images": images,
            "K": steps,
            "accuracy": round(accuracy.value, 4),
            "low": round(accuracy.interval[0], 4),
            "high": round(accuracy.interval[1], 4),
            "n": accuracy.n,
            "H": replicas,
            "N": updates,
        }
        for model, images, steps, accuracy, replicas, updates in rows
    )


def curves(curve: pd.DataFrame) -> pd.DataFrame:
    """The same accuracies with one column a curve, for `dvc plots`."""
    named = curve.assign(curve=curve.model + " " + curve.images)
    wide = named.pivot_table(index="K", columns="curve", values="accuracy").reset_index()
    wide.columns = [str(name).replace(" ", "_") for name in wide.columns]
    return wide


def summarise(params: Params, rows: pd.DataFrame, curve: pd.DataFrame) -> dict[str, object]:
    """The handful of numbers that `dvc metrics` and `dvc exp show` compare."""
    summary: dict[str, object] = {}
    for dataset in params.datasets:
        own = rows[rows.dataset == dataset].set_index(["attack", "metric"]).accuracy
        summary[dataset] = {
            "bare_natural": own["pgd", "natural"],
            "bare_pgd": own["pgd", "adversarial"],
            "defended_natural": own["transfer_K", "natural"],
            "defended_transfer": own["transfer_K", "adversarial"],
            "defended_bpda_eot": own["bpda_eot", "adversarial"],
        }
    natural = curve[curve.images == "natural"]
    summary["natural_lost_at_longest_K"] = {
        str(model): round(float(group.accuracy.max() - group.accuracy.iloc[-1]), 4)
        for model, group in natural.groupby("model")
    }
    return summary


# Tables: published rows first, ours beneath, and what nobody ran says so.


def cell(rows: pd.DataFrame, dataset: str, attack: str, metric: str) -> str:
    """One measured accuracy with its interval and n, or "not run"."""
    if rows.empty:
        return NOT_RUN
    found = rows[(rows.dataset == dataset) & (rows.attack == attack) & (rows.metric == metric)]
    if found.empty:
        return NOT_RUN
    row = found.iloc[0]
    return f"{Accuracy(int(row.right), int(row.n))} n={row.n}"


def summary_table(params: Params, rows: pd.DataFrame, published: pd.DataFrame) -> str:
    """Five numbers a dataset, beside the paper's for CIFAR-10; the README shows this table."""
    paper = published[published.system == "Hill et al. 2021"].set_index("table")
    first, second = (paper.loc[table].to_dict() for table in ("1", "2"))
    lines = {
        "bare classifier, natural images": ("pgd", "natural", first["base_natural"]),
        "bare classifier, PGD": ("pgd", "adversarial", first["base_adversarial"]),
        "defense, natural images": ("transfer_K", "natural", first["natural"]),
        "defense, the same PGD images": ("transfer_K", "adversarial", first["adversarial"]),
        "defense, BPDA+EOT (Algorithm 1)": ("bpda_eot", "adversarial", second["adversarial"]),
    }
    table = pd.DataFrame(
        [
            [what, *(cell(rows, dataset, attack, metric) for dataset in params.datasets), theirs]
            for what, (attack, metric, theirs) in lines.items()
        ],
        columns=["accuracy", *(f"{d}, measured" for d in params.datasets), "CIFAR-10, paper"],
    )
    return table.to_markdown(index=False, disable_numparse=True) + "\n"


def measured_datasets(params: Params, table: int) -> list[str]:
    """The datasets of a table's own rows: those of the run, then those of the paper."""
    own = [d for d in params.datasets if (d == params.compare_dataset) == (table < 3)]
    return own + [d for d in FULL_SCALE[table] if d not in own]


def table1(params: Params, rows: pd.DataFrame, published: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """PGD on the bare classifier, transferred to the defense with a short and a long chain."""
    columns = (
        "base_natural",
        "base_adversarial",
        "short_natural",
        "short_adversarial",
        "natural",
        "adversarial",
    )
    short, long = params.langevin.K_short, params.langevin.K
    names = ["f(x) nat.", "f(x) adv.", "short K nat.", "short K adv.", "long K nat.", "long K adv."]
    lines = [
        [row.system, row.dataset, "published, K=10 and 1500", *(row[c] for c in columns)]
        for _, row in published[published.table == "1"].iterrows()
    ]
    for dataset in measured_datasets(params, 1):
        cells = [
            cell(rows, dataset, attack, metric)
            for attack in ("pgd", "transfer_K_short", "transfer_K")
            for metric in ("natural", "adversarial")
        ]
        ran = dataset in params.datasets
        source = f"measured, K={short} and {long}" if ran else NOT_RUN
        lines.append(["Ours", dataset, source, *cells])
    caption = (
        f"Table 1. Accuracy under PGD on the bare classifier f(x), the same images transferred to "
        f"the EBM defense. {_threat(params)}; N={params.attack.pgd.steps}, the strongest iterate; "
        f"defended by the mean logits of {params.attack.transfer.replicas} replicas. "
        f"{_published_note()}"
    )
    return pd.DataFrame(lines, columns=["Defense", "Dataset", "Source", *names]), caption


def table2(params: Params, rows: pd.DataFrame, published: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Whitebox attacks on the comparison's dataset (the paper: CIFAR-10)."""
    return _whitebox_table(2, params, rows, published)


def table3(params: Params, rows: pd.DataFrame, published: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Whitebox attacks on the other datasets (the paper: SVHN and CIFAR-100)."""
    return _whitebox_table(3, params, rows, published)


def _whitebox_table(
    table: int, params: Params, rows: pd.DataFrame, published: pd.DataFrame
) -> tuple[pd.DataFrame, str]:
    lines = [
        [
            row.system,
            row.dataset,
            row.train_images,
            row.transformation,
            row.attack,
            "published",
            row.natural,
            row.adversarial,
        ]
        for _, row in published[published.table == str(table)].iterrows()
    ]
    for dataset in measured_datasets(params, table):
        cells = [cell(rows, dataset, "bpda_eot", m) for m in ("natural", "adversarial")]
        source = "measured" if dataset in params.datasets else NOT_RUN
        lines.append(["Ours", dataset, "Natural", "Langevin", "BPDA+EOT", source, *cells])
    size, langevin = params.attack.bpda_eot, params.langevin
    caption = (
        f"Table {table}. Defense against whitebox attacks. Ours: Algorithm 1 with {_threat(params)}"
        f"; K={langevin.K}, N={size.steps}, {size.restarts} start(s), H_adv={langevin.H_adv}, "
        f"H_def={langevin.H_def}. {_published_note()}"
    )
    names = ["Defense", "Dataset", "f(x) train ims.", "T(x)", "Attack", "Source", "Nat.", "Adv."]
    return pd.DataFrame(lines, columns=names), caption


def _threat(params: Params) -> str:
    attack = params.attack
    return f"{attack.norm} eps={attack.eps_255:g}/255, alpha={attack.step_255:g}/255"


def _published_note() -> str:
    return (
        "Measured cells: accuracy [95 % Wilson interval] n. Published rows are as printed in "
        "Hill et al. (2021), at l_inf eps=8/255 (* on 1,000 images)."
    )


def write_table(out: Path, number: int, table: pd.DataFrame, caption: str) -> None:
    """One table as CSV, Markdown and LaTeX."""
    write_text(out / f"table{number}.csv", table.to_csv(index=False, lineterminator="\n"))
    markdown = table.to_markdown(index=False, disable_numparse=True)
    write_text(out / f"table{number}.md", f"{caption}\n\n{markdown}\n")
    latex = table.to_latex(index=False, escape=True, caption=_escape(caption))
    write_text(out / f"table{number}.tex", latex)


def _escape(text: str) -> str:
    return text.replace("%", r"\%").replace("_", r"\_")


def show(table: pd.DataFrame, caption: str) -> None:
    """The table in the terminal."""
    from rich.table import Table

    shown = Table(title=caption, title_justify="left", title_style="")
    for name in table.columns:
        shown.add_column(str(name))
    for line in table.itertuples(index=False):
        ours = line[0] == "Ours"
        shown.add_row(*map(str, line), style="bold" if ours else "")
    console.print(shown)
