"""`stochsec convert` and `convert-energy`: somebody else's networks as files for every command.

A classifier that Python builds is exported by `torch.export` (.pt2), with its weights and the
normalization before them. Weights of the authors' energy become a file like those of `train-ebm`.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from defense.energy import ConvEnergy
from defense.inference import classify, freeze, logits_of
from defense.nets.importers import (
    NORMALIZATIONS,
    Logits,
    Preprocessed,
    Statistics,
    build_model,
    is_torchscript,
    load_weights,
)
from defense.pixels import from_bytes
from stages import StageError
from stages.core.artifacts import Images, load_images, save_weights
from stages.core.classifiers import EXPORTED, OURS, load_classifier
from stages.core.console import say
from stages.core.energies import load_energy
from stages.core.files import Whole, fingerprint, readable
from stages.core.hardware import Hardware
from stages.core.params import Params
from stages.reporting.rows import count

TRIED = 300  # images on which the accuracy is compared
FAR_BETTER = 0.1  # this much more accuracy under another normalization is no accident


def run(
    params: Params,
    dataset: str,
    hardware: Hardware,
    *,
    model: str,
    weights: Path | None,
    normalize: str,
    size: int | None,
    images: Path,
    out: Path,
) -> None:
    """Build, load, check on test images, and write the classifier.

    `StageError` if it cannot be built, does not fit its weights or the images, or cannot be
    exported. A poor accuracy is only flagged.
    """
    statistics = statistics_of(normalize)
    out = out.with_suffix(EXPORTED)
    try:
        network = built(model, weights)
        whole = freeze(Preprocessed(network, statistics, [size, size] if size else None))
    except ValueError as error:
        raise StageError(str(error)) from None
    about = {
        "model": model,
        "weights": weights and named(weights),
        "mean": statistics[0],
        "std": statistics[1],
        "resized_to": size,
    }
    data = params.dataset(dataset)
    shown = load_images(images, "test", data, min(TRIED, data.test_images or TRIED))
    x = from_bytes(shown.images)
    check_shape(model, whole, x)
    with checked_copy(model, out) as made:
        save(Logits(whole), x[:2], made)
        load_classifier(params, dataset, hardware, made)
    say(f"{out}: {readable(out)}; {', '.join(f'{name} {value}' for name, value in about.items())}")
    say_accuracy(network, whole, normalize, shown, hardware)


@contextmanager
def checked_copy(model: str, out: Path) -> Iterator[Path]:
    """A file to write and to check, which becomes ``out`` if nothing is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"made{out.suffix}"
        try:
            yield made
        except StageError as error:
            raise StageError(str(error).replace(str(made), model)) from None
        with Whole(out) as partial:
            shutil.copyfile(made, partial)


def named(weights: Path) -> str:
    """A file, by name and hash."""
    return f"{weights.name}, sha256 {fingerprint(weights)}..."


def statistics_of(normalize: str) -> Statistics:
    """A name of `NORMALIZATIONS`, or MEAN/STD with one number or one a channel, as 0.5/0.25."""
    if normalize in NORMALIZATIONS:
        return NORMALIZATIONS[normalize]
    try:
        mean, std = (tuple(map(float, part.split(","))) for part in normalize.split("/"))
    except ValueError:
        raise StageError(
            f"normalize: expected one of {list(NORMALIZATIONS)}, or MEAN/STD such as "
            f"0.49,0.48,0.45/0.25,0.24,0.26, got {normalize!r}"
        ) from None
    return mean, std


def built(model: str, weights: Path | None) -> nn.Module:
    """The network of an import path, with its weights."""
    path = Path(model)
    if path.is_file() and path.suffix != ".py":
        if is_torchscript(path):
            raise ValueError(
                f"{model}: a program of TorchScript, which torch.export does not take; in Python "
                "defense.EOTDefense takes torch.jit.load(...) as it is"
            )
        raise ValueError(
            f"{model}: weights need the network that they are of: give its code, such as "
            f"resnet.py:resnet32(), and --weights {model}"
        )
    network = build_model(model)
    if weights is not None:
        load_weights(network, weights)
    return network


def check_shape(model: str, network: nn.Module, x: Tensor) -> None:
    """`StageError` if the network does not take such images, with its own words."""
    try:
        with torch.no_grad():
            logits_of(network(x[:2]), 2)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise StageError(f"{model}: does not take images {tuple(x.shape[1:])}: {reason}") from None


def save(network: nn.Module, x: Tensor, path: Path) -> None:
    """The network as a program of torch.export, for batches of any size."""
    batch = {0: torch.export.Dim("batch")}
    try:
        program = torch.export.export(network, (x,), dynamic_shapes=(batch,))
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:200]
        raise StageError(
            f"torch.export cannot follow this network ({reason}); in Python it can be defended as "
            "it is, see defense.EOTDefense"
        ) from None
    torch.export.save(program, path)


def say_accuracy(
    network: nn.Module, whole: Preprocessed, normalize: str, shown: Images, hardware: Hardware
) -> None:
    """Accuracy on test images; a flag if another usual normalization does far better."""
    x = from_bytes(shown.images)

    def right(candidate: nn.Module) -> Tensor:
        candidate = freeze(Logits(candidate)).to(hardware.device)
        logits = classify(candidate, x.to(hardware.device), batch=100).cpu()
        return logits.argmax(1) == shown.labels

    found = count(right(whole))
    say(f"accuracy on test images: {found} n={found.n}")
    channels = x.shape[1]
    best, name = max(
        (float(right(Preprocessed(network, statistics, whole.size)).float().mean()), name)
        for name, statistics in NORMALIZATIONS.items()
        if len(statistics[0]) in (1, channels)
    )
    if best > found.value + FAR_BETTER:
        say(
            f"FLAG: {best:.2f} with --normalize {name}: is that the normalization that it was "
            f"trained with, rather than {normalize}?"
        )


def run_energy(
    params: Params,
    dataset: str,
    hardware: Hardware,
    *,
    model: str,
    weights: Path | None,
    tau: float,
    sigma: float | None,
    out: Path,
) -> None:
    """Build and load a `ConvEnergy`, and write it as `train-ebm` does.

    A step of its chain is x - grad f(x) + tau z; ``sigma`` is the noise on its training images, for
    denoising. `StageError` if it cannot be built, or does not take the images.
    """
    try:
        network = freeze(built(model, weights))
    except ValueError as error:
        raise StageError(str(error)) from None
    if not isinstance(network, ConvEnergy):
        raise StageError(
            f"{model}: expected a ConvEnergy, got a {type(network).__name__}; in Python "
            "defense.LangevinPurifier takes any energy"
        )
    out = out.with_suffix(OURS)
    network.architecture["sigma"] = sigma
    with checked_copy(model, out) as made:
        save_weights(made, network, tau=tau)
        load_energy(params, dataset, hardware, made)
    say(f"{out}: {readable(out)}")
