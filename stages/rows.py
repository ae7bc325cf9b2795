"""What was measured, as rows: every accuracy with its n, its 95 % interval and its conditions."""

from dataclasses import dataclass

import pandas as pd
import torch
from scipy.stats import binomtest

from defense.attack import is_right
from stages.artifacts import AttackResult
from stages.params import MODELS, Params


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


def rows(results: dict[tuple[str, str], AttackResult]) -> pd.DataFrame:
    """Every accuracy of every record, by (dataset, attack)."""
    return pd.DataFrame([row for key, result in results.items() for row in rows_of(*key, result)])


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
