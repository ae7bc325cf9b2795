"""The Langevin chain, equation (3) of Hill et al. (2021): the plain reference, on autograd.

Energies here return f = (tau^2 / 2) U, so the paper's step

    X_{k+1} = X_k - (tau^2 / 2) dU/dX (X_k) + tau Z_k,    Z_k ~ N(0, I)

reads ``x - df/dx + tau z``. Its stationary density is proportional to exp(-U) = exp(-2 f / tau^2)
as tau -> 0. Nothing is clipped: a chain lives in net range but is not bounded by it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

EnergyFn = Callable[[Tensor], Tensor]
"""Images (N,C,H,W) in net range -> energies f (N,)."""

StepFn = Callable[[int, Tensor], None]
"""Observer ``(k, state after k steps)``; it looks and returns nothing."""


@dataclass(frozen=True)
class LangevinConfig:
    """One chain: ``steps`` is the paper's K, ``tau`` its step size, in net-range units.

    ``tau`` is that of the energy's training: the network returns (tau^2 / 2) U for that very tau.
    """

    steps: int
    tau: float

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: expected >= 0, got {self.steps}")
        if not self.tau >= 0:
            raise ValueError(f"tau: expected >= 0, got {self.tau}")


class Chain(Protocol):
    """The call that every implementation of the chain offers; `langevin` is the reference."""

    def __call__(
        self,
        energy: EnergyFn,
        x: Tensor,
        config: LangevinConfig,
        *,
        generator: Generator | None,
        on_step: StepFn | None = None,
    ) -> Tensor: ...


def energy_gradient(energy: EnergyFn, x: Tensor) -> Tensor:
    """df/dx, (N,C,H,W) -> (N,C,H,W), under whatever grad mode the caller has set."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x).sum(), x)
    return gradient


def langevin(
    energy: EnergyFn,
    x: Tensor,
    config: LangevinConfig,
    *,
    generator: Generator | None,
    on_step: StepFn | None = None,
) -> Tensor:
    """K Langevin steps from x, (N,C,H,W) in net range -> the same shape, detached.

    ``generator`` lives on the device of x; None draws from the global stream. ``steps=0`` is the
    identity, ``tau=0`` plain gradient descent. Hill et al. (2021), equation (3).
    """
    x = x.detach()
    for k in range(config.steps):
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = x - energy_gradient(energy, x) + config.tau * noise
        if on_step is not None:
            on_step(k + 1, x)
    return x
