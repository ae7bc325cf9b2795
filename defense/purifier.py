"""The purifier interface, and the paper's purifier: Langevin chains (Hill et al. 2021).

| a purifier that has ...          | gives an attack, besides BPDA's identity ...                |
|----------------------------------|-------------------------------------------------------------|
| `with_way_back`                  | its own vector-Jacobian product (gradient="exact")          |
| ``differentiable = True``        | autograd through the call (gradient="exact")                |
| neither                          | nothing: it can be attacked by BPDA or without gradients    |
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

from defense.gradient.chain import (
    MakeProduct,
    autograd_product,
    pull_back,
    run_in_segments,
    smoothed,
)
from defense.langevin import Chain, LangevinConfig, denoised, denoising_factor, langevin
from defense.pixels import to_net, to_pixels

WayBack = Callable[[Tensor], Tensor]
"""The vector-Jacobian product of one call, for its images and its noise.

v (N,C,H,W) -> v^T d(purified)/dx, the same shape.
"""


class Purifier(Protocol):
    """Pixels (N,C,H,W) in [0, 1] -> purified pixels, the same shape, in any range.

    All its noise comes from ``generator``, which is on the device of x and which the call advances.
    Images are purified independently: given its noise, the result for an image does not depend on
    the others.
    """

    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor: ...


@runtime_checkable
class Reversible(Protocol):
    """A purifier that computes its own vector-Jacobian product."""

    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor: ...

    def with_way_back(self, x: Tensor, *, generator: Generator) -> tuple[Tensor, WayBack]:
        """The purified pixels, and the vector-Jacobian product from them back to x."""
        ...


class LangevinPurifier(nn.Module):
    """T(x) = X_K of the chain that starts at X_0 = x (Hill et al. 2021, equation 3).

    With ``config.denoise`` the end of each chain is denoised (`denoised`). Output pixels are not
    clamped. ``chain`` runs the steps: `langevin`, the plain reference, or a fast one. The backward
    pass differentiates the same chains with the same noise. A (leaky) ReLU energy has a zero
    Hessian almost everywhere, so its exact gradient is the identity; a ``softness`` smooths its
    activations over about sqrt(``softness``), in the backward pass only. ``product`` makes the
    Hessian-vector products; ``segment`` is the number of steps recomputed at once (None: about
    sqrt(K), the least memory).
    """

    def __init__(
        self,
        energy: nn.Module,
        config: LangevinConfig,
        *,
        chain: Chain = langevin,
        softness: float | None = None,
        product: MakeProduct = autograd_product,
        segment: int | None = None,
    ) -> None:
        super().__init__()
        self.energy = energy
        self.config = config
        self.chain = chain
        self.softness = softness
        self.product = product
        self.segment = segment
        self._energy_on_the_way_back()  # raises now, not in the middle of an attack
        if config.denoise:
            denoising_factor(energy, config.tau)  # likewise

    @torch.no_grad()
    def forward(self, x: Tensor, *, generator: Generator) -> Tensor:
        """One chain for each image: (N,C,H,W) in [0, 1] -> purified pixels, no gradient."""
        if self.config.steps == 0:
            return x
        return self._shown(self.chain(self.energy, to_net(x), self.config, generator=generator))

    @torch.no_grad()
    def with_way_back(self, x: Tensor, *, generator: Generator) -> tuple[Tensor, WayBack]:
        """`forward` and its vector-Jacobian product, which recomputes the chains in segments."""
        if self.config.steps == 0:
            return x, lambda v: v
        end, segments = run_in_segments(
            self.chain,
            self.energy,
            to_net(x),
            self.config,
            generator=generator,
            length=self.segment,
        )

        def back(v: Tensor) -> Tensor:  # the scales of to_net and to_pixels cancel
            energy = self._energy_on_the_way_back()
            product = self.product(energy, v, self.config.steps)
            # `denoised` has the Jacobian I - (2 sigma^2 / tau^2) H(X_K), which is symmetric.
            if self.config.denoise:
                v = v - denoising_factor(self.energy, self.config.tau) * product(end, v)
            return pull_back(self.chain, self.energy, self.config, segments, v, product=product)

        return self._shown(end), back

    def _shown(self, end: Tensor) -> Tensor:
        """The end of a chain as pixels, denoised if ``config.denoise``."""
        if self.config.denoise:
            end = denoised(self.energy, end, self.config.tau, chain=self.chain)
        return to_pixels(end)

    def _energy_on_the_way_back(self) -> nn.Module:
        return self.energy if self.softness is None else smoothed(self.energy, self.softness)
