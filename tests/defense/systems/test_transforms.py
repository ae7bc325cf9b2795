"""JPEG against Pillow; total variation against its own optimality condition."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from defense.rng import make_generator
from defense.systems import Jpeg, TotalVariation
from defense.systems.transforms import Chambolle, forward_differences, minus_divergence


def images(channels: int) -> Tensor:
    return torch.rand(3, channels, 16, 12, generator=make_generator(0, "images"))


def test_grey_jpeg_is_that_of_pillow() -> None:
    x = images(1)
    found = Jpeg(50).purifier(None)(x, generator=make_generator(0))
    for image, mine in zip(x, found, strict=True):
        file = io.BytesIO()
        Image.fromarray((255 * image[0]).round().byte().numpy()).save(file, "jpeg", quality=50)
        theirs = np.asarray(Image.open(file)) / 255
        np.testing.assert_allclose(mine[0].numpy(), theirs, atol=1.01 / 255)


def test_colours_stay_in_their_places() -> None:
    x = torch.zeros(2, 3, 16, 16)
    x[0, 0] = x[1, 2] = 1.0
    found = Jpeg(95).purifier(None)(x, generator=make_generator(0))
    torch.testing.assert_close(found, x, atol=0.02, rtol=0.0)


def test_differences_and_divergence_are_adjoint() -> None:
    u = images(2)
    p = torch.rand(2, *u.shape, generator=make_generator(1))
    one, other = (forward_differences(u) * p).sum(), (u * minus_divergence(p)).sum()
    torch.testing.assert_close(one, other)


def test_the_denoised_image_is_the_minimum() -> None:
    """The gap between the problem and its dual vanishes, so nothing better is left."""
    x, weight = images(1).double(), 0.2
    u = Chambolle(weight, 3000)(x, generator=make_generator(0))
    variation = forward_differences(u).square().sum(0).sqrt().flatten(1).sum(1)
    primal = 0.5 * (u - x).flatten(1).square().sum(1) + weight * variation
    # u = x - weight * minus_divergence(p) with |p| <= 1, so the dual value of p is
    dual = 0.5 * (x.flatten(1).square().sum(1) - u.flatten(1).square().sum(1))
    assert float((primal - dual).abs().max()) < 1e-3 * float(primal.max())
    assert float(variation.max()) < 0.5 * float(
        forward_differences(x).square().sum(0).sqrt().flatten(1).sum(1).min()
    )


def test_total_variation_has_a_gradient_through_its_steps() -> None:
    purify = TotalVariation(0.2, 20).purifier(None)
    x = images(1).double()
    assert torch.autograd.gradcheck(
        lambda x: purify(x, generator=make_generator(0)), x[:1, :, :3, :3].requires_grad_(True)
    )
