"""Stage 1: images from a source into one file, checked, in a fixed random order.

The order depends on the images alone: what is not embedded is sorted by the sha256 of its pixels
before it is shuffled, so that "the first 1,000 test images" are the same for everybody, whatever
order their copy of a dataset came in.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from defense.rng import make_generator
from stages import StageError
from stages.artifacts import UNREADABLE, Images, check, save_images
from stages.console import Track, say
from stages.params import Dataset, Params

SPLITS = ("train", "test")


def run(params: Params, dataset: str, out: Path) -> None:
    """Read, check, shuffle and write both splits of a dataset."""
    section = params.dataset(dataset)
    root = Path(section.path or f"data/{dataset}")
    parts: dict[str, Images] = {}
    for split in SPLITS:
        images, labels, origin = read_split(section, dataset, root, split)
        check(images, labels, section, origin)
        if section.source != "embedded":
            by_pixels = sorted_by_pixels(images, labels)
            images, labels = images[by_pixels], labels[by_pixels]
        # A random order, fixed for ever, so that the first n images are a fair sample.
        order = torch.randperm(len(labels), generator=make_generator(0, "order", dataset, split))
        if split == "train" and section.held_out:
            order, held_out = order[: -section.held_out], order[-section.held_out :]
            parts["held_out"] = Images(images[held_out], labels[held_out], held_out)
        count = section.train_images if split == "train" else section.test_images
        if len(order) < (count or 1):
            raise StageError(
                f"{origin}: expected at least {count or 1} images besides those held out, "
                f"got {len(order)}"
            )
        order = order[:count]
        if dataset == params.compare_dataset and len(order) < params.fid.images:
            raise StageError(
                f"fid.images: expected <= {len(order)} {split} images, got {params.fid.images}"
            )
        parts[split] = Images(images[order], labels[order], order)
        say(f"{dataset} {split}: {len(order)} of {len(labels)} images from {origin}")
    save_images(out, parts)


def sorted_by_pixels(images: Tensor, labels: Tensor) -> list[int]:
    """Places of images (N,C,H,W) in the order of their sha256; equal ones by their label."""
    keys = [
        (hashlib.sha256(image.numpy().tobytes()).digest(), label)
        for image, label in zip(images.contiguous(), labels.tolist(), strict=True)
    ]
    return sorted(range(len(keys)), key=keys.__getitem__)


def read_split(
    section: Dataset, dataset: str, root: Path, split: str
) -> tuple[Tensor, Tensor, str]:
    """uint8 images (N,C,H,W), labels (N,) and a name for messages."""
    if section.source == "embedded":
        return read_digits(split)
    if section.source == "torchvision":
        return read_torchvision(dataset, root, split)
    if section.source == "npz":
        return read_npz(root / f"{split}.npz")
    return read_folder(root / split, section)


def read_digits(split: str) -> tuple[Tensor, Tensor, str]:
    """scikit-learn's 1,797 handwritten digits: 1,297 to train on, 500 to test, by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    parts = train_test_split(
        pixels, digits.target, test_size=500, random_state=0, stratify=digits.target
    )
    images, labels = parts[SPLITS.index(split)], parts[2 + SPLITS.index(split)]
    return torch.from_numpy(images), torch.from_numpy(labels).long(), f"digits {split}"


def read_torchvision(dataset: str, root: Path, split: str) -> tuple[Tensor, Tensor, str]:
    """CIFAR-10, CIFAR-100 or SVHN, downloaded and md5-checked by torchvision if not in ``root``."""
    from torchvision.datasets import CIFAR10, CIFAR100, SVHN

    kinds = {
        "cifar10": lambda download: CIFAR10(root, split == "train", download=download),
        "cifar100": lambda download: CIFAR100(root, split == "train", download=download),
        "svhn": lambda download: SVHN(root, split, download=download),
    }
    if dataset not in kinds:
        raise StageError(f"dataset: torchvision source has {list(kinds)}, got {dataset!r}")
    try:
        loaded = kinds[dataset](download=True)
    except (OSError, RuntimeError) as error:
        raise StageError(
            f"{root}: {dataset} is not there and cannot be downloaded ({error})"
        ) from None
    data, labels = loaded.data, loaded.labels if dataset == "svhn" else loaded.targets
    images = torch.from_numpy(np.asarray(data))
    if dataset != "svhn":
        images = images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(labels).long(), f"{dataset} {split}"


def read_npz(path: Path) -> tuple[Tensor, Tensor, str]:
    """An .npz with ``images`` (N,H,W,C) uint8 and ``labels`` (N,) whole numbers."""
    try:
        with np.load(path) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; expected arrays images and labels in it") from None
    except UNREADABLE as error:
        raise StageError(f"{path}: expected an .npz with images and labels ({error})") from None
    if images.dtype != np.uint8 or images.ndim != 4:
        raise StageError(
            f"{path}: expected images (N,H,W,C) uint8, got {images.shape} {images.dtype}"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise StageError(f"{path}: expected labels (N,) integer, got {labels.shape} {labels.dtype}")
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return tensor, torch.from_numpy(labels.astype(np.int64)), str(path)


def read_folder(root: Path, section: Dataset) -> tuple[Tensor, Tensor, str]:
    """One folder a class, classes in alphabetical order, any image files Pillow can read."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(root))
        names = [ImageFolder(str(root.parent / split)).classes for split in SPLITS]
    except OSError as error:
        raise StageError(f"{root}: expected one folder of images a class ({error})") from None
    if names[0] != names[1] or len(names[0]) != section.classes:
        raise StageError(
            f"{root.parent}: expected the same {section.classes} class folders in train and test, "
            f"got {names[0]} and {names[1]}"
        )
    say(f"{root}: " + ", ".join(f"{label}={name}" for label, name in enumerate(names[0])))
    files = found.samples
    mode = "RGB" if section.channels == 3 else "L"
    size = (section.image_size, section.image_size)
    images = np.empty((len(files), section.channels, *size), np.uint8)
    with Track(f"read {root}", len(files), unit="images") as track:
        for i, (name, _) in enumerate(files):
            try:
                with Image.open(name) as image:
                    pixels = np.asarray(image.convert(mode))
            except (UnidentifiedImageError, OSError) as error:
                raise StageError(f"{name}: cannot be read as an image ({error})") from None
            if pixels.shape[:2] != size:
                raise StageError(f"{name}: expected {size} pixels, got {pixels.shape[:2]}")
            images[i] = pixels.reshape(*size, section.channels).transpose(2, 0, 1)
            track.advance()
    labels = torch.tensor([label for _, label in files])
    return torch.from_numpy(images), labels, str(root)
