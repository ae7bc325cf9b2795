"""Gradients through the Langevin chain: vector-Jacobian products with checkpointing.

One step is X_{k+1} = X_k - df/dX (X_k) + tau Z_k, so a cotangent v goes back through it as

    v_k = v_{k+1} - H(X_k) v_{k+1},    H the Hessian of f, which is symmetric.

Only a few states are kept. The others are recomputed from them with the same noise, so K steps need
the memory of 2 sqrt(K) states. BPDA sets H = 0. A piecewise linear energy has H = 0 almost
everywhere, so its exact gradient is BPDA's; `smoothed` makes its activations smooth.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from defense.energy import SmoothLeakyReLU
from defense.langevin import Chain, EnergyFn, LangevinConfig

GradientMode = Literal["identity", "exact", "smoothed"]
"""How an attack differentiates the purifier: BPDA, the exact chain, or a smoothed energy."""

CORNERS = (nn.LeakyReLU, nn.ReLU)

HessianProduct = Callable[[Tensor, Tensor], Tensor]
"""x, v (N,C,H,W) -> H(x) v, the same shape."""

MakeProduct = Callable[[nn.Module, Tensor, int], HessianProduct]
"""An energy, example images and the number of calls to expect -> its Hessian-vector product."""


class Segment(NamedTuple):
    """Steps that can be recomputed: their first state, and the generator's state there."""

    x: Tensor
    noise: Tensor
    steps: int


def hessian_product(energy: EnergyFn, x: Tensor, v: Tensor) -> Tensor:
    """H(x) v for the Hessian of f at every image, by double backward: x, v (N,C,H,W).

    Zero where f is piecewise linear.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        if not gradient.requires_grad:
            return torch.zeros_like(x)
        (product,) = torch.autograd.grad(gradient, x, v.clone(), allow_unused=True)
    return torch.zeros_like(x) if product is None else product


def autograd_product(energy: nn.Module, like: Tensor, times: int) -> HessianProduct:
    """`hessian_product` of an energy; needs no preparation."""
    return lambda x, v: hessian_product(energy, x, v)


def smoothed(energy: nn.Module, softness: float) -> nn.Module:
    """A copy of an energy with every (leaky) ReLU smoothed over a width of about sqrt(softness).

    `ValueError` if it has none (differentiate such an energy as it is), or is one itself.
    """
    if not has_corners(energy):
        raise ValueError("energy: expected one with a ReLU or leaky ReLU to smooth")
    smooth = copy.deepcopy(energy)
    for parent in list(smooth.modules()):
        for name, child in list(parent._modules.items()):  # one module may stand in two places
            if isinstance(child, CORNERS):
                slope = child.negative_slope if isinstance(child, nn.LeakyReLU) else 0.0
                setattr(parent, name, SmoothLeakyReLU(slope, softness))
    if has_corners(smooth):
        raise ValueError("energy: expected its ReLUs to be modules inside it")
    return smooth


def has_corners(energy: nn.Module) -> bool:
    """Whether an energy has a ReLU or leaky ReLU module."""
    return any(isinstance(module, CORNERS) for module in energy.modules())


def run_in_segments(
    chain: Chain,
    energy: EnergyFn,
    x: Tensor,
    config: LangevinConfig,
    *,
    generator: Generator,
    length: int | None = None,
) -> tuple[Tensor, list[Segment]]:
    """Run the chain from x (N,C,H,W), with a checkpoint every ``length`` steps for `pull_back`.

    The end does not depend on ``length``, up to rounding. None is about sqrt(K), which needs the
    least memory.
    """
    length = length or max(1, round(math.sqrt(config.steps)))
    segments = []
    for first in range(0, config.steps, length):
        steps = min(length, config.steps - first)
        segments.append(Segment(x, generator.get_state(), steps))
        x = chain(energy, x, replace(config, steps=steps), generator=generator)
    return x, segments


def pull_back(
    chain: Chain,
    energy: EnergyFn,
    config: LangevinConfig,
    segments: list[Segment],
    v: Tensor,
    *,
    product: HessianProduct,
) -> Tensor:
    """v^T J (N,C,H,W), J = dX_K / dX_0 of the chain that `run_in_segments` ran.

    ``product`` is the Hessian product of the energy, or of one that replaces it going backward.
    """
    generator = Generator(v.device)
    for segment in reversed(segments):
        states: list[Tensor] = []
        generator.set_state(segment.noise)
        # The product of each step is taken at the state before it, so the last step is not rerun.
        again = replace(config, steps=segment.steps - 1)
        last = chain(energy, segment.x, again, generator=generator, states=states)
        for x in reversed([*states, last]):
            v = v - product(x, v)
    return v
