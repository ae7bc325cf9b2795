"""The command line: one command per stage, with every path it reads and writes as an option."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages import (
    FAILED,
    TIME_IS_UP,
    TOO_SHORT,
    StageError,
    Stopped,
    WindowTooShort,
    console,
    presets,
)
from stages.console import say
from stages.files import Paths, pretrained, reports, write_text
from stages.params import EVALUATED, TABLE_ATTACKS, Params, load_params

if TYPE_CHECKING:
    from stages.attack import Files

app = typer.Typer(
    help="Secure a trained image classifier with long-run Langevin sampling, and measure how "
    "robust it is. Each stage command is one stage of the workflow that `dvc repro` runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
def _stage(params_file: Path) -> Iterator[Params]:
    """Validated parameters for a stage that ends as `_mendable` says."""
    with _mendable():
        yield load_params(params_file)


@contextmanager
def _mendable() -> Iterator[None]:
    """One line and an exit status for whatever the user can mend."""
    try:
        yield
    except StageError as error:
        say(f"error: {error}")
        raise typer.Exit(TOO_SHORT if isinstance(error, WindowTooShort) else FAILED) from None
    except Stopped as stop:
        say(str(stop))
        raise typer.Exit(TIME_IS_UP if stop.time_is_up else 130) from None


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
    with _stage(params_file) as params:
        write_text(out or Paths(params.run, "").checked, "valid\n")


@app.command()
def prepare_data(
    dataset: Dataset, params_file: ParamsFile = DEFAULT_PARAMS, out: Out = None
) -> None:
    """Fetch or read the images of DATASET, check them, write them as one file."""
    with _stage(params_file) as params:
        params.dataset(dataset)
        from stages import prepare_data as stage

        stage.run(params, dataset, out or Paths(params.run, dataset).images)


@app.command()
def train_classifier(
    dataset: Dataset,
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    out: Out = None,
    device: Device = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Train the classifier that is to be secured, naturally. Resumes after a kill."""
    with _stage(params_file) as params:
        params.dataset(dataset)
        from stages import train_classifier as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, None, time_limit, checkpoint),
            images=images or paths.images,
            out=out or paths.model("classifier"),
            history=out.with_suffix(".csv") if out else paths.history("classifier"),
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
    with _stage(params_file) as params:
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
            out=out or paths.model(name),
            state_out=out.with_suffix(".state.pt") if out else paths.state(name),
            history=out.with_suffix(".csv") if out else paths.history(name),
        )


@app.command()
def attack(
    dataset: Dataset,
    attack: Annotated[
        str,
        typer.Argument(
            help="pgd (on the bare classifier), transfer_K_short, transfer_K (its images against "
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
    with _stage(params_file) as params:
        params.dataset(dataset)
        limits = _limits(subset)
        own = attack not in TABLE_ATTACKS or any((images, classifier, energy, pgd, subset))
        from stages import attack as stage
        from stages import tables
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        result = stage.run(
            params,
            dataset,
            attack,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            _files(paths, images, classifier, energy, pgd),
            out or (paths.own(f"{attack}.safetensors") if own else paths.record(attack)),
            subset=limits,
            afresh=not resume,
        )
        tables.show_attacks([result], params.evaluate.draws)


def _files(
    paths: Paths,
    images: Path | None,
    classifier: Path | None,
    energy: Path | None,
    pgd: Path | None,
    phase: str = "convergent",
) -> "Files":
    """What was given, and for the rest what the workflow has made."""
    from stages.attack import Files

    return Files(
        images=images or paths.images,
        classifier=classifier or paths.model("classifier"),
        energy=energy or paths.model(f"ebm_{phase}"),
        pgd=pgd or paths.record("pgd"),
    )


def _limits(subset: str | None) -> tuple[int, int] | None:
    """START:STOP as numbers."""
    if subset is None:
        return None
    start, _, stop = subset.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
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
    with _stage(params_file) as params:
        params.dataset(dataset)
        if energy is None and name not in EVALUATED:
            raise StageError(f"energy: expected one of {list(EVALUATED)}, got {name!r}")
        own = any((images, classifier, energy, pgd))
        from stages import evaluate as stage
        from stages import tables
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        results = stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            _files(paths, images, classifier, energy, pgd, phase=name),
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
    with _stage(params_file) as params:
        params.dataset(dataset)
        own = any((images, classifier, energy))
        from stages import active_test as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            _files(paths, images, classifier, energy, None),
            out or (paths.own("active_test.safetensors") if own else paths.record("active_test")),
        )


@app.command()
def compare(
    dataset: Dataset,
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    convergent: Annotated[
        Path | None, typer.Option(help="Energy of phase 2; default ebm_convergent.")
    ] = None,
    nonconvergent: Annotated[
        Path | None, typer.Option(help="Energy of the Adam branch; default ebm_nonconvergent.")
    ] = None,
    pgd: PGDRecord = None,
    out: Out = None,
    device: Device = None,
    max_chains: MaxChains = None,
    time_limit: TimeLimit = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Compare convergent with non-convergent learning over the number of Langevin steps."""
    with _stage(params_file) as params:
        params.dataset(dataset)
        from stages import compare as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            images=images or paths.images,
            classifier=classifier or paths.model("classifier"),
            models={
                "convergent": convergent or paths.model("ebm_convergent"),
                "nonconvergent": nonconvergent or paths.model("ebm_nonconvergent"),
            },
            pgd=pgd or paths.record("pgd"),
            out=out or paths.record("compare"),
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
    with _stage(params_file) as params:
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
            out=out or paths.record(f"inspect_{phase}"),
        )


@app.command()
def diagnose(
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
    """Record the spread of the defense's logits over its replicas."""
    with _stage(params_file) as params:
        params.dataset(dataset)
        from stages import diagnose as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains, time_limit, checkpoint),
            images=images or paths.images,
            classifier=classifier or paths.model("classifier"),
            energy=energy or paths.model("ebm_convergent"),
            out=out or paths.record("diagnose"),
        )


@app.command()
def bench(
    json_path: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Another copy of the numbers.")
    ] = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for numbers, table and plot.")
    ] = Path("reports/bench"),
    rounds: Annotated[int, typer.Option(min=2, help="Timings of everything.")] = 7,
    device: Device = None,
) -> None:
    """Time chains, training and attack against a plain torch loop and the machine's limits."""
    with _mendable():
        from stages import bench as stage
        from stages.hardware import Hardware

        stage.run(Hardware.choose(device), rounds, out, json_path)


@app.command()
def bench_attack(
    dataset: Dataset,
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: Annotated[int, typer.Option(min=1, help="Test images to attack.")] = 50,
    steps: Annotated[int, typer.Option(min=0, help="N, the updates of the attack.")] = 50,
    block: Annotated[int, typer.Option(min=1, help="Images that are attacked together.")] = 25,
    classifier: ClassifierFile = None,
    energy: EnergyFile = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for numbers and table.")
    ] = Path("reports/bench"),
    device: Device = None,
    max_chains: MaxChains = None,
) -> None:
    """Time Algorithm 1 as it is printed against the way that `attack` runs it."""
    with _stage(params_file) as params:
        params.dataset(dataset)
        from stages import bench_attack as stage
        from stages.hardware import Hardware

        paths = Paths(params.run, dataset)
        stage.run(
            params,
            dataset,
            Hardware.choose(device, max_chains),
            _files(paths, None, classifier, energy, None),
            images=images,
            steps=steps,
            block=block,
            out=out,
        )


@app.command()
def run_all(
    stages: Annotated[
        list[str] | None,
        typer.Argument(help="Stages of dvc.yaml, in this order, such as ebm_adam; default all."),
    ] = None,
    params_file: ParamsFile = DEFAULT_PARAMS,
    device: Device = None,
    time_limit: TimeLimit = None,
) -> None:
    """Run stages of dvc.yaml whose outs are missing or older than what they read, without DVC.

    It does not see that parameters or code have changed; `dvc repro` does.
    """
    with _stage(params_file) as params:
        from stages import run_all as stage

        status = stage.run(params, params_file, stages or (), time_limit, device)
        if status:
            raise typer.Exit(status)


@app.command()
def cost(
    params_file: ParamsFile = DEFAULT_PARAMS,
    bench: Annotated[
        Path | None,
        typer.Option(help="Numbers of `stochsec bench` on the machine in question, for hours."),
    ] = None,
) -> None:
    """Count what the experiment costs, stage by stage, before anybody runs it."""
    with _stage(params_file) as params:
        from stages import cost as stage

        stage.run(params, bench)


@app.command()
def report(
    params_file: ParamsFile = DEFAULT_PARAMS,
    out: Annotated[Path | None, typer.Option(help="Folder; default reports/RUN.")] = None,
) -> None:
    """Write Tables 1-3 and the figures from the records; print the tables."""
    with _stage(params_file) as params:
        from stages import report as stage

        out = out or reports(params.run)
        stage.run(params, out)
        say(f"report: {out}")


@app.command()
def publish(
    params_file: ParamsFile = DEFAULT_PARAMS,
    out: Annotated[Path | None, typer.Option(help="Folder; default pretrained/RUN.")] = None,
) -> None:
    """Put the trained energies where git keeps them, with a card that says what they are."""
    with _stage(params_file) as params:
        from stages import publish as stage

        stage.run(params, out or pretrained(params.run))


@app.command("export")
def export_results(
    out: Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, help="A new .zip file.")],
    params_file: ParamsFile = DEFAULT_PARAMS,
    device: Device = None,
) -> None:
    """Pack records and energies of the run into one file, for `import` on another machine."""
    with _stage(params_file) as params:
        from stages import results
        from stages.hardware import Hardware

        results.pack(params, Hardware.choose(device), out)


@app.command("import")
def import_results(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `export` wrote.")],
    force: Annotated[
        bool, typer.Option("--force", help="Put the files over records of the run that are here.")
    ] = False,
) -> None:
    """Check results that were made elsewhere, and write their report into reports/RUN."""
    with _mendable():
        from stages import results

        results.unpack(file, force=force)


@app.command()
def preset(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A file in presets/, such as digits or paper; without a name, list them."
        ),
    ] = None,
    params_file: ParamsFile = DEFAULT_PARAMS,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another value, as in langevin.K=2000."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a params.yaml that you have changed.")
    ] = False,
) -> None:
    """Write params.yaml for a preset; its comments name the source of each number."""
    try:
        if name is None and values:
            raise StageError("set: expected the name of a preset before --set")
        if name is None:
            say("presets: " + ", ".join(presets.names()))
        else:
            text = presets.text(name, values or ())
            if not force and params_file.exists():
                presets.refuse_to_lose(params_file)
            write_text(params_file, text)
            own = f" with {', '.join(values)}" if values else ""
            say(f"{params_file} is now preset {name}{own}; `dvc repro` runs it")
    except StageError as error:
        say(f"error: {error}")
        raise typer.Exit(FAILED) from None
