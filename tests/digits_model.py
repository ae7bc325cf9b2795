"""Nets that have learned the digits, on which an attack means something: ten seconds, once.

What `make tables` trains, in fewer updates. The bare classifier is right about 98 % of the test
images, and after PGD about none; defended by 30 Langevin steps it is still right about 98 %.
"""

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from defense.bank import ImageBank, NoisyImages
from defense.classifier_training import ClassifierTrainConfig, ClassifierTrainer
from defense.ebm_training import EBMTrainConfig, EBMTrainer
from defense.energy import ConvEnergy
from defense.fast.langevin import FastLangevin
from defense.inference import freeze
from defense.langevin import LangevinConfig
from defense.nets.wide_resnet import WideResNet
from defense.pixels import from_bytes, to_net
from defense.rng import make_generator
from stages.prepare_data import read_digits

Net = TypeVar("Net", bound=nn.Module)

TAU = 0.08
EPOCHS = 10
UPDATES = 500  # of Adam, and then of SGD


@dataclass(frozen=True)
class DigitsModel:
    """Frozen nets and the test images, in a random order: the first few are a fair sample."""

    classifier: WideResNet
    energy: ConvEnergy
    images: Tensor  # (500,1,8,8) pixels
    labels: Tensor  # (500,)
    tau: float


@cache
def trained(activation: str = "leaky_relu") -> DigitsModel:
    """The nets, the same in every process; energies of different activations share a classifier."""
    images, labels = split("test")
    return DigitsModel(trained_classifier(), trained_energy(activation), images, labels, TAU)


def split(name: str) -> tuple[Tensor, Tensor]:
    """Pixels (N,1,8,8) and labels (N,) of a split, in a fixed random order."""
    images, labels, _ = read_digits(name)
    order = torch.randperm(len(labels), generator=make_generator(0, "order", "digits", name))
    return from_bytes(images[order]), labels[order]


@cache
def trained_classifier() -> WideResNet:
    """SGD as in the digits preset, in fewer epochs."""
    images, labels = split("train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = WideResNet(depth=10, width=1, classes=10, channels=1)
    config = ClassifierTrainConfig(
        epochs=EPOCHS,
        batch=64,
        learning_rate=0.1,
        schedule="step",
        milestones=(5, 8),
        warm_up=0.0,
        momentum=0.9,
        weight_decay=2e-4,
        crop=0,
        flip=False,
        precision="float32",
    )
    generator = make_generator(0, "classifier")
    trainer = ClassifierTrainer(classifier, images, labels, config, generator=generator)
    for _ in range(config.epochs):
        trainer.epoch()
    return at_rest(classifier)


@cache
def trained_energy(activation: str) -> ConvEnergy:
    """Algorithm 2 as in the digits preset: Adam, then SGD on the same weights and chains."""
    images = to_net(split("train")[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        energy = ConvEnergy(image_size=8, channels=1, width=16, activation=activation)
    generator = make_generator(0, "ebm")
    bank = ImageBank.uniform(images.shape, generator=generator)
    for optimizer in ("adam", "sgd"):
        config = EBMTrainConfig(
            optimizer=optimizer,
            learning_rate=2e-3,
            batch=100,
            langevin=LangevinConfig(steps=4, tau=TAU),
            precision="float32",
        )
        trainer = EBMTrainer(
            energy,
            NoisyImages(images, 0.12),
            bank,
            config,
            generator=generator,
            chain=FastLangevin(),
        )
        for _ in range(UPDATES):
            trainer.update()
    return at_rest(energy)


def at_rest(net: Net) -> Net:
    """Frozen, and without the gradients of its last update: any that is found later is new."""
    net.zero_grad()
    return freeze(net)


@pytest.fixture(scope="session")
def digits_model() -> DigitsModel:
    """The nets of the digits preset: an energy with leaky ReLU."""
    return trained()


@pytest.fixture(scope="session")
def smooth_digits_model() -> DigitsModel:
    """The same classifier, and an energy whose Hessian is not zero."""
    return trained("smooth_leaky_relu")
