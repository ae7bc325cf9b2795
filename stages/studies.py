"""The commands that look at what was trained and attacked, up to the report."""

from pathlib import Path
from typing import Annotated

import typer

from stages.console import say
from stages.files import KEPT_RECORDS, Paths, pretrained, reports
from stages.options import (
    DEFAULT_PARAMS,
    Checkpoint,
    ClassifierFile,
    ConvergentFile,
    Dataset,
    Device,
    EnergyFile,
    ImagesFile,
    MaxChains,
    NonconvergentFile,
    Out,
    ParamsFile,
    PGDRecord,
    TimeLimit,
    checked,
    place,
)
from stages.params import MODELS

app = typer.Typer()


@app.command()
def compare(
    dataset: Dataset,
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    convergent: ConvergentFile = None,
    nonconvergent: NonconvergentFile = None,
    pgd: PGDRecord = None,
    out: Out = None,
    device: Device = None,
    max_chains: MaxChains = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Compare convergent with non-convergent learning over the number of Langevin steps."""
    with checked(params_file) as params:
        params.dataset(dataset)
        from stages import compare as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            images=images or paths.images,
            classifier=classifier or paths.classifier(),
            models={
                "convergent": convergent or paths.model("ebm_convergent"),
                "nonconvergent": nonconvergent or paths.model("ebm_nonconvergent"),
            },
            pgd=pgd or paths.record("pgd"),
            out=out or place(paths, "compare", images, classifier, convergent, nonconvergent, pgd),
        )


@app.command()
def sweep(
    dataset: Dataset,
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    adversarial: Annotated[
        Path | None,
        typer.Option(help="Adversarially trained classifier; default classifier_adversarial."),
    ] = None,
    energy: EnergyFile = None,
    out: Out = None,
    device: Device = None,
    max_chains: MaxChains = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Attack over the radius in both norms, and over the replicas of attacker and defender."""
    with checked(params_file) as params:
        params.dataset(dataset)
        from stages import sweep as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            images=images or paths.images,
            classifiers={
                "natural": classifier or paths.classifier(),
                "adversarial": adversarial or paths.classifier("adversarial"),
            },
            energy=energy or paths.model("ebm_convergent"),
            out=out or place(paths, "sweep", images, classifier, adversarial, energy),
        )


@app.command()
def snapshots(
    dataset: Dataset,
    params_file: ParamsFile = DEFAULT_PARAMS,
    out: Out = None,
    device: Device = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Go on with the training's own chains for many steps, under the weights of each moment."""
    with checked(params_file) as params:
        params.dataset(dataset)
        from stages import snapshots as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, None, time_limit, checkpoint),
            {phase: paths.snapshots(f"ebm_{phase}") for phase in ("adam", *MODELS)},
            out or paths.record("snapshots"),
        )


@app.command()
def lyapunov(
    dataset: Dataset,
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    energy: EnergyFile = None,
    smooth: Annotated[
        Path | None, typer.Option(help="Smooth energy; default ebm_smooth_convergent.")
    ] = None,
    out: Out = None,
    device: Device = None,
    max_chains: MaxChains = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Measure the maximal Lyapunov exponent of the chain over the strength of its noise."""
    with checked(params_file) as params:
        params.dataset(dataset)
        from stages import lyapunov as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            images=images or paths.images,
            energies={
                "convergent": energy or paths.model("ebm_convergent"),
                "smooth_convergent": smooth or paths.model("ebm_smooth_convergent"),
            },
            out=out or place(paths, "lyapunov", images, energy, smooth),
        )


@app.command()
def fid(
    dataset: Dataset,
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    convergent: ConvergentFile = None,
    nonconvergent: NonconvergentFile = None,
    out: Out = None,
    device: Device = None,
    max_chains: MaxChains = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Measure the Frechet distance to the training images along chains that start from them."""
    with checked(params_file) as params:
        params.dataset(dataset)
        from stages import fid as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            images=images or paths.images,
            classifier=classifier or paths.classifier(),
            models={
                "convergent": convergent or paths.model("ebm_convergent"),
                "nonconvergent": nonconvergent or paths.model("ebm_nonconvergent"),
            },
            out=out or place(paths, "fid", images, classifier, convergent, nonconvergent),
        )


@app.command()
def inspect(
    dataset: Dataset,
    phase: Annotated[
        str, typer.Argument(help="A phase of train-ebm, such as convergent.")
    ] = "convergent",
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    energy: Annotated[
        Path | None, typer.Option(help="Energy weights; default those of the phase.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="State of its training, with the persistent chains; default beside it."),
    ] = None,
    out: Out = None,
    device: Device = None,
    max_chains: MaxChains = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Follow long chains under an energy: is it convergent?"""
    with checked(params_file) as params:
        params.dataset(dataset)
        from stages import inspect as stage
        from stages.hardware import Hardware

        paths, name = Paths(params.run, dataset), f"ebm_{phase}"
        weights = energy or paths.model(name)
        stage.run(
            params,
            dataset,
            phase,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            images=images or paths.images,
            energy=weights,
            state=state or weights.with_suffix(".state.pt"),
            out=out or place(paths, f"inspect_{phase}", images, energy, state),
        )


@app.command()
def diagnose(
    dataset: Dataset,
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    energy: EnergyFile = None,
    pgd: PGDRecord = None,
    out: Out = None,
    device: Device = None,
    max_chains: MaxChains = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Record the spread of the defense's logits over its replicas, and one image's whole way."""
    with checked(params_file) as params:
        params.dataset(dataset)
        from stages import diagnose as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            images=images or paths.images,
            classifier=classifier or paths.classifier(),
            energy=energy or paths.model("ebm_convergent"),
            pgd=pgd or paths.record("pgd"),
            out=out or place(paths, "diagnose", images, classifier, energy, pgd),
        )


@app.command()
def report(
    params_file: ParamsFile = DEFAULT_PARAMS,
    out: Annotated[Path | None, typer.Option(help="Folder; default reports/RUN.")] = None,
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
    with checked(params_file) as params:
        from stages import report as stage

        out = out or reports(params.run)
        kept = out / KEPT_RECORDS
        stage.run(params, out, kept=kept if keep or kept.is_dir() else None)
        say(f"report: {out}")


@app.command()
def publish(
    params_file: ParamsFile = DEFAULT_PARAMS,
    out: Annotated[Path | None, typer.Option(help="Folder; default pretrained/RUN.")] = None,
) -> None:
    """Put the trained energies where git keeps them, with a card that says what they are."""
    with checked(params_file) as params:
        from stages import publish as stage

        stage.run(params, out or pretrained(params.run))
