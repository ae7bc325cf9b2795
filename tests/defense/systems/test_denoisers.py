"""The denoiser, and MALADE's chain along its score."""

import math

import torch
from torch import Tensor, nn

from defense.rng import make_generator
from defense.systems import MALADE, Fit, ScorePurification, Trainer
from defense.systems.denoiser import Denoiser, DenoiserSystem, squared_error
from defense.systems.malade import ScoreLangevin


class Gaussian(nn.Module):
    """The posterior mean under N(m, s^2) and noise sigma: a denoiser whose score is known."""

    mean, spread = 0.3, 0.2

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        weight = self.spread**2 / (self.spread**2 + sigma**2)
        return self.mean + weight * (x - self.mean)


def test_the_chain_samples_the_density_whose_score_the_denoiser_has() -> None:
    sigma = 0.15
    chain = ScoreLangevin(Gaussian(), sigma, step=0.1 * sigma**2, steps=400, temperature=1.0)
    x = torch.zeros(4000, 1, 1, 1)
    end = chain(x, generator=make_generator(0)).flatten()
    assert math.isclose(float(end.mean()), 0.3, abs_tol=0.02)
    assert math.isclose(float(end.var()), 0.2**2 + sigma**2, rel_tol=0.08)


def test_one_step_of_the_chain_by_hand() -> None:
    torch.manual_seed(0)
    denoiser, x = Denoiser(1, 4, 3), torch.rand(2, 1, 4, 4)
    found = ScoreLangevin(denoiser, 0.2, 0.01, 1, 0.25)(x, generator=make_generator(1))
    noise = torch.randn(x.shape, generator=make_generator(1))
    by_hand = x + 0.005 * (denoiser(x, 0.2) - x) / 0.04 + 0.1 * 0.5 * noise
    torch.testing.assert_close(found, by_hand)


def test_the_squared_error_is_that_of_the_noise() -> None:
    torch.manual_seed(0)
    denoiser, x = Denoiser(1, 4, 3), torch.rand(3, 1, 4, 4)
    sigma = torch.tensor([0.1, 0.2, 0.3])
    loss = squared_error(denoiser, x, sigma, generator=make_generator(2))
    noise = torch.randn(x.shape, generator=make_generator(2))
    errors = [
        (denoiser((x + s * noise)[i : i + 1], float(s)) - x[i : i + 1]).square().mean() / s**2
        for i, s in enumerate(sigma)
    ]
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_the_supervised_loss_adds_the_classifier() -> None:
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    settings = {"width": 4, "depth": 3, "sigma": 0.2, "fit": Fit(1, 2, 1e-3)}
    chain = {"steps": 2, "pull": 0.1, "temperature": 0.0}
    x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    network = MALADE(**settings, supervision=0.0, **chain).network((1, 4, 4), bare)

    def loss(supervision: float) -> Tensor:
        system = MALADE(**settings, supervision=supervision, **chain)
        return system.loss(network, bare, x, y, generator=make_generator(3))

    generator = make_generator(3)
    torch.randn(x.shape, generator=generator)
    noisy = x + 0.2 * torch.randn(x.shape, generator=generator)
    crossed = nn.functional.cross_entropy(bare(network(noisy, 0.2)), y)
    torch.testing.assert_close(loss(0.5) - loss(0.0), 0.5 * crossed)


def test_noise_levels_of_the_training_lie_between_last_and_sigma() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            seen.append(sigma)
            return x

    system = ScorePurification(4, 3, 0.4, Fit(1, 2, 1e-3), 0.05, 10)
    x = torch.rand(1000, 1, 2, 2)
    system.loss(Spy(), nn.Identity(), x, x, generator=make_generator(0))
    assert 0.05 <= float(seen[0].min()) < 0.055
    assert 0.38 < float(seen[0].max()) <= 0.4
    assert math.isclose(float(seen[0].log().mean()), math.log(0.05 * 0.4) / 2, abs_tol=0.05)


def trainer(updates: int = 30) -> Trainer:
    torch.manual_seed(0)
    fit = Fit(updates, 8, 1e-2)
    system = DenoiserSystem(8, 3, 0.2, fit)
    bare = nn.Identity()
    x = torch.rand(20, 1, 1, 1, generator=make_generator(0)).expand(-1, 1, 6, 6)
    network = system.network((1, 6, 6), bare)
    y = torch.zeros(20, dtype=torch.int64)
    return Trainer(system, fit, network, bare, x, y, generator=make_generator(1))


def test_training_lowers_the_loss_and_resumes_exactly() -> None:
    whole = trainer()
    losses = [whole.step() for _ in range(30)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    first, second = trainer(), trainer()
    for _ in range(11):
        first.step()
    second.load_state_dict(first.state_dict())
    rest = [second.step() for _ in range(19)]
    assert rest == losses[11:]
    for one, other in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(one, other)
