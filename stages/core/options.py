"""What the commands share: the options of all of them, and how a command ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from stages import FAILED, TIME_IS_UP, TOO_SHORT, StageError, Stopped, WindowTooShort
from stages.core.console import say
from stages.core.files import Paths
from stages.core.params import Params, load_params

if TYPE_CHECKING:
    from stages.core.hardware import Hardware

ParamsFile = Annotated[Path, typer.Option("--params", help="The parameters of the experiment.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:1; else $STOCHSEC_DEVICE, else a GPU if there is one."),
]
MaxChains = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Chains that run together (limits memory); else $STOCHSEC_MAX_CHAINS, else 200 on a "
        "CPU and 4096 on a GPU.",
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        metavar="MINUTES",
        help="Stop after this time with exit status 75 and keep all work; the same command then "
        "continues it. Default: $STOCHSEC_TIME_LIMIT, else no limit.",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="Also keep unfinished work in this file, to resume on another machine; "
        "read if it exists, written once a minute, deleted when the work is done.",
    ),
]


@dataclass(frozen=True)
class Given:
    """The options that every command has."""

    params_file: Path = Path("params.yaml")
    device: str | None = None
    max_chains: int | None = None
    time_limit: float | None = None
    checkpoint: Path | None = None

    def hardware(self) -> "Hardware":
        """Where a command computes, and for how long."""
        from stages.core.hardware import Hardware

        return Hardware.choose(self.device, self.max_chains, self.time_limit, self.checkpoint)


given = Given()
"""The options of the current command, set before it runs."""


class Anywhere(TyperGroup):
    """Commands whose common options may stand before or after the name of the command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Bring these options to the front."""
        options: list[Any] = self.get_params(ctx)
        takes_value = {name: not option.is_flag for option in options for name in option.opts}
        del takes_value["--help"]  # which is of the command that it follows
        front, rest = list[str](), list[str]()
        words = iter(args)
        for word in words:
            name, equals, _ = word.partition("=")
            if word == "--":
                rest += [word, *words]
            elif name in takes_value:
                front.append(word)
                if takes_value[name] and not equals:
                    value = next(words, None)
                    if value is None:
                        raise typer.BadParameter("expected a value", param_hint=name)
                    front.append(value)
            else:
                rest.append(word)
        return super().parse_args(ctx, front + rest)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command, whose help says where these options are."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            command.epilog = "`stochsec --help` lists the options of all commands."
        return command


Dataset = Annotated[str, typer.Argument(help="A dataset named under `datasets` in params.yaml.")]
Resume = Annotated[
    bool,
    typer.Option("--resume/--no-resume", help="Resume unfinished work of the same command."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        dir_okay=False,
        help="Where to write. Default: the path in dvc.yaml, or artifacts/RUN/own/DATASET for "
        "results outside the workflow. Other outputs of a stage go beside it.",
    ),
]


@dataclass(frozen=True)
class Input:
    """A file that commands read: what it is, and where the workflow has it."""

    says: str
    usual: Callable[[Paths], Path]

    @property
    def option(self) -> Any:
        """The command-line option for this file; its name is that of the command's parameter."""
        return typer.Option(help=self.says)


INPUTS = {
    "images": Input("Images; default artifacts/RUN/data/DATASET.npz.", lambda at: at.images),
    "classifier": Input(
        "Classifier: weights of train-classifier, or any network as a .pt2 file of torch.export, "
        "from pixels in [0, 1] to logits; default artifacts/RUN/models/DATASET/classifier.",
        lambda at: at.classifier(),
    ),
    "adversarial": Input(
        "Adversarially trained classifier; default classifier_adversarial.",
        lambda at: at.classifier("adversarial"),
    ),
    "energy": Input(
        "Energy weights; default artifacts/RUN/models/DATASET/ebm_convergent.",
        lambda at: at.model("ebm_convergent"),
    ),
    "convergent": Input(
        "Energy of phase 2; default ebm_convergent.", lambda at: at.model("ebm_convergent")
    ),
    "nonconvergent": Input(
        "Energy of the Adam branch; default ebm_nonconvergent.",
        lambda at: at.model("ebm_nonconvergent"),
    ),
    "smooth": Input(
        "Smooth energy; default ebm_smooth_convergent.",
        lambda at: at.model("ebm_smooth_convergent"),
    ),
    "pgd": Input(
        "Record of PGD on the bare classifier, whose images are judged; default "
        "artifacts/RUN/records/DATASET/pgd.",
        lambda at: at.record("pgd"),
    ),
}
ImagesFile = Annotated[Path | None, INPUTS["images"].option]
ClassifierFile = Annotated[Path | None, INPUTS["classifier"].option]
EnergyFile = Annotated[Path | None, INPUTS["energy"].option]
PGDRecord = Annotated[Path | None, INPUTS["pgd"].option]


def located(paths: Paths, **given: Path | None) -> dict[str, Path]:
    """The files that were given, by their names in `INPUTS`; of the rest, those of the workflow."""
    return {role: path or INPUTS[role].usual(paths) for role, path in given.items()}


def place(paths: Paths, record: str, *given: Path | None) -> Path:
    """Where a record goes: that of the workflow, or beside it if it is of files that were given."""
    return paths.own(f"{record}.safetensors") if any(given) else paths.record(record)


@contextmanager
def checked(dataset: str | None = None) -> Iterator[Params]:
    """Load and validate the parameters, check the dataset, and handle errors as `mendable` does."""
    with mendable():
        params = load_params(given.params_file)
        if dataset is not None:
            params.dataset(dataset)
        yield params


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
