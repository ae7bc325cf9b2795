"""Other defenses under the suite: every system of the preset in small, and one of one's own."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from defense.systems import SYSTEMS
from stages import attack as stage_attack
from stages.core import presets
from stages.core.artifacts import about_of, load_tensors
from stages.core.hardware import Hardware
from stages.core.params import load_params
from stages.core.records import AttackResult
from stages.systems import build, report
from stages.systems.certificate import broken_inside
from tests.tiny import ROOT, command, tiny_params

CLASSIFIER = "artifacts/tiny/models/digits/classifier.safetensors"
ENERGY = "artifacts/tiny/models/digits/ebm_{}.safetensors"
RECORDS = Path("artifacts/tiny/records/digits/systems")
PRESET: dict[str, Any] = yaml.safe_load(presets.text("systems"))["systems"]
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / "stages/systems/dvc.yaml").read_text())["stages"]
TRAINED = [name for name, settings in PRESET["settings"].items() if settings.get("fit")]


def small() -> dict[str, Any]:
    """The preset, with a few images, steps and updates."""
    section = copy.deepcopy(PRESET)
    section |= {"images": 7, "H_adv": 2, "H_def": 4}
    for settings in section["attacks"].values():
        settings["steps"] = 2
    section["certificate"] |= {"select": 4, "estimate": 20, "alpha": 0.1, "steps": 1}
    for settings in section["settings"].values():
        settings |= (
            {"fit": {"updates": 60, "batch": 8, "learning_rate": 1e-3}}
            if settings.get("fit")
            else {}
        )
        for name, value in (("steps", 3), ("width", 4), ("layers", 3), ("depth", 3)):
            if name in settings:
                settings[name] = value
    return section


def words(name: str) -> str:
    """The command that attacks a system of the preset."""
    energy = f" --network {ENERGY.format(name.removeprefix('hill_'))}" if "hill" in name else ""
    return f"attack-system {name}{energy}"


@pytest.fixture(scope="module")
def whole(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every system was trained and attacked, and the report written."""
    folder = tmp_path_factory.mktemp("systems")
    shutil.copytree(experiment / "artifacts/tiny", folder / "artifacts/tiny")
    (folder / "params.yaml").write_text(yaml.safe_dump({**tiny_params(), "systems": small()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in TRAINED:
            result = command(f"train-system {name}")
            assert result.exit_code == 0, result.output
        for name in PRESET["settings"]:
            result = command(words(name))
            assert result.exit_code == 0, result.output
        result = command("report-systems --out systems")
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in."""
    shutil.copytree(whole, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def records(name: str) -> dict[str, AttackResult]:
    return {
        path.stem: AttackResult.load(path)
        for path in sorted((RECORDS / name).glob("*.safetensors"))
        if path.stem != "certificate"
    }


def test_the_preset_has_every_system_and_the_workflow_every_system_of_the_preset() -> None:
    assert PRESET["settings"].keys() == SYSTEMS.keys()
    stated = [f"hill_{name}" for name in WORKFLOW["attack_hill"]["matrix"]["energy"]]
    for stage in ("attack_trained", "attack_untrained"):
        stated += WORKFLOW[stage]["matrix"]["system"]
    assert sorted(stated) == sorted(SYSTEMS)
    assert WORKFLOW["train_system"]["matrix"]["system"] == TRAINED
    assert WORKFLOW["attack_trained"]["matrix"]["system"] == TRAINED


def test_stages_of_the_workflow_depend_on_the_file_of_their_code_and_exist() -> None:
    codes = {"train_system": "train", "report_systems": "report"}
    for name, stage in WORKFLOW.items():
        (listed,) = [dep for dep in stage["deps"] if dep.startswith("artifacts/code/")]
        code = f"systems_{codes.get(name, 'attack')}"
        assert listed == f"artifacts/code/{'params' if name == 'systems_params' else code}.txt"
        assert stage["wdir"] == "../.."


@pytest.mark.parametrize("name", PRESET["settings"])
def test_each_system_meets_every_attack_that_is_possible(folder: Path, name: str) -> None:
    found = records(name)
    random = found["pgd"].about["random"]
    possible = {"pgd", "transfer", *PRESET["attacks"]}
    possible -= set() if random else {"known_noise"}
    possible -= {"exact"} if name in ("pixeldefend", "menet", "jpeg") else set()
    assert found.keys() == possible
    assert random == (name not in ("pixeldefend", "jpeg", "total_variation"))
    for attack, result in found.items():
        assert len(result.images.labels) == 7
        assert result.farthest() <= 48 / 255 + 1e-6
        assert result.about["system"] == name
        assert result.about["cost"] > 0
        assert ("H_def" in result.about) == (random and attack != "pgd")
    best = found["apgd"].about["gradient"]
    assert best == ("identity" if "exact" not in found else "exact")


def test_an_exact_gradient_costs_more_than_bpda_and_bpda_more_than_none(folder: Path) -> None:
    for name in ("hill_smooth_convergent", "malade", "score"):
        found = records(name)
        costs = [found[attack].about["cost"] for attack in ("exact", "bpda_eot", "square")]
        assert costs == sorted(costs, reverse=True)
        assert len(set(costs)) == 3


def test_where_the_noise_is_known_every_break_repeats(folder: Path) -> None:
    for name in ("smoothing", "malade"):
        result = records(name)["known_noise"]
        record, labels = result.record, result.images.labels
        broken = record.broken_at >= 0
        assert not (record.adversarial_logits.argmax(1) == labels)[broken].any()


def test_transferred_images_are_those_of_the_bare_classifier_for_every_system(folder: Path) -> None:
    found = records("smoothing")  # which has a classifier of its own
    assert torch.equal(found["pgd"].record.adversarial, found["transfer"].record.adversarial)
    for name in SYSTEMS:
        pgd = records(name)["pgd"].record
        assert torch.equal(pgd.adversarial, found["pgd"].record.adversarial)


def test_certificates_are_measured_for_smoothed_classifiers(folder: Path) -> None:
    for name in SYSTEMS:
        path = RECORDS / name / "certificate.safetensors"
        assert path.exists() == (name in ("smoothing", "denoised_smoothing"))
    certified, _ = load_tensors(RECORDS / "smoothing/certificate.safetensors")
    assert certified["radius"].shape == (7,)
    assert float(certified["radius"].max()) < 4 * 0.25


def test_a_vote_that_changes_within_its_certificate_is_counted() -> None:
    certified = {
        "radius": torch.tensor([0.5, 0.5, 0.01, 0.5]),
        "predicted": torch.tensor([1, 1, 1, -1]),
        "attacked": torch.tensor([1, 2, 2, 2]),
    }
    assert broken_inside(certified, 32) == (3, 1)


def test_the_report_has_a_row_for_each_system_and_says_what_was_not_run(folder: Path) -> None:
    rows = pd.read_csv("systems/systems.csv")
    assert set(rows.system) == set(SYSTEMS)
    natural = rows[(rows.attack == "transfer") & (rows.metric == "natural")]
    assert (natural.n == 7).all()
    shutil.rmtree(RECORDS / "jpeg")
    assert command("report-systems --out again").exit_code == 0
    page = Path("again/index.html").read_text()
    assert page.count("<td>not run</td>") == len(PRESET["attacks"]) + 5
    table = Path("again/systems.md").read_text()
    assert "0.95 / 0.09 (BPDA)" in table  # PixelDefend's published row
    assert 'src="data:image/png' in page
    assert "https://" not in page


def test_the_report_takes_the_worst_over_all_attacks(folder: Path) -> None:
    params = load_params(Path("params.yaml"))
    line = report.load(params, "score")
    robust = torch.stack([report.robust(result) for result in line.attacks.values()])
    assert line.worst().right == float(robust.all(0).sum())
    assert line.own() == line.robust("bpda_eot")
    assert report.load(params, "smoothing").own() is None  # its paper has a certificate
    assert line.worst().value <= line.robust(line.strongest()).value
    assert line.robust(line.strongest()).value == min(
        line.robust(attack).value for attack in line.attacks
    )


def test_without_records_there_is_no_report(folder: Path) -> None:
    shutil.rmtree(RECORDS)
    result = command("report-systems --out again")
    assert result.exit_code == 2
    assert "no system was attacked" in result.output


PURIFIER = """
import torch
from torch import nn


class Blur(nn.Module):
    differentiable = True

    def __init__(self, strength=0.1):
        super().__init__()
        self.strength = strength

    def forward(self, x, *, generator):
        return x + self.strength * torch.randn(x.shape, generator=generator, device=x.device)
"""


def test_a_purifier_of_ones_own_meets_the_same_suite(folder: Path) -> None:
    Path("mine.py").write_text(PURIFIER)
    result = command("attack-system mine.py:Blur(0.2) --out mine")
    assert result.exit_code == 0, result.output
    assert {path.stem for path in Path("mine").iterdir()} == {"pgd", "transfer", *PRESET["attacks"]}
    assert "exact" in result.output
    refused = command("attack-system mine.py:Sharpen() --out mine")
    assert refused.exit_code == 2
    assert "mine.py has no Sharpen" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("attack-system nothing", "system: expected one of"),
        ("attack-system hill_convergent", "expects the file of an energy"),
        ("train-system jpeg", "jpeg: has nothing to train"),
        (f"attack-system score --network {CLASSIFIER}", "not the network of score"),
        ("attack-system score --network missing.safetensors", "no such file"),
    ],
)
def test_what_is_wrong_is_one_line(folder: Path, words: str, says: str) -> None:
    result = command(words)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_a_wrong_setting_is_named(folder: Path) -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["systems"]["settings"]["jpeg"] = {"sharpness": 3}
    Path("params.yaml").write_text(yaml.safe_dump(values))
    result = command("attack-system jpeg")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "systems.settings.jpeg:" in said
    assert "sharpness" in said
    values["systems"] = None
    Path("params.yaml").write_text(yaml.safe_dump(values))
    said = " ".join(command("attack-system jpeg").output.split())
    assert "`stochsec preset systems` writes one" in said


def test_a_killed_suite_continues_with_the_same_records(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in (RECORDS / "malade").iterdir()}
    calls = []
    usual = stage_attack.AttackResult.save

    def killed(self: AttackResult, path: Path) -> None:
        calls.append(path)
        if len(calls) == 5:
            raise RuntimeError("killed")
        usual(self, path)

    monkeypatch.setattr(AttackResult, "save", killed)
    with pytest.raises(RuntimeError, match="killed"):
        command("attack-system malade --out again")
    monkeypatch.setattr(AttackResult, "save", usual)
    result = command("attack-system malade --out again")
    assert result.exit_code == 0
    assert "resumed at" in result.output
    assert {path.name: path.read_bytes() for path in Path("again").iterdir()} == before


def test_a_stopped_training_continues_to_the_same_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = build.network_file(load_params(Path("params.yaml")), "score")
    before = place.read_bytes()
    params, name = load_params(Path("params.yaml")), "score"
    from stages.systems import train

    files = {"images": Path("artifacts/tiny/data/digits.npz"), "classifier": Path(CLASSIFIER)}
    monkeypatch.setattr("stages.systems.train.Stopwatch.due", lambda self: True)
    usual, steps = train.Trainer.step, []

    def step(self: Any) -> float:
        steps.append(1)
        if len(steps) == 55:
            raise RuntimeError("the machine is gone")
        return usual(self)

    monkeypatch.setattr(train.Trainer, "step", step)
    with pytest.raises(RuntimeError, match="gone"):
        train.run(params, name, Hardware.choose("cpu"), **files, out=Path("one.safetensors"))
    train.run(params, name, Hardware.choose("cpu"), **files, out=Path("one.safetensors"))
    assert len(steps) == 55 + 10, "it began anew"
    assert load_tensors(Path("one.safetensors"))[0].keys() == load_tensors(place)[0].keys()
    assert Path("one.safetensors").read_bytes() == before
    assert about_of(place)["system"] == "score"
