"""Purified pixels with a gradient: BPDA's identity, the purifier's own product, or autograd.

Its own product is the vector-Jacobian product of a `Reversible` purifier.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from defense.inference import evaluation_mode
from defense.purifier import Purifier, Reversible

Watch = Callable[[Tensor, Tensor], None]
"""Called in every backward pass with the gradients at the purified pixels and at the image."""


class _StraightThrough(torch.autograd.Function):
    """Value of the second argument, gradient of the first: BPDA with the identity, g(x) = x."""

    @staticmethod
    def forward(x: Tensor, purified: Tensor) -> Tensor:
        return purified.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[0], None


def straight_through(x: Tensor, purified: Tensor) -> Tensor:
    """The purified images exactly, with d(output)/dx = identity (Athalye et al. 2018, BPDA)."""
    output: Tensor = _StraightThrough.apply(x, purified)
    return output


class _ThroughPurifier(torch.autograd.Function):
    """Purified pixels, with the purifier's own vector-Jacobian product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, purifier: Reversible, generator: Generator, watch: Watch
    ) -> Tensor:
        with at_rest(purifier):
            purified, ctx.back = purifier.with_way_back(x.detach(), generator=generator)
        ctx.purifier, ctx.watch, ctx.nothing_done = purifier, watch, torch.equal(purified, x)
        return purified.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None, None]:
        with at_rest(ctx.purifier):
            back = ctx.back(gradient[0])
        if not ctx.nothing_done:
            ctx.watch(gradient[0], back)
        return back, None, None, None


def purified_with_gradient(
    purifier: Purifier, x: Tensor, *, generator: Generator, identity: bool, watch: Watch
) -> Tensor:
    """Pixels x (N,C,H,W) -> purified ones, the same shape, for an attack to differentiate.

    With ``identity`` the gradient is BPDA's, otherwise the purifier's. For a `Reversible` purifier
    ``watch`` is called in every backward pass.
    """
    if identity or not x.requires_grad:
        with torch.no_grad(), at_rest(purifier):
            pixels = purifier(x.detach(), generator=generator)
        return straight_through(x, pixels)
    if isinstance(purifier, Reversible):
        through: Tensor = _ThroughPurifier.apply(x, purifier, generator, watch)
        return through
    with at_rest(purifier):
        return purifier(x, generator=generator)


def at_rest(purifier: Purifier) -> AbstractContextManager[None]:
    """Context in which the purifier, if it is an nn.Module, is in evaluation mode."""
    return evaluation_mode(*[purifier] if isinstance(purifier, nn.Module) else [])
