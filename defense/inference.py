"""Trained networks at rest: frozen, and asked in pieces."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Evaluation mode and no gradient to the weights: every net that is not being trained."""
    module.eval()
    module.requires_grad_(False)
    return module


@torch.no_grad()
def classify(classifier: nn.Module, pixels: Tensor, *, batch: int) -> Tensor:
    """Logits (N, classes) for pixels (N,C,H,W), in pieces."""
    return torch.cat([classifier(part) for part in pixels.split(batch)])
