"""Where things are, and how a file is written: whole, then renamed. No torch here."""

import csv
import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages import StageError

ROOT = Path(__file__).parents[2]
"""The folder that holds both packages: a checkout, or where packages are installed."""

WORKFLOW = ROOT if (ROOT / "dvc.yaml").is_file() else ROOT / "stages/workflow"
"""Where dvc.yaml, presets/ and what belongs to them are; a wheel carries them inside (setup.py)."""

CODE = Path("artifacts/code")
"""The folder of `stochsec code`, a file for each stage."""

NETWORK_TIMES = Path("reports/bench/networks")
"""The folder of `stochsec bench-networks`, a file for each kind of device, kept in git."""


@dataclass(frozen=True)
class Paths:
    """Every file of one dataset in one run; dvc.yaml states the same names."""

    run: str
    dataset: str
    root: Path = Path()

    @property
    def checked(self) -> Path:
        """The mark that params.yaml is valid; every stage of the workflow waits for it."""
        return self.root / f"artifacts/{self.run}/params.checked"

    @property
    def images(self) -> Path:
        """Train and test images with labels."""
        return self.root / f"artifacts/{self.run}/data/{self.dataset}.npz"

    def classifier(self, training: str = "natural") -> Path:
        """Weights of the classifier with this ``training``: natural or adversarial."""
        return self.model(classifier_name(training))

    def model(self, name: str) -> Path:
        """Weights: classifier, or ebm_ and a phase."""
        return self.root / f"artifacts/{self.run}/models/{self.dataset}/{name}.safetensors"

    def state(self, name: str) -> Path:
        """The state of training (weights, optimizer, bank, generator) that a next phase needs."""
        return self.root / f"artifacts/{self.run}/models/{self.dataset}/{name}.state.pt"

    def snapshots(self, name: str) -> Path:
        """Weights and chains at some batches of a training, for the picture of it."""
        return (
            self.root / f"artifacts/{self.run}/models/{self.dataset}/{name}.snapshots.safetensors"
        )

    def record(self, name: str) -> Path:
        """What a stage measured, as tensors with a description."""
        return self.root / f"artifacts/{self.run}/records/{self.dataset}/{name}.safetensors"

    def evaluation(self, energy: str) -> Path:
        """The folder of all attacks on the defense with one energy, a record each."""
        return self.root / f"artifacts/{self.run}/records/{self.dataset}/evaluate_{energy}"

    def system(self, name: str) -> Path:
        """The folder of all attacks on another purification defense, a record each."""
        return self.root / f"artifacts/{self.run}/records/{self.dataset}/systems/{name}"

    @property
    def tables(self) -> Path:
        """The folder of Tables 1-3 and Figure 4 before the studies are there."""
        return self.root / f"artifacts/{self.run}/tables/{self.dataset}"

    def own(self, name: str) -> Path:
        """Where a record goes that is not the workflow's: of other files, images or attacks."""
        return self.root / f"artifacts/{self.run}/own/{self.dataset}/{name}"

    def history(self, name: str) -> Path:
        """The curve of a training run."""
        return self.root / f"artifacts/{self.run}/records/{self.dataset}/{name}.csv"


def classifier_name(training: str) -> str:
    """What the files of a classifier are called."""
    return "classifier" if training == "natural" else f"classifier_{training}"


PUBLISHED_INDEX = "index.json"
"""What a folder of published networks says of each of them, by the name of its file."""

KEPT_RECORDS = "records"
"""The folder of a report that keeps the records it was made of."""


def energy_name(weights: Path) -> str:
    """What a record calls an energy: the phase that it is named after."""
    return weights.stem.removeprefix("ebm_")


def reports(run: str) -> Path:
    """The folder of a run's tables and figures, kept in git."""
    return Path(f"reports/{run}")


def pretrained(run: str) -> Path:
    """The folder of a run's published energies, kept in git."""
    return Path(f"pretrained/{run}")


FULL = 2**16  # bytes; a write that fails with less free space is reported as a full disk


class Whole:
    """``with Whole(path) as partial:`` write to ``partial``; it becomes ``path`` at the end.

    A reader never sees half a file, and a failure leaves the old one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        if self.path.exists() and not self.path.is_file():
            raise StageError(f"{self.path}: expected a regular file")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.partial

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.partial.chmod(0o666 & ~umask())  # some libraries write files for their owner only
            self.partial.replace(self.path)
        else:
            left = shutil.disk_usage(self.path.parent).free
            self.partial.unlink(missing_ok=True)
            if left < FULL:  # libraries say it in many ways
                raise StageError(
                    f"{self.path}: no space left on its disk; what was finished before is kept"
                ) from None


def umask() -> int:
    """Permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


class WholeFolder:
    """``with WholeFolder(path, mark) as partial:`` the same for a folder: the new one or the old.

    The old folder is deleted with all that it holds. It must hold the file ``mark`` or be empty;
    `StageError` otherwise.
    """

    def __init__(self, path: Path, mark: str) -> None:
        self.path = path = path.resolve()
        refuse_foreign(path, mark)
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        for left in self.partial.parent.iterdir():
            if left.name.startswith(f".{self.path.name}.") and left.suffix == ".partial":
                shutil.rmtree(left)  # of a run that was killed
        self.partial.mkdir()
        return self.partial

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            old = self.partial.with_suffix(".old")
            if self.path.exists():
                self.path.rename(old)
            self.partial.rename(self.path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


def refuse_foreign(path: Path, mark: str) -> None:
    """`StageError` unless ``path`` is absent, empty, or a folder that holds the file ``mark``."""
    if path.exists() and not path.is_dir():
        raise StageError(f"{path}: expected a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / mark).exists():
        raise StageError(f"{path}: is not empty and has no {mark}, so nothing is written over it")


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with Whole(path) as partial:
        partial.write_text(text)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows under a header."""
    with Whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def minutes(time_limit: float | None) -> float:
    """The time limit of a command: what is given, else STOCHSEC_TIME_LIMIT, else none."""
    written = str(time_limit or os.environ.get("STOCHSEC_TIME_LIMIT") or math.inf)
    try:
        limit = float(written)
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise StageError(f"STOCHSEC_TIME_LIMIT: expected minutes > 0, got {written!r}")
    return limit


def source_files() -> list[Path]:
    """The modules of both packages."""
    return sorted(path for name in ("defense", "stages") for path in (ROOT / name).rglob("*.py"))


def visible(folder: Path, pattern: str) -> list[Path]:
    """The files under a folder that match, in order; neither hidden ones nor in hidden folders."""
    return [
        path
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]


def readable(path: Path) -> str:
    """The size of a file, or of all files in a folder, for a person."""
    files = path.rglob("*") if path.is_dir() else [path]
    size = float(sum(file.stat().st_size for file in files if file.is_file()))
    units = ("B", "kB", "MB", "GB", "TB")
    power = next((i for i in range(len(units)) if size < 1000 ** (i + 1)), len(units) - 1)
    return f"{size / 1000**power:.{0 if power == 0 else 1}f} {units[power]}"


def fingerprint(path: Path) -> str:
    """The first half of a file's sha256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def require(path: Path, made_by: str = "") -> None:
    """`StageError` for a file that is not there, with the command that makes it."""
    if not path.is_file():
        raise StageError(f"{path}: no such file" + (f"; {made_by} makes it" if made_by else ""))
