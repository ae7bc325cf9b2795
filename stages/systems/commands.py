"""The commands for other purification defenses, and for one of your own."""

from pathlib import Path
from typing import Annotated

import typer

from stages.core import options
from stages.core.files import Paths, reports
from stages.core.options import ClassifierFile, ImagesFile, Out, Resume, checked, located

app = typer.Typer()

SystemName = Annotated[
    str, typer.Argument(metavar="SYSTEM", help="A system under systems.settings in params.yaml.")
]


@app.command()
def train_system(
    system: SystemName,
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    out: Out = None,
) -> None:
    """Train the network of another purification defense. Resumes."""
    with checked() as params:
        from stages.systems import train
        from stages.systems.build import network_file

        files = located(
            Paths(params.run, params.compare_dataset), images=images, classifier=classifier
        )
        out = out or network_file(params, system)
        train.run(params, system, options.given.hardware(), **files, out=out)


@app.command()
def attack_system(
    system: Annotated[
        str,
        typer.Argument(
            metavar="SYSTEM",
            help="A system under systems.settings in params.yaml, or FILE.py:NAME() of a module "
            "that purifies (its code is run).",
        ),
    ],
    images: ImagesFile = None,
    classifier: ClassifierFile = None,
    network: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="The network of the purifier; default where train-system writes it. For hill the "
            "energy.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for the records; default artifacts/RUN/records/DATASET/systems/SYSTEM.",
        ),
    ] = None,
    resume: Resume = True,
) -> None:
    """Run every attack of systems.attacks on a purification defense. Resumes."""
    with checked() as params:
        from stages.reporting import tables
        from stages.systems import attack

        paths = Paths(params.run, params.compare_dataset)
        files = located(paths, images=images, classifier=classifier)
        name = "".join(c if c.isalnum() or c == "_" else "-" for c in system)
        results = attack.run(
            params,
            system,
            options.given.hardware(),
            attack.Files(files["images"], files["classifier"], network),
            out or (paths.own(f"systems/{name}") if ":" in system else paths.system(system)),
            afresh=not resume,
        )
        tables.show_attacks(results, params.evaluate.draws)


@app.command()
def report_systems(
    out: Annotated[Path | None, typer.Option(help="Folder; default reports/RUN.")] = None,
) -> None:
    """Write the table, the figures and the page of all systems from their records."""
    with checked() as params:
        from stages.systems import report

        report.run(params, out or reports(params.run))
