"""A CPU's convolutions and matrix products, with the weights laid out for its library once.

`F.conv2d` brings the weights into oneDNN's own layout anew at every call. The operators that take
them as laid out are private to torch (`torch.ops.mkldnn`: torch.compile emits them). So they are
tried before they are trusted, in this module only; where they are missing, changed or wrong, and on
a GPU, plain torch computes the same.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor], Tensor]

NO_ACTIVATION: tuple[Any, ...] = ("none", [], "")  # to be applied to the result
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the trial, relative to the largest


def lays_out(weight: Tensor) -> bool:
    """Whether weights of this kind are laid out for the library, and not left to plain torch."""
    return not weight.is_cuda and weight.dtype in TOLERANCE and _can_be_trusted(weight.dtype)


def linear(weight: Tensor, bias: Tensor | None) -> Map:
    """Rows (M,in) -> (M,out) by ``weight`` (out,in)."""
    if lays_out(weight):
        return _linear(weight, bias)
    return lambda rows: F.linear(rows, weight, bias)


def convolution(weight: Tensor, bias: Tensor | None, stride: int, inputs: list[int]) -> Map:
    """(N,in,S,S) -> (N,out,T,T) with padding 1; ``inputs`` is the usual shape of the former."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    if lays_out(weight):
        return _convolution(weight, bias, stride, inputs)
    return lambda x: F.conv2d(x, weight, bias, stride, 1)


def transposed_convolution(weight: Tensor, rest: int, inputs: list[int]) -> Map:
    """(N,in,T,T) -> (N,out,S,S), S = 2 T + ``rest``: of a 4x4 kernel, stride 2 and padding 1.

    ``weight`` is (in,out,4,4), ``inputs`` the usual shape of the images.
    """
    if lays_out(weight):
        return _transposed_convolution(weight, rest, inputs)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return lambda g: F.conv_transpose2d(g, weight, None, 2, 1, rest)


def _linear(weight: Tensor, bias: Tensor | None) -> Map:
    ops = torch.ops.mkldnn
    laid_out = ops._reorder_linear_weight(weight.contiguous())
    return lambda rows: ops._linear_pointwise(rows, laid_out, bias, *NO_ACTIVATION)


def _convolution(weight: Tensor, bias: Tensor | None, stride: int, inputs: list[int]) -> Map:
    ops = torch.ops.mkldnn
    laid_out = ops._reorder_convolution_weight(weight, 1, stride, 1, 1, inputs)
    shape: tuple[Any, ...] = ([1, 1], [stride] * 2, [1, 1], 1)  # padding, stride, dilation, groups
    return lambda x: ops._convolution_pointwise(x, laid_out, bias, *shape, *NO_ACTIVATION)


def _transposed_convolution(weight: Tensor, rest: int, inputs: list[int]) -> Map:
    ops = torch.ops.mkldnn
    shape: tuple[Any, ...] = ([1, 1], [rest] * 2, [2, 2], [1, 1], 1)
    laid_out = ops._reorder_convolution_transpose_weight(weight.contiguous(), *shape, inputs)
    return lambda g: ops._convolution_transpose_pointwise(g, laid_out, None, *shape, *NO_ACTIVATION)


@cache
def _can_be_trusted(dtype: torch.dtype) -> bool:
    """Whether the operators are there and compute what plain torch does: tried on small numbers."""
    if not torch.backends.mkldnn.is_available():
        return False
    draw = torch.Generator().manual_seed(0)
    x, weight, matrix, bias = (
        torch.randn(shape, generator=draw).to(dtype)
        for shape in ((2, 8, 6, 6), (8, 8, 4, 4), (8, 288), (8,))
    )
    x, rows = x.contiguous(memory_format=torch.channels_last), x.flatten(1)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        pairs = [
            (_linear(matrix, bias)(rows), F.linear(rows, matrix, bias)),
            (_convolution(weight, bias, 2, [*x.shape])(x), F.conv2d(x, weight, bias, 2, 1)),
            (
                _transposed_convolution(weight, 1, [*x.shape])(x),
                F.conv_transpose2d(x, weight, None, 2, 1, 1),
            ),
        ]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(
        ours.shape == plain.shape
        and float((ours - plain).abs().max()) <= TOLERANCE[dtype] * float(plain.abs().max())
        for ours, plain in pairs
    )
