"""The command line: a command for each stage of the workflow; `stages.tools` has the others."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from stages import StageError
from stages.core import console, options
from stages.core.console import say
from stages.core.files import (
    CODE,
    KEPT_RECORDS,
    Paths,
    classifier_name,
    pretrained,
    reports,
    write_text,
)
from stages.core.options import (
    INPUTS,
    Anywhere,
    Checkpoint,
    ClassifierFile,
    Dataset,
    Device,
    EnergyFile,
    Given,
    ImagesFile,
    MaxChains,
    Out,
    ParamsFile,
    PGDRecord,
    Resume,
    TimeLimit,
    checked,
    located,
    mendable,
    place,
)
from stages.core.params import EVALUATED, MODELS, PGD_ATTACKS, TABLE_ATTACKS
from stages.custom import commands as custom
from stages.systems import commands as systems
from stages.tools import commands

app = typer.Typer(
    cls=Anywhere,
    help="Defend a trained image classifier with long-run Langevin sampling, and measure how "
    "robust it is. Each stage command is one stage of the workflow that `dvc repro` runs. The "
    "options below belong to every command that can use them, and may stand before or after it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def show_version(asked: bool) -> None:
    """The version of the installed package."""
    if asked:
        try:
            typer.echo(f"stochsec {version('stochsec')}")
        except PackageNotFoundError:
            typer.echo("stochsec, not installed: a checkout")
        raise typer.Exit


@app.callback()
def main(
    params_file: ParamsFile = Path("params.yaml"),
    device: Device = None,
    max_chains: MaxChains = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            envvar="STOCHSEC_VERBOSE",
            help="Print which implementation of the chain runs, and why.",
        ),
    ] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=show_version, help="Print the version."),
    ] = False,
) -> None:
    """Before any command."""
    console.verbose = verbose
    options.given = Given(params_file, device, max_chains, time_limit, checkpoint)


@app.command()
def check_params(out: Out = None) -> None:
    """Validate the parameters. The workflow runs this first: a wrong value deletes no results."""
    with checked() as params:
        if params.fid.features == "inception":
            from stages.fid import inception

            inception()  # hours before the stage that needs it
        write_text(out or Paths(params.run, "").checked, "valid\n")


@app.command()
def code(
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for a small file of each stage.")
    ] = CODE,
) -> None:
    """Write hashes of the code of each stage, so that DVC reruns only what an edit affects."""
    with mendable():
        from stages import code as stage

        stage.run(out)


@app.command()
def prepare_data(dataset: Dataset, out: Out = None) -> None:
    """Fetch or read the images of DATASET, check them, write them as one file."""
    with checked(dataset) as params:
        from stages import prepare_data as stage

        stage.run(params, dataset, out or Paths(params.run, dataset).images)


@app.command()
def train_classifier(
    dataset: Dataset,
    training: Annotated[
        str, typer.Argument(help="natural, or adversarial: the baseline of Tables 2 and 3.")
    ] = "natural",
    images: ImagesFile = None,
    out: Out = None,
) -> None:
    """Train the classifier to be defended, or the adversarially trained baseline. Resumes."""
    with checked(dataset) as params:
        from stages import train_classifier as stage

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            training,
            options.given.hardware(),
            images=images or paths.images,
            out=_weights(out, paths.classifier(training)),
            history=out.with_suffix(".csv") if out else paths.history(classifier_name(training)),
        )


@app.command()
def train_ebm(
    dataset: Dataset,
    phase: Annotated[
        str,
        typer.Argument(
            help="adam (phase 1), convergent (phase 2, SGD) or nonconvergent; smooth_adam, "
            "smooth_convergent."
        ),
    ],
    images: ImagesFile = None,
    start: Annotated[
        Path | None,
        typer.Option(help="State saved by the adam phase; default its .state.pt."),
    ] = None,
    out: Out = None,
) -> None:
    """Train the energy, Algorithm 2, one phase. Resumes after a kill."""
    with checked(dataset) as params:
        from stages import train_ebm as stage

        paths, name = Paths(params.run, dataset), f"ebm_{phase}"
        stage.run(
            params,
            dataset,
            phase,
            options.given.hardware(),
            images=images or paths.images,
            start=start or paths.state(f"ebm_{'smooth_' * phase.startswith('smooth_')}adam"),
            out=_weights(out, paths.model(name)),
            state_out=out.with_suffix(".state.pt") if out else paths.state(name),
            snapshots_out=_snapshots(paths, phase, out),
            history=out.with_suffix(".csv") if out else paths.history(name),
        )


def _weights(out: Path | None, usual: Path) -> Path:
    """Where trained weights go; the curve of their training goes beside them as .csv."""
    if out is not None and out.suffix == ".csv":
        raise StageError(f"{out}: expected another ending than .csv, which is that of the curve")
    return out or usual


def _snapshots(paths: Paths, phase: str, out: Path | None) -> Path | None:
    """Where a phase leaves its snapshots; those of the smooth energy are in no picture."""
    if phase.startswith("smooth_"):
        return None
    return out.with_suffix(".snapshots.safetensors") if out else paths.snapshots(f"ebm_{phase}")


@app.command()
def attack(
    dataset: Dataset,
    attack: Annotated[
        str,
        typer.Argument(
            help="pgd (on the bare classifier), pgd_adversarial (on the adversarially trained "
            "one), transfer_K_short or transfer_K (the images of pgd against the defense with "
            "K_short or K steps), bpda_eot (Algorithm 1), transfer (as "
            "transfer_K, on evaluate.images), or a name under evaluate.attacks in params.yaml."
        ),
    ],
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    energy: EnergyFile = None,
    pgd: PGDRecord = None,
    subset: Annotated[
        str | None,
        typer.Option(
            metavar="START:STOP", help="Attack these test images instead of the first ones."
        ),
    ] = None,
    out: Out = None,
    resume: Resume = True,
) -> None:
    """Attack the classifier or its defense on test images; print every accuracy and flag."""
    with checked(dataset) as params:
        limits = _limits(subset)
        own = attack not in TABLE_ATTACKS or any((images, classifier, energy, pgd, subset))
        from stages import attack as stage
        from stages.reporting import tables

        paths = Paths(params.run, dataset)
        classifier = classifier or paths.classifier(PGD_ATTACKS.get(attack, "natural"))
        result = stage.run(
            params,
            dataset,
            attack,
            options.given.hardware(),
            stage.Files(
                **located(paths, images=images, classifier=classifier, energy=energy, pgd=pgd)
            ),
            out or (paths.own(f"{attack}.safetensors") if own else paths.record(attack)),
            subset=limits,
            afresh=not resume,
        )
        tables.show_attacks([result], params.evaluate.draws)


def _limits(subset: str | None) -> tuple[int, int] | None:
    """START:STOP as numbers."""
    if subset is None:
        return None
    start, _, stop = subset.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise StageError(f"subset: expected START:STOP with START < STOP, got {subset!r}")
    return int(start), int(stop)


@app.command()
def evaluate(
    dataset: Dataset,
    name: Annotated[
        str, typer.Argument(metavar="ENERGY", help="convergent or smooth_convergent.")
    ] = "convergent",
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    energy: EnergyFile = None,
    pgd: PGDRecord = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for the records; default as dvc.yaml states."),
    ] = None,
    resume: Resume = True,
) -> None:
    """Run every attack under evaluate.attacks on the defense; print all accuracies and flags."""
    with checked(dataset) as params:
        if energy is None and name not in EVALUATED:
            raise StageError(f"energy: expected one of {list(EVALUATED)}, got {name!r}")
        own = any((images, classifier, energy, pgd))
        from stages import evaluate as stage
        from stages.attack import Files
        from stages.reporting import tables

        paths = Paths(params.run, dataset)
        weights = energy or paths.model(f"ebm_{name}")
        results = stage.run(
            params,
            dataset,
            options.given.hardware(),
            Files(**located(paths, images=images, classifier=classifier, energy=weights, pgd=pgd)),
            out or (paths.own(f"evaluate_{name}") if own else paths.evaluation(name)),
            afresh=not resume,
        )
        tables.show_attacks(results, params.evaluate.draws)


def study(name: str, *inputs: str, says: str) -> None:
    """A command for a stage that reads some of `INPUTS` and writes one record."""

    def command(dataset: str, out: Path | None, **files: Path | None) -> None:
        with checked(dataset) as params:
            paths, stage = Paths(params.run, dataset), import_module(f"stages.{name}")
            out = out or place(paths, name, *files.values())
            stage.run(params, dataset, options.given.hardware(), **located(paths, **files), out=out)

    def parameter(role: str, annotation: Any, default: object = None) -> Parameter:
        kind = Parameter.POSITIONAL_OR_KEYWORD
        return Parameter(role, kind, default=default, annotation=annotation)

    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            parameter("dataset", Dataset, Parameter.empty),
            *(parameter(role, Annotated[Path | None, INPUTS[role].option]) for role in inputs),
            parameter("out", Out),
        ]
    )
    app.command(name.replace("_", "-"), help=says)(command)


study(
    "active_test",
    *("images", "classifier", "energy"),
    says="Plant adversarial images that evaluate.active_test.attack has to find.",
)
study(
    "compare",
    *("images", "classifier", "convergent", "nonconvergent", "pgd"),
    says="Compare convergent with non-convergent learning over the number of Langevin steps.",
)
study(
    "sweep",
    *("images", "classifier", "adversarial", "energy"),
    says="Attack over the radius in both norms, and over the replicas of attacker and defender.",
)
study(
    "lyapunov",
    *("images", "energy", "smooth"),
    says="Measure the maximal Lyapunov exponent of the chain over the strength of its noise.",
)
study(
    "fid",
    *("images", "classifier", "convergent", "nonconvergent"),
    says="Measure the Frechet distance to the training images along chains that start from them.",
)
study(
    "diagnose",
    *("images", "classifier", "energy", "pgd"),
    says="Record the logits of the defense's replicas, and the path of one attacked image.",
)


@app.command()
def snapshots(dataset: Dataset, out: Out = None) -> None:
    """Continue the persistent chains of training for many steps, under each snapshot's weights."""
    with checked(dataset) as params:
        from stages import snapshots as stage

        paths = Paths(params.run, dataset)
        moments = {phase: paths.snapshots(f"ebm_{phase}") for phase in ("adam", *MODELS)}
        out = out or paths.record("snapshots")
        stage.run(params, dataset, options.given.hardware(), moments, out)


@app.command()
def inspect(
    dataset: Dataset,
    phase: Annotated[
        str, typer.Argument(help="A phase of train-ebm, such as convergent.")
    ] = "convergent",
    images: ImagesFile = None,
    energy: Annotated[
        Path | None, typer.Option(help="Energy weights; default those of the phase.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Training state with the persistent chains; default beside the energy."),
    ] = None,
    out: Out = None,
) -> None:
    """Follow long chains under an energy: is it convergent?"""
    with checked(dataset) as params:
        from stages import inspect as stage

        paths = Paths(params.run, dataset)
        weights = energy or paths.model(f"ebm_{phase}")
        stage.run(
            params,
            dataset,
            phase,
            options.given.hardware(),
            images=images or paths.images,
            energy=weights,
            state=state or weights.with_suffix(".state.pt"),
            out=out or place(paths, f"inspect_{phase}", images, energy, state),
        )


@app.command()
def report(
    dataset: Annotated[
        str | None,
        typer.Argument(
            help="Write only this dataset's rows of Tables 1-3, and Figure 4; the other studies "
            "are not needed."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder; default reports/RUN, of a dataset artifacts/RUN/tables."),
    ] = None,
    vector: Annotated[
        bool, typer.Option("--vector", help="Write every figure as an SVG, too.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Keep the records, without their images, in the folder `records` of the report. "
            "From then on the report can be made again where artifacts/ is gone.",
        ),
    ] = False,
) -> None:
    """Write Tables 1-3 and the figures from the records; print the tables."""
    with checked(dataset) as params:
        from stages import report as stage
        from stages.reporting import style

        style.vector = vector
        if dataset is not None:
            stage.first(params, dataset, out or Paths(params.run, dataset).tables)
            return
        out = out or reports(params.run)
        kept = out / KEPT_RECORDS
        stage.run(params, out, kept=kept if keep or kept.is_dir() else None)
        say(f"report: {out}")


@app.command()
def publish(
    out: Annotated[Path | None, typer.Option(help="Folder; default pretrained/RUN.")] = None,
) -> None:
    """Copy the trained networks into a folder that git tracks, with a model card."""
    with checked() as params:
        from stages import publish as stage

        stage.run(params, out or pretrained(params.run))


app.add_typer(custom.app)
app.add_typer(systems.app)
app.add_typer(commands.app)
