"""A chain in bfloat16 is admitted by what it does to accuracy: chaotic values cannot agree.

The networks are trained here, shortly, on the real digits.
"""

import pytest
import torch
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from torch import Tensor

from defense.attack import AttackConfig, run_attack
from defense.bank import ImageBank, NoisyImages
from defense.classifier_training import ClassifierTrainConfig, ClassifierTrainer
from defense.ebm_training import EBMTrainConfig, EBMTrainer
from defense.energy import ConvEnergy
from defense.eot import EOTDefense
from defense.fast.langevin import FastLangevin
from defense.fast.precision import Precision
from defense.inference import freeze
from defense.langevin import LangevinConfig
from defense.nets.wide_resnet import WideResNet
from defense.pixels import to_net
from defense.rng import make_generator
from defense.studies.diagnostics import energies
from defense.threat import ThreatModel

TAU, K, TEST = 0.08, 30, 300
PRECISIONS: tuple[Precision, Precision] = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """All digits, (1797,1,8,8) pixels and labels, in a fixed random order."""
    bunch = load_digits()
    order = torch.randperm(1797, generator=make_generator(0, "order", device=torch.device("cpu")))
    pixels = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return pixels[order], torch.tensor(bunch.target)[order]


@pytest.fixture(scope="module")
def classifier(digits) -> WideResNet:
    torch.manual_seed(0)
    config = ClassifierTrainConfig(
        epochs=6,
        batch=64,
        learning_rate=0.1,
        schedule="one_cycle",
        milestones=(),
        warm_up=0.3,
        momentum=0.9,
        weight_decay=2e-4,
        crop=0,
        flip=False,
        precision="float32",
    )
    network = WideResNet(depth=10, width=1, classes=10, channels=1)
    generator = make_generator(0, "classifier", device=torch.device("cpu"))
    images, labels = (part[TEST:] for part in digits)
    trainer = ClassifierTrainer(network, images, labels, config, generator=generator)
    for _ in range(config.epochs):
        trainer.epoch()
    return freeze(network)


@pytest.fixture(scope="module")
def energy(digits) -> ConvEnergy:
    torch.manual_seed(0)
    net = ConvEnergy(image_size=8, channels=1, width=16)
    generator = make_generator(0, "ebm", device=torch.device("cpu"))
    images = to_net(digits[0][TEST:])
    bank = ImageBank.uniform(images.shape, generator=generator)
    config = EBMTrainConfig("adam", 2e-3, 100, LangevinConfig(4, TAU), "float32")
    chain = FastLangevin()
    data = NoisyImages(images, 0.12)
    trainer = EBMTrainer(net, data, bank, config, generator=generator, chain=chain)
    for _ in range(500):
        trainer.update()
    return freeze(net)


@pytest.fixture(scope="module")
def accuracies(digits, classifier, energy) -> dict[str, dict[str, int]]:
    """How many of the test images each precision gets right, natural and under transferred PGD."""
    x, y = (part[:TEST] for part in digits)
    config = AttackConfig(ThreatModel("linf", 48), 10, 12, stop_at_break=False)
    generator = make_generator(0, "attack", device=x.device)
    record = run_attack(classifier, classifier, x, y, config, generator=generator)
    assert record.robust(y).float().mean() < 0.1
    right: dict[str, dict[str, int]] = {}
    for precision in PRECISIONS:
        defense = EOTDefense(
            classifier,
            energy,
            LangevinConfig(K, TAU),
            replicas=5,
            seed=precision,  # noise of its own
            chain=FastLangevin(precision=precision),
        )
        with torch.no_grad():
            right[precision] = {
                name: int((defense(images).argmax(1) == y).sum())
                for name, images in (("natural", x), ("defended", record.adversarial))
            }
    return right


@pytest.mark.parametrize(("images", "least"), [("natural", 0.9), ("defended", 0.3)])
def test_bfloat16_is_as_accurate_as_float32(accuracies, images: str, least: float) -> None:
    float32, bfloat16 = (accuracies[precision][images] for precision in PRECISIONS)
    interval = binomtest(float32, TEST).proportion_ci(method="wilson")
    assert float32 / TEST > least
    assert interval.low <= bfloat16 / TEST <= interval.high


def test_bfloat16_chains_have_the_energies_of_float32_chains(digits, energy) -> None:
    x, levels = to_net(digits[0][:TEST]), []
    for precision in PRECISIONS:
        generator = make_generator(0, precision, device=x.device)
        chain = FastLangevin(precision=precision)
        end = chain(energy, x, LangevinConfig(200, TAU), generator=generator)
        levels.append(energies(energy, end, tau=TAU, batch=TEST))
    exact, low = levels
    error = ((exact.var() + low.var()) / TEST).sqrt()
    assert abs(low.mean() - exact.mean()) < 5 * error
    assert not torch.equal(exact, low)
