"""The Langevin chain, equation (3) of Hill et al. (2021): the plain reference, on autograd.

Energies here return f = (tau^2 / 2) U, so the paper's step

    X_{k+1} = X_k - (tau^2 / 2) dU/dX (X_k) + tau Z_k,    Z_k ~ N(0, I)

reads ``x - df/dx + tau z``. Its stationary density is proportional to exp(-U) = exp(-2 f / tau^2)
as tau -> 0. States are never clipped and may leave the net range [-1, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Generator, Tensor

EnergyFn = Callable[[Tensor], Tensor]
"""Images (N,C,H,W) in net range -> energies f (N,)."""


@dataclass(frozen=True)
class LangevinConfig:
    """One chain: ``steps`` is the paper's K, ``tau`` its step size, in net-range units.

    ``tau`` must be the one that the energy was trained with, since the network returns
    (tau^2 / 2) U. ``denoise`` asks the caller to denoise the end of the chain (`denoised`); the
    chain itself ignores it.
    """

    steps: int
    tau: float
    denoise: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: expected >= 0, got {self.steps}")
        if not self.tau >= 0:
            raise ValueError(f"tau: expected >= 0, got {self.tau}")


@dataclass
class ChainLog:
    """Diagnostics of a chain: energy and gradient norm of each of N images, before every step."""

    energies: list[Tensor] = field(default_factory=list)  # f(X_k), K rows (N,)
    gradient_norms: list[Tensor] = field(default_factory=list)  # l_2 norm of df/dx, K rows (N,)

    def add(self, energies: Tensor, gradient: Tensor) -> None:
        """One step: energies (N,) and df/dx (N,C,H,W) at the state that it starts from."""
        self.energies.append(energies)
        self.gradient_norms.append(gradient.flatten(1).norm(dim=1))

    def mean_gradient_norm(self) -> Tensor:
        """Over chains and steps; NaN if there was no step."""
        rows = self.gradient_norms
        return torch.stack(rows).mean() if rows else torch.tensor(torch.nan)


class Chain(Protocol):
    """The call that every implementation of the chain offers; `langevin` is the reference."""

    def __call__(
        self,
        energy: EnergyFn,
        x: Tensor,
        config: LangevinConfig,
        *,
        generator: Generator | None,
        log: ChainLog | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor: ...


def energy_and_gradient(energy: EnergyFn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Energy f (N,) and gradient df/dx (N,C,H,W) at x (N,C,H,W), in any grad mode of the caller."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().detach().requires_grad_(True)
        f = energy(x)
        (gradient,) = torch.autograd.grad(f.sum(), x)
    return f.detach(), gradient


def langevin(
    energy: EnergyFn,
    x: Tensor,
    config: LangevinConfig,
    *,
    generator: Generator | None,
    log: ChainLog | None = None,
    states: list[Tensor] | None = None,
) -> Tensor:
    """K Langevin steps from x, (N,C,H,W) in net range -> the same shape, detached.

    ``generator`` lives on the device of x; None draws from the global stream. ``steps=0`` is the
    identity, ``tau=0`` plain gradient descent. X_0 to X_{K-1}, one before every step, are appended
    to ``states``. Hill et al. (2021), equation (3).
    """
    x = x.detach()
    for _ in range(config.steps):
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        f, gradient = energy_and_gradient(energy, x)
        if log is not None:
            log.add(f, gradient)
        if states is not None:
            states.append(x)
        x = x - gradient + config.tau * noise
    return x


def denoised(energy: EnergyFn, x: Tensor, tau: float, *, chain: Chain = langevin) -> Tensor:
    """Posterior mean of each clean image given a noisy one: x (N,C,H,W) in net range -> the same.

    An energy trained on images plus noise N(0, sigma^2) models noisy images, so its chains end with
    that noise. Tweedie's formula (Efron 2011) removes it in one step,

        E[image | x] = x - sigma^2 dU/dx = x - (2 sigma^2 / tau^2) df/dx,

    if exp(-U) is proportional to the density of noisy images. sigma is ``energy.sigma``;
    `ValueError` if that is missing. ``chain`` computes df/dx, as one step without noise.
    """
    factor = denoising_factor(energy, tau)
    # One step with tau = 0 ends at x - df/dx.
    without_noise = LangevinConfig(1, 0.0)
    moved = chain(energy, x, without_noise, generator=Generator(x.device))
    return x + factor * (moved - x)


def denoising_factor(energy: EnergyFn, tau: float) -> float:
    """2 sigma^2 / tau^2, the factor on -df/dx in `denoised`; `ValueError` without a sigma."""
    sigma: float | None = getattr(energy, "sigma", None)
    if sigma is None:
        raise ValueError(
            "energy: states no sigma, the noise on its training images, so the ends of its chains "
            "cannot be denoised; set energy.sigma, or purify without denoising"
        )
    if not tau > 0:
        raise ValueError(f"tau: expected > 0 to denoise, got {tau}")
    return 2.0 * sigma**2 / tau**2
