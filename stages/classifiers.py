"""The classifier of a dataset, as params.yaml and its file describe it; or somebody else's."""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from defense.classifier import WideResNet
from defense.inference import freeze
from stages import StageError
from stages.artifacts import load_network
from stages.files import require
from stages.hardware import Hardware
from stages.params import Params

EXPORTED = ".pt2"


def new_classifier(params: Params, dataset: str) -> WideResNet:
    """The classifier of a dataset, untrained."""
    data = params.dataset(dataset)
    size = params.classifier
    return WideResNet(
        depth=size.depth, width=size.width, classes=data.classes, channels=data.channels
    )


def load_classifier(params: Params, dataset: str, hardware: Hardware, path: Path) -> nn.Module:
    """A trained classifier, frozen, on the device, that fits the dataset.

    A .safetensors file of `train-classifier` says which network it is; a .pt2 file is any network
    that `torch.export` has written, for batches of any size, from pixels in [0, 1] to logits.
    """
    if path.suffix == EXPORTED:
        classifier = _exported(path)
    else:
        otherwise = new_classifier(params, dataset).architecture
        made_by = f"`stochsec train-classifier {dataset}`"
        classifier = load_network(path, WideResNet, otherwise, made_by)
        # Channels last is faster.
        freeze(classifier.to(memory_format=torch.channels_last))
    classifier.to(hardware.device)
    data = params.dataset(dataset)
    images = torch.rand(3, data.channels, data.image_size, data.image_size)
    try:
        with torch.no_grad():
            logits: Tensor = classifier(images.to(hardware.device))
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StageError(f"{path}: does not take images of {dataset}: {reason}") from None
    if logits.shape != (3, data.classes):
        raise StageError(
            f"{path}: expected logits (3, {data.classes}) for 3 images, got {tuple(logits.shape)}"
        )
    return classifier


class Exported(nn.Module):
    """A program of torch.export, which stays in the mode that it was exported in."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def train(self, mode: bool = True) -> Self:
        """There is no other mode."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B,C,H,W) in [0, 1] -> logits (B, classes)."""
        logits: Tensor = self.program(x)
        return logits


def _exported(path: Path) -> nn.Module:
    """A network written by `torch.export.save`."""
    require(path)
    try:
        module = torch.export.load(path).module()
    except Exception as error:  # it raises many kinds for a file that is none of its own
        reason = " ".join(str(error).split())[:200]
        raise StageError(f"{path}: not a program of torch.export ({reason})") from None
    return freeze(Exported(module))
