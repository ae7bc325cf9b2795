"""The energy network: its size, its shapes, and where it is curved."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defense.energy import ACTIVATIONS, ConvEnergy, SmoothLeakyReLU, count_parameters


def test_the_papers_network_has_the_papers_parameters() -> None:
    assert count_parameters(ConvEnergy(image_size=32, channels=3, width=32)) == 693_569


def test_frozen_parameters_are_counted_too() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert count_parameters(layer) == 8


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [4, 8, 15, 16, 28, 32, (64, 48), (5, 16)])
def test_one_number_for_each_image(
    image_size: int | tuple[int, int], channels: int, activation: str
) -> None:
    torch.manual_seed(0)
    energy = ConvEnergy(image_size=image_size, channels=channels, width=4, activation=activation)
    x = torch.randn(3, *energy.shape)
    together = energy(x)
    alone = torch.cat([energy(one) for one in x.split(1)])
    assert together.shape == alone.shape == (3,)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert together.unique().numel() == 3


def largest_curvature(activation: str) -> float:
    """The largest entry of the Hessian of f at a random image."""
    torch.manual_seed(0)
    energy = ConvEnergy(image_size=4, channels=1, width=4, activation=activation).double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: energy(x).sum(), x)
    return hessian.abs().max().item()


def test_leaky_relu_makes_a_piecewise_linear_energy() -> None:
    assert largest_curvature("leaky_relu") == 0.0


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"leaky_relu"}))
def test_the_smooth_activations_make_a_curved_energy(activation: str) -> None:
    assert largest_curvature(activation) > 1e-4


def test_smooth_leaky_relu_keeps_the_slopes_of_leaky_relu() -> None:
    smooth, h = SmoothLeakyReLU(), torch.tensor([-100.0, -10.0, 10.0, 100.0], dtype=torch.float64)
    h.requires_grad_(True)
    (slopes,) = torch.autograd.grad(smooth(h).sum(), h)
    expected = torch.tensor([0.05, 0.05, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(slopes, expected, rtol=0, atol=1e-4)


def test_smooth_leaky_relu_tends_to_leaky_relu_below_a_constant() -> None:
    smooth = SmoothLeakyReLU(negative_slope=0.2, softness=0.04)
    h = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    offset = 0.5 * (1 - 0.2) * 0.04**0.5
    assert smooth(torch.zeros(1)).item() == 0.0
    torch.testing.assert_close(smooth(h), F.leaky_relu(h, 0.2) - offset, rtol=0, atol=1e-5)


def test_bad_arguments_are_said() -> None:
    with pytest.raises(ValueError, match="image_size: expected >= 4, got 3"):
        ConvEnergy(image_size=3)
    with pytest.raises(ValueError, match="image_size: 64x12 is too narrow"):
        ConvEnergy(image_size=(64, 12))
    with pytest.raises(ValueError, match=r"activation: expected one of .*leaky_relu.*, got 'tanh'"):
        ConvEnergy(activation="tanh")


def test_images_of_another_size_are_refused() -> None:
    energy = ConvEnergy(image_size=8, channels=1, width=4)
    with pytest.raises((ValueError, RuntimeError)):
        energy(torch.zeros(2, 1, 16, 16))
