"""The CPU library's private operators: what they compute, and what happens where they are not."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from defense.fast import onednn


@pytest.fixture(autouse=True)
def tried_anew() -> Iterator[None]:
    onednn._can_be_trusted.cache_clear()
    yield
    onednn._can_be_trusted.cache_clear()


def maps(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Each of the three, beside plain torch."""
    draw = torch.Generator().manual_seed(1)
    x, weight, matrix, bias = (
        torch.randn(shape, generator=draw).to(dtype)
        for shape in ((3, 16, 9, 9), (16, 16, 4, 4), (7, 5), (16,))
    )
    x, rows = x.contiguous(memory_format=torch.channels_last), x[:, :5, 0, 0].contiguous()
    shape = [*x.shape]
    return [
        (onednn.linear(matrix, bias[:7])(rows), F.linear(rows, matrix, bias[:7])),
        (onednn.linear(matrix, None)(rows), F.linear(rows, matrix)),
        (onednn.convolution(weight, bias, 2, shape)(x), F.conv2d(x, weight, bias, 2, 1)),
        (
            onednn.transposed_convolution(weight, [1, 1], shape)(x),
            F.conv_transpose2d(x, weight, None, 2, 1, 1),
        ),
    ]


def assert_plain(dtype: torch.dtype) -> None:
    tolerance = onednn.TOLERANCE.get(dtype, 1e-12)
    for ours, plain in maps(dtype):
        assert ours.shape == plain.shape
        assert (ours - plain).abs().max() <= tolerance * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_map_is_plain_torchs(dtype: torch.dtype) -> None:
    assert_plain(dtype)


def test_the_operators_of_this_torch_are_trusted() -> None:
    """Else the engine is slow, and this test says why."""
    assert torch.backends.mkldnn.is_available()
    assert onednn.lays_out(torch.zeros(1))
    assert not onednn.lays_out(torch.zeros(1, dtype=torch.float64))


def missing(*about: object) -> Tensor:
    raise AttributeError("no such operator")


def changed(*about: object) -> Tensor:
    raise RuntimeError("expected at most 4 arguments")


def wrong(weight: Tensor, bias: Tensor | None) -> onednn.Map:
    return lambda rows: 1.1 * F.linear(rows, weight, bias)


@pytest.mark.parametrize("now", [missing, changed, wrong])
def test_an_operator_that_is_not_what_it_was_is_not_used(monkeypatch, now) -> None:
    monkeypatch.setattr(onednn, "_linear", now)
    assert not onednn.lays_out(torch.zeros(1))
    assert_plain(torch.float32)


def test_without_the_library_nothing_is_laid_out(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not onednn.lays_out(torch.zeros(1))
    assert_plain(torch.float32)
