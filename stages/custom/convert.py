"""`stochsec convert` and `convert-energy`: somebody else's networks as files for every command.

A classifier that Python builds is exported by `torch.export` (.pt2), with its weights and the
normalization before them. Weights of the authors' energy become a file like those of `train-ebm`.
"""

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from defense.energy import ConvEnergy
from defense.inference import classify, freeze, logits_of
from defense.nets.importers import (
    NORMALIZATIONS,
    Energies,
    Logits,
    Preprocessed,
    Statistics,
    build_model,
    load_weights,
)
from defense.nets.programs import EXPORTED, SCRIPTED, save_program
from defense.pixels import from_bytes
from stages import StageError
from stages.core.artifacts import Images, load_images, save_weights
from stages.core.classifiers import OURS, load_classifier
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
    with said_errors():
        network = built(model, weights)
        whole = freeze(Preprocessed(network, statistics, [size, size] if size else None))
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
        with said_errors(f"{model}: "):
            save_program(Logits(whole), x[:2], about, made)
        load_classifier(params, dataset, hardware, made)
    say(f"{out}: {readable(out)}; {', '.join(f'{name} {value}' for name, value in about.items())}")
    say_accuracy(network, whole, normalize, shown, hardware)


@contextmanager
def said_errors(before: str = "") -> Iterator[None]:
    """The library's errors as those of a command."""
    try:
        yield
    except ValueError as error:
        raise StageError(f"{before}{error}") from None


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
        if path.suffix in (EXPORTED, SCRIPTED) and is_program(path):
            raise ValueError(f"{model}: is a program already, which every command takes as it is")
        raise ValueError(
            f"{model}: weights need the network that they are of: give its code, such as "
            f"resnet.py:resnet32(), and --weights {model}"
        )
    network = build_model(model)
    if weights is not None:
        load_weights(network, weights)
    return network


def is_program(path: Path) -> bool:
    """Whether a file is one of torch.export or TorchScript, rather than of weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return path.suffix == EXPORTED or any(
            name.endswith("/constants.pkl") for name in archive.namelist()
        )


def check_shape(model: str, network: nn.Module, x: Tensor) -> None:
    """`StageError` if the network does not take such images, with its own words."""
    try:
        with torch.no_grad():
            logits_of(network(x[:2]), 2)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise StageError(f"{model}: does not take images {tuple(x.shape[1:])}: {reason}") from None


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
    """Build and load an energy, and write a `ConvEnergy` as `train-ebm` does, any other as .pt2.

    It maps images (N,C,H,W) in net range [-1, 1] to energies (N,) or (N,1). A step of its chain is
    x - grad f(x) + tau z; ``sigma`` is the noise on its training images, for denoising.
    `StageError` if it cannot be built, does not take the images or cannot be exported.
    """
    with said_errors():
        network = freeze(built(model, weights))
    shape = params.dataset(dataset).shape.image
    if isinstance(network, ConvEnergy):
        out = out.with_suffix(OURS)
        network.architecture["sigma"] = sigma
    else:
        out = out.with_suffix(EXPORTED)
        check_energies(model, network, torch.zeros(2, *shape))
    about = {"shape": shape, "tau": tau, "sigma": sigma, "model": model}
    about["weights"] = weights and named(weights)
    with checked_copy(model, out) as made:
        if isinstance(network, ConvEnergy):
            save_weights(made, network, tau=tau)
        else:
            with said_errors(f"{model}: "):
                save_program(Energies(network), torch.zeros(2, *shape), about, made)
        load_energy(params, dataset, hardware, made)
    say(f"{out}: {readable(out)}")


def check_energies(model: str, network: nn.Module, x: Tensor) -> None:
    """`StageError` if a network does not return one number with a gradient for each image x."""
    x = x.requires_grad_()
    try:
        found = network(x)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise StageError(f"{model}: does not take images {tuple(x.shape[1:])}: {reason}") from None
    if not isinstance(found, Tensor) or found.shape not in ((len(x),), (len(x), 1)):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise StageError(f"{model}: expected energies (N,) of images (N,C,H,W), got {got}")
    if not found.requires_grad:
        raise StageError(f"{model}: its energies have no gradient in the pixels")
