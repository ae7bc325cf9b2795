"""An attacker who knows the noise: a deterministic function, image by image."""

import torch
from torch import Tensor, nn

from defense.attack import AttackConfig, run_attack
from defense.eot import EOTDefense
from defense.known_noise import KnownNoise
from defense.rng import make_generator
from defense.systems.smoothing import GaussianNoise
from defense.threat import ThreatModel

Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = 20 * self.layer(x.flatten(1))
        return logits


def defense(replicas: int = 4) -> EOTDefense:
    torch.manual_seed(0)
    return EOTDefense(Net(), GaussianNoise(0.5), replicas=replicas, seed=0, gradient="exact")


def images() -> Tensor:
    return torch.rand(6, 1, 4, 4, generator=make_generator(0, "images"))


def test_every_call_is_the_same_and_images_do_not_depend_on_each_other() -> None:
    known, x = KnownNoise(defense(), "a seed"), images()
    whole = known(x)
    assert torch.equal(known(x), whole)
    assert torch.equal(known(x[[4, 1]]), whole[[4, 1]])
    assert not torch.equal(KnownNoise(defense(), "another")(x), whole)


def test_it_is_the_defense_with_the_noise_of_its_seed() -> None:
    x, generator = images()[:1], make_generator("a seed", "known")
    known = KnownNoise(defense(), "a seed")
    torch.testing.assert_close(known(x), defense()(x, generator=generator))


def test_knowing_the_noise_breaks_more() -> None:
    """The same attack, of the same strength, where noise hides a linear classifier."""
    x, config = images(), AttackConfig(ThreatModel("linf", 12), 20, 3)

    def robust(surrogate: nn.Module, target: nn.Module) -> int:
        y = target(x).argmax(1)
        record = run_attack(surrogate, target, x, y, config, generator=make_generator(1))
        return int(record.robust(y).sum())

    known = KnownNoise(defense(1), 3)
    found = run_attack(known, known, x, known(x).argmax(1), config, generator=make_generator(1))
    broken = found.broken_at >= 0
    # Every break repeats: there is no noise left between the attack and the judge.
    assert not (found.adversarial_logits.argmax(1) == known(x).argmax(1))[broken].any()
    unknown = EOTDefense(defense().classifier, GaussianNoise(0.5), replicas=1, seed=9)
    fresh = EOTDefense(defense().classifier, GaussianNoise(0.5), replicas=200, seed=10)
    assert robust(known, known) <= robust(unknown, fresh)
