"""Images, weights, training states and named tensors on disk."""

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stages import StageError
from stages.core.files import Whole, require
from stages.core.params import Dataset

Network = TypeVar("Network", bound=nn.Module)

# Images

UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for a file that is no good .npz."""


@dataclass(frozen=True)
class Images:
    """uint8 images (N,C,H,W), labels (N,) int64 and their positions ``index`` (N,) in the source.

    If the source is not embedded, positions count in its images sorted by the hash of their pixels.
    """

    images: Tensor
    labels: Tensor
    index: Tensor

    def shards(self, size: int, start: int = 0) -> list["Images"]:
        """Split into shards of at most ``size`` images; each shard has its own random streams.

        Images before ``start`` are dropped, but shards are numbered from the first image: a shard
        that lies wholly before ``start`` is empty.
        """
        parts = []
        for first in range(0, len(self.labels), size):
            part = slice(max(first, start), max(first + size, start))
            parts.append(Images(*(getattr(self, field.name)[part] for field in fields(self))))
        return parts


def check(images: Tensor, labels: Tensor, section: Dataset, origin: str) -> None:
    """Shape, type and labels against the dataset's section."""
    if images.dtype != torch.uint8 or labels.ndim != 1 or labels.is_floating_point():
        raise StageError(
            f"{origin}: expected images uint8 and labels (N,) integer, got {images.dtype} and "
            f"{tuple(labels.shape)} {labels.dtype}"
        )
    expected = section.shape.image
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise StageError(
            f"{origin}: expected images of (channels, height, width) = {expected}, "
            f"got {tuple(images.shape[1:])}"
        )
    if len(images) != len(labels) or not len(labels):
        raise StageError(
            f"{origin}: expected one label an image, got {len(labels)} labels "
            f"for {len(images)} images"
        )
    if labels.min() < 0 or labels.max() >= section.shape.classes:
        raise StageError(
            f"{origin}: expected labels 0 to {section.shape.classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )


def save_images(path: Path, parts: Mapping[str, Images]) -> None:
    """The splits (train, test and perhaps held_out) in one .npz of uint8 (N,C,H,W) arrays."""
    arrays = {
        f"{split}_{field.name}": getattr(part, field.name).numpy()
        for split, part in parts.items()
        for field in fields(Images)
    }
    # numpy's own np.savez leaves what the archive's headers say to the version of Python.
    with Whole(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, array in arrays.items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), file.getvalue())


def load_images(path: Path, split: str, section: Dataset, count: int | None = None) -> Images:
    """The first ``count`` images (None: all) of "train", "test" or "held_out".

    "test" means the images to evaluate on: the held-out ones if judged_on is held_out.
    """
    require(path, "`stochsec prepare-data`")
    if split == "test":
        split = section.judged_on
    try:
        with np.load(path) as arrays:
            parts = [arrays[f"{split}_{field.name}"][:count] for field in fields(Images)]
    except UNREADABLE as error:
        raise StageError(
            f"{path}: not an image file of `stochsec prepare-data` ({error})"
        ) from None
    if count is not None and len(parts[0]) < count:
        raise StageError(f"{path}: expected at least {count} {split} images, got {len(parts[0])}")
    images = Images(*map(torch.from_numpy, parts))
    check(images.images, images.labels, section, str(path))
    return images


# Weights and training states


def save_weights(path: Path, module: nn.Module, **more: object) -> None:
    """The weights of a network as safetensors, with the arguments that build it, and ``more``.

    `StageError` for weights that are NaN or infinite.
    """
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    if not all_finite(tensors):
        raise StageError(f"{path}: its training has diverged; lower the learning rate")
    about = {"network": type(module).__name__, "architecture": module.architecture, **more}
    save_tensors(path, tensors, about)


def load_network(
    path: Path, kind: Callable[..., Network], otherwise: dict[str, Any], made_by: str
) -> Network:
    """A network from its weights, built as the file says, or as ``otherwise`` if it does not.

    `StageError` if the file is missing, corrupt or of another kind of network.
    """
    require(path, made_by)
    tensors, about = load_tensors(path)
    found = about.get("network", kind.__name__)
    if found != kind.__name__:
        raise StageError(f"{path}: expected the weights of a {kind.__name__}, got a {found}")
    try:
        module = kind(**about.get("architecture", otherwise))
        module.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StageError(f"{path}: not the weights of a {kind.__name__}: {reason}") from None
    if not all_finite(tensors):
        raise StageError(f"{path}: its weights are NaN or infinite: its training has diverged")
    return module


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all values of all tensors are finite."""
    return all(bool(torch.isfinite(value).all()) for value in tensors.values())


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """The state of a training run; tensors and plain values only."""
    with Whole(path) as partial, partial.open("wb") as file:
        torch.save(dict(state), file)  # given a path, it would write the path's name inside


def load_state(path: Path, made_by: str, device: torch.device) -> dict[str, Any]:
    """Read what `save_state` wrote, onto a device; generator states stay on the CPU."""
    require(path, made_by)
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise StageError(f"{path}: not a readable training state ({error})") from None
    if "generator" not in state:
        raise StageError(f"{path}: not a training state")
    state["generator"] = state["generator"].cpu()
    return state


# Tensors


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Named tensors with a description (any JSON) as safetensors.

    `StageError` if ``path`` holds the weights of a network and ``about`` describes a record.
    """
    if "network" not in about and path.exists() and is_network(path):
        raise StageError(f"{path}: is a network; a record is not written over it")
    with Whole(path) as partial:
        contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(contiguous, partial, metadata={"about": json.dumps(about, sort_keys=True)})


def is_network(path: Path) -> bool:
    """Whether a file holds the weights of a network."""
    try:
        return "network" in about_of(path)
    except StageError:
        return False


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: tensors and description."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
    except FileNotFoundError:
        raise StageError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise StageError(f"{path}: not a readable safetensors file ({error})") from None
    return tensors, about


def about_of(path: Path) -> dict[str, Any]:
    """The description alone."""
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise StageError(f"{path}: not a readable safetensors file ({error})") from None
    return about


def together(abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the descriptions of parts that may come from several machines.

    Values that differ are listed, separated by commas.
    """
    about = dict(abouts[0])
    for name in about:
        said = dict.fromkeys(str(one.get(name)) for one in abouts)
        if len(said) > 1:
            about[name] = ", ".join(said)
    return about
