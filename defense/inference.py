"""Inference with trained networks: freezing, evaluation mode, batches, checks of the output."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

MODES_MATTER = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


def freeze(module: Module) -> Module:
    """Put a module into evaluation mode and turn off its weights' gradients; returns the module."""
    module.eval()
    module.requires_grad_(False)
    module.zero_grad(set_to_none=True)
    return module


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Context in which these modules and their submodules are in evaluation mode.

    Their modes are restored afterwards. Warns if dropout or batch normalization is in training mode
    inside a network in evaluation mode, which may be intended.
    """
    training = [part for module in modules for part in module.modules() if part.training]
    odd = {
        type(part).__name__
        for module in modules
        if not module.training
        for part in module.modules()
        if part.training and isinstance(part, MODES_MATTER)
    }
    if odd:
        warnings.warn(
            f"{', '.join(sorted(odd))} in training mode inside a network in evaluation mode: the "
            "whole network runs in evaluation mode. A defense that is random by design has "
            "`replica_logits`, see defense.Replicated",
            stacklevel=3,
        )
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def logits_in(output: Any) -> Tensor:
    """The logits in what a classifier returned.

    Accepted: a tensor; a tuple or list of exactly one tensor; a mapping with the key "logits", or
    an object with that attribute. `ValueError` for anything else.
    """
    found = output
    if isinstance(found, Mapping):
        found = found.get("logits")
    elif isinstance(found, tuple | list) and not hasattr(found, "logits"):
        found = found[0] if len(found) == 1 else None
    elif not isinstance(found, Tensor):
        found = getattr(found, "logits", None)
    if not isinstance(found, Tensor):
        kind = type(output).__name__
        if isinstance(output, Mapping):
            kind += f" with {list(output)}"
        elif isinstance(output, tuple | list):
            kind += f" of {len(output)}"
        raise ValueError(
            f"classifier: expected logits (B, classes), or one tensor called logits, got a {kind}; "
            "wrap it in a module that returns the logits"
        )
    return found


def logits_of(output: Any, count: int) -> Tensor:
    """`logits_in`, for B = ``count`` images; `ValueError` unless they are (B, classes)."""
    found = logits_in(output)
    if found.ndim != 2 or len(found) != count or not found.is_floating_point():
        raise ValueError(
            f"classifier: expected logits ({count}, classes), floating, for {count} images, got "
            f"{tuple(found.shape)} {found.dtype}"
        )
    return found


def labels_of(y: Tensor, count: int) -> Tensor:
    """Labels (B,) int64 from labels of any integer type, (B,) or (B,1); `ValueError` otherwise."""
    if not isinstance(y, Tensor):
        raise ValueError(f"labels: expected a tensor of whole numbers, got {type(y).__name__}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"labels: expected whole numbers, got {y.dtype}")
    if y.shape not in ((count,), (count, 1)):
        raise ValueError(f"labels: expected ({count},) for {count} images, got {tuple(y.shape)}")
    return y.flatten().long()


def check_labels(y: Tensor, classes: int) -> None:
    """`ValueError` unless labels (B,) are 0 to ``classes`` - 1."""
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(
            f"labels: expected 0 to {classes - 1}, as many as the classifier has logits, got "
            f"{int(y.min())} to {int(y.max())}"
        )


def flops(net: nn.Module, x: Tensor, *, weights: bool = False, back: bool = True) -> int:
    """FLOPs of the matrix products and convolutions in one call with images x (B,C,H,W).

    Forward and, unless ``back`` is False, backward: to the weights if ``weights``, else to x.
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
