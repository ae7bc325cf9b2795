"""Arithmetic precision of a network: float32, tf32 or bfloat16. State and weights are float32."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

import torch

from defense.fast.onednn import has_bfloat16

Precision = Literal["float32", "tf32", "bfloat16"]


def check_precision(precision: Precision) -> Precision:
    """The same, or ValueError."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision: expected one of {get_args(Precision)}, got {precision!r}")
    return precision


def runs_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed as such, which needs a GPU or a CPU with kernels for it."""
    return device.type != "cpu" or has_bfloat16()


def usable(precision: Precision, device: torch.device) -> Precision:
    """The same, but float32 for bfloat16 on a CPU without kernels for it; warns once of that."""
    if precision == "bfloat16" and not runs_bfloat16(device):
        _warn()
        return "float32"
    return precision


@cache
def _warn() -> None:
    warnings.warn(
        "this CPU has no bfloat16 kernels: computing in float32, which is more precise and here "
        "several times as fast",
        stacklevel=3,
    )


@contextmanager
def tensor_cores(precision: Precision) -> Iterator[None]:
    """Context in which CUDA convolutions compute in full float32, unless ``precision`` allows tf32.

    torch's own default is tf32. cuDNN chooses kernels by timing them. No effect on a CPU.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = precision != "float32", True
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Inside, networks compute in `usable` precision, forward and back; bfloat16 is autocast."""
    low = usable(precision, device) == "bfloat16"
    with tensor_cores(precision), torch.autocast(device.type, torch.bfloat16, enabled=low):
        yield
