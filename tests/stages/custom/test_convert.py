"""`stochsec convert`: somebody else's classifier, from its code and weights to an attack on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from defense import load_classifier, load_energy
from stages.core.artifacts import load_tensors
from tests.tiny import command

OURS = "artifacts/tiny/models/digits/classifier.safetensors"
SOURCE = f"""
import torch
from torch import nn
from defense import load_classifier

class Shifted(nn.Module):
    "Expects pixels in [-1, 1]."
    def __init__(self):
        super().__init__()
        self.net = load_classifier("{OURS}")

    def forward(self, x):
        return self.net(0.5 * x + 0.5)

class Branching(Shifted):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

class Few(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def forward(self, x):
        return self.net(x)

class Dropping(Few):
    def forward(self, x):
        return nn.functional.dropout(nn.functional.pad(self.net(x), (0, 7)), training=True)

class Bowl(nn.Module):
    "An energy that is no ConvEnergy."
    def forward(self, x):
        return 0.01 * x.square().sum(dim=(1, 2, 3)) + 0.001 * x.sum(dim=(1, 2, 3)).sin()

def vision_transformer():
    from transformers import ViTConfig, ViTForImageClassification
    size = {{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}}
    return ViTForImageClassification(ViTConfig(
        **size, intermediate_size=16, image_size=8, patch_size=4, num_channels=1, num_labels=10
    ))

def grown():
    from torchvision.models import resnet18
    net = resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return Named(net)

class Named(nn.Module):
    "Its output is a dictionary, as of Hugging Face."
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return {{"logits": self.net(x), "loss": None}}
"""


@pytest.fixture(autouse=True)
def folder(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(experiment)
    (tmp_path / "nets.py").write_text(SOURCE)
    return tmp_path


def made(words: str) -> str:
    result = command(f"convert digits {words}")
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def attacked(classifier: Path | str, out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The record of PGD on five images."""
    words = f"attack digits pgd --classifier {classifier} --subset 0:5 --out {out}"
    assert command(words).exit_code == 0
    return load_tensors(out)


def refused(words: str) -> str:
    result = command(f"convert digits {words}")
    assert result.exit_code == 2, result.output
    *_, line = result.output.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_network_and_its_weights_become_a_classifier_that_is_attacked(folder: Path) -> None:
    torch.save({"state_dict": load_classifier(OURS).state_dict()}, folder / "w.pth")
    factory = "defense:WideResNet(depth=10,width=1,classes=10,channels=1)"
    said = made(f"{factory} --weights {folder}/w.pth --out {folder}/a.pt2")
    assert "w.pth, sha256" in said
    assert "accuracy on test images" in said
    assert "FLAG" not in said
    ours, plain = attacked(OURS, folder / "ours.safetensors")
    theirs, about = attacked(folder / "a.pt2", folder / "a.safetensors")
    assert about["classifier_made_of"]["weights"].startswith("w.pth, sha256")
    assert "classifier_made_of" not in plain
    torch.testing.assert_close(theirs["clean_logits"], ours["clean_logits"], rtol=1e-4, atol=1e-4)


def test_a_forgotten_normalization_is_noticed(folder: Path) -> None:
    words = f"{folder}/nets.py:Shifted() --out {folder}/b.pt2"
    assert "with --normalize half" in made(words)
    assert "FLAG" not in made(f"{words} --normalize half")
    assert "FLAG" not in made(f"{words} --normalize 0.5/0.5")


DOORS = {
    "torchvision": "{f}/nets.py:grown() --resize 32 --normalize half",
    "timm": "timm:create_model('resnet10t',num_classes=10,in_chans=1) --resize 32 --normalize half",
    "Hugging Face": "{f}/nets.py:vision_transformer() --normalize half",
}


@pytest.mark.parametrize("library", DOORS)
def test_a_library_of_networks_is_a_door(folder: Path, library: str) -> None:
    made(f"{DOORS[library].format(f=folder)} --out {folder}/r.pt2")
    _, about = attacked(folder / "r.pt2", folder / "r.safetensors")
    assert about["classifier_made_of"]["mean"] == [0.5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{f}/nets.py:Few()", "nets.py:Few(): expected logits (4, 10) for 4 images, got (4, 3)"),
        ("{f}/nets.py:Dropping()", "its answer to an image changes from call to call"),
        ("{f}/nets.py:Branching()", "torch.export cannot follow this network"),
        ("{f}/nets.py:Few() --normalize cifar10", "does not take images (1, 8, 8)"),
        ("{f}/nets.py:Few() --resize 9", "does not take images (1, 8, 8)"),
        ("{f}/nets.py:Few() --normalize nothing", "normalize: expected one of ['none', 'half'"),
        ("{f}/nets.py:Few() --weights {f}/nets.py", "nets.py: not a file of weights"),
        ("{f}/weights.pt", "weights need the network that they are of"),
        ("{f}/nets.py", "expected a file and what to call in it"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing(folder: Path, words: str, message: str) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), folder / "weights.pt")
    assert message in refused(f"{words.format(f=folder)} --out {folder}/no.pt2")
    assert not (folder / "no.pt2").exists()


def test_a_program_needs_no_conversion(folder: Path) -> None:
    torch.jit.trace(load_classifier(OURS), torch.rand(2, 1, 8, 8)).save(folder / "traced.pt")
    assert "is a program already" in refused(f"{folder}/traced.pt")


def test_any_energy_defends_and_is_attacked(folder: Path) -> None:
    tau = load_energy("artifacts/tiny/models/digits/ebm_convergent.safetensors")[1]
    words = f"convert-energy digits {folder}/nets.py:Bowl() --tau {tau} --out {folder}/bowl.pt2"
    assert command(words).exit_code == 0
    for attack in ("transfer_K", "exact"):
        out = folder / f"{attack}.safetensors"
        words = f"attack digits {attack} --energy {folder}/bowl.pt2 --subset 0:5 --out {out}"
        assert command(words).exit_code == 0
        tensors, about = load_tensors(out)
        assert about["energy_made_of"]["model"] == f"{folder}/nets.py:Bowl()"
        assert torch.isfinite(tensors["clean_logits"]).all()
    assert tensors["through_chain"].any()  # its exact gradient is not the identity


def test_the_authors_weights_become_an_energy_of_ours(folder: Path) -> None:
    ours = "artifacts/tiny/models/digits/ebm_convergent.safetensors"
    energy, tau = load_energy(ours)
    theirs = {name.replace("layers.", "f."): value for name, value in energy.state_dict().items()}
    torch.save({"ebm": theirs}, folder / "ebm.pth")
    words = (
        "convert-energy digits defense:ConvEnergy(image_size=8,channels=1,width=4) "
        f"--weights {folder}/ebm.pth --tau {tau} --sigma 0.12 --out {folder}/theirs.pt2"
    )
    assert command(words).exit_code == 0
    again, same_tau = load_energy(folder / "theirs.safetensors")
    assert (same_tau, again.sigma) == (tau, 0.12)
    for name, value in energy.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    for path in (ours, folder / "theirs.safetensors"):
        words = f"attack digits identity --energy {path} --subset 0:5 --out {folder}/r.safetensors"
        assert command(words).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{f}/nets.py:Few() --tau 0.08", "expected energies (N,) of images (N,C,H,W), got (2, 3)"),
        ("{f}/nets.py:grown() --tau 0.08", "expected energies (N,) of images (N,C,H,W), got dict"),
        ("defense:ConvEnergy() --tau 0.08", "expected an energy of images (1, 8, 8)"),
        ("defense:ConvEnergy(image_size=8,channels=1) --tau 0.01", "was trained with tau 0.01"),
    ],
)
def test_what_is_no_energy_leaves_nothing(folder: Path, words: str, message: str) -> None:
    result = command(f"convert-energy digits {words.format(f=folder)} --out {folder}/no.pt2")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (folder / "no.pt2").exists()
