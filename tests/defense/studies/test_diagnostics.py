"""States along chains, energies in nats, independent draws of the mean logits."""

import pytest
import torch

from defense.langevin import LangevinConfig, langevin
from defense.studies.diagnostics import energies, states_at


def along(energy, x, grid, generator, *, max_chains: int = 100, tau: float = 0.1):
    return states_at(
        energy, x, grid, tau=tau, chain=langevin, generator=generator, max_chains=max_chains
    )


def test_the_states_are_those_of_one_long_chain(tiny_energy, images, seeded) -> None:
    grid = [0, 1, 4, 9]
    states = along(tiny_energy, images, grid, seeded())
    assert states.shape == (4, *images.shape)
    for steps, state in zip(grid, states, strict=True):
        config = LangevinConfig(steps, 0.1)
        assert torch.equal(state, langevin(tiny_energy, images, config, generator=seeded()))


@pytest.mark.parametrize("max_chains", [1, 2, 5])
def test_pieces_keep_images_and_grid_in_place(quadratic, images, seeded, max_chains: int) -> None:
    states = along(quadratic(0.1), images, [2, 3], seeded(), max_chains=max_chains, tau=0.0)
    torch.testing.assert_close(states, torch.stack([0.9**2 * images, 0.9**3 * images]))


def test_no_step_is_taken_twice(quadratic, images, seeded) -> None:
    energy = quadratic(0.1)
    along(energy, images, [3, 10], seeded())
    assert energy.calls == 10


@pytest.mark.parametrize("grid", [[3, 1], [1, 1], [-1, 2]])
def test_a_grid_that_does_not_ascend_is_refused(quadratic, images, seeded, grid: list[int]) -> None:
    with pytest.raises(ValueError, match=r"grid: expected ascending steps >= 0, got \["):
        along(quadratic(0.1), images, grid, seeded())


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_energies_are_in_nats(quadratic, images, batch: int) -> None:
    energy, tau = quadratic(0.3), 0.1
    nats = energies(energy, images, tau=tau, batch=batch)
    expected = 0.3 * images.flatten(1).square().sum(1) / tau**2
    torch.testing.assert_close(nats, expected)
    assert not nats.requires_grad


def test_a_long_chain_has_half_a_nat_a_coordinate(quadratic, seeded) -> None:
    """Equipartition ties the two scales together: exp(-U) is what the chain samples."""
    a, tau, size = 0.01, 0.1, 10_000
    state = along(quadratic(a), torch.zeros(1, 1, 100, 100), [600], seeded(), tau=tau)[0]
    nats = energies(quadratic(a), state, tau=tau, batch=1).item() / size
    discretized = 0.5 / (1 - a / 2)
    assert abs(nats - discretized) < 5 * discretized * (2 / size) ** 0.5
