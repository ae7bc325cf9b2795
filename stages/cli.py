"""The command line: one command per stage, with every path it reads and writes as an option.

Here are data, training and attacks; `stages.studies` has what looks at their results.
"""

from pathlib import Path
from typing import Annotated

import typer

from stages import StageError, console, studies, tools
from stages.files import CODE, Paths, classifier_name, write_text
from stages.options import (
    DEFAULT_PARAMS,
    Checkpoint,
    ClassifierFile,
    CodeFolder,
    Dataset,
    Device,
    EnergyFile,
    ImagesFile,
    MaxChains,
    Out,
    ParamsFile,
    PGDRecord,
    Resume,
    TimeLimit,
    attack_files,
    checked,
    mendable,
    place,
    weights,
)
from stages.params import EVALUATED, PGD_ATTACKS, TABLE_ATTACKS

app = typer.Typer(
    help="Secure a trained image classifier with long-run Langevin sampling, and measure how "
    "robust it is. Each stage command is one stage of the workflow that `dvc repro` runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", envvar="STOCHSEC_VERBOSE", help="Say which engine runs, and why."
        ),
    ] = False,
) -> None:
    """Before any command."""
    console.verbose = verbose


@app.command()
def check_params(params_file: ParamsFile = DEFAULT_PARAMS, out: Out = None) -> None:
    """Validate the parameters; the workflow begins with it, so a wrong value costs no result."""
    with checked(params_file) as params:
        if params.fid.features == "inception":
            from stages.fid import inception

            inception()  # hours before the stage that needs it
        write_text(out or Paths(params.run, "").checked, "valid\n")


@app.command()
def code(out: CodeFolder = CODE) -> None:
    """Write down the code that each stage runs, for DVC to see what an edit changes."""
    with mendable():
        from stages import code as stage

        stage.run(out)


@app.command()
def prepare_data(
    dataset: Dataset, params_file: ParamsFile = DEFAULT_PARAMS, out: Out = None
) -> None:
    """Fetch or read the images of DATASET, check them, write them as one file."""
    with checked(params_file) as params:
        params.dataset(dataset)
        from stages import prepare_data as stage

        stage.run(params, dataset, out or Paths(params.run, dataset).images)


@app.command()
def train_classifier(
    dataset: Dataset,
    training: Annotated[
        str, typer.Argument(help="natural, or adversarial: the baseline of Tables 2 and 3.")
    ] = "natural",
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    out: Out = None,
    device: Device = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Train the classifier that is to be secured, or its baseline. Resumes after a kill."""
    with checked(params_file) as params:
        params.dataset(dataset)
        from stages import train_classifier as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            training,
            Hardware.choose(device, None, time_limit, checkpoint),
            images=images or paths.images,
            out=weights(out, paths.classifier(training)),
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
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    start: Annotated[
        Path | None, typer.Option(help="State that the adam phase left; default its .state.pt.")
    ] = None,
    out: Out = None,
    device: Device = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Train the energy, Algorithm 2, one phase. Resumes after a kill."""
    with checked(params_file) as params:
        params.dataset(dataset)
        from stages import train_ebm as stage
        from stages.hardware import Hardware

        paths, name = Paths(params.run, dataset), f"ebm_{phase}"
        stage.run(
            params,
            dataset,
            phase,
            Hardware.choose(device, None, time_limit, checkpoint),
            images=images or paths.images,
            start=start or paths.state(f"ebm_{'smooth_' * phase.startswith('smooth_')}adam"),
            out=weights(out, paths.model(name)),
            state_out=out.with_suffix(".state.pt") if out else paths.state(name),
            snapshots_out=_snapshots(paths, phase, out),
            history=out.with_suffix(".csv") if out else paths.history(name),
        )


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
            "one), transfer_K_short, transfer_K (its images against "
            "the defense with that many steps), bpda_eot (Algorithm 1), transfer, or a name "
            "under evaluate.attacks in params.yaml."
        ),
    ],
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    energy: EnergyFile = None,
    pgd: PGDRecord = None,
    subset: Annotated[
        str | None,
        typer.Option(
            metavar="START:STOP", help="These of the test images, in place of the first ones."
        ),
    ] = None,
    out: Out = None,
    resume: Resume = True,
    device: Device = None,
    max_chains: MaxChains = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Attack the classifier or its defense on test images; print every accuracy and flag."""
    with checked(params_file) as params:
        params.dataset(dataset)
        limits = _limits(subset)
        own = attack not in TABLE_ATTACKS or any((images, classifier, energy, pgd, subset))
        from stages import attack as stage, tables
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        result = stage.run(
            params,
            dataset,
            attack,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            attack_files(
                paths, images, classifier, energy, pgd, training=PGD_ATTACKS.get(attack, "natural")
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
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    energy: EnergyFile = None,
    pgd: PGDRecord = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for the records; default as dvc.yaml states."),
    ] = None,
    resume: Resume = True,
    device: Device = None,
    max_chains: MaxChains = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Run every attack under evaluate.attacks on the defense; print all accuracies and flags."""
    with checked(params_file) as params:
        params.dataset(dataset)
        if energy is None and name not in EVALUATED:
            raise StageError(f"energy: expected one of {list(EVALUATED)}, got {name!r}")
        own = any((images, classifier, energy, pgd))
        from stages import evaluate as stage, tables
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        results = stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            attack_files(paths, images, classifier, energy, pgd, phase=name),
            out or (paths.own(f"evaluate_{name}") if own else paths.evaluation(name)),
            afresh=not resume,
        )
        tables.show_attacks(results, params.evaluate.draws)


@app.command()
def active_test(
    dataset: Dataset,
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    energy: EnergyFile = None,
    out: Out = None,
    device: Device = None,
    max_chains: MaxChains = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Plant adversarial images that evaluate.active_test.attack has to find."""
    with checked(params_file) as params:
        params.dataset(dataset)
        from stages import active_test as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            attack_files(paths, images, classifier, energy, None),
            out or place(paths, "active_test", images, classifier, energy),
        )


app.add_typer(studies.app)
app.add_typer(tools.app)
