"""CPU convolutions and matrix products with weights prepacked once for oneDNN.

`F.conv2d` reorders the weights into oneDNN's own layout at every call. The operators that take
prepacked weights are private to torch (`torch.ops.mkldnn`: torch.compile emits them). Only this
module uses them, and it tests them first. Where they are missing, changed or wrong, and on a GPU,
plain torch computes the same.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor], Tensor]

NO_ACTIVATION: tuple[Any, ...] = ("none", [], "")  # fused into the operator
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the self-test, relative to the maximum


def lays_out(weight: Tensor) -> bool:
    """Whether weights of this device and dtype are prepacked for oneDNN, not left to torch."""
    return not weight.is_cuda and weight.dtype in TOLERANCE and _can_be_trusted(weight.dtype)


def linear(weight: Tensor, bias: Tensor | None) -> Map:
    """Rows (M,in) -> (M,out) by ``weight`` (out,in)."""
    if lays_out(weight):
        return _linear(weight, bias)
    return lambda rows: F.linear(rows, weight, bias)


def convolution(weight: Tensor, bias: Tensor | None, stride: int, inputs: list[int]) -> Map:
    """(N,in,H,W) -> (N,out,T,U) with padding 1; ``inputs`` is the typical input shape."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    if lays_out(weight):
        return _convolution(weight, bias, stride, inputs)
    return lambda x: F.conv2d(x, weight, bias, stride, 1)


def transposed_convolution(weight: Tensor, rest: list[int], inputs: list[int]) -> Map:
    """(N,in,T,U) -> (N,out,H,W), H = 2 T + ``rest[0]``, with a 4x4 kernel, stride 2 and padding 1.

    ``rest`` is the output padding, ``weight`` is (in,out,4,4), ``inputs`` the typical input shape.
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


def _transposed_convolution(weight: Tensor, rest: list[int], inputs: list[int]) -> Map:
    ops = torch.ops.mkldnn
    shape: tuple[Any, ...] = ([1, 1], rest, [2, 2], [1, 1], 1)
    laid_out = ops._reorder_convolution_transpose_weight(weight.contiguous(), *shape, inputs)
    return lambda g: ops._convolution_transpose_pointwise(g, laid_out, None, *shape, *NO_ACTIVATION)


@cache
def has_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 kernels for this CPU, as from AVX-512 on; True if it cannot say.

    Without them a chain in bfloat16 takes several times as long as in float32.
    """
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True


@cache
def _can_be_trusted(dtype: torch.dtype) -> bool:
    """Self-test: whether the operators exist and agree with plain torch on small tensors."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not has_bfloat16():
        return False
    draw = torch.Generator().manual_seed(0)
    x, weight, matrix, bias = (
        torch.randn(shape, generator=draw).to(dtype)
        for shape in ((2, 8, 6, 6), (8, 8, 4, 4), (8, 288), (8,))
    )
    x, rows = x.contiguous(memory_format=torch.channels_last), x.flatten(1)
    try:
        pairs = [
            (_linear(matrix, bias)(rows), F.linear(rows, matrix, bias)),
            (_convolution(weight, bias, 2, [*x.shape])(x), F.conv2d(x, weight, bias, 2, 1)),
            (
                _transposed_convolution(weight, [1, 1], [*x.shape])(x),
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
