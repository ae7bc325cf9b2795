"""What a purifier is, and the paper's: Langevin chains under an energy (Hill et al. 2021).

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

from defense.chain_gradient import (
    MakeProduct,
    autograd_product,
    pull_back,
    run_in_segments,
    smoothed,
)
from defense.langevin import Chain, LangevinConfig, denoised, denoising_factor, langevin
from defense.pixels import to_net, to_pixels

WayBack = Callable[[Tensor], Tensor]
"""v (N,C,H,W) -> v^T d(purified)/dx, the same shape, for the very images and noise of one call."""


class Purifier(Protocol):
    """Pixels (N,C,H,W) in [0, 1] -> purified pixels, the same shape, in any range.

    All its noise comes from ``generator``, which lives on the device of x and which the call
    advances. Each image is purified by itself: what becomes of it does not depend on the others,
    apart from the noise that they draw.
    """

    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor: ...


@runtime_checkable
class Reversible(Protocol):
    """A purifier that knows its own gradient."""

    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor: ...

    def with_way_back(self, x: Tensor, *, generator: Generator) -> tuple[Tensor, WayBack]:
        """The purified pixels, and how a gradient at them goes back to x."""
        ...


class LangevinPurifier(nn.Module):
    """T(x) = X_K of the chain that starts at X_0 = x (Hill et al. 2021, equation 3).

    With ``config.denoise`` the noise that a chain ends with is taken off (`denoised`). Pixels come
    out unclamped. ``chain`` runs the steps: `langevin`, the plain reference, or a fast one. The way
    back is that of these very chains, noise and all; with a ``softness`` the corners of a (leaky)
    ReLU energy are rounded over about sqrt(``softness``) on it, since the second derivative of such
    an energy is zero and its exact way back the identity. ``product`` makes the Hessian products,
    and ``segment`` is how many steps are made again at once (None: about sqrt(K), least memory).
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
        self._energy_on_the_way_back()  # or an error, now and not in the middle of an attack
        if config.denoise:
            denoising_factor(energy, config.tau)  # the same

    @torch.no_grad()
    def forward(self, x: Tensor, *, generator: Generator) -> Tensor:
        """One chain for each image: (N,C,H,W) in [0, 1] -> purified pixels, no gradient."""
        if self.config.steps == 0:
            return x
        return self._shown(self.chain(self.energy, to_net(x), self.config, generator=generator))

    @torch.no_grad()
    def with_way_back(self, x: Tensor, *, generator: Generator) -> tuple[Tensor, WayBack]:
        """The call itself, its chains to be made again from a few kept states."""
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

        def back(v: Tensor) -> Tensor:  # to net range and back again, scales cancel
            energy = self._energy_on_the_way_back()
            product = self.product(energy, v, self.config.steps)
            if self.config.denoise:
                v = v - denoising_factor(self.energy, self.config.tau) * product(end, v)
            return pull_back(self.chain, self.energy, self.config, segments, v, product=product)

        return self._shown(end), back

    def _shown(self, end: Tensor) -> Tensor:
        """What is seen of the end of a chain, as pixels."""
        if self.config.denoise:
            end = denoised(self.energy, end, self.config.tau, chain=self.chain)
        return to_pixels(end)

    def _energy_on_the_way_back(self) -> nn.Module:
        return self.energy if self.softness is None else smoothed(self.energy, self.softness)
