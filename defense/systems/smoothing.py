"""Randomized smoothing (Cohen et al. 2019) and denoised smoothing (Salman et al. 2020).

The defense classifies copies with Gaussian noise. Its certificate: within an l_2 radius of the
image, no attack changes the majority vote over all noise.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.stats import beta, binomtest, norm
from torch import Generator, Tensor

from defense.purifier import Purifier
from defense.systems.denoiser import DenoiserSystem
from defense.systems.score import NoiseThenDenoise
from defense.systems.system import RetrainedSystem

ABSTAIN = -1
"""The prediction where the vote is not clear."""


def vote(counts: Tensor, alpha: float) -> int:
    """The class of most votes, or `ABSTAIN`: PREDICT of Cohen et al. (2019), Section 3.2.2.

    ``counts`` (classes,) of the predictions of noisy copies. The vote is clear if a fair coin would
    split the votes of the first two classes as unevenly with probability at most ``alpha``.
    """
    (first, second), (top, _) = counts.topk(2)
    of = int(first + second)
    clear = of > 0 and binomtest(int(first), of, 0.5).pvalue <= alpha
    return int(top) if clear else ABSTAIN


def certified_radius(counts: Tensor, top: int, sigma: float, alpha: float) -> float:
    """The l_2 radius, in pixels, within which the majority is ``top``; 0 without a certificate.

    CERTIFY of Cohen et al. (2019): sigma Phi^-1(p), p the Clopper-Pearson lower bound on the share
    of ``top`` at level ``alpha``. ``counts`` (classes,) come from other copies than those that
    chose ``top``.
    """
    votes, of = int(counts[top]), int(counts.sum())
    share = float(beta.ppf(alpha, votes, of - votes + 1)) if votes else 0.0
    return sigma * float(norm.ppf(share)) if share > 0.5 else 0.0


@dataclass(frozen=True)
class GaussianNoise:
    """x + sigma z, sigma in pixels."""

    sigma: float

    differentiable = True

    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return x + self.sigma * noise


@dataclass(frozen=True)
class RandomizedSmoothing(RetrainedSystem):
    """Noise ``sigma``, in pixels, and a classifier trained further on images with that noise."""

    title: ClassVar[str] = "randomized smoothing"
    source: ClassVar[str] = "Cohen et al. 2019"
    own_attack: ClassVar[str] = ""

    sigma: float

    def purifier(self, network: Any) -> Purifier:
        return GaussianNoise(self.sigma)


@dataclass(frozen=True)
class DenoisedSmoothing(DenoiserSystem):
    """Noise ``sigma``, and one pass of a denoiser trained for it, before the bare classifier."""

    title: ClassVar[str] = "denoised smoothing"
    source: ClassVar[str] = "Salman et al. 2020"
    own_attack: ClassVar[str] = ""

    def purifier(self, network: Any) -> Purifier:
        return NoiseThenDenoise(network, (self.sigma,))
