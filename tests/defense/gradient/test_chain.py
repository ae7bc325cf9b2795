"""Gradients through the chain, held to the autograd tape, to finite differences, to themselves."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import Generator, Tensor, nn

from defense.attack import loss_gradient
from defense.energy import ACTIVATIONS, ConvEnergy, SmoothLeakyReLU
from defense.eot import EOTDefense
from defense.fast.langevin import FastLangevin
from defense.gradient.chain import (
    autograd_product,
    hessian_product,
    pull_back,
    run_in_segments,
    smoothed,
)
from defense.gradient.hessian import WrittenHessian, written_product
from defense.langevin import LangevinConfig, langevin
from defense.pixels import to_net, to_pixels
from defense.purifier import LangevinPurifier
from tests.chains import SHAPES, make_energy, make_images, relative_difference

SMOOTH = ("smooth_leaky_relu", "silu", "softplus")
TAU = 0.1


def seeded(seed: int = 3) -> Generator:
    return Generator().manual_seed(seed)


def double_energy(activation: str) -> ConvEnergy:
    return make_energy("digits", activation).double().requires_grad_(False)


def taped(energy: nn.Module, x: Tensor, config: LangevinConfig, noises: list[Tensor]) -> Tensor:
    """The chain from x as one differentiable expression."""
    for noise in noises:
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        x = x - gradient + config.tau * noise
    return x


def noises_of(x: Tensor, steps: int) -> list[Tensor]:
    generator = seeded()
    return [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(steps)]


def pulled(energy: nn.Module, x: Tensor, v: Tensor, steps: int, length: int | None) -> Tensor:
    config = LangevinConfig(steps, TAU)
    _, segments = run_in_segments(langevin, energy, x, config, generator=seeded(), length=length)
    product = autograd_product(energy, x, steps)
    return pull_back(langevin, energy, config, segments, v, product=product)


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_it_is_the_product_of_the_autograd_tape(activation: str, steps: int) -> None:
    energy, x = double_energy(activation), make_images("digits", 3).double()
    v = torch.randn(x.shape, generator=seeded(5), dtype=x.dtype)
    start = x.clone().requires_grad_(True)
    end = taped(energy, start, LangevinConfig(steps, TAU), noises_of(x, steps))
    (expected,) = torch.autograd.grad(end, start, v)
    ours = pulled(energy, x, v, steps, None)
    assert relative_difference(ours, expected) < 1e-8
    assert relative_difference(expected, v) > 0.01, "the chain is not the identity"


def test_it_is_the_finite_difference_of_the_chain_with_its_noise_held() -> None:
    energy, x, config = double_energy("silu"), make_images("digits", 2).double(), 6
    v, u = (torch.randn(x.shape, generator=seeded(s), dtype=x.dtype) for s in (5, 6))

    def end(start: Tensor) -> Tensor:
        return langevin(energy, start, LangevinConfig(config, TAU), generator=seeded())

    h = 1e-5
    difference = ((end(x + h * u) - end(x - h * u)) / (2 * h) * v).sum()
    ours = (pulled(energy, x, v, config, None) * u).sum()
    assert ours.item() == pytest.approx(difference.item(), rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 100, None])
def test_the_length_of_a_segment_changes_nothing(length: int | None) -> None:
    energy, x = double_energy("silu"), make_images("digits", 3).double()
    v = torch.randn(x.shape, generator=seeded(5), dtype=x.dtype)
    config = LangevinConfig(8, TAU)
    end, _ = run_in_segments(langevin, energy, x, config, generator=seeded(), length=length)
    assert torch.equal(end, langevin(energy, x, config, generator=seeded()))
    assert relative_difference(pulled(energy, x, v, 8, length), pulled(energy, x, v, 8, 8)) < 1e-12


@pytest.mark.parametrize("steps", [1, 9, 100, 1500])
def test_memory_grows_with_the_square_root_of_the_steps(quadratic, steps: int) -> None:
    x = torch.zeros(1, 1, 2, 2)
    kept = 0

    def chain(energy, x, config, *, generator, log=None, states=None):
        nonlocal kept
        if states is not None:
            states += [x] * config.steps
            kept = max(kept, len(states) + 1)
        return x

    config = LangevinConfig(steps, TAU)
    _, segments = run_in_segments(chain, quadratic(0.1), x, config, generator=seeded())
    pull_back(chain, quadratic(0.1), config, segments, x, product=lambda x, v: v)
    assert len(segments) + kept <= 2 * steps**0.5 + 2
    assert sum(segment.steps for segment in segments) == steps


def test_on_a_quadratic_energy_a_step_shrinks_the_cotangent(quadratic) -> None:
    x, v = torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    out = pulled(quadratic(0.25).requires_grad_(False), x, v, 3, None)
    torch.testing.assert_close(out, torch.full_like(v, 0.75**3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("images_at_once", [2, 1000])
def test_the_written_product_is_autograds(
    shape: str, activation: str, images_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defense.gradient.hessian.images_at_once", lambda *about: images_at_once)
    energy = make_energy(shape, activation).requires_grad_(False)
    x = make_images(shape, 5)
    v = torch.randn(x.shape, generator=seeded())
    for times in (2, 20):
        ours = WrittenHessian(energy, x, times).product(x, v)
        expected = hessian_product(energy, x, v)
        if activation == "leaky_relu":
            assert not ours.any()
            assert not expected.any()
        else:
            assert relative_difference(ours, expected) < 1e-4


@pytest.mark.parametrize("activation", ["silu", "smooth_leaky_relu", "softplus"])
@pytest.mark.parametrize("shape", ["digits", "paper"])
def test_the_way_back_in_bfloat16_is_near_that_in_float32(shape: str, activation: str) -> None:
    energy = make_energy(shape, activation).requires_grad_(False)
    x = make_images(shape, 4)
    v = torch.sign(torch.randn(x.shape, generator=seeded(1)))
    config, chain, ways = LangevinConfig(12, TAU), FastLangevin(precision="bfloat16"), []
    for precision in ("float32", "bfloat16"):
        product = partial(written_product, precision=precision)
        purifier = LangevinPurifier(energy, config, chain=chain, product=product)
        ways.append(purifier.with_way_back(to_pixels(x), generator=seeded())[1](v))
    exact, low = (way - v for way in ways)
    assert exact.norm() > 0.01 * v.norm(), "the chain changes the gradient"
    assert 0 < relative_difference(low, exact) < 0.08


def test_the_written_product_is_of_a_conv_energy_only(quadratic) -> None:
    with pytest.raises(ValueError, match="energy: expected a ConvEnergy, got QuadraticEnergy"):
        written_product(quadratic(0.1), torch.zeros(1, 1, 2, 2), 3)


def test_smoothed_replaces_corners_in_a_copy() -> None:
    energy = make_energy()
    smooth = smoothed(energy, 0.03)
    kinds = [type(layer) for layer in smooth.layers[1::2]]
    assert set(kinds[: len(energy.layers) // 2]) == {SmoothLeakyReLU}
    assert smooth.layers[1].negative_slope == 0.05
    assert smooth.layers[1].softness == 0.03
    assert isinstance(energy.layers[1], nn.LeakyReLU)
    with pytest.raises(ValueError, match="expected one with a ReLU or leaky ReLU"):
        smoothed(make_energy(activation="silu"), 0.03)


def test_an_activation_that_stands_in_two_places_is_smoothed_in_both() -> None:
    act = nn.LeakyReLU(0.05)
    smooth = smoothed(nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 1), act), 0.01)
    assert isinstance(smooth[1], SmoothLeakyReLU)
    assert isinstance(smooth[3], SmoothLeakyReLU)
    with pytest.raises(ValueError, match="expected its ReLUs to be modules inside it"):
        smoothed(nn.ReLU(), 0.01)


def test_a_gradient_that_is_zero_says_nothing_of_the_chain() -> None:
    class Flat(Pick):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.0

    defense = EOTDefense(
        Flat(), double_energy("silu"), LangevinConfig(3, TAU), replicas=2, gradient="exact"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_gradient(defense, (make_images("digits", 2).double() + 1) / 2, torch.tensor([0, 1]))
    assert defense.gradient_is_identity is None


def test_there_is_no_second_derivative_to_get_wrong() -> None:
    defense = defend(double_energy("silu"), "exact")
    x = ((make_images("digits", 2).double() + 1) / 2).requires_grad_(True)
    (gradient,) = torch.autograd.grad(defense(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Pick(nn.Module):
    """A linear classifier of two classes with known gradients."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype)
        score = x.flatten(1) @ weights
        return torch.stack([score, -score], dim=1)


def defend(energy: nn.Module, gradient: str, **options) -> EOTDefense:
    options = {"replicas": 3, "seed": 0, **options}
    return EOTDefense(Pick(), energy, LangevinConfig(6, TAU), gradient=gradient, **options)


@pytest.mark.parametrize("segment", [None, 1, 4])
def test_the_exact_gradient_of_a_defense_is_that_of_its_tape(segment: int | None) -> None:
    energy, x = double_energy("silu"), (make_images("digits", 2).double() + 1) / 2
    y = torch.tensor([0, 1])
    ours, _ = loss_gradient(defend(energy, "exact", segment=segment), x, y)
    twin = defend(energy, "exact")
    copies = to_net(x).repeat(3, 1, 1, 1)
    generator = twin.own_generator(x.device)
    noises = [torch.randn(copies.shape, generator=generator, dtype=x.dtype) for _ in range(6)]
    start = x.clone().requires_grad_(True)
    end = taped(energy, to_net(start).repeat(3, 1, 1, 1), LangevinConfig(6, TAU), noises)
    logits = Pick()(to_pixels(end)).unflatten(0, (3, 2)).mean(0)
    loss = nn.functional.cross_entropy(logits, y, reduction="sum")
    (expected,) = torch.autograd.grad(loss, start)
    assert relative_difference(ours, expected) < 1e-8


@pytest.mark.parametrize("mode", ["exact", "smoothed"])
def test_pieces_of_the_batch_change_no_gradient_but_the_order_of_the_noise(mode: str) -> None:
    energy = double_energy("silu" if mode == "exact" else "leaky_relu")
    x, y = (make_images("digits", 4).double() + 1) / 2, torch.tensor([0, 1, 1, 0])
    quiet = LangevinConfig(5, 0.0)
    whole, parts = (
        loss_gradient(
            EOTDefense(Pick(), energy, quiet, replicas=3, max_chains=n, gradient=mode), x, y
        )[0]
        for n in (100, 5)
    )
    assert relative_difference(parts, whole) < 1e-10


def test_a_piecewise_linear_energy_gives_the_identity_and_says_so() -> None:
    energy, x = double_energy("leaky_relu"), (make_images("digits", 3).double() + 1) / 2
    y = torch.tensor([0, 1, 0])
    expected, _ = loss_gradient(defend(energy, "identity"), x, y)
    defense = defend(energy, "exact")
    with pytest.warns(UserWarning, match="is the identity, as in BPDA"):
        ours, _ = loss_gradient(defense, x, y)
    assert torch.equal(ours, expected)
    assert defense.gradient_is_identity is True

    def end(start: Tensor) -> Tensor:
        return langevin(energy, to_net(start), LangevinConfig(6, TAU), generator=seeded())

    step = (8 / 255) * torch.sign(torch.randn(x.shape, generator=seeded(), dtype=x.dtype))
    response = (end(x + step) - end(x)) / 2
    assert relative_difference(response, step) > 0.1, "the chain itself does respond otherwise"


@pytest.mark.parametrize(("activation", "mode"), [("silu", "exact"), ("leaky_relu", "smoothed")])
def test_a_gradient_that_the_chain_has_changed_is_not_warned_of(activation, mode) -> None:
    defense = defend(double_energy(activation), mode)
    x = (make_images("digits", 3).double() + 1) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_gradient(defense, x, torch.tensor([0, 1, 0]))
    assert defense.gradient_is_identity is False


def test_smoothed_is_the_chains_own_states_with_a_smooth_hessian() -> None:
    energy, x = double_energy("leaky_relu"), make_images("digits", 2).double()
    v = torch.randn(x.shape, generator=seeded(5), dtype=x.dtype)
    config, smooth = LangevinConfig(6, TAU), smoothed(energy, 0.01)
    states: list[Tensor] = []
    langevin(energy, x, config, generator=seeded(), states=states)
    expected = v
    for state in reversed(states):
        expected = expected - hessian_product(smooth, state, expected)
    _, segments = run_in_segments(langevin, energy, x, config, generator=seeded())
    product = autograd_product(smooth, x, 6)
    ours = pull_back(langevin, energy, config, segments, v, product=product)
    assert torch.equal(ours, expected)


def test_values_do_not_depend_on_the_mode() -> None:
    energy = make_energy()
    x = (make_images("digits", 3) + 1) / 2
    y = torch.tensor([0, 1, 0])
    options = {"chain": FastLangevin(), "product": written_product}
    logits = [
        loss_gradient(defend(energy, mode, **options), x, y)[1] for mode in ("identity", "smoothed")
    ]
    assert relative_difference(*logits) < 1e-5


def test_the_fast_chain_and_product_give_the_plain_ones_gradient() -> None:
    energy = make_energy(activation="smooth_leaky_relu").requires_grad_(False)
    x, y = (make_images("digits", 3) + 1) / 2, torch.tensor([0, 1, 0])
    plain, _ = loss_gradient(defend(energy, "exact"), x, y)
    fast = defend(energy, "exact", chain=FastLangevin(), product=written_product)
    assert relative_difference(loss_gradient(fast, x, y)[0], plain) < 1e-3


def test_going_back_draws_nothing_from_the_defenses_noise() -> None:
    x, y = (make_images("digits", 2).double() + 1) / 2, torch.tensor([0, 1])
    defense, twin = (defend(double_energy("silu"), "exact") for _ in range(2))
    loss_gradient(defense, x, y)
    twin(x)
    with torch.no_grad():
        assert torch.equal(defense(x), twin(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_predictions_need_no_way_back(mode) -> None:
    defense = defend(make_energy(), "smoothed")
    with mode():
        assert defense((make_images("digits", 2) + 1) / 2).shape == (2, 2)
    assert copy.deepcopy(defense).gradient == "smoothed"


def test_bad_modes_are_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"gradient: expected one of .*, got 'adjoint'"):
        defend(make_energy(), "adjoint")
    with pytest.raises(ValueError, match="expected one with a ReLU"):
        defend(make_energy(activation="silu"), "smoothed")


@pytest.mark.parametrize("chain", [langevin, FastLangevin()])
def test_a_chain_hands_out_the_state_before_every_step(chain) -> None:
    energy, x = make_energy(), make_images()
    states: list[Tensor] = []
    end = chain(energy, x, LangevinConfig(5, TAU), generator=seeded(), states=states)
    again = chain(energy, x, LangevinConfig(5, TAU), generator=seeded())
    assert torch.equal(end, again)
    assert torch.equal(states[0], x)
    for steps, state in enumerate(states):
        shorter = chain(energy, x, LangevinConfig(steps, TAU), generator=seeded())
        assert relative_difference(state, shorter) < 1e-5
    assert len(states) == 5
