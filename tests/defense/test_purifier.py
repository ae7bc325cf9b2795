"""Any purifier in the paper's place: what it must do, how an attack goes back through it."""

import pytest
import torch
from torch import Generator, Tensor, nn

from defense.attack import AttackConfig, loss_gradient, run_attack
from defense.eot import EOTDefense
from defense.langevin import LangevinConfig
from defense.purifier import LangevinPurifier, Purifier, WayBack
from defense.threat import ThreatModel

Y = torch.tensor([0, 1, 2, 0, 1])


class Blur(nn.Module):
    """Noise, then half of each pixel; autograd knows the way back."""

    differentiable = True

    def forward(self, x: Tensor, *, generator: Generator) -> Tensor:
        return 0.5 * (x + 0.1 * torch.randn(x.shape, generator=generator))


class Quantize:
    """A function without a gradient, as JPEG is; nothing says how to go back."""

    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor:
        return (4 * x + torch.rand(x.shape, generator=generator) - 0.5).round() / 4


class Mirror:
    """Turns images around, and knows that its way back is the same."""

    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor:
        return x.flip(-1)

    def with_way_back(self, x: Tensor, *, generator: Generator) -> tuple[Tensor, WayBack]:
        return self(x, generator=generator), lambda v: v.flip(-1)


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("gradient", ["identity", "exact", "smoothed"])
@pytest.mark.parametrize("denoise", [False, True])
def test_an_energy_and_a_config_are_short_for_their_purifier(
    tiny_energy, images, gradient: str, denoise: bool
) -> None:
    tiny_energy.sigma = 0.1
    config, classifier = LangevinConfig(3, 0.1, denoise), linear()
    short = EOTDefense(classifier, tiny_energy, config, replicas=2, seed=1, gradient=gradient)
    purifier = LangevinPurifier(
        tiny_energy, config, softness=0.01 if gradient == "smoothed" else None
    )
    way = "exact" if gradient == "smoothed" else gradient
    long = EOTDefense(classifier, purifier, replicas=2, seed=1, gradient=way)
    ours, theirs = (loss_gradient(defense, images, Y) for defense in (short, long))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("max_chains", [100, 4])
def test_the_exact_gradient_is_autograds_where_a_purifier_is_differentiable(
    images, max_chains: int
) -> None:
    classifier, options = linear(), {"replicas": 3, "seed": 0, "max_chains": max_chains}
    bpda = EOTDefense(classifier, Blur(), **options)
    exact = EOTDefense(classifier, Blur(), gradient="exact", **options)
    identity, logits = loss_gradient(bpda, images, Y)
    gradient, same = loss_gradient(exact, images, Y)
    assert torch.equal(logits, same)
    torch.testing.assert_close(gradient, 0.5 * identity)


def test_a_purifier_may_know_its_own_way_back(images) -> None:
    classifier = linear()
    bpda, exact = (
        EOTDefense(classifier, Mirror(), replicas=2, gradient=g) for g in ("identity", "exact")
    )
    identity, _ = loss_gradient(bpda, images, Y)
    gradient, _ = loss_gradient(exact, images, Y)
    assert torch.equal(gradient, identity.flip(-1))
    assert bpda.gradient_is_identity is None
    assert exact.gradient_is_identity is False


def test_a_purifier_without_a_way_back_is_attacked_with_the_identity(images) -> None:
    attacked, judge = (
        EOTDefense(linear(), Quantize(), replicas=4, seed=seed) for seed in ("attacker", "judge")
    )
    config = AttackConfig(ThreatModel("linf", 32), steps=4, step_255=16, stop_at_break=False)
    record = run_attack(attacked, judge, images, Y, config, generator=Generator().manual_seed(0))
    first, largest, _ = record.losses.unbind(1)
    assert (largest > first).all()
    assert bool(record.through_chain.all())


def test_the_noise_of_a_purifier_is_the_defenses(images) -> None:
    first, again = (EOTDefense(linear(), Quantize(), replicas=2, seed=5) for _ in range(2))
    assert torch.equal(first(images), again(images))
    assert not torch.equal(first(images), EOTDefense(linear(), Quantize(), replicas=2)(images))


def test_a_purifier_with_modes_is_asked_in_evaluation_mode(images) -> None:
    class Dropped(nn.Module):
        differentiable = True

        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, *, generator: Generator) -> Tensor:
            return self.drop(x)

    purifier = Dropped().train()
    for gradient in ("identity", "exact"):
        defense = EOTDefense(linear(), purifier, replicas=1, gradient=gradient)
        torch.testing.assert_close(loss_gradient(defense, images, Y)[1], linear()(images))
    assert purifier.drop.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "exact"}, "Quantize has neither `with_way_back` nor `differentiable = True`"),
        ({"gradient": "smoothed"}, "gradient: expected 'identity' or 'exact' of a purifier"),
        ({"segment": 3}, "segment: belongs to a purifier; with an energy, a LangevinConfig is"),
        ({"gradient": "bpda"}, "gradient: expected one of"),
    ],
)
def test_what_a_purifier_cannot_do_is_said_at_once(options: dict, message: str) -> None:
    quantize: Purifier = Quantize()
    with pytest.raises(ValueError, match=message):
        EOTDefense(linear(), quantize, replicas=2, **options)


def test_what_is_no_purifier_is_refused(tiny_energy) -> None:
    for other in (3, tiny_energy, nn.Identity()):
        with pytest.raises(ValueError, match=r"purifier: expected one .* give a LangevinConfig"):
            EOTDefense(linear(), other, replicas=2)
