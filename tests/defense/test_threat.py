"""The ball in the box: projection, random points, steepest steps."""

import math

import pytest
import torch
from torch import Tensor

from defense.threat import ThreatModel

pytestmark = pytest.mark.parametrize("norm", ["linf", "l2"])
RADII = pytest.mark.parametrize("eps_255", [0.0, 0.5, 8.0, 128.0])
ROUNDING = 1e-6


@pytest.fixture
def originals(seeded) -> Tensor:
    """Random images, and images on the border of the box."""
    inside = torch.rand(6, 3, 4, 4, generator=seeded(1))
    border = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), inside[0].round()])
    return torch.cat([inside, border])


def assert_allowed(threat: ThreatModel, x_adv: Tensor, x: Tensor) -> None:
    assert x_adv.min() >= 0.0
    assert x_adv.max() <= 1.0
    assert (threat.distance(x_adv, x) <= threat.eps + ROUNDING).all()


@RADII
def test_a_projection_is_allowed_and_projecting_twice_is_projecting_once(
    norm: str, eps_255: float, originals: Tensor, seeded
) -> None:
    threat = ThreatModel(norm, eps_255)
    for size in (1e-3, 0.1, 10.0):
        far = originals + size * torch.randn(originals.shape, generator=seeded(2))
        once = threat.project(far, originals)
        assert_allowed(threat, once, originals)
        twice = threat.project(once, originals)
        torch.testing.assert_close(twice, once, rtol=0, atol=ROUNDING)


@RADII
def test_clean_images_are_fixed_points(norm: str, eps_255: float, originals: Tensor) -> None:
    assert torch.equal(ThreatModel(norm, eps_255).project(originals, originals), originals)


def test_allowed_points_stay_and_others_go_to_the_border(norm: str, seeded) -> None:
    threat, x = ThreatModel(norm, 8.0), torch.full((4, 1, 3, 3), 0.5)
    direction = torch.randn(x.shape, generator=seeded())
    unit = direction / threat.distance(direction, torch.zeros_like(x)).view(-1, 1, 1, 1)
    within = x + 0.9 * threat.eps * unit
    torch.testing.assert_close(threat.project(within, x), within, rtol=0, atol=ROUNDING)
    border = threat.project(x + 3 * threat.eps * unit, x)
    expected = torch.full((4,), threat.eps)
    torch.testing.assert_close(threat.distance(border, x), expected, rtol=0, atol=ROUNDING)


def test_no_allowed_point_is_nearer_than_the_projection_within_the_ball(norm: str, seeded) -> None:
    threat, x = ThreatModel(norm, 20.0), torch.full((1, 1, 3, 3), 0.5)
    far = x + 0.2 * torch.randn(x.shape, generator=seeded(1))
    nearest = (threat.project(far, x) - far).norm()
    others = threat.random_point(x.expand(2000, -1, -1, -1), generator=seeded(2))
    assert threat.distance(far, x) > threat.eps
    assert ((others - far).flatten(1).norm(dim=1) >= nearest - ROUNDING).all()


@RADII
def test_random_points_are_allowed(norm: str, eps_255: float, originals: Tensor, seeded) -> None:
    threat = ThreatModel(norm, eps_255)
    generator = seeded(3)
    first = threat.random_point(originals, generator=generator)
    assert_allowed(threat, first, originals)
    if eps_255 > 0:
        assert not torch.equal(threat.random_point(originals, generator=generator), first)


def test_random_points_fill_the_ball_uniformly(norm: str, seeded) -> None:
    threat, count, size = ThreatModel(norm, 8.0), 20_000, 12
    x = torch.full((count, 3, 2, 2), 0.5)
    delta = (threat.random_point(x, generator=seeded()) - x).double() / threat.eps
    # (distance / radius)^D is uniform in [0, 1], and no direction is preferred.
    lengths = delta.flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1)
    filled = lengths**size
    assert abs(filled.mean().item() - 1 / 2) < 5 * math.sqrt(1 / 12 / count)
    assert abs(filled.square().mean().item() - 1 / 3) < 5 * math.sqrt(4 / 45 / count)
    pixels = delta.flatten(1)
    errors = pixels.std(0) / math.sqrt(count)
    assert (pixels.mean(0).abs() < 5 * errors).all()


def test_random_points_follow_the_generator_alone(norm: str, originals: Tensor, seeded) -> None:
    threat, before = ThreatModel(norm, 8.0), torch.get_rng_state()
    points = [threat.random_point(originals, generator=seeded(5)) for _ in range(2)]
    assert torch.equal(points[0], points[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("step_255", [0.5, 2.0, 16.0])
def test_ascend_is_the_steepest_step(norm: str, step_255: float, originals: Tensor, seeded) -> None:
    threat, step = ThreatModel(norm, 8.0), step_255 / 255
    gradient = torch.randn(originals.shape, generator=seeded(4))
    update = threat.ascend(originals, gradient, step_255) - originals
    # No step of this length gains more than step times the dual norm of the gradient (Hoelder).
    gained = (update * gradient).flatten(1).sum(1)
    dual = gradient.flatten(1).norm(p=1 if norm == "linf" else 2, dim=1)
    torch.testing.assert_close(gained, step * dual, rtol=1e-4, atol=0)
    length = threat.distance(originals + update, originals)
    torch.testing.assert_close(length, torch.full_like(length, step), rtol=0, atol=ROUNDING)


def test_a_zero_gradient_moves_nothing(norm: str, originals: Tensor, seeded) -> None:
    gradient = torch.randn(originals.shape, generator=seeded())
    gradient[2] = 0.0
    moved = ThreatModel(norm, 8.0).ascend(originals, gradient, 2.0) != originals
    assert not moved[2].any()
    assert moved[[0, 1, 3]].flatten(1).any(1).all()


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_the_size_of_the_gradient_does_not_matter(norm: str, size: float, seeded) -> None:
    threat, x = ThreatModel(norm, 8.0), torch.full((2, 1, 3, 3), 0.5)
    gradient = torch.randn(x.shape, generator=seeded())
    expected = threat.ascend(x, gradient, 2.0)
    torch.testing.assert_close(threat.ascend(x, size * gradient, 2.0), expected)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_square_of_the_gradient_may_leave_float32(norm: str, size: float, seeded) -> None:
    test_the_size_of_the_gradient_does_not_matter(norm, size, seeded)


def test_no_images_have_no_random_points(norm: str, seeded) -> None:
    none = torch.zeros(0, 3, 4, 4)
    assert ThreatModel(norm, 8.0).random_point(none, generator=seeded()).shape == none.shape


def test_no_images_are_moved_and_projected(norm: str) -> None:
    threat, none = ThreatModel(norm, 8.0), torch.zeros(0, 3, 4, 4)
    assert threat.project(threat.ascend(none, none, 2.0), none).shape == none.shape


def test_bad_configurations_are_said(norm: str) -> None:
    with pytest.raises(ValueError, match="eps_255: expected >= 0, got -1"):
        ThreatModel(norm, -1)
    with pytest.raises(ValueError, match="norm: expected linf or l2, got 'l1'"):
        ThreatModel("l1", 8)
