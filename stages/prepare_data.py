"""Stage 1: images from a source into one file, checked, in a fixed random order.

The order depends on the images alone: what is not embedded is sorted by the sha256 of its pixels
before it is shuffled, so that "the first 1,000 test images" are the same for everybody, whatever
order their copy of a dataset came in.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from defense.rng import make_generator
from stages import StageError
from stages.core.artifacts import UNREADABLE, Images, check, save_images
from stages.core.console import Track, say
from stages.core.params import Dataset, Params

SPLITS = ("train", "test")
SHOWN = 5  # files that a message names
FULL_RANGE = 2**14  # if no 16-bit file reaches this value, they hold fewer than 16 bits


def run(params: Params, dataset: str, out: Path) -> None:
    """Read, check, shuffle and write both splits of a dataset."""
    section = params.dataset(dataset)
    root = where(section.path or f"data/{dataset}")
    parts: dict[str, Images] = {}
    for split in SPLITS:
        images, labels, origin = read_split(section, dataset, root, split)
        check(images, labels, section, origin)
        if lacking := sorted(set(range(section.shape.classes)) - set(labels.tolist())):
            say(f"{origin}: has no images of class {', '.join(map(str, lacking))}")
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


def where(path: str) -> Path:
    """Resolve a path of params.yaml, also within a temporary experiment of DVC.

    DVC runs such an experiment in a copy of the files that git tracks. Data that is missing there
    is read from the repository, $DVC_ROOT.
    """
    here, there = Path(path), Path(os.environ.get("DVC_ROOT", ".")) / path
    return there if there.exists() and not here.exists() else here


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
    """One folder a class, classes in alphabetical order; files of any kind that Pillow reads.

    File types are detected from the content, not the name. Files that are no images are left out
    and listed. `StageError` names an image that is not a plain picture of 8 or 16 bits per value;
    see `read_picture`.
    """
    names = class_names(root, section)
    say(f"{root}: " + ", ".join(f"{label}={name}" for label, name in enumerate(names)))
    files, left_out = list[tuple[Path, int]](), list[Path]()
    for path in everything(root):
        name, *inner = path.relative_to(root).parts
        if name in names and inner and not any(part.startswith(".") for part in inner):
            files.append((path, names.index(name)))
        else:
            left_out.append(path)
    images, labels = list[np.ndarray[Any, Any]](), list[int]()
    animated, deep = list[Path](), list[int]()
    with Track(f"read {root}", len(files), unit="files") as track:
        for path, label in files:
            picture = read_picture(path, section.shape.image, animated, deep)
            if picture is None:
                left_out.append(path)
            else:
                images.append(picture)
                labels.append(label)
            track.advance()
    told(f"{root}: files that are no images, hidden or in no class folder, left out", left_out)
    told(f"{root}: files of several frames, of which the first was taken", animated)
    if deep and max(deep) < FULL_RANGE:
        raise StageError(
            f"{root}: the largest value in {len(deep)} 16-bit files is {max(deep)}, so they hold "
            "fewer bits and would come out dark; scale them to 0..65535, or store 8 bits"
        )
    for label, name in enumerate(names):
        if label not in labels:
            raise StageError(f"{root / name}: expected images in it, found none")
    return torch.from_numpy(np.stack(images)), torch.tensor(labels), str(root)


def class_names(root: Path, section: Dataset) -> list[str]:
    """The class folders of a split, the same in both splits, in alphabetical order."""
    found: dict[Path, list[str]] = {}
    for folder in (root, *(root.parent / split for split in SPLITS)):
        try:
            there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        except OSError as error:
            raise StageError(
                f"{folder}: expected one folder of images a class ({error.strerror})"
            ) from None
        found[folder] = [name for name in there if not name.startswith(".")]
    every = sorted(set().union(*found.values()))
    for folder, names in found.items():
        if len(names) != section.shape.classes or names != every:
            lacking = ", ".join(sorted(set(every) - set(names)))
            raise StageError(
                f"{folder}: expected the same {section.shape.classes} class folders in train and "
                f"test, found {names}" + (f", which lack {lacking}" if lacking else "")
            )
    return every


def everything(root: Path) -> list[Path]:
    """All files in a folder and its subfolders, sorted.

    Links are followed; broken links are listed, too.
    """
    found = list[Path]()
    for folder, inner, names in os.walk(root, followlinks=True):
        here = Path(folder)
        if any(parent.resolve() == here.resolve() for parent in here.parents):
            inner.clear()  # a link to a folder that it lies in
        else:
            found += [here / name for name in names]
    return sorted(found)


def is_picture(path: Path) -> bool:
    """Whether a file has the suffix of an image that Pillow reads."""
    Image.init()
    return path.suffix.lower() in Image.registered_extensions()


def size_of(path: Path) -> tuple[int, int, int]:
    """(channels, height, width) of an image file, as `read_picture` would read it."""
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged or hostile file raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise StageError(f"{path}: cannot be read as an image ({reason})") from None
    gray = picture.mode in ("1", "L", "F") or picture.mode.startswith("I")
    return 1 if gray else 3, picture.height, picture.width


def read_picture(
    path: Path, shape: tuple[int, int, int], animated: list[Path], deep: list[int]
) -> np.ndarray[Any, Any] | None:
    """Read an image file, rotated by its EXIF tag, as uint8 (C,H,W); None if it is no image.

    ``shape`` is (C,H,W). 16 bits per value are scaled to 8. `StageError` for an unreadable file
    with the suffix of an image, another size, transparent pixels, and values that are floats or
    outside 0..65535. Files of several frames are appended to ``animated``, the largest value of
    16-bit files to ``deep``.
    """
    if path.exists() and not path.is_file():
        return None
    try:
        pixels = opened(path, shape, animated, deep)
    except StageError:
        raise
    except Exception as error:  # a damaged or hostile file raises many kinds
        if is_picture(path):
            reason = " ".join(str(error).split())[:200]
            raise StageError(f"{path}: cannot be read as an image ({reason})") from None
        return None
    channels, *size = shape
    if list(pixels.shape[:2]) != size:
        raise StageError(f"{path}: expected {tuple(size)} pixels, got {pixels.shape[:2]}")
    return pixels.reshape(*size, channels).transpose(2, 0, 1)


def opened(
    path: Path, shape: tuple[int, int, int], animated: list[Path], deep: list[int]
) -> np.ndarray[Any, Any]:
    """What `read_picture` reads, of any size: uint8 (H,W) or (H,W,3)."""
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            animated.append(path)
        picture = ImageOps.exif_transpose(image)
        picture.load()
    wide = picture.mode == "F" or picture.mode.startswith("I")
    if picture.has_transparency_data:
        if wide or np.asarray(picture.convert("RGBA").getchannel("A")).min() < 255:
            raise StageError(
                f"{path}: has transparent pixels; put it on a background of your choice first"
            )
        picture = picture.convert("RGBA").convert("RGB")
    if wide:
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise StageError(
                f"{path}: expected 8 or 16 bits a value, got {values.dtype} from "
                f"{values.min():g} to {values.max():g}"
            )
        deep.append(int(values.max()))
        picture = Image.fromarray(np.round(values / 257.0).astype(np.uint8))
    return np.asarray(picture.convert("RGB" if shape[0] == 3 else "L"))


def told(what: str, paths: list[Path]) -> None:
    """Say how many files something is true of, and which."""
    if paths:
        shown = ", ".join(map(str, paths[:SHOWN])) + (", ..." if len(paths) > SHOWN else "")
        say(f"{what}: {len(paths)}: {shown}")
