"""The workflow with every switch of cheap training on, and some images held out."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from defense import load_energy
from stages.core.artifacts import load_images, load_state, load_tensors, save_tensors
from stages.core.files import Paths
from stages.core.params import Dataset, load_params
from stages.core.records import AttackResult
from tests.tiny import command, tiny_params

PATHS = Paths("cheap", "digits")
STAGES = [
    "prepare-data digits",
    "train-classifier digits",
    "train-ebm digits adam",
    "train-ebm digits convergent",
    "train-ebm digits nonconvergent",
    "attack digits pgd",
    "attack digits transfer_K",
    "attack digits bpda_eot",
    "compare digits",
    "inspect digits",
    "report",
]


@pytest.fixture(scope="module")
def cheap(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the stages print, in a folder that stays the current one for this module."""
    folder = tmp_path_factory.mktemp("cheap")
    values = tiny_params()
    values["run"] = "cheap"
    values["data"]["digits"] |= {"held_out": 100, "judged_on": "held_out"}
    values["ebm"]["phase_2"] = "cosine"
    values["ebm"]["update"] |= {
        "bank": 40,
        "life": 2,
        "coupled": True,
        "mirror": True,
        "average": 0.9,
    }
    values["langevin"]["denoise"] = True
    os.chdir(folder)
    Path("params.yaml").write_text(yaml.safe_dump(values))
    said = {}
    for words in STAGES:
        result = command(words)
        assert result.exit_code == 0, f"{words}: {result.output}"
        said[words] = " ".join(result.output.split())
    return {"folder": str(folder), **said}


@pytest.fixture(autouse=True)
def there(cheap: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cheap["folder"])


def section() -> Dataset:
    return load_params(Path("params.yaml")).dataset("digits")


def test_nothing_is_trained_or_judged_on_what_is_held_out_for_the_other(
    cheap: dict[str, str],
) -> None:
    held_out = load_images(PATHS.images, "held_out", section())
    train = load_images(PATHS.images, "train", section())
    assert len(train.labels) == 1297 - 100
    assert "held_out accuracy" in cheap["train-classifier digits"]
    for name in ("pgd", "transfer_K", "bpda_eot"):
        judged = AttackResult.load(PATHS.record(name))
        assert judged.images.images.equal(held_out.images[: len(judged.images.labels)])
        assert judged.about["judged_on"] == "held_out"
    assert "FLAG: digits: every number is of training images" in cheap["report"]


def test_records_of_held_out_images_are_not_reported_as_of_test_images() -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["data"]["digits"]["judged_on"] = "test"
    Path("other.yaml").write_text(yaml.safe_dump(values))
    result = command("report --params other.yaml --out other")
    assert result.exit_code == 2
    assert "expected judged_on = test as in params.yaml, got held_out" in " ".join(
        result.output.split()
    )


def test_training_tells_the_level_of_fresh_chains_for_three_kinds_of_images(
    cheap: dict[str, str],
) -> None:
    said = cheap["train-ebm digits convergent"]
    for who in ("images of the bank", "training images", "held-out images"):
        assert f"20 batches: U of chains from {who} less U of noisy data: 2:" in said


def test_the_result_is_the_average_and_says_its_noise() -> None:
    state = load_state(PATHS.state("ebm_convergent"), "", torch.device("cpu"))
    energy, tau = load_energy(PATHS.model("ebm_convergent"))
    assert (energy.sigma, tau) == (0.12, 0.08)
    weights = energy.state_dict()
    assert all(value.equal(state["average"][f"module.{name}"]) for name, value in weights.items())
    assert not all(value.equal(state["energy"][name]) for name, value in weights.items())


def test_the_energy_that_shall_drift_keeps_the_weights_of_its_last_batch() -> None:
    state = load_state(PATHS.state("ebm_nonconvergent"), "", torch.device("cpu"))
    weights = load_energy(PATHS.model("ebm_nonconvergent"))[0].state_dict()
    assert "average" not in state
    assert all(value.equal(state["energy"][name]) for name, value in weights.items())


def test_the_rate_is_zero_at_the_end_of_phase_2_only() -> None:
    rates = [
        load_state(PATHS.state(f"ebm_{phase}"), "", torch.device("cpu"))["optimizer"][
            "param_groups"
        ][0]["lr"]
        for phase in ("adam", "nonconvergent", "convergent")
    ]
    assert rates[0] == rates[1] == 2e-3
    assert 0 < rates[2] < 0.01 * 2e-3  # of the last update but one


def test_an_inspection_knows_the_images_of_the_bank() -> None:
    tensors, _ = load_tensors(PATHS.record("inspect_convergent"))
    for who in ("images of the bank", "training images", "test images"):
        assert tensors[f"{who}/changes"].shape == (2,)
        assert tensors[f"{who}/changes"].isfinite().all()
    assert Path("reports/cheap/figures/energy_digits_convergent.png").exists()


def test_records_say_whether_the_ends_were_denoised() -> None:
    assert AttackResult.load(PATHS.record("bpda_eot")).about["denoise"] is True
    compared, about = load_tensors(PATHS.record("compare"))
    assert about["denoise"] is True
    assert compared["convergent/natural/logits"].isfinite().all()


def test_an_energy_that_does_not_say_its_noise_is_one_line() -> None:
    tensors, about = load_tensors(PATHS.model("ebm_convergent"))
    architecture = {k: v for k, v in about["architecture"].items() if k != "sigma"}
    save_tensors(Path("old.safetensors"), tensors, {**about, "architecture": architecture})
    result = command("attack digits bpda_eot --energy old.safetensors")
    assert result.exit_code == 2
    assert "old.safetensors: does not say the noise (sigma)" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (
            ("ebm", "update", "bank"),
            None,
            "ebm.update.life: expects chains that start at data",
        ),
        (("ebm", "update", "bank"), 19, "ebm.update.batch: expected <= bank = 19, got 20"),
        (("ebm", "update", "average"), 1.0, "ebm.update.average = 1.0: expected"),
        (("data", "digits", "held_out"), 0, "judged_on: held_out expects held_out >= 1, got 0"),
        (("inspect", "levels"), [5, 2], "levels: expected ascending numbers"),
    ],
)
def test_switches_that_do_not_fit_are_one_line(
    where: tuple[str, ...], value: object, message: str
) -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    inner = values
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    Path("wrong.yaml").write_text(json.dumps(values))
    result = command("check-params --params wrong.yaml")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
