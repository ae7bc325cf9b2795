"""Randomized smoothing: the vote and the certificate against ART and by hand."""

import math

import numpy as np
import torch
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from defense.eot import EOTDefense
from defense.rng import make_generator
from defense.systems import Fit
from defense.systems.denoiser import Denoiser
from defense.systems.score import NoiseThenDenoise
from defense.systems.smoothing import (
    ABSTAIN,
    DenoisedSmoothing,
    GaussianNoise,
    RandomizedSmoothing,
    certified_radius,
    vote,
)


def test_a_vote_is_clear_only_if_a_coin_would_hardly_do_it() -> None:
    assert vote(torch.tensor([9, 1, 0]), 0.05) == 0  # 22 of 1024 splits are as uneven
    assert vote(torch.tensor([1, 9, 0]), 0.02) == ABSTAIN
    assert vote(torch.tensor([50, 50]), 0.05) == ABSTAIN
    assert vote(torch.tensor([0, 0, 100]), 1e-3) == 2


def test_the_radius_follows_from_the_exact_bound_on_the_share() -> None:
    """Clopper and Pearson's, as scipy has it: of two sides that are wrong by alpha each."""
    for votes, of, alpha in ((990, 1000, 0.001), (600, 1000, 0.001), (100, 100, 0.05)):
        share = binomtest(votes, of).proportion_ci(1 - 2 * alpha, "exact").low
        radius = certified_radius(torch.tensor([of - votes, votes]), 1, 0.25, alpha)
        assert math.isclose(radius, 0.25 * norm.ppf(share), rel_tol=1e-6)


def test_no_majority_is_no_certificate() -> None:
    assert certified_radius(torch.tensor([500, 500]), 0, 0.25, 1e-3) == 0.0
    assert certified_radius(torch.tensor([0, 100]), 0, 0.25, 1e-3) == 0.0


class Halfplane(nn.Module):
    """Class 1 where the mean pixel is above one half: its smoothed radius is known."""

    def forward(self, x: Tensor) -> Tensor:
        distance = (x.flatten(1).mean(1) - 0.5) * math.sqrt(x[0].numel())
        return torch.stack([-distance, distance], dim=1)


def test_the_certificate_of_a_half_plane_is_the_distance_to_it() -> None:
    x = torch.full((1, 1, 4, 4), 0.55)
    distance = 0.05 * 4
    defense = EOTDefense(Halfplane(), GaussianNoise(0.25), replicas=20_000, seed=0)
    votes = defense.replica_logits(x).argmax(2).flatten().bincount(minlength=2)
    radius = certified_radius(votes, 1, 0.25, 1e-3)
    assert 0.9 * distance < radius < distance


def test_the_noise_is_gaussian_and_its_gradient_is_the_identity() -> None:
    x = torch.full((1000, 1, 8, 8), 0.5)
    noise = GaussianNoise(0.25)(x, generator=make_generator(0)) - x
    assert abs(float(noise.mean())) < 0.005
    assert math.isclose(float(noise.std()), 0.25, rel_tol=0.02)
    one = x[:1].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(GaussianNoise(0.25)(one, generator=make_generator(0)).sum(), one)
    assert torch.equal(slope, torch.ones_like(slope))


def test_denoised_smoothing_is_one_denoising_of_the_noisy_image() -> None:
    torch.manual_seed(0)
    system = DenoisedSmoothing(8, 3, 0.2, Fit(1, 2, 1e-3))
    denoiser = system.network((1, 6, 6), nn.Identity())
    x = torch.rand(2, 1, 6, 6)
    purified = system.purifier(denoiser)(x, generator=make_generator(3))
    noisy = GaussianNoise(0.2)(x, generator=make_generator(3))
    torch.testing.assert_close(purified, denoiser(noisy, 0.2))


def test_noise_then_denoise_ends_where_a_perfect_denoiser_points() -> None:
    class Perfect(nn.Module):
        def forward(self, x: Tensor, sigma: float) -> Tensor:
            return torch.full_like(x, 0.25)

    purify = NoiseThenDenoise(Perfect(), (0.4, 0.2, 0.1))
    x = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(
        purify(x, generator=make_generator(0)), torch.full_like(x, 0.25), atol=1e-6, rtol=0.0
    )


def test_the_denoising_steps_are_those_of_the_probability_flow() -> None:
    """Karras et al. (2022), Algorithm 1 without its correction: x + (t' - t) (x - D) / t."""
    torch.manual_seed(0)
    denoiser, sigmas = Denoiser(1, 4, 3), (0.5, 0.2, 0.1)
    x = torch.rand(2, 1, 4, 4)
    found = NoiseThenDenoise(denoiser, sigmas)(x, generator=make_generator(5))
    state = x + 0.5 * torch.randn(x.shape, generator=make_generator(5))
    for now, after in ((0.5, 0.2), (0.2, 0.1), (0.1, 0.0)):
        state = state + (after - now) * (state - denoiser(state, now)) / now
    torch.testing.assert_close(found, state)


def test_retraining_sees_noisy_images() -> None:
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    system = RandomizedSmoothing(Fit(1, 2, 1e-3), 0.25)
    x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    loss = system.loss(bare, bare, x, y, generator=make_generator(7))
    noisy = x + 0.25 * torch.randn(x.shape, generator=make_generator(7))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(bare(noisy), y))
    own = system.network((1, 4, 4), bare)
    assert own is not bare
    assert system.classifier(bare, own) is own
    assert np.allclose(own[1].weight.detach(), bare[1].weight.detach())
