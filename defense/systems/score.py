"""Noise, then denoise by a learned score: the principle of ADP (Yoon et al. 2021) and of DiffPure
(Nie et al. 2022), with an iterated denoiser.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from defense.purifier import Purifier
from defense.systems.denoiser import DenoiserSystem, squared_error


@dataclass(frozen=True)
class NoiseThenDenoise:
    """x + sigmas[0] z, then from each noise level to the next and at last to none.

    One step is X <- D + (sigma' / sigma) (X - D), with D = D(X, sigma) the denoised image: an Euler
    step of the probability flow from noise sigma to sigma' (Song et al. 2021, DDIM; Karras et al.
    2022, equation 1 with s(t) = 1).
    """

    denoiser: nn.Module
    sigmas: tuple[float, ...]  # descending

    differentiable = True

    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor:
        """Pixels (N,C,H,W) -> the same shape."""
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = x + self.sigmas[0] * noise
        for sigma, after in zip(self.sigmas, (*self.sigmas[1:], 0.0), strict=True):
            clean = self.denoiser(x, sigma)
            x = clean + after / sigma * (x - clean)
        return x


@dataclass(frozen=True)
class ScorePurification(DenoiserSystem):
    """A denoiser for noise up to ``sigma``, used ``steps`` times an image.

    Noise levels fall geometrically from ``sigma`` to ``last``; the training draws them at random.
    """

    title: ClassVar[str] = "noise, then denoise"
    source: ClassVar[str] = "after Yoon et al. 2021, Nie et al. 2022"
    own_attack: ClassVar[str] = "bpda_eot"

    last: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.last <= self.sigma:
            raise ValueError(f"last: expected above 0 and at most sigma, got {self.last}")
        if self.steps < 2:
            raise ValueError(f"steps: expected >= 2, got {self.steps}")

    def loss(
        self, network: Any, bare: nn.Module, x: Tensor, y: Tensor, *, generator: Generator
    ) -> Tensor:
        share = torch.rand(len(x), generator=generator, device=x.device)
        sigma = self.sigma * (self.last / self.sigma) ** share
        return squared_error(network, x, sigma, generator=generator)

    def purifier(self, network: Any) -> Purifier:
        ratio = (self.last / self.sigma) ** (1 / (self.steps - 1))
        return NoiseThenDenoise(network, tuple(self.sigma * ratio**i for i in range(self.steps)))
