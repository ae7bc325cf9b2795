"""`stochsec tune`: a setting chosen on half of the images, reported on the other half."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stages.custom.tune import Measured, Setting, best
from stages.reporting.rows import Accuracy
from tests.tiny import command

pytestmark = pytest.mark.usefixtures("folder")

FILES = (
    "artifacts/tiny/models/digits/classifier.safetensors artifacts/tiny/data/digits.npz "
    "--energy artifacts/tiny/models/digits/ebm_convergent.safetensors"
)
SMALL = {
    "attack.threat.eps_255": 48,
    "attack.threat.step_255": 24,
    "attack.pgd.steps": 3,
    "compare.K": "[0,2,4]",
    "compare.images": 20,
    "compare.replicas": 6,
    "compare.bpda_eot.images": 5,
    "compare.bpda_eot.steps": 2,
    "compare.bpda_eot.H_adv": 2,
    "compare.bpda_eot.H_def": 10,
}
WORDS = " ".join(f"--set {name}={value}" for name, value in SMALL.items())


def test_a_setting_is_chosen_and_reported_on_other_images(folder: Path) -> None:
    result = command(f"tune {FILES} {WORDS} --out {folder}")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(folder / "tune.csv")
    tuning, reporting = (table[table.half == half] for half in ("tuning", "reporting"))
    assert len(reporting) == 1
    assert set(tuning.K) == {0, 2, 4}
    assert set(tuning.replicas) == {1, 5, 6}
    assert set(tuning.denoise) == {False, True}
    assert (tuning.natural_n == 20).all()
    [chosen] = reporting.to_dict("records")
    attacked = tuning.dropna(subset=["bpda_eot"])
    assert (chosen["K"], chosen["denoise"]) in set(zip(attacked.K, attacked.denoise, strict=True))
    assert attacked.groupby(["K", "denoise"]).ngroups <= 2
    assert chosen["bpda_eot_n"] == 5
    assert f"use: --set langevin.K={chosen['K']} " in " ".join(result.output.split())
    assert (folder / "tune.png").stat().st_size > 5000


def test_too_few_images_are_said(folder: Path) -> None:
    np.savez(folder / "n.npz", images=np.zeros((9, 8, 8, 1), np.uint8), labels=np.arange(9))
    result = command(f"tune {FILES.replace('artifacts/tiny/data/digits.npz', f'{folder}/n.npz')}")
    assert result.exit_code == 2
    assert "expected at least 40 labelled ones" in " ".join(result.output.split())


def measured(steps: int, replicas: int, natural: float, transfer: float) -> Measured:
    setting = Setting(steps, denoise=True, replicas=replicas)
    return Measured(setting, Accuracy(100 * natural, 100), Accuracy(100 * transfer, 100))


def test_the_most_robust_setting_that_costs_little_comes_first_with_few_replicas() -> None:
    found = [
        measured(0, 10, 0.95, 0.00),
        measured(50, 10, 0.90, 0.60),
        measured(100, 1, 0.80, 0.55),
        measured(100, 5, 0.87, 0.69),
        measured(100, 10, 0.88, 0.70),
        measured(200, 10, 0.70, 0.75),
    ]
    said = [(one.setting.steps, one.setting.replicas) for one in best(found)]
    assert said == [(100, 5), (50, 10)]
