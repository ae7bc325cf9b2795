"""A classifier, an energy and images of somebody, as an experiment without a workflow."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from defense.inference import logits_in
from defense.nets.pretrained import load_energy
from defense.nets.programs import EXPORTED, SCRIPTED, EnergyProgram, Program, load_program
from defense.pixels import from_bytes
from defense.rng import make_generator
from stages import StageError
from stages.core import presets
from stages.core.artifacts import UNREADABLE, Images, about_of
from stages.core.build import Nets
from stages.core.classifiers import CONVERT, OURS
from stages.core.console import say
from stages.core.files import PUBLISHED_INDEX, require, write_text
from stages.core.hardware import Hardware
from stages.core.levels import unlike
from stages.core.params import Params, load_params, validate_params
from stages.prepare_data import everything, is_picture, read_picture, size_of, told

RUN, UNKNOWN = "custom", "images"
FAR_AS_THE_PAPER = 0.15  # K tau^2 of the paper's 1,500 steps of tau = 0.01
LOOKED_AT = 200  # images whose energies are compared with those of the energy's training


@dataclass(frozen=True)
class Pictures:
    """Images on disk, of which only those in use are in memory.

    ``read`` takes places and returns uint8 (n,C,H,W). ``labels`` (N,) is None if there are none;
    ``classes`` are their names. ``identity`` changes with the files.
    """

    names: list[str]
    labels: Tensor | None
    classes: list[str]
    identity: str
    read: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.names)

    def called(self, label: int) -> str:
        """The name of a class, or its number."""
        return self.classes[label] if label < len(self.classes) else str(label)

    def sample(self, count: int) -> Images:
        """At most ``count`` labelled images, drawn at random once and for ever."""
        if self.labels is None:
            raise StageError(
                "images: expected labels; give a folder with one folder a class, or an .npz with "
                "images and labels"
            )
        order = torch.randperm(len(self), generator=make_generator(0, "sample"))[:count]
        return Images(self.read(order.tolist()), self.labels[order], order)


@dataclass(frozen=True)
class About:
    """What the file of an energy says, and the index of the folder that it was published in.

    ``level`` is that of `stages.core.levels.level_of`; None if nobody measured it.
    """

    dataset: str
    shape: tuple[int, int, int]
    tau: float
    sigma: float | None
    steps: int
    denoise: bool
    level: list[float] | None


@dataclass(frozen=True)
class Given:
    """Somebody's files and the parameters for them."""

    params: Params
    hardware: Hardware
    pictures: Pictures
    classifier: Path
    energy: Path | None
    about: About | None

    @property
    def dataset(self) -> str:
        """What the parameters call the images: as the energy calls those of its training."""
        return self.params.datasets[0]

    @property
    def inputs(self) -> dict[str, Path]:
        """The networks' files, by role."""
        energy = {"energy": self.energy} if self.energy else {}
        return {"classifier": self.classifier, **energy}

    def nets(self) -> Nets:
        """Both networks; `StageError` without an energy."""
        if self.energy is None:
            raise StageError("energy: expected one; pretrained/ has some")
        return Nets.load(
            self.params, self.dataset, self.hardware, classifier=self.classifier, energy=self.energy
        )

    def say_unlike(self, nets: Nets) -> str | None:
        """One line if the energy was trained on other images than these."""
        if self.about is None or self.about.level is None:
            return None
        count = min(len(self.pictures), LOOKED_AT)
        spread = torch.linspace(0, len(self.pictures) - 1, count).long().tolist()
        pixels = from_bytes(self.pictures.read(spread)).to(self.hardware.device)
        found = unlike(nets.energy, self.about.level, pixels, self.about.tau)
        if found:
            say(f"FLAG: {self.energy}: {found}")
        return found


def set_up(
    classifier: Path,
    energy: Path | None,
    images: Path,
    hardware: Hardware,
    *,
    preset: str,
    changes: Sequence[str],
    out: Path,
) -> Given:
    """Look at somebody's files, and write ``out``/params.yaml for them.

    The parameters are those of a preset with the energy's tau, noise and chain, the shape of the
    images and as many classes as the classifier has, and ``changes`` (as "langevin.K=100").
    """
    require(classifier)
    about = described(energy) if energy else None
    shape = about.shape if about else first_shape(images)
    pictures = read_pictures(images, shape)
    classes = classes_of(classifier, shape)
    if pictures.classes and len(pictures.classes) != classes:
        say(
            f"{images}: {len(pictures.classes)} folders, and the classifier has {classes} classes: "
            "taken as images without labels"
        )
        pictures = replace(pictures, labels=None, classes=[])
    if pictures.labels is not None and int(pictures.labels.max()) >= classes:
        raise StageError(
            f"{images}: expected labels 0 to {classes - 1}, as the classifier has {classes} "
            f"classes, got {int(pictures.labels.max())}"
        )
    params = parameters(preset, changes, about, shape, classes, len(pictures), out / "params.yaml")
    return Given(params, hardware, pictures, classifier, energy, about)


def parameters(
    preset: str,
    changes: Sequence[str],
    about: About | None,
    shape: tuple[int, int, int],
    classes: int,
    count: int,
    path: Path,
) -> Params:
    """A preset for other images, written to ``path`` and read from there."""
    own = list[str]()
    if about:
        own = [f"langevin.K={about.steps}", f"langevin.denoise={str(about.denoise).lower()}"]
    text = presets.text(preset, [*own, *changes], unfinished=True)
    values: dict[str, Any] = yaml.safe_load(text)
    [section] = values["data"].values()
    channels, height, width = shape
    size = height if height == width else [height, width]
    section["shape"] = {"image_size": size, "channels": channels, "classes": classes}
    if about:
        section |= {"tau": about.tau, "data_noise": about.sigma or 0.0}
    name = about.dataset if about else UNKNOWN
    values |= {"run": RUN, "datasets": [name], "data": {name: section}, "compare_dataset": name}
    fewer(values, min(count, values["attack"]["pgd"]["images"]))
    validate_params(values, path)
    write_text(path, yaml.safe_dump(values, sort_keys=False))
    return load_params(path)


def fewer(section: dict[str, Any], count: int) -> None:
    """No attack or study on more images than there are, or than PGD attacks; the FID is not run."""
    for name, value in section.items():
        if isinstance(value, dict) and name != "fid":
            fewer(value, count)
        elif name in ("images", "chains"):
            section[name] = min(value, count)


def described(path: Path) -> About:
    """What is known of an energy; `StageError` if the file is none."""
    require(path)
    try:
        if path.suffix == EXPORTED:
            program = load_program(path, EnergyProgram)
            shape, tau, sigma, dataset = program.shape, program.tau, program.sigma, UNKNOWN
        else:
            network, tau = load_energy(path)
            shape, sigma = network.shape, network.sigma
            dataset = about_of(path).get("dataset", UNKNOWN)
    except ValueError as error:
        raise StageError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    index = path.parent / PUBLISHED_INDEX
    entry = json.loads(index.read_text()).get(path.stem, {}) if index.is_file() else {}
    if entry.get("tau") != tau:  # of another file with that name
        entry = {}
    steps = int(entry.get("K", max(1, round(FAR_AS_THE_PAPER / tau**2))))
    denoise = bool(entry.get("denoise", bool(sigma)))
    return About(dataset, shape, tau, sigma, steps, denoise, entry.get("level"))


def classes_of(path: Path, shape: tuple[int, int, int]) -> int:
    """How many classes a classifier tells apart."""
    if path.suffix == OURS:
        return int(about_of(path).get("architecture", {}).get("classes", 0))
    if path.suffix not in (EXPORTED, SCRIPTED):
        raise StageError(f"{path}: expected {OURS}, {EXPORTED} or {SCRIPTED}; {CONVERT}")
    try:
        with torch.no_grad():
            logits = logits_in(load_program(path, Program)(torch.rand(2, *shape)))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StageError(
            f"{path}: does not take images {shape}, as the energy or the first image is: {reason}"
        ) from None
    return int(logits.shape[1])


# Images


def read_pictures(path: Path, shape: tuple[int, int, int]) -> Pictures:
    """A picture, a folder of them (of classes, or of train and test), or an .npz.

    An .npz has ``images`` (N,H,W,C) uint8 and perhaps ``labels`` (N,), or is one of
    `stochsec prepare-data`, of which the test images are taken.
    """
    if path.suffix == ".npz":
        return of_arrays(path, shape)
    if path.is_dir() and (path / "test").is_dir():
        path = path / "test"
    files, labels, classes = listed(path)
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def read(places: Sequence[int]) -> Tensor:
        found = []
        for place in places:
            picture = read_picture(files[place], shape, [], [])
            if picture is None:
                raise StageError(f"{files[place]}: is no image")
            found.append(torch.from_numpy(picture.copy()))  # Pillow's is read-only
        return torch.stack(found)

    base = path if path.is_dir() else path.parent
    names = [str(file.relative_to(base)) for file in files]
    return Pictures(names, labels, classes, hashed(stats), read)


def listed(path: Path) -> tuple[list[Path], Tensor | None, list[str]]:
    """The image files under a path, and their labels if it has a folder for each class."""
    if path.is_file():
        return [path], None, []
    if not path.is_dir():
        raise StageError(f"{path}: no such file or folder")
    every = everything(path)
    files = [file for file in every if is_picture(file) and not hidden(file, path)]
    told(f"{path}: other files, left out", sorted(set(every) - set(files)))
    if not files:
        raise StageError(f"{path}: no images in it")
    parts = [file.relative_to(path).parts for file in files]
    if not all(len(part) > 1 for part in parts):
        return files, None, []
    classes = sorted({part[0] for part in parts})
    say(f"{path}: " + ", ".join(f"{label}={name}" for label, name in enumerate(classes)))
    return files, torch.tensor([classes.index(part[0]) for part in parts]), classes


def hidden(file: Path, root: Path) -> bool:
    """Whether a file or a folder that it lies in is hidden."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def of_arrays(path: Path, shape: tuple[int, int, int]) -> Pictures:
    """The arrays of an .npz, read once."""
    require(path)
    try:
        with np.load(path) as arrays:
            if "test_images" in arrays:
                images, labels = arrays["test_images"], arrays["test_labels"]
            else:
                images = arrays["images"].transpose(0, 3, 1, 2)
                labels = arrays.get("labels")
    except UNREADABLE as error:
        raise StageError(
            f"{path}: expected an .npz with images (N,H,W,C) and labels ({error})"
        ) from None
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise StageError(
            f"{path}: expected images uint8 of (channels, height, width) = {shape}, got "
            f"{images.dtype} {images.shape[1:]}"
        )
    if labels is not None and (labels.shape != (len(images),) or labels.min() < 0):
        raise StageError(f"{path}: expected labels ({len(images)},) >= 0, got {labels.shape}")
    stat = path.stat()

    def read(places: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(images[list(places)]))

    return Pictures(
        [str(place) for place in range(len(images))],
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        [],
        hashed([(str(path), stat.st_size, stat.st_mtime_ns)]),
        read,
    )


def first_shape(path: Path) -> tuple[int, int, int]:
    """(channels, height, width) of the first image."""
    if path.suffix == ".npz":
        require(path)
        try:
            with np.load(path) as arrays:
                if "test_images" in arrays:
                    return tuple(arrays["test_images"].shape[1:])
                _, height, width, channels = arrays["images"].shape
                return channels, height, width
        except UNREADABLE as error:
            raise StageError(
                f"{path}: expected an .npz with images (N,H,W,C) and labels ({error})"
            ) from None
    files, _, _ = listed(path / "test" if (path / "test").is_dir() else path)
    return size_of(files[0])


def hashed(stats: list[tuple[str, int, int]]) -> str:
    """A hash of names, sizes and times of files."""
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()
