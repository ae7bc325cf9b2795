"""Load the classifier of a dataset: one that `train-classifier` wrote, or any exported network."""

from pathlib import Path

import torch
from torch import Tensor, nn

from defense.inference import freeze, logits_of
from defense.nets.programs import EXPORTED, SCRIPTED, Program, load_program
from defense.nets.wide_resnet import WideResNet
from defense.rng import make_generator
from defense.verdict import differ
from stages import StageError
from stages.core.artifacts import load_network
from stages.core.files import require
from stages.core.hardware import Hardware
from stages.core.params import Params

OURS = ".safetensors"
CONVERT = "`stochsec convert` makes one of any network, from its code and its weights"
TRIED = 4  # images that a classifier is tried on


def new_classifier(params: Params, dataset: str) -> WideResNet:
    """The classifier of a dataset, untrained."""
    data = params.dataset(dataset)
    size = params.classifier
    return WideResNet(
        depth=size.depth, width=size.width, classes=data.shape.classes, channels=data.shape.channels
    )


def load_classifier(params: Params, dataset: str, hardware: Hardware, path: Path) -> nn.Module:
    """A trained classifier, frozen, on the device, that fits the dataset.

    A .safetensors file of `train-classifier` states its architecture. A .pt2 file of torch.export
    or a .pt file of TorchScript holds any network, for batches of any size, from pixels in [0, 1]
    to logits.
    `StageError` for other files, for weights or logits that are not finite, for logits of another
    shape or without a gradient, and if the logits of an image vary from call to call or depend on
    the rest of the batch.
    """
    if path.suffix in (EXPORTED, SCRIPTED):
        require(path)
        try:
            classifier: nn.Module = load_program(path, ClassifierProgram)
        except ValueError as error:
            raise StageError(f"{path}: {error}; {CONVERT}") from None
    elif path.suffix != OURS:
        raise StageError(
            f"{path}: expected {OURS} of `stochsec train-classifier`, {EXPORTED} of torch.export "
            f"or {SCRIPTED} of TorchScript; {CONVERT}"
        )
    else:
        otherwise = new_classifier(params, dataset).architecture
        made_by = f"`stochsec train-classifier {dataset}`"
        classifier = load_network(path, WideResNet, otherwise, made_by)
        # Channels last is faster.
        freeze(classifier.to(memory_format=torch.channels_last))
    classifier.to(hardware.device)
    data = params.dataset(dataset)
    generator = make_generator(0, "images to try a classifier on")
    shape = (TRIED, *data.shape.image)
    images = torch.rand(shape, generator=generator).to(hardware.device)
    try:
        logits = logits_of(classifier(images.requires_grad_()), TRIED)
        differentiable = logits.requires_grad
        with torch.no_grad():
            again = logits_of(classifier(images), TRIED)
            alone = logits_of(classifier(images[:1]), 1)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StageError(f"{path}: does not take images of {dataset}: {reason}") from None
    except ValueError as error:
        raise StageError(f"{path}: {error}") from None
    if logits.shape[1] != data.shape.classes:
        raise StageError(
            f"{path}: expected logits ({TRIED}, {data.shape.classes}) for {TRIED} images, got "
            f"{tuple(logits.shape)}"
        )
    logits = logits.detach()
    if not torch.isfinite(logits).all():
        raise StageError(
            f"{path}: its logits are NaN or infinite: its training has diverged, or a class is "
            "masked with -inf, where a large negative number would do"
        )
    if not differentiable:
        raise StageError(
            f"{path}: its logits have no gradient in the pixels (detached, or under no_grad "
            "inside), and attacks follow one"
        )
    if differ(logits, again):
        raise StageError(
            f"{path}: its answer to an image changes from call to call, as with dropout in a "
            "network that was exported in training mode; call .eval() before the export. A "
            "classifier that is meant to draw its answer is judged from Python: defense.Replicated"
        )
    if differ(logits[:1], alone):
        raise StageError(
            f"{path}: its answer to an image depends on the other images in the batch, as with "
            "batch normalization in a network that was exported in training mode; call .eval() "
            "before the export"
        )
    return classifier


class ClassifierProgram(Program):
    """Pixels (B,C,H,W) in [0, 1] -> logits (B, classes)."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return logits_of(super().forward(x), len(x))
        except AssertionError as error:  # of a bound that was set on the size of a batch
            reason = " ".join(str(error).split())[:200]
            raise StageError(f"classifier: does not take {len(x)} images: {reason}") from None
