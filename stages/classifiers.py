"""The classifier of a dataset, as params.yaml describes it."""

from pathlib import Path

import torch

from defense.classifier import WideResNet
from defense.inference import freeze
from stages.artifacts import load_weights
from stages.hardware import Hardware
from stages.params import Params


def new_classifier(params: Params, dataset: str) -> WideResNet:
    """The classifier of a dataset, untrained."""
    data = params.dataset(dataset)
    size = params.classifier
    return WideResNet(
        depth=size.depth, width=size.width, classes=data.classes, channels=data.channels
    )


def load_classifier(params: Params, dataset: str, hardware: Hardware, path: Path) -> WideResNet:
    """The trained classifier, frozen, on the device; channels last is faster."""
    model = new_classifier(params, dataset)
    load_weights(path, model, f"`stochsec train-classifier {dataset}`")
    model.to(memory_format=torch.channels_last)
    return freeze(model.to(hardware.device))
