"""Long chains of every engine and precision settle where the energy says."""

from functools import cache

import pytest
import torch
from torch import Tensor

from defense.energy import ConvEnergy
from defense.fast.langevin import FastLangevin
from defense.langevin import Chain, LangevinConfig, langevin
from tests.chains import torch_threads

TAU, DEPTH = 0.15, 0.02
CHAINS = {
    "plain": langevin,
    "fast": FastLangevin(),
    "bfloat16": FastLangevin(precision="bfloat16"),
}


def well() -> ConvEnergy:
    """f(x) = DEPTH sum_i (silu(x_i) + silu(-x_i)) = DEPTH sum_i x_i tanh(x_i / 2)."""
    energy = ConvEnergy(image_size=4, channels=1, width=2, activation="silu")
    first, last = energy.layers[0], energy.layers[2]
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.zero_()
        first.weight[:, 0, 1, 1] = torch.tensor([1.0, -1.0])
        last.weight.fill_(DEPTH)
    return energy


def moments_of_the_density() -> tuple[float, float]:
    """E x^2 and E x^4 of a pixel under exp(-U), U = 2 f / tau^2, by quadrature."""
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    density = torch.exp(-2 / TAU**2 * DEPTH * x * torch.tanh(x / 2))
    density /= density.sum()
    return float((density * x**2).sum()), float((density * x**4).sum())


@cache
def settled(name: str) -> Tensor:
    """Pixels of 500 chains after 1500 steps."""
    chain: Chain = CHAINS[name]
    generator = torch.Generator().manual_seed(len(name))
    start = torch.zeros(500, 1, 4, 4)
    with torch_threads(1):
        return chain(well(), start, LangevinConfig(1500, TAU), generator=generator).double()


def test_the_energy_is_the_well() -> None:
    x = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(well()(x), (DEPTH * x * torch.tanh(x / 2)).flatten(1).sum(1))


@pytest.mark.parametrize("name", CHAINS)
def test_moments_are_those_of_the_density(name: str) -> None:
    x, (second, fourth) = settled(name), moments_of_the_density()
    assert abs(x.mean()) < 5 * (second / x.numel()) ** 0.5
    error = ((fourth - second**2) / x.numel()) ** 0.5  # of the mean of 8,000 squares
    assert abs((x**2).mean() - second) < 5 * error
    assert (x**4).mean() == pytest.approx(fourth, rel=0.2)


@pytest.mark.parametrize("name", ["fast", "bfloat16"])
def test_moments_are_the_plain_chains(name: str) -> None:
    plain, x = settled("plain"), settled(name)
    error = (2 * plain.square().var() / plain.numel()) ** 0.5
    assert abs(x.square().mean() - plain.square().mean()) < 5 * error
    assert not torch.equal(x, plain)
