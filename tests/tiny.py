"""The smallest experiment that goes through every stage."""

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from stages.cli import app
from stages.core import presets
from stages.core.files import NETWORK_TIMES

ROOT = Path(__file__).parent.parent


def named(rule: str, gradient: str, **others: Any) -> dict[str, Any]:
    """One entry of evaluate.attacks."""
    usual = {"loss": "cross_entropy", "steps": 2, "restarts": 1, "scale": 1, "stop_at_break": True}
    return {"rule": rule, "gradient": gradient, **usual, **others}


TINY: dict[str, Any] = {
    "run": "tiny",
    "classifier": {"depth": 10, "width": 1},
    "energy": {
        "width": 4,
        "activation": "leaky_relu",
        "smooth_activation": "smooth_leaky_relu",
    },
    "ebm": {
        "update": {
            "batch": 20,
            "steps": 3,
            "precision": "float32",
            "bank": None,
            "life": None,
            "coupled": False,
            "mirror": False,
            "average": 0.0,
        },
        "phase_1_batches": 20,
        "phase_2_batches": 20,
        "snapshots": 2,
        "phase_2": "sgd",
    },
    "langevin": {
        "K": 4,
        "K_short": 2,
        "H_adv": 2,
        "H_def": 5,
        "precision": "float32",
        "denoise": False,
    },
    "attack": {
        "threat": {"norm": "linf", "eps_255": 48, "step_255": 12},
        "shard": 5,
        "sequential": {"error": 1e-3, "first": 10, "clip": 20.0},
        "early_verdicts": False,
        "pgd": {"images": 12, "steps": 3, "restarts": 1},
        "transfer": {"images": 10, "replicas": 3},
        "bpda_eot": {"images": 8, "steps": 2, "restarts": 2},
    },
    "evaluate": {
        "images": 7,
        "draws": 3,
        "softness": 0.01,
        "early_verdicts": False,
        "active_test": {"images": 3, "attack": "identity", "points": 20},
        "attacks": {
            "identity": named("pgd", "identity"),
            "exact": named("pgd", "exact"),
            "smoothed": named("pgd", "smoothed", loss="margin"),
            "apgd": named("apgd", "exact", loss="margin"),
            "square": named("square", "none", steps=5),
            "no_attack": named("noise", "none", scale=0),
            "huge": named("pgd", "identity", scale=4),
        },
    },
    "compare": {
        "K": [0, 3, 6],
        "images": 10,
        "replicas": 2,
        "bpda_eot": {"images": 4, "steps": 1, "H_adv": 2, "H_def": 3},
    },
    "sweep": {
        "images": 6,
        "steps": 2,
        "H_adv": 2,
        "H_def": 3,
        "linf_255": [24, 48],
        "l2_255": [200],
        "attacker_replicas": [1, 3],
        "defender_replicas": [1, 4],
    },
    "snapshots": {"long_steps": 20},
    "lyapunov": {
        "eta": [0.5, 1.0],
        "chains": 4,
        "burn_in": 10,
        "steps": 20,
        "every": 5,
        "separations": [0.01, 0.1],
    },
    "fid": {"K": [0, 4, 8], "images": 40, "features": "classifier"},
    "inspect": {"chains": 6, "long_steps": 40, "levels": [2, 5]},
    "diagnose": {"images": 12, "replicas": 20, "H": [1, 5]},
}


def tiny_params() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(presets.text("digits"))
    values |= copy.deepcopy(TINY)
    values["data"]["digits"]["classifier"] |= {"epochs": 2, "milestones": [1]}
    values["data"]["digits"]["adversarial"] |= {"epochs": 1, "milestones": [1], "steps": 2}
    return values


def command(words: str) -> Result:
    return CliRunner().invoke(app, words.split(), catch_exceptions=False)


STAGES = [
    "check-params",
    "prepare-data digits",
    "train-classifier digits",
    "train-classifier digits adversarial",
    "train-ebm digits adam",
    "train-ebm digits convergent",
    "train-ebm digits nonconvergent",
    "train-ebm digits smooth_adam",
    "train-ebm digits smooth_convergent",
    "attack digits pgd",
    "attack digits pgd_adversarial",
    "attack digits transfer_K_short",
    "attack digits transfer_K",
    "attack digits bpda_eot",
    "evaluate digits",
    "evaluate digits smooth_convergent",
    "active-test digits",
    "compare digits",
    "report digits",
    "sweep digits",
    "snapshots digits",
    "lyapunov digits",
    "fid digits",
    "inspect digits",
    "inspect digits nonconvergent",
    "inspect digits smooth_convergent",
    "diagnose digits",
    "report",
    "publish",
]


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole tiny experiment has been run; leave it as it is."""
    folder = tmp_path_factory.mktemp("experiment")
    before = Path.cwd()
    os.chdir(folder)
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params()))
    shutil.copytree(ROOT / NETWORK_TIMES, NETWORK_TIMES)
    for words in STAGES:
        result = command(words)
        assert result.exit_code == 0, f"{words}: {result.output}"
    os.chdir(before)
    return folder
