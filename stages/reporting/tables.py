"""Tables 1-3: published rows first, then ours; a result that is missing is marked "not run"."""

from pathlib import Path

import pandas as pd
from rich.table import Table

from stages.core.console import console
from stages.core.files import write_text
from stages.core.params import Params
from stages.core.records import AttackResult
from stages.reporting.rows import Accuracy, accuracies, energy_of

PUBLISHED = Path(__file__).parent / "published.csv"
FULL_SCALE = {1: ("cifar10",), 2: ("cifar10",), 3: ("svhn", "cifar100")}
NOT_RUN = "not run"
MADRY = "Madry et al. 2018"
EMPTY = "-"  # the source gives no number


def write(params: Params, rows: pd.DataFrame, strongest: Accuracy | None, out: Path) -> None:
    """All tables as CSV, Markdown and LaTeX, and in the terminal.

    ``strongest``: what every attack of the evaluation together leaves of the defense.
    """
    published = pd.read_csv(PUBLISHED, dtype=str).fillna(EMPTY)
    for number, make in ((1, table1), (2, table2), (3, table3)):
        table, caption = make(params, rows, published)
        write_table(out, number, table, caption)
        show(table, caption)
    write_text(out / "summary.md", summary_table(params, rows, strongest, published))


def cell(rows: pd.DataFrame, dataset: str, attack: str, metric: str) -> str:
    """One measured accuracy with its interval and n, or "not run"."""
    if rows.empty:
        return NOT_RUN
    found = rows[(rows.dataset == dataset) & (rows.attack == attack) & (rows.metric == metric)]
    if found.empty:
        return NOT_RUN
    row = found.iloc[0]
    return f"{Accuracy(row.right, int(row.n))} n={row.n}"


def summary_table(
    params: Params, rows: pd.DataFrame, strongest: Accuracy | None, published: pd.DataFrame
) -> str:
    """The main numbers of every dataset, beside the paper's for CIFAR-10; the README shows it."""
    paper = published[published.system == "Hill et al. 2021"].set_index("table")
    first, second = (paper.loc[table].to_dict() for table in ("1", "2"))
    madry = published[(published.system == MADRY) & (published.table == "2")].iloc[0]
    by = dict.fromkeys(_trained(params, dataset) for dataset in params.datasets)
    trained = f"adversarially trained classifier ({'; '.join(by)})"

    def cells(attack: str, metric: str) -> list[str]:
        return [cell(rows, dataset, attack, metric) for dataset in params.datasets]

    worst = f"{strongest} n={strongest.n}" if strongest else NOT_RUN
    evaluated = [worst if d == params.compare_dataset else NOT_RUN for d in params.datasets]
    lines = {
        "bare classifier, natural images": (cells("pgd", "natural"), first["base_natural"]),
        "bare classifier, PGD": (cells("pgd", "adversarial"), first["base_adversarial"]),
        "defense, natural images": (cells("transfer_K", "natural"), first["natural"]),
        "defense, the same PGD images": (cells("transfer_K", "adversarial"), first["adversarial"]),
        "defense, BPDA+EOT (Algorithm 1)": (
            cells("bpda_eot", "adversarial"),
            second["adversarial"],
        ),
        "defense, worst case over all attacks": (evaluated, EMPTY),
        f"{trained}, natural images": (cells("pgd_adversarial", "natural"), madry.natural),
        f"{trained}, PGD": (cells("pgd_adversarial", "adversarial"), madry.adversarial),
    }
    attack = params.attack
    table = pd.DataFrame(
        [[what, *measured, theirs] for what, (measured, theirs) in lines.items()],
        columns=[
            f"accuracy (attacks: {attack.threat.norm}, {attack.threat.eps_255:g}/255)",
            *(f"{d}, measured" for d in params.datasets),
            "CIFAR-10 at 8/255, paper",
        ],
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
        ran = any(text != NOT_RUN for text in cells)
        source = f"measured, K={short} and {long}" if ran else NOT_RUN
        lines.append(["Ours", dataset, source, *cells])
    caption = (
        f"Table 1. Accuracy under PGD on the bare classifier f(x), the same images transferred to "
        f"the EBM defense. {_threat(params)}; N={params.attack.pgd.steps}, the strongest iterate; "
        f"defended by the mean logits of {params.attack.transfer.replicas} replicas"
        f"{_early(params)}. Measured cells: accuracy [95 % Wilson interval] n. "
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
        for name, training, transformation, attack, record in (
            ("Ours", "Natural", "Langevin", "BPDA+EOT", "bpda_eot"),
            (f"{_trained(params, dataset)}, ours", "Adversarial", EMPTY, "PGD", "pgd_adversarial"),
        ):
            cells = [cell(rows, dataset, record, m) for m in ("natural", "adversarial")]
            source = "measured" if any(text != NOT_RUN for text in cells) else NOT_RUN
            lines.append([name, dataset, training, transformation, attack, source, *cells])
    size, langevin, pgd = params.attack.bpda_eot, params.langevin, params.attack.pgd
    ours = (
        f"Ours: Algorithm 1 with {_threat(params)}; K={langevin.K}, N={size.steps}, "
        f"{size.restarts} start(s), H_adv={langevin.H_adv}, H_def={langevin.H_def}"
        f"{_early(params)}. Adversarial, ours: the same network, trained by this workflow on "
        "l_inf PGD images "
        f"({_baseline(params, table)}); attacked by PGD with N={pgd.steps}, {pgd.restarts} "
        "start(s). Measured cells: accuracy [95 % Wilson interval] n."
    )
    ran = any(line[5] == "measured" for line in lines)
    caption = (
        f"Table {table}. Defense against whitebox attacks. {ours if ran else 'Ours: not run.'} "
        f"{_published_note()}"
    )
    names = ["Defense", "Dataset", "f(x) train ims.", "T(x)", "Attack", "Source", "Nat.", "Adv."]
    return pd.DataFrame(lines, columns=names), caption


def _trained(params: Params, dataset: str) -> str:
    """The name and citation of a dataset's adversarial training: FGSM if it takes one step."""
    own = params.data.get(dataset)
    fast = own is not None and own.adversarial.steps == 1
    return "FGSM, Wong et al. 2020" if fast else MADRY


def _baseline(params: Params, table: int) -> str:
    """How the adversarially trained classifiers of a table were trained."""
    said = dict.fromkeys(
        f"eps={adversarial.eps_255:g}/255, {adversarial.steps} steps of "
        f"{adversarial.step_255:g}/255, {adversarial.epochs} epochs"
        for adversarial in (
            params.data[dataset].adversarial
            for dataset in measured_datasets(params, table)
            if dataset in params.datasets
        )
    )
    return "; ".join(said) or NOT_RUN


def _early(params: Params) -> str:
    return " at most (early verdicts)" if params.attack.early_verdicts else ""


def _threat(params: Params) -> str:
    threat = params.attack.threat
    return f"{threat.norm} eps={threat.eps_255:g}/255, alpha={threat.step_255:g}/255"


def _published_note() -> str:
    return (
        "Published rows are as printed in Hill et al. (2021), at l_inf eps=8/255 (* on 1,000 "
        "images)."
    )


def write_table(out: Path, number: int, table: pd.DataFrame, caption: str) -> None:
    """One table as CSV, Markdown and LaTeX."""
    write_text(out / f"table{number}.csv", table.to_csv(index=False, lineterminator="\n"))
    markdown = table.to_markdown(index=False, disable_numparse=True)
    write_text(out / f"table{number}.md", f"{caption}\n\n{markdown}\n")
    latex = table.to_latex(
        index=False, escape=True, caption=_escape(caption.split(". ", 1)[1]), label=f"tab:{number}"
    )
    write_text(out / f"table{number}.tex", latex)


def _escape(text: str) -> str:
    return text.replace("%", r"\%").replace("_", r"\_")


ATTACK_METRICS = {
    "Algorithm 1": "adversarial",
    "mean logits": "adversarial_afresh",
    "average": "adversarial_afresh_average",
    "majority": "adversarial_afresh_majority",
    "worst": "adversarial_afresh_worst",
}
HOW_TO_READ = """\
Accuracy [95 % Wilson interval]. *Algorithm 1*: right when clean and never broken on the way, each
break verified by all H_def replicas. The other columns judge the saved images once more, with
fresh noise: *mean logits* over H_def replicas (the paper's F_H); *average*, *majority* and *worst*
of {draws} single replicas. An attacked image counts only if the mean logits were right about its
clean image.
"""


def attack_lines(results: list[AttackResult], draws: int) -> pd.DataFrame:
    """One line for each attack, beneath one for the natural images of each defense."""
    lines: list[dict[str, object]] = []
    seen: set[tuple[object, ...]] = set()
    for result in results:
        about, found = result.about, accuracies(result, draws)
        energy = energy_of(about)
        about = {**about, "loss": str(about.get("loss", "-")).replace("_", " ")}
        head = {"dataset": about["dataset"], "energy": energy, "K": about.get("K", 0)}
        if tuple(head.values()) not in seen:
            seen.add(tuple(head.values()))
            natural = {"attack": "(natural images)", "n": found["natural"].n}
            natural |= dict.fromkeys(("rule", "gradient", "loss", "N"), "-")
            natural["Algorithm 1"] = "-"
            for column, metric in list(ATTACK_METRICS.items())[1:]:
                name = metric.replace("adversarial_afresh", "natural")
                natural[column] = _short(found[name])
            lines.append({**head, **natural, "flags": ""})
        line = {"attack": about["attack"]}
        line |= {column: about.get(column, "-") for column in ("rule", "gradient", "loss")}
        line |= {"N": about["steps"], "n": found["adversarial"].n}
        line |= {column: _short(found[metric]) for column, metric in ATTACK_METRICS.items()}
        lines.append({**head, **line, "flags": "; ".join(about.get("flags", []))})
    return pd.DataFrame(lines)


def _short(accuracy: Accuracy) -> str:
    low, high = accuracy.interval
    return f"{accuracy.value:.3f} [{low:.2f}, {high:.2f}]"


def show_attacks(results: list[AttackResult], draws: int) -> None:
    """The lines of some attacks in the terminal, their flags beneath."""
    lines = attack_lines(results, draws)
    show(
        lines.drop(columns=["dataset", "flags"]),
        HOW_TO_READ.format(draws=draws).replace("*", "").strip(),
    )
    for _, line in lines[lines["flags"] != ""].iterrows():
        console.print(f"flag, {line.attack}: {line['flags']}", markup=False, soft_wrap=True)


def write_attacks(results: list[AttackResult], draws: int, findings: list[str], out: Path) -> None:
    """All attacks as CSV and Markdown; flags and findings beneath."""
    lines = attack_lines(results, draws)
    write_text(out / "attacks.csv", lines.to_csv(index=False, lineterminator="\n"))
    table = lines.drop(columns=["flags"]).to_markdown(index=False, disable_numparse=True)
    flags = [
        f"- {line.dataset}, {line.energy}, {line.attack}: {line['flags']}"
        for _, line in lines[lines["flags"] != ""].iterrows()
    ]
    parts = [HOW_TO_READ.format(draws=draws), table, "", "Flags:", "", *(flags or ["- none"])]
    parts += ["", "Findings:", "", *(f"- {finding}" for finding in findings), ""]
    write_text(out / "attacks.md", "\n".join(parts))


def show(table: pd.DataFrame, caption: str) -> None:
    """The table in the terminal."""
    shown = Table(title=caption, title_justify="left", title_style="")
    for name in table.columns:
        shown.add_column(str(name), overflow="fold")  # no number is cut
    for line in table.itertuples(index=False):
        ours = str(line[0]).casefold().endswith("ours")
        shown.add_row(*map(str, line), style="bold" if ours else "")
    console.print(shown)
