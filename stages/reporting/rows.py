"""What was measured, as rows: every accuracy with its n, its 95 % interval and its conditions."""

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from defense.verdict import METRICS, is_right, scores
from stages.core.files import Paths, write_text
from stages.core.params import MODELS, NORMS, SMOOTH, TABLE_ATTACKS, Params
from stages.core.records import AttackResult

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """``right`` of n, with the Wilson 95 % interval.

    An image that is right in a fraction of its draws counts as that fraction. The interval is then
    conservative, as such an image varies less than a Bernoulli variable.
    """

    right: float
    n: int

    @property
    def value(self) -> float:
        """The share that is right."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson (1927) score interval at 95 %."""
        z2, p, n = Z95**2, self.value, self.n
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.4f} [{low:.3f}, {high:.3f}]"


def count(right: torch.Tensor) -> Accuracy:
    """(n,) bool, or shares in [0, 1] -> accuracy."""
    return Accuracy(round(float(right.double().sum()), 6), len(right))


def rows(results: list[AttackResult], draws: int) -> pd.DataFrame:
    """Every accuracy of every record."""
    return pd.DataFrame([row for result in results for row in rows_of(result, draws)])


def accuracies(result: AttackResult, draws: int) -> dict[str, Accuracy]:
    """All accuracies of one record: natural, under the attack, on saved images with fresh noise.

    As everywhere, an attacked image counts only if its clean image is right too. Suffixes are the
    metrics of `defense.verdict`; names without a suffix use the mean logits.
    """
    labels, record = result.images.labels, result.record
    right = record.clean_correct(labels)
    clean = scores(record.clean_logits, record.clean_classes, labels, draws)
    afresh = scores(record.adversarial_logits, record.adversarial_classes, labels, draws)
    found = {"natural": count(right), "adversarial": count(record.robust(labels))}
    for metric in METRICS:
        suffix = "" if metric == "mean_logits" else f"_{metric}"
        found[f"natural{suffix}"] = count(clean[metric])
        found[f"adversarial_afresh{suffix}"] = count(afresh[metric] * right)
    return found


def energy_of(about: dict[str, object]) -> str:
    """The energy of a record's defense; for a classifier by itself, how it was trained."""
    trained = about.get("training", "natural")
    return str(about.get("energy", "-" if trained == "natural" else f"- ({trained} training)"))


CONDITIONS = ("K", "H_adv", "H_def", "norm", "eps_255", "step_255", "steps", "restarts", "rule")


def rows_of(result: AttackResult, draws: int) -> list[dict[str, object]]:
    """Every accuracy of one record, with its conditions and its flags."""
    about = result.about
    conditions = {name: about.get(name, "") for name in (*CONDITIONS, "gradient", "loss")}
    conditions["flags"] = "; ".join(about.get("flags", []))
    where = {"dataset": about["dataset"], "energy": energy_of(about), "attack": about["attack"]}
    rows = []
    for metric, accuracy in accuracies(result, draws).items():
        low, high = accuracy.interval
        row = {**where, "metric": metric}
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
            **_numbers(accuracy),
            "H": replicas,
            "N": updates,
        }
        for model, images, steps, accuracy, replicas, updates in rows
    )


def swept(tensors: dict[str, torch.Tensor], params: Params) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Figures 5 and 6 as rows: over the radius (norm, eps_255, system), and over the replicas.

    At radius 0 stands the accuracy on the same natural images.
    """
    section = params.sweep
    over_radius: list[dict[str, object]] = []
    for norm in NORMS:
        for system in ("defense", "adversarial", "natural"):
            smallest, *_ = section.radii(norm)
            for radius in (0.0, *section.radii(norm)):
                place = f"{norm}/{radius or smallest:.12g}/{system}"
                right = tensors[f"{place}/{'robust' if radius else 'natural'}"]
                place_of = {"norm": norm, "eps_255": radius, "system": system, "N": section.steps}
                over_radius.append({**place_of, **_numbers(count(right))})
    over_replicas: list[dict[str, object]] = []
    for side, replicas in (
        ("H_adv", section.attacker_replicas),
        ("H_def", section.defender_replicas),
    ):
        for number in replicas:
            right = tensors[f"{side}/{number}/defense/robust"]
            row: dict[str, object] = {"side": side, "replicas": number, "N": section.steps}
            row |= _numbers(count(right))
            row |= {"H_adv": section.H_adv, "H_def": section.H_def, side: number}
            over_replicas.append(row)
    return pd.DataFrame(over_radius), pd.DataFrame(over_replicas)


def _numbers(accuracy: Accuracy) -> dict[str, object]:
    """Value, interval and n, as columns."""
    low, high = accuracy.interval
    value = {"accuracy": round(accuracy.value, 4)}
    return {**value, "low": round(low, 4), "high": round(high, 4), "n": accuracy.n}


def over_attack_steps(results: list[AttackResult]) -> pd.DataFrame:
    """Accuracy after N steps with one column an attack, for `dvc plots`.

    An attack that has ended keeps its last value.
    """
    longest = max(int(result.about["steps"]) for result in results)
    columns = {
        str(result.about["attack"]): [
            round(float(result.record.robust(result.images.labels, steps=n).float().mean()), 4)
            for n in range(longest + 1)
        ]
        for result in results
    }
    return pd.DataFrame({"N": range(longest + 1), **columns})


def wide(curve: pd.DataFrame, x: str, name: str) -> pd.DataFrame:
    """Accuracies with one column for each value of ``name``, for `dvc plots`."""
    return curve.pivot_table(index=x, columns=name, values="accuracy").reset_index()


def curves(curve: pd.DataFrame) -> pd.DataFrame:
    """Figure 4's accuracies with one column a curve, for `dvc plots`."""
    return wide(curve.assign(curve=curve.model + "_" + curve.images), "K", "curve")


def summarise(params: Params, rows: pd.DataFrame) -> dict[str, object]:
    """The handful of numbers that `dvc metrics` and `dvc exp show` compare."""
    summary: dict[str, object] = {}
    for dataset in params.datasets:
        table = (rows.dataset == dataset) & rows.attack.isin(TABLE_ATTACKS)
        own = rows[table].set_index(["attack", "metric"]).accuracy.to_dict()
        summary[dataset] = {name: own[place] for name, place in SUMMARY.items() if place in own}
    return summary


SUMMARY = {
    "bare_natural": ("pgd", "natural"),
    "bare_pgd": ("pgd", "adversarial"),
    "adversarially_trained_natural": ("pgd_adversarial", "natural"),
    "adversarially_trained_pgd": ("pgd_adversarial", "adversarial"),
    "defended_natural": ("transfer_K", "natural"),
    "defended_transfer": ("transfer_K", "adversarial"),
    "defended_bpda_eot": ("bpda_eot", "adversarial"),
}


def lost_at_longest(curve: pd.DataFrame) -> dict[str, object]:
    """How much natural accuracy the longest chains cost, with either kind of learning."""
    natural = curve[curve.images == "natural"]
    lost = {
        str(model): round(float(group.accuracy.max() - group.accuracy.iloc[-1]), 4)
        for model, group in natural.groupby("model")
    }
    return {"natural_lost_at_longest_K": lost}


def training(paths: Paths, phase: str) -> pd.DataFrame:
    """Energy gap and gradient norm over the batches of a phase and of the one before it."""
    first = f"{SMOOTH}adam" if phase.startswith(SMOOTH) else "adam"
    parts, batches = [], 0
    for name in (first, phase):
        path = paths.history(f"ebm_{name}")
        if path.exists():
            part = pd.read_csv(path).assign(phase=name)
            part["batch"] += batches
            batches = int(part["batch"].max()) if len(part) else batches
            parts.append(part)
    columns = ["batch", "energy_gap", "gradient_norm", "phase"]
    return pd.concat(parts) if parts else pd.DataFrame(columns=columns)


def write(frame: pd.DataFrame, path: Path) -> None:
    """Rows as CSV."""
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))
