"""The energy of a dataset, as params.yaml describes it."""

from pathlib import Path

from defense.energy import ConvEnergy
from defense.inference import freeze
from stages.artifacts import load_weights
from stages.hardware import Hardware
from stages.params import Params


def new_energy(params: Params, dataset: str) -> ConvEnergy:
    """The energy of a dataset, untrained."""
    data = params.dataset(dataset)
    return ConvEnergy(
        image_size=data.image_size,
        channels=data.channels,
        width=params.energy.width,
        activation=params.energy.activation,
    )


def load_energy(params: Params, dataset: str, hardware: Hardware, path: Path) -> ConvEnergy:
    """A trained energy, frozen, on the device."""
    model = new_energy(params, dataset)
    phase = path.stem.removeprefix("ebm_")
    load_weights(path, model, f"`stochsec train-ebm {dataset} {phase}`")
    return freeze(model.to(hardware.device))
