"""What the commands share: options, and how a command ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages import FAILED, TIME_IS_UP, TOO_SHORT, StageError, Stopped, WindowTooShort
from stages.console import say
from stages.files import Paths
from stages.params import Params, load_params

if TYPE_CHECKING:
    from stages.attack import Files

Dataset = Annotated[str, typer.Argument(help="A dataset named under `datasets` in params.yaml.")]
ParamsFile = Annotated[Path, typer.Option("--params", help="The parameters of the experiment.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:1; else $STOCHSEC_DEVICE, else a GPU if there is one."),
]
MaxChains = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Chains that advance together (memory); else $STOCHSEC_MAX_CHAINS, else 200 on a "
        "CPU and 4096 on a GPU.",
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        metavar="MINUTES",
        help="Stop after so long, all work kept, with exit status 75; the same command goes on. "
        "Else $STOCHSEC_TIME_LIMIT, else never.",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="Keep unfinished work in this one file too, to go on with it on another machine; "
        "read if it is there, written once a minute, deleted when the work is done.",
    ),
]
CodeFolder = Annotated[
    Path, typer.Option("--out", file_okay=False, help="Folder for a small file of each stage.")
]
ImagesFile = Annotated[
    Path | None,
    typer.Option("--images", help="Images; default artifacts/RUN/data/DATASET.npz."),
]
ClassifierFile = Annotated[
    Path | None,
    typer.Option(
        "--classifier",
        help="Classifier: weights of train-classifier, or any network as a .pt2 file of "
        "torch.export, from pixels in [0, 1] to logits; default "
        "artifacts/RUN/models/DATASET/classifier.",
    ),
]
EnergyFile = Annotated[
    Path | None,
    typer.Option(
        "--energy", help="Energy weights; default artifacts/RUN/models/DATASET/ebm_convergent."
    ),
]
ConvergentFile = Annotated[
    Path | None, typer.Option("--convergent", help="Energy of phase 2; default ebm_convergent.")
]
NonconvergentFile = Annotated[
    Path | None,
    typer.Option("--nonconvergent", help="Energy of the Adam branch; default ebm_nonconvergent."),
]
PGDRecord = Annotated[
    Path | None,
    typer.Option(
        "--pgd",
        help="Record of PGD on the bare classifier, whose images are judged; default "
        "artifacts/RUN/records/DATASET/pgd.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume", help="Go on with what the same command left when it was killed."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        dir_okay=False,
        help="Where to write; default as dvc.yaml states, or artifacts/RUN/own/DATASET for what is "
        "no part of the workflow. What else a stage writes goes beside it.",
    ),
]

DEFAULT_PARAMS = Path("params.yaml")


@contextmanager
def checked(params_file: Path) -> Iterator[Params]:
    """Validated parameters for a stage that ends as `mendable` says."""
    with mendable():
        yield load_params(params_file)


@contextmanager
def mendable() -> Iterator[None]:
    """One line and an exit status for whatever the user can mend."""
    try:
        yield
    except StageError as error:
        say(f"error: {error}")
        raise typer.Exit(TOO_SHORT if isinstance(error, WindowTooShort) else FAILED) from None
    except OSError as error:  # no space, no permission, a file where a folder is expected
        where = f"{error.filename}: " if error.filename else ""
        say(f"error: {where}{error.strerror or error}; what was finished before is kept")
        raise typer.Exit(FAILED) from None
    except Stopped as stop:
        say(str(stop))
        raise typer.Exit(TIME_IS_UP if stop.time_is_up else 130) from None


def attack_files(
    paths: Paths,
    images: Path | None,
    classifier: Path | None,
    energy: Path | None,
    pgd: Path | None,
    *,
    phase: str = "convergent",
    training: str = "natural",
) -> "Files":
    """What was given, and for the rest what the workflow has made."""
    from stages.attack import Files

    return Files(
        images=images or paths.images,
        classifier=classifier or paths.classifier(training),
        energy=energy or paths.model(f"ebm_{phase}"),
        pgd=pgd or paths.record("pgd"),
    )


def weights(given: Path | None, usual: Path) -> Path:
    """Where trained weights go; the curve of their training goes beside them as .csv."""
    if given is not None and given.suffix == ".csv":
        raise StageError(f"{given}: expected another ending than .csv, which is that of the curve")
    return given or usual


def place(paths: Paths, record: str, *given: Path | None) -> Path:
    """Where a record goes: that of the workflow, or beside it if it is of files that were given."""
    return paths.own(f"{record}.safetensors") if any(given) else paths.record(record)
