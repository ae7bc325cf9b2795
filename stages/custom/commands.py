"""The commands for somebody else's classifier, energy and images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages.core import options
from stages.core.files import Paths
from stages.core.options import Dataset, ImagesFile, Resume, checked, located, mendable

if TYPE_CHECKING:
    from stages.custom.given import Given

app = typer.Typer()

Model = Annotated[
    Path,
    typer.Argument(
        metavar="CLASSIFIER",
        help="A classifier: .pt2 of `convert` or torch.export, .pt of TorchScript, or .safetensors "
        "of train-classifier.",
    ),
]
Shown = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGES",
        help="One image, a folder of images (for labels: of a folder a class), or an .npz with "
        "images (N,H,W,C) uint8 and labels.",
    ),
]
EnergyOf = Annotated[
    Path, typer.Option(help="The energy: of pretrained/, train-ebm or convert-energy.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another parameter, as in langevin.K=100."),
]


@app.command()
def convert(
    dataset: Dataset,
    model: Annotated[
        str,
        typer.Argument(
            help="What builds the network, such as 'resnet.py:resnet32()' or 'package:name()' (its "
            "code is run)."
        ),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Its weights: .th, .pth, .pt, .ckpt or .safetensors; nothing in it is run.",
        ),
    ] = None,
    normalize: Annotated[
        str,
        typer.Option(
            help="What the network expects of pixels in [0, 1]: none, half (to [-1, 1]), bytes (to "
            "0..255), imagenet, cifar10, cifar100, svhn, or MEAN/STD such as 0.5/0.25."
        ),
    ] = "none",
    size: Annotated[
        int | None, typer.Option("--resize", min=1, help="Pixels a side that the network expects.")
    ] = None,
    images: ImagesFile = None,
    out: Annotated[Path, typer.Option(dir_okay=False, help="The classifier, as .pt2.")] = Path(
        "mine.pt2"
    ),
) -> None:
    """Make a file that --classifier takes of somebody else's network; check its accuracy."""
    with checked(dataset) as params:
        from stages.custom.convert import run

        files = located(Paths(params.run, dataset), images=images)
        hardware = options.given.hardware()
        run(
            params,
            dataset,
            hardware,
            model=model,
            weights=weights,
            normalize=normalize,
            size=size,
            images=files["images"],
            out=out,
        )


@app.command()
def convert_energy(
    dataset: Dataset,
    model: Annotated[
        str,
        typer.Argument(
            help="What builds the energy, such as defense:ConvEnergy(), the network of the authors."
        ),
    ],
    tau: Annotated[float, typer.Option(min=1e-6, help="Noise of a step, x - grad f(x) + tau z.")],
    weights: Annotated[Path | None, typer.Option(dir_okay=False, help="As in `convert`.")] = None,
    sigma: Annotated[
        float | None, typer.Option(min=0, help="Noise on its training images, for denoising.")
    ] = None,
    out: Annotated[Path, typer.Option(dir_okay=False, help="The energy, as .safetensors.")] = Path(
        "energy.safetensors"
    ),
) -> None:
    """Make a file that --energy takes of somebody else's energy."""
    with checked(dataset) as params:
        from stages.custom.convert import run_energy

        run_energy(
            params,
            dataset,
            options.given.hardware(),
            model=model,
            weights=weights,
            tau=tau,
            sigma=sigma,
            out=out,
        )


def set_up(
    classifier: Path,
    energy: Path | None,
    images: Path,
    changes: list[str] | None,
    out: Path,
    preset: str,
) -> "Given":
    """Somebody's files, as the options name them; see `stages.custom.given`."""
    from stages.custom import given

    hardware = options.given.hardware()
    return given.set_up(
        classifier, energy, images, hardware, preset=preset, changes=changes or (), out=out
    )


@app.command()
def secure(
    classifier: Model,
    images: Shown,
    energy: EnergyOf,
    replicas: Annotated[int, typer.Option(min=1, help="Purified copies of each image.")] = 15,
    keep: Annotated[
        bool, typer.Option("--purified", help="Write a purified copy of every image, too.")
    ] = False,
    changes: Changes = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")] = Path(
        "secured"
    ),
    resume: Resume = True,
) -> None:
    """Classify images with a defended CLASSIFIER: predictions, and which of them are not clear."""
    with mendable():
        from stages.custom import secure

        case = set_up(classifier, energy, images, changes, out, "cifar10")
        secure.run(case, out, replicas, keep=keep, afresh=not resume)


@app.command()
def audit(
    classifier: Model,
    images: Shown,
    energy: Annotated[
        Path | None, typer.Option(help="The energy that defends; without one, PGD alone is run.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Few images, steps and replicas: minutes instead of days."),
    ] = False,
    changes: Changes = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for page and records.")] = Path(
        "audit"
    ),
    resume: Resume = True,
) -> None:
    """Attack a CLASSIFIER, bare and defended, and write a page about it (index.html)."""
    with mendable():
        from stages.custom import audit

        case = set_up(classifier, energy, images, changes, out, "check" if quick else "cifar10")
        audit.run(case, out, quick=quick, afresh=not resume)


@app.command()
def tune(
    classifier: Model,
    images: Shown,
    energy: EnergyOf,
    changes: Changes = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the results.")] = Path(
        "tuned"
    ),
    resume: Resume = True,
) -> None:
    """Find chain length, denoising and replicas for a CLASSIFIER, on a few hundred images."""
    with mendable():
        from stages.custom import tune

        case = set_up(classifier, energy, images, changes, out, "check")
        tune.run(case, out, afresh=not resume)
