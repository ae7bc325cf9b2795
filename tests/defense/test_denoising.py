"""Tweedie's formula, where everything is known: Gaussians and mixtures of them."""

import pytest
import torch
from torch import Tensor, nn

from defense.energy import ConvEnergy
from defense.eot import EOTDefense
from defense.fast.langevin import FastLangevin
from defense.langevin import LangevinConfig, denoised, energy_and_gradient, langevin

TAU, SIGMA = 0.2, 0.3


class Mixture(nn.Module):
    """f = (tau^2 / 2) U for images that are one of some points (G,C,H,W), plus N(0, sigma^2)."""

    def __init__(self, points: Tensor, spread: float = 0.0) -> None:
        super().__init__()
        self.points = points
        self.sigma = SIGMA
        self.variance = spread**2 + SIGMA**2

    def log_densities(self, x: Tensor) -> Tensor:
        """(N,G), up to one constant."""
        distances = (x[:, None] - self.points[None]).flatten(2).square().sum(2)
        return -0.5 * distances / self.variance

    def forward(self, x: Tensor) -> Tensor:
        return -0.5 * TAU**2 * self.log_densities(x).logsumexp(1)


def test_the_clean_image_to_expect_under_a_mixture(seeded) -> None:
    """The points, weighted by how likely each is behind the noisy image: Bayes by hand."""
    points = torch.randn(3, 1, 2, 2, generator=seeded(1), dtype=torch.float64)
    energy = Mixture(points)
    x = points.repeat(4, 1, 1, 1) + SIGMA * torch.randn(
        12, 1, 2, 2, generator=seeded(2), dtype=torch.float64
    )
    weights = energy.log_densities(x).softmax(1)
    expected = torch.einsum("ng,gchw->nchw", weights, points)
    assert (weights.amax(1) < 0.99).any(), "some images are in doubt"
    torch.testing.assert_close(denoised(energy, x, TAU), expected)


def test_the_clean_image_to_expect_under_a_gaussian(seeded) -> None:
    """Data N(m, s^2) and noise sigma: the mean of m and x, weighted by their precisions."""
    mean, spread = torch.full((1, 1, 2, 2), 0.4, dtype=torch.float64), 0.5
    x = torch.randn(6, 1, 2, 2, generator=seeded(1), dtype=torch.float64)
    expected = (SIGMA**2 * mean + spread**2 * x) / (spread**2 + SIGMA**2)
    torch.testing.assert_close(denoised(Mixture(mean, spread), x, TAU), expected)


def test_of_all_factors_the_formula_leaves_the_least_noise(seeded) -> None:
    points = torch.randn(3, 1, 4, 4, generator=seeded(1))
    energy = Mixture(points)
    clean = points.repeat(300, 1, 1, 1)
    noisy = clean + SIGMA * torch.randn(clean.shape, generator=seeded(2))
    step = denoised(energy, noisy, TAU) - noisy
    errors = [float((noisy + share * step - clean).square().mean()) for share in (0.5, 1, 1.5)]
    assert min(errors) == errors[1] < 0.2 * SIGMA**2


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_every_engine_denoises_alike(seeded, activation: str) -> None:
    torch.manual_seed(1)
    energy = ConvEnergy(image_size=8, channels=1, width=4, activation=activation, sigma=SIGMA)
    x = torch.randn(5, 1, 8, 8, generator=seeded(1))
    before = torch.get_rng_state()
    plain, fast = (denoised(energy, x, TAU, chain=c) for c in (langevin, FastLangevin()))
    _, gradient = energy_and_gradient(energy, x)
    torch.testing.assert_close(plain, x - 2 * SIGMA**2 / TAU**2 * gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def a_defense(energy: nn.Module, *, denoise: bool, gradient: str = "identity") -> EOTDefense:
    config = LangevinConfig(4, TAU, denoise=denoise)
    return EOTDefense(nn.Flatten(), energy, config, replicas=2, max_chains=3, gradient=gradient)


def test_a_defense_classifies_what_is_denoised_of_the_same_chains(seeded) -> None:
    energy = Mixture(torch.randn(3, 1, 2, 2, generator=seeded(1)))
    x = torch.rand(4, 1, 2, 2, generator=seeded(2))
    noisy, clean = (
        a_defense(energy, denoise=on).purify(x, generator=seeded(3)) for on in (False, True)
    )
    ends = 2 * noisy - 1
    torch.testing.assert_close(2 * clean - 1, denoised(energy, ends, TAU))
    assert (clean - noisy).abs().max() > 0.05


def test_a_chain_of_no_steps_is_the_classifier_itself(seeded) -> None:
    x = torch.rand(4, 1, 2, 2, generator=seeded(2))
    energy = Mixture(torch.zeros(1, 1, 2, 2))
    config = LangevinConfig(0, TAU, denoise=True)
    defense = EOTDefense(nn.Flatten(), energy, config, replicas=1)
    assert torch.equal(defense(x), x.flatten(1))


def test_the_exact_gradient_goes_back_through_the_denoising(seeded) -> None:
    """Finite differences of the purified pixels, chains and noise held fixed."""
    points = torch.randn(3, 1, 2, 2, generator=seeded(1), dtype=torch.float64)
    defense = a_defense(Mixture(points), denoise=True, gradient="exact")
    x = torch.rand(3, 1, 2, 2, generator=seeded(2), dtype=torch.float64).requires_grad_(True)
    v = torch.randn(2, 3, 4, generator=seeded(4), dtype=torch.float64)
    logits = defense.replica_logits(x, generator=seeded(5))
    (pulled,) = torch.autograd.grad((logits * v).sum(), x)
    direction = torch.randn(x.shape, generator=seeded(6), dtype=torch.float64)

    def value(step: float) -> Tensor:
        moved = x.detach() + step * direction
        return (defense.replica_logits(moved, generator=seeded(5)) * v).sum()

    by_differences = (value(1e-5) - value(-1e-5)) / 2e-5
    torch.testing.assert_close((pulled * direction).sum(), by_differences, rtol=1e-6, atol=1e-9)
    chain_alone = a_defense(Mixture(points), denoise=False, gradient="exact")
    (other,) = torch.autograd.grad(
        (chain_alone.replica_logits(x, generator=seeded(5)) * v).sum(), x
    )
    assert (other - pulled).abs().max() > 1e-2


def test_an_energy_that_states_no_sigma_cannot_be_denoised_with(tiny_energy) -> None:
    with pytest.raises(ValueError, match="energy: states no sigma"):
        denoised(tiny_energy, torch.zeros(1, 1, 8, 8), TAU)
    with pytest.raises(ValueError, match="energy: states no sigma"):
        a_defense(tiny_energy, denoise=True)
    a_defense(tiny_energy, denoise=False)
    with pytest.raises(ValueError, match="sigma: expected >= 0 or None, got -1"):
        ConvEnergy(image_size=8, channels=1, width=4, sigma=-1.0)
