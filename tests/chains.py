"""Energies, images and comparisons for the tests of the fast chain."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

from defense.energy import ConvEnergy
from defense.langevin import ChainLog, LangevinConfig

TWENTY = LangevinConfig(steps=20, tau=0.01)

# Every way through the network: one matrix, 2x2 blocks (8 channels), the library, odd sides,
# images that are not square.
SHAPES = {
    "digits": {"image_size": 8, "channels": 1, "width": 8},
    "paper": {"image_size": 32, "channels": 3, "width": 16},
    "odd": {"image_size": 15, "channels": 2, "width": 8},
    "none_strided": {"image_size": 4, "channels": 3, "width": 8},
    "oblong": {"image_size": (64, 48), "channels": 3, "width": 8},
    "odd_oblong": {"image_size": (20, 15), "channels": 1, "width": 8},
}


def make_energy(shape: str = "digits", activation: str = "leaky_relu", seed: int = 1) -> ConvEnergy:
    """An energy with weights large enough that twenty steps move the images visibly."""
    torch.manual_seed(seed)
    energy = ConvEnergy(**SHAPES[shape], activation=activation)
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.mul_(2.0)
    return energy


def make_images(shape: str = "digits", count: int = 7) -> Tensor:
    energy_shape = make_energy(shape).shape
    generator = Generator().manual_seed(2)
    return torch.rand(count, *energy_shape, generator=generator) * 2 - 1


def seeded() -> Generator:
    return Generator().manual_seed(3)


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_log(actual: ChainLog, expected: ChainLog) -> None:
    for rows in ("energies", "gradient_norms"):
        ours, theirs = torch.stack(getattr(actual, rows)), torch.stack(getattr(expected, rows))
        assert ours.shape == theirs.shape
        assert relative_difference(ours, theirs) < 1e-5
