"""Diagnostics of an energy: states along chains, and their energies."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from defense.langevin import Chain, EnergyFn, LangevinConfig


def states_at(
    energy: EnergyFn,
    x: Tensor,
    grid: Sequence[int],
    *,
    tau: float,
    chain: Chain,
    generator: Generator,
    max_chains: int,
) -> Tensor:
    """States of chains after each number of steps in ``grid``: x (N,C,H,W) -> (len(grid),N,C,H,W).

    One chain per image passes through the whole grid (ascending), all in net range.
    """
    if not grid or list(grid) != sorted(set(grid)) or grid[0] < 0:
        raise ValueError(f"grid: expected ascending steps >= 0, got {list(grid)}")
    parts = []
    for state in x.split(max_chains):
        reached, states = 0, []
        for steps in grid:
            config = LangevinConfig(steps - reached, tau)
            state = chain(energy, state, config, generator=generator)
            states.append(state)
            reached = steps
        parts.append(torch.stack(states))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def energies(energy: EnergyFn, x: Tensor, *, tau: float, batch: int) -> Tensor:
    """U(x) in nats, (N,C,H,W) in net range -> (N,); the network itself returns (tau^2 / 2) U."""
    return torch.cat([energy(part) for part in x.split(batch)]) / (0.5 * tau**2)


def level_changes(
    energy: EnergyFn,
    x: Tensor,
    grid: Sequence[int],
    *,
    tau: float,
    chain: Chain,
    generator: Generator,
    max_chains: int,
) -> Tensor:
    """Energy drift of chains from noisy data: mean U after the steps minus mean U before.

    x (N,C,H,W) in net range are images with the noise that the energy was trained on; the result is
    (len(grid),), in nats. For a convergent energy it is 0 at every number of steps, on training
    images and on others. If it is negative for images of the bank only, the energy has memorized
    the bank. If it is negative for all training images, the energy overfits. If it is negative for
    all images, training has recently raised the energy where its chains were, and has not
    converged.
    """
    states = states_at(
        energy, x, grid, tau=tau, chain=chain, generator=generator, max_chains=max_chains
    )
    before = energies(energy, x, tau=tau, batch=max_chains).mean()
    after = [energies(energy, state, tau=tau, batch=max_chains).mean() for state in states]
    return torch.stack(after) - before
