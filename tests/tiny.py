"""The smallest experiment that goes through every stage."""

from typing import Any

import yaml
from typer.testing import CliRunner, Result

from stages import presets
from stages.cli import app

TINY: dict[str, Any] = {
    "run": "tiny",
    "classifier": {"depth": 10, "width": 1},
    "energy": {"width": 4, "activation": "leaky_relu"},
    "ebm": {"batch": 20, "steps": 3, "adam_batches": 20, "sgd_batches": 20, "precision": "float32"},
    "langevin": {"K": 4, "K_short": 2, "H_adv": 2, "H_def": 5, "precision": "float32"},
    "attack": {
        "norm": "linf",
        "eps_255": 48,
        "step_255": 12,
        "shard": 5,
        "pgd": {"images": 12, "steps": 3, "restarts": 1},
        "transfer": {"images": 10, "replicas": 3},
        "bpda_eot": {"images": 8, "steps": 2, "restarts": 2},
    },
    "compare": {
        "K": [0, 3, 6],
        "images": 10,
        "replicas": 2,
        "bpda_eot": {"images": 4, "steps": 1, "H_adv": 2, "H_def": 3},
    },
    "diagnose": {"images": 12, "replicas": 20, "H": [1, 5], "long_steps": 8},
}


def tiny_params() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(presets.text("digits"))
    values |= TINY
    values["data"]["digits"]["classifier"] |= {"epochs": 2, "milestones": [1]}
    return values


def command(words: str) -> Result:
    return CliRunner().invoke(app, words.split(), catch_exceptions=False)
