"""Trained networks at rest: frozen, and asked in pieces."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Evaluation mode and no gradient to the weights: every net that is not being trained."""
    module.eval()
    module.requires_grad_(False)
    module.zero_grad(set_to_none=True)
    return module


def flops(net: nn.Module, x: Tensor, *, weights: bool = False, back: bool = True) -> int:
    """Multiplications and additions in the products of one call with images x (B,C,H,W).

    Forward, and unless ``back`` is False back again: to the weights, or to the images.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes a while, and few need it

    net.requires_grad_(weights)
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        out = net(x.detach().requires_grad_(back and not weights))
        if back:
            out.sum().backward()
    return int(counter.get_total_flops())


@torch.no_grad()
def classify(classifier: nn.Module, pixels: Tensor, *, batch: int) -> Tensor:
    """Logits (N, classes) for pixels (N,C,H,W), in pieces."""
    return torch.cat([classifier(part) for part in pixels.split(batch)])
