"""The energies of noisy images, and how they change along fresh chains.

They stay constant on average if the energy is convergent: see
`defense.studies.diagnostics.level_changes`. Training prints the change; `inspect` records it. A
trained energy states the level of its training images, and images far from it are not of its kind.
"""

import copy
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from defense.bank import DataBank, NoisyImages
from defense.ebm_training import EBMTrainer
from defense.energy import ConvEnergy
from defense.pixels import from_bytes, to_net
from defense.rng import make_generator
from defense.studies.diagnostics import energies, level_changes
from stages.core.artifacts import load_images
from stages.core.console import say
from stages.core.energies import Energy
from stages.core.engine import choose_chain
from stages.core.hardware import Hardware
from stages.core.params import Params

LEVEL_IMAGES = 1000  # training images whose energies are stated
FAR = 1.0  # standard deviations of single images that the mean of other images may be away


def noisy_energies(energy: Energy, pixels: Tensor, tau: float) -> Tensor:
    """U (N,) in nats of pixels (N,C,H,W) in [0, 1] plus the noise of the energy's training."""
    noise = torch.randn(pixels.shape, generator=make_generator(0, "noise on images"))
    noisy = to_net(pixels.cpu()) + (energy.sigma or 0.0) * noise
    return energies(energy, noisy.to(pixels.device), tau=tau, batch=500).cpu()


def level_of(energy: Energy, training: Tensor, tau: float) -> list[float]:
    """Mean and standard deviation of U over training pixels (M,C,H,W)."""
    levels = noisy_energies(energy, training, tau).double()
    return [round(float(levels.mean()), 1), round(float(levels.std()), 1)]


def unlike(energy: Energy, level: list[float], pixels: Tensor, tau: float) -> str | None:
    """How far from its training images an energy finds pixels (N,C,H,W) in [0, 1].

    None if their mean energy is within `FAR` of the ``level`` of `level_of`, give or take two
    standard errors of the mean of so few images.
    """
    mean, deviation = level
    away = (float(noisy_energies(energy, pixels, tau).mean()) - mean) / deviation
    if abs(away) <= FAR + 2 / len(pixels) ** 0.5:
        return None
    return (
        "the energy was trained on other images than these, or in another range or size: their "
        f"mean energy lies {away:+.1f} standard deviations from that of its training images"
    )


def level_changes_of(
    params: Params, dataset: str, hardware: Hardware, energy: Energy, images: Tensor, who: str
) -> Tensor:
    """`level_changes` over inspect.levels, of images (N,C,H,W) in net range without their noise."""
    section, precision = params.dataset(dataset), params.langevin.precision
    generator = make_generator(params.seed, dataset, "levels", who, device=hardware.device)
    data = NoisyImages(images.to(hardware.device), section.data_noise)
    places = torch.arange(len(images), device=hardware.device)
    return level_changes(
        energy,
        data.at(places, generator=generator),
        params.inspect.levels,
        tau=section.tau,
        chain=choose_chain(energy, max(params.inspect.levels), precision, hardware),
        generator=generator,
        max_chains=hardware.max_chains,
    )


def held_out_images(params: Params, dataset: str, images: Path) -> Tensor | None:
    """The first of the held-out images, in net range; None if there are none."""
    section = params.dataset(dataset)
    if not section.held_out:
        return None
    count = min(section.held_out, params.inspect.chains)
    return to_net(from_bytes(load_images(images, "held_out", section, count).images))


def say_levels(
    params: Params,
    dataset: str,
    phase: str,
    hardware: Hardware,
    trainer: EBMTrainer,
    held_out: Tensor | None,
) -> None:
    """The level of fresh chains, for images of the bank, other training images, held-out ones."""
    data, count, sets = trainer.data.images, params.inspect.chains, dict[str, Tensor]()
    if isinstance(trainer.bank, DataBank):
        sets["images of the bank"] = trainer.data.clean(trainer.bank.origins[:count])
    sets["training images"] = data[:count]
    if held_out is not None:
        sets["held-out images"] = held_out
    energy = cast(ConvEnergy, copy.deepcopy(trainer.trained))
    for name, images in sets.items():
        changes = level_changes_of(params, dataset, hardware, energy, images, name)
        said = zip(params.inspect.levels, changes.tolist(), strict=True)
        say(
            f"ebm {dataset} {phase}, {trainer.batches_done} batches: U of chains from {name} less "
            "U of noisy data: " + "  ".join(f"{steps}: {change:+.1f}" for steps, change in said)
        )
