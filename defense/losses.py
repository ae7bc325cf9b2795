"""The losses that an attack maximizes: logits (B, classes) and labels (B,) -> (B,)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, classes) and labels (B,) -> (B,)."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The paper's loss."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus the right one: positive where the prediction is wrong.

    Carlini & Wagner (2017). Unlike cross-entropy it does not saturate where the classifier is
    confident.
    """
    right = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return wrong - right


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, Croce & Hein (2020): the margin divided by z_(1) - z_(3).

    z_(k) is the k-th largest logit. Invariant to shift and scale of the logits. `ValueError` with
    fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"dlr: expected at least 3 classes, got {logits.shape[1]}")
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin(logits, y) / (first - third).clamp_min(1e-12)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}
