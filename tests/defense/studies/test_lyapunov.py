"""Exponents that are known exactly, or from derivatives; what cannot be measured."""

import math

import pytest
import torch
from torch import Tensor

from defense.energy import ConvEnergy
from defense.fast.langevin import FastLangevin
from defense.langevin import EnergyFn, LangevinConfig, langevin
from defense.studies.lyapunov import lyapunov_exponents
from tests.chains import make_energy, make_images


def measured(energy, x: Tensor, generator, **others) -> tuple[Tensor, Tensor]:
    usual = {"eta": 1.0, "tau": 0.1, "steps": 200, "burn_in": 100, "every": 1, "separation": 1e-3}
    usual |= {"chain": langevin, "max_chains": 100}
    return lyapunov_exponents(energy, x, generator=generator, **(usual | others))


def weighted(*curvatures: float) -> EnergyFn:
    """f(x) = sum_i a_i/2 x_i^2, in float64."""
    a = torch.tensor(curvatures, dtype=torch.float64)
    return lambda x: 0.5 * (a * x.flatten(1).square()).sum(1)


def wells(r: float) -> EnergyFn:
    """A double well, its bottoms at -1 and 1: x - df/dx = x + r x (1 - x^2)."""
    return lambda x: r * (x.flatten(1) ** 4 / 4 - x.flatten(1).square() / 2).sum(1)


def logistic(x: Tensor) -> Tensor:
    """The logistic map: x - df/dx = 4 x (1 - x)."""
    return (4 / 3 * x.flatten(1) ** 3 - 1.5 * x.flatten(1).square()).sum(1)


def column(low: float, high: float, count: int = 20) -> Tensor:
    """Images of one pixel, in float64."""
    return torch.linspace(low, high, count, dtype=torch.float64).view(count, 1, 1, 1)


def network(activation: str) -> tuple[ConvEnergy, Tensor]:
    """A network that turns and stretches differences, and six images for it, in float64."""
    return make_energy(activation=activation).double(), make_images(count=6).double()


@pytest.mark.parametrize("eta", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("a", [0.02, 0.5, 1.5, -0.01])
def test_on_a_quadratic_it_is_the_slope_whatever_the_noise(
    quadratic, images, seeded, a: float, eta: float
) -> None:
    values, _ = measured(quadratic(a), images, seeded(), eta=eta, separation=0.1)
    assert values.shape == (5,) and values.dtype == torch.float64
    assert values.tolist() == pytest.approx([math.log(abs(1 - a))] * 5, abs=2e-5)


@pytest.mark.parametrize(
    ("curvatures", "slowest"), [((0.02, 0.5, 1.9), 0.98), ((0.3, 1.0, 1.95), -0.95)]
)
def test_the_direction_that_shrinks_least_wins(seeded, curvatures, slowest: float) -> None:
    x = torch.zeros(4, 1, 1, 3, dtype=torch.float64)
    values, _ = measured(weighted(*curvatures), x, seeded(), burn_in=500)
    assert values.tolist() == pytest.approx([math.log(abs(slowest))] * 4, abs=1e-9)


def test_the_burn_in_is_not_counted(seeded) -> None:
    """One of two directions dies in the first step, and with it that part of the distance."""
    x = torch.zeros(3, 1, 1, 2, dtype=torch.float64)
    first, later = (
        measured(weighted(0.0, 1.0), x, seeded(), steps=1, burn_in=burn_in)[0] for burn_in in (0, 1)
    )
    direction = torch.randn(x.shape, generator=seeded(), dtype=x.dtype).flatten(1)
    torch.testing.assert_close(first, (direction[:, 0].abs() / direction.norm(dim=1)).log())
    assert later.abs().max() < 1e-9


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    ("energy", "exponent"),
    [(logistic, math.log(2)), (wells(2.0), math.log(3)), (wells(0.3), math.log(0.4))],
    ids=["logistic", "cubic", "settled"],
)
def test_maps_of_the_interval(seeded, energy, exponent: float, every: int) -> None:
    """At r = 2 the double well's map is the third Chebyshev polynomial; at 0.3 it rests at +-1."""
    x = column(0.1, 0.9)
    values, _ = measured(
        energy, x, seeded(), tau=0.0, steps=2000, separation=1e-8, every=every, burn_in=200
    )
    assert values.mean().item() == pytest.approx(exponent, abs=2e-3)
    assert values.std().item() < 0.02


@pytest.mark.parametrize("eta", [0.1, 1.0, 4.0])
def test_in_one_dimension_it_is_the_mean_logarithm_of_the_slope(seeded, eta: float) -> None:
    x, tau = column(-1.5, 1.5), 0.1
    values, last = measured(wells(0.2), x, seeded(), eta=eta, tau=tau, separation=1e-8)

    generator, states = seeded(), list[Tensor]()
    torch.randn(x.shape, generator=generator, dtype=x.dtype)
    config = LangevinConfig(300, eta * tau)
    end = langevin(wells(0.2), x, config, generator=generator, states=states)
    slopes = 1 + 0.2 * (1 - 3 * torch.stack(states[100:]).square())
    torch.testing.assert_close(values, slopes.abs().log().mean(0).flatten(), atol=1e-4, rtol=0)
    assert torch.equal(last, end)
    assert values.mean() < -0.1


@pytest.mark.parametrize("every", [5, 20])
def test_neither_the_pulling_back_nor_a_small_separation_matters(seeded, every: int) -> None:
    energy, x = network("silu")
    expected, last = measured(energy, x, seeded())
    for separation in (1e-7, 1e-4):
        values, same = measured(energy, x, seeded(), every=every, separation=separation)
        torch.testing.assert_close(values, expected, atol=2e-5, rtol=0)
        assert torch.equal(same, last)
    assert expected.min() > 5e-4


def test_a_piecewise_linear_energy_parts_only_chains_with_a_corner_between(seeded) -> None:
    energy, x = network("leaky_relu")
    near, far = (measured(energy, x, seeded(), separation=s)[0] for s in (1e-8, 0.1))
    assert near.abs().max() < 1e-6
    assert far.min() > 1e-3


def test_both_chains_agree(seeded) -> None:
    energy, x = make_energy(activation="silu"), make_images(count=40)
    plain, same, other = (
        measured(energy, x, seeded(seed), chain=chain, separation=0.01)[0]
        for seed, chain in [(0, langevin), (0, FastLangevin()), (1, FastLangevin())]
    )
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=0)
    error = (plain.var() / 40 + other.var() / 40).sqrt()
    assert abs(plain.mean() - other.mean()) < 5 * error < plain.mean()


def test_chains_that_meet_yield_what_could_still_be_told_apart(quadratic, images, seeded) -> None:
    """A step leaves nothing but the noise, the same for both: the exponent itself is -inf."""
    values, last = measured(quadratic(1.0), images, seeded(), separation=1e-2)
    assert last.abs().max() > 0.1
    size = 0.1 * 64**0.5  # of a state
    assert values.tolist() == pytest.approx([math.log(2**-23 * size / 1e-2)] * 5, abs=0.1)
    resting, _ = measured(quadratic(1.0), torch.zeros(2, 1, 1, 1), seeded(), eta=0.0)
    assert resting.tolist() == pytest.approx([math.log(2**-23)] * 2)


@pytest.mark.parametrize("burn_in", [0, 1000])
def test_a_chain_that_diverges_has_no_exponent(seeded, burn_in: int) -> None:
    x = torch.tensor([0.5, 30.0, 1.0]).view(3, 1, 1, 1)
    values, last = measured(wells(0.2), x, seeded(), burn_in=burn_in, separation=0.01)
    assert values.isnan().tolist() == [False, True, False]
    assert last.flatten().isfinite().tolist() == [True, False, True]


def test_a_second_chain_that_diverges_leaves_no_exponent(seeded) -> None:
    x = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    energy = weighted(-1e200)
    values, last = measured(energy, x, seeded(), eta=0.0, steps=1, burn_in=0, separation=1e150)
    assert values.isnan().all()
    assert torch.equal(last, x)


def test_a_separation_lost_in_rounding_has_no_exponent(quadratic, images, seeded) -> None:
    for separation in (1e-12, 1e-7):
        values, _ = measured(quadratic(0.0), images, seeded(), separation=separation)
        assert values.isnan().all()


@pytest.mark.parametrize("max_chains", [1, 2, 5])
def test_pieces_are_calls_one_after_the_other(tiny_energy, images, seeded, max_chains: int) -> None:
    short = {"steps": 20, "burn_in": 10}
    together = measured(tiny_energy, images, seeded(), max_chains=max_chains, **short)
    generator = seeded()
    parts = [measured(tiny_energy, x, generator, **short) for x in images.split(max_chains)]
    for whole, pieces in zip(together, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(pieces), atol=1e-4, rtol=1e-4)


def test_the_generator_gives_directions_then_the_noise_of_one_chain(
    tiny_energy, images, seeded
) -> None:
    used, expected = seeded(), seeded()
    global_stream = torch.get_rng_state()
    short = {"steps": 20, "burn_in": 10, "separation": 0.1}
    values, last = measured(tiny_energy, images, used, **short)
    torch.randn(images.shape, generator=expected)
    end = langevin(tiny_energy, images, LangevinConfig(30, 0.1), generator=expected)
    assert torch.equal(last, end)
    assert torch.equal(used.get_state(), expected.get_state())
    assert torch.equal(torch.get_rng_state(), global_stream)

    again, other = (measured(tiny_energy, images, seeded(seed), **short)[0] for seed in (0, 1))
    assert torch.equal(values, again)
    assert not torch.equal(values, other)


def test_two_evaluations_a_step_and_no_graph(quadratic, images, seeded) -> None:
    energy, x = quadratic(0.1), images.clone().requires_grad_(True)
    values, last = measured(energy, x, seeded(), steps=15, burn_in=10, every=5)
    assert energy.calls == 2 * 25
    assert last.shape == x.shape
    assert not values.requires_grad and not last.requires_grad


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"separation": 0}, "separation: expected > 0, got 0"),
        ({"separation": math.nan}, "separation: expected > 0, got nan"),
        ({"eta": -0.5}, r"eta: expected >= 0, got -0\.5"),
        ({"tau": -0.5}, r"tau: expected >= 0, got -0\.5"),
        ({"steps": 0}, "steps: expected >= 1, got 0"),
        ({"burn_in": -1}, "burn_in: expected >= 0, got -1"),
        ({"every": 0}, "every: expected >= 1, got 0"),
        ({"max_chains": 0}, "max_chains: expected >= 1, got 0"),
        ({"steps": 10, "every": 4}, "steps: expected a multiple of every = 4, got 10"),
        ({"burn_in": 2, "every": 4}, "burn_in: expected a multiple of every = 4, got 2"),
    ],
)
def test_bad_numbers_are_said_before_any_work(quadratic, images, seeded, wrong, message) -> None:
    energy = quadratic(0.1)
    with pytest.raises(ValueError, match=f"^{message}$"):
        measured(energy, images, seeded(), **wrong)
    assert energy.calls == 0
