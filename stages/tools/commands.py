"""The commands that are no stage: presets, benches, costs, windows, results of other machines."""

from pathlib import Path
from typing import Annotated

import typer

from stages import StageError
from stages.core import options, presets
from stages.core.console import say
from stages.core.files import NETWORK_TIMES, Paths, write_text
from stages.core.options import (
    ClassifierFile,
    Dataset,
    EnergyFile,
    checked,
    located,
    mendable,
)

app = typer.Typer()


@app.command()
def bench(
    json_path: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Another copy of the numbers.")
    ] = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for numbers, table and plot.")
    ] = Path("reports/bench"),
    rounds: Annotated[int, typer.Option(min=2, help="How often everything is timed.")] = 7,
) -> None:
    """Time chains, training and attack against a plain torch loop and the machine's limits."""
    with mendable():
        from stages.bench import speed

        speed.run(options.given.hardware(), rounds, out, json_path)


@app.command()
def bench_attack(
    dataset: Dataset,
    images: Annotated[int, typer.Option(min=1, help="Test images to attack.")] = 50,
    steps: Annotated[int, typer.Option(min=0, help="N, the updates of the attack.")] = 50,
    block: Annotated[int, typer.Option(min=1, help="Images that are attacked together.")] = 25,
    classifier: ClassifierFile = None,
    energy: EnergyFile = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for numbers and table.")
    ] = Path("reports/bench"),
) -> None:
    """Time Algorithm 1 as it is printed against the way that `attack` runs it."""
    with checked(dataset) as params:
        from stages.attack import Files
        from stages.bench import attack

        paths = Paths(params.run, dataset)
        attack.run(
            params,
            dataset,
            options.given.hardware(),
            Files(**located(paths, images=None, classifier=classifier, energy=energy, pgd=None)),
            images=images,
            steps=steps,
            block=block,
            out=out,
        )


@app.command()
def bench_networks(
    out: Annotated[
        Path,
        typer.Option(file_okay=False, help="Folder for the numbers; the report draws the default."),
    ] = NETWORK_TIMES,
    rounds: Annotated[int, typer.Option(min=2, help="How often everything is timed.")] = 7,
    batch: Annotated[int, typer.Option(min=1, help="Images that are sampled together.")] = 100,
) -> None:
    """Time Langevin steps of the paper's energy against networks of IGEBM's and JEM's size."""
    with mendable():
        from stages.bench import networks

        networks.run(options.given.hardware(), rounds, out, batch=batch)


@app.command()
def run_all(
    stages: Annotated[
        list[str] | None,
        typer.Argument(help="Stages of dvc.yaml, in this order, such as ebm_adam; default all."),
    ] = None,
) -> None:
    """Run the stages of dvc.yaml whose outputs are missing or older than their inputs, without DVC.

    It does not see that parameters or code have changed; `dvc repro` does.
    """
    with checked() as params:
        from stages.tools.run_all import run

        own = options.given
        status = run(params, own.params_file, stages or (), own.time_limit, own.device)
        if status:
            raise typer.Exit(status)


@app.command()
def cost(
    rate: Annotated[
        float | None,
        typer.Option(min=1, help="Image-steps a second, as `stochsec bench` prints, for hours."),
    ] = None,
) -> None:
    """Estimate an upper limit of the cost of each stage, without running it."""
    with checked() as params:
        from stages.bench.cost import run

        run(params, rate)


@app.command("export")
def export_results(
    out: Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, help="A new .zip file.")],
) -> None:
    """Pack records and networks of the run into one file, for `import` on another machine."""
    with checked() as params:
        from stages.tools import results

        results.pack(params, options.given.hardware(), out)


@app.command()
def join_records(
    out: Annotated[Path, typer.Argument(metavar="OUT", dir_okay=False, help="The joined record.")],
    parts: Annotated[
        list[Path], typer.Argument(metavar="RECORD...", help="Records of `attack --subset`.")
    ],
    without_images: Annotated[
        bool,
        typer.Option("--without-images", help="Leave the images out, as `report --keep` does."),
    ] = False,
) -> None:
    """Join records of one attack on parts of the test images, made anywhere, into one."""
    with mendable():
        from stages.tools import join

        join.run(parts, out, without_images=without_images)


@app.command("import")
def import_results(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `export` wrote.")],
    force: Annotated[
        bool,
        typer.Option("--force", help="Move what is in the way aside, to artifacts/RUN/own."),
    ] = False,
) -> None:
    """Check results that were made elsewhere, and write their report into reports/RUN."""
    with mendable():
        from stages.tools import results

        results.unpack(file, force=force)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(file_okay=False, help="A new or an empty folder.")],
) -> None:
    """Lay out an experiment in FOLDER: dvc.yaml, params.yaml, presets. A git checkout has them."""
    with mendable():
        from stages.tools.init import run

        run(folder)


@app.command()
def preset(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A file in presets/, such as digits or paper; without a name, list them."
        ),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another value, as in langevin.K=2000."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a params.yaml that you have changed.")
    ] = False,
) -> None:
    """Write params.yaml for a preset; its comments name the source of each number."""
    with mendable():
        if name is None and values:
            raise StageError("set: expected the name of a preset before --set")
        if name is None:
            say("presets: " + ", ".join(presets.names()))
            return
        text, params_file = presets.text(name, values or ()), options.given.params_file
        if not force and params_file.exists():
            presets.refuse_to_lose(params_file)
        write_text(params_file, text)
        own = f" with {', '.join(values)}" if values else ""
        say(f"{params_file} is now preset {name}{own}; `dvc repro` runs it")
