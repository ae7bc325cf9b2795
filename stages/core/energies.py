"""The energies of a dataset, as params.yaml and their files describe them."""

from pathlib import Path

import torch
from torch import Tensor

from defense.energy import ConvEnergy
from defense.inference import freeze
from defense.langevin import denoised
from defense.nets.programs import EXPORTED, EnergyProgram, load_program
from defense.pixels import to_pixels
from stages import StageError
from stages.core.artifacts import about_of, load_network
from stages.core.console import say
from stages.core.engine import choose_chain
from stages.core.files import require
from stages.core.hardware import Hardware
from stages.core.params import SMOOTH, Params


def new_energy(params: Params, dataset: str, phase: str) -> ConvEnergy:
    """The energy of a dataset, untrained; phases of the smooth one have its activation."""
    data, energy = params.dataset(dataset), params.energy
    smooth = phase.startswith(SMOOTH)
    return ConvEnergy(
        image_size=data.shape.image_size,
        channels=data.shape.channels,
        width=energy.width,
        activation=energy.smooth_activation if smooth else energy.activation,
        sigma=data.data_noise,
    )


Energy = ConvEnergy | EnergyProgram


def load_energy(params: Params, dataset: str, hardware: Hardware, path: Path) -> Energy:
    """A trained energy, frozen, on the device; its file says which network it is.

    A .safetensors file of `train-ebm`, or a .pt2 file of any energy that `convert-energy` wrote.
    `StageError` for images of another shape, and for training with another tau, which changes the
    density that the chain samples. Another training dataset is only reported.
    """
    phase, data = path.stem.removeprefix("ebm_"), params.dataset(dataset)
    energy: Energy
    if path.suffix == EXPORTED:
        require(path)
        try:
            energy = load_program(path, EnergyProgram)
        except ValueError as error:
            raise StageError(f"{path}: {error}; `stochsec convert-energy` writes one") from None
        about = energy.about
    else:
        otherwise = new_energy(params, dataset, phase).architecture
        made_by = f"`stochsec train-ebm {dataset} {phase}`"
        energy, about = load_network(path, ConvEnergy, otherwise, made_by), about_of(path)
    expected = data.shape.image
    if energy.shape != expected:
        raise StageError(f"{path}: expected an energy of images {expected}, got {energy.shape}")
    if about.get("tau", data.tau) != data.tau:
        raise StageError(
            f"{path}: was trained with tau {about['tau']:g}, and data.{dataset}.tau is {data.tau:g}"
        )
    if about.get("dataset", dataset) != dataset:
        say(f"{path}: was trained on images of {about['dataset']}, not of {dataset}")
    return freeze(energy.to(hardware.device))


def pixels_shown(
    params: Params,
    dataset: str,
    hardware: Hardware,
    energy: Energy,
    states: Tensor,
    steps: int,
) -> Tensor:
    """The pixels that a classifier sees of chain states; denoised if langevin.denoise is set.

    ``states`` (N,C,H,W) in net range, after ``steps`` steps -> pixels, which may leave [0, 1] a
    little. After 0 steps nothing is denoised. The chains can continue from the unchanged states.
    """
    if not params.langevin.denoise or steps == 0:
        return to_pixels(states)
    tau, precision = params.dataset(dataset).tau, params.langevin.precision
    chain = choose_chain(energy, steps, precision, hardware)
    parts = states.split(hardware.max_chains)
    return to_pixels(torch.cat([denoised(energy, part, tau, chain=chain) for part in parts]))
