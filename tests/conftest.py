"""Shared pieces: an energy and classifiers whose answers are known by hand, and tiny real nets."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Generator, Tensor, nn

from defense.energy import ConvEnergy
from defense.fast import precision
from defense.inference import freeze
from defense.nets.wide_resnet import WideResNet
from tests.digits_model import digits_model, smooth_digits_model
from tests.tiny import experiment

__all__ = ["digits_model", "experiment", "smooth_digits_model"]


@pytest.fixture(autouse=True, scope="session")
def bfloat16_is_bfloat16() -> Iterator[None]:
    """On a CPU without kernels for it, too, where the library would compute in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("defense.fast.precision.runs_bfloat16", lambda device: True)
        yield


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without kernels for it."""
    for place in ("defense.fast.precision", "stages.core.hardware"):
        monkeypatch.setattr(f"{place}.runs_bfloat16", lambda device: device.type != "cpu")
    precision._warn.cache_clear()


class QuadraticEnergy(nn.Module):
    """f(x) = a/2 |x|^2, so that a step without noise multiplies x by 1 - a; counts its calls."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 0.5 * self.a * x.flatten(1).square().sum(1)


class BrightnessClassifier(nn.Module):
    """Class 1 where the mean pixel exceeds ``threshold``, linear in x; remembers its batches."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x.detach().clone())
        excess = x.flatten(1).mean(1) - self.threshold
        return torch.stack([-excess, excess], dim=1)

    @property
    def batch_sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


class WindowClassifier(BrightnessClassifier):
    """Class 1 only where the mean pixel lies within ``width`` above ``threshold``."""

    def __init__(self, threshold: float, width: float) -> None:
        super().__init__(threshold)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        excess = super().forward(x)[:, 1]
        inside = torch.minimum(excess, self.width - excess)
        return torch.stack([-inside, inside], dim=1)


@pytest.fixture
def quadratic() -> type[QuadraticEnergy]:
    return QuadraticEnergy


@pytest.fixture
def brightness() -> type[BrightnessClassifier]:
    return BrightnessClassifier


@pytest.fixture
def window() -> type[WindowClassifier]:
    return WindowClassifier


@pytest.fixture
def seeded() -> Callable[..., Generator]:
    """``seeded()`` is a fresh generator, the same at every call."""
    return lambda seed=0: Generator().manual_seed(seed)


@pytest.fixture
def tiny_energy() -> ConvEnergy:
    """A network for 8x8 gray images; with weights this large two steps move an image visibly."""
    torch.manual_seed(1)
    energy = ConvEnergy(image_size=8, channels=1, width=4)
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.mul_(2.0)
    return energy


@pytest.fixture
def tiny_classifier() -> WideResNet:
    """A frozen Wide ResNet for 8x8 gray images of three classes."""
    torch.manual_seed(2)
    return freeze(WideResNet(depth=10, width=1, classes=3, channels=1))


@pytest.fixture
def images(seeded: Callable[..., Generator]) -> Tensor:
    """Five gray 8x8 images in [0, 1]."""
    return torch.rand(5, 1, 8, 8, generator=seeded(3))
