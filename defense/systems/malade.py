"""MALADE (Srinivasan et al. 2019): Langevin steps along the score of a denoising autoencoder."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from defense.purifier import Purifier
from defense.systems.denoiser import DenoiserSystem


@dataclass(frozen=True)
class ScoreLangevin:
    """X_{k+1} = X_k + (step / 2) (r(X_k) - X_k) / sigma^2 + noise, from X_0 = x.

    (r(x) - x) / sigma^2 estimates the gradient of the log density of images with noise sigma
    (Alain & Bengio 2014). The noise has variance ``step`` times ``temperature``. The Metropolis
    test of the paper's chain is left out: its acceptance needs an energy, and r has none.
    """

    denoiser: nn.Module
    sigma: float
    step: float
    steps: int
    temperature: float

    differentiable = True

    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor:
        """Pixels (N,C,H,W) -> the same shape."""
        spread = math.sqrt(self.step * self.temperature)
        for _ in range(self.steps):
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            score = (self.denoiser(x, self.sigma) - x) / self.sigma**2
            x = x + 0.5 * self.step * score + spread * noise
        return x


@dataclass(frozen=True)
class MALADE(DenoiserSystem):
    """A supervised denoising autoencoder, and ``steps`` Langevin steps along its score.

    Its loss is the squared error plus ``supervision`` times the cross-entropy of the frozen
    classifier on the denoised image, so the score leads towards images of the right class. A step
    of the chain is ``pull`` times sigma^2.
    """

    title: ClassVar[str] = "MALADE"
    source: ClassVar[str] = "Srinivasan et al. 2019"
    own_attack: ClassVar[str] = "transfer"

    supervision: float
    steps: int
    pull: float
    temperature: float

    def loss(
        self, network: Any, bare: nn.Module, x: Tensor, y: Tensor, *, generator: Generator
    ) -> Tensor:
        squared = super().loss(network, bare, x, y, generator=generator)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        logits = bare(network(x + self.sigma * noise, self.sigma))
        return squared + self.supervision * F.cross_entropy(logits, y)

    def purifier(self, network: Any) -> Purifier:
        step = self.pull * self.sigma**2
        return ScoreLangevin(network, self.sigma, step, self.steps, self.temperature)
