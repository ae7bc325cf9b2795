"""The plain chain against closed forms on f = a/2 |x|^2."""

import math

import pytest
import torch

from defense.langevin import ChainLog, LangevinConfig, energy_and_gradient, langevin

START = torch.linspace(-1, 1, 24).view(2, 3, 2, 2)


@pytest.mark.parametrize("a", [0.02, 0.5, 1.5])
@pytest.mark.parametrize("steps", [1, 7])
def test_without_noise_it_is_gradient_descent(quadratic, seeded, a: float, steps: int) -> None:
    end = langevin(quadratic(a), START, LangevinConfig(steps, 0.0), generator=seeded())
    torch.testing.assert_close(end, START * (1 - a) ** steps)


def test_one_step_is_equation_3(tiny_energy, images, seeded) -> None:
    end = langevin(tiny_energy, images, LangevinConfig(1, 0.3), generator=seeded())
    x = images.clone().requires_grad_(True)
    tiny_energy(x).sum().backward()
    noise = torch.randn(images.shape, generator=seeded())
    torch.testing.assert_close(end, images - x.grad + 0.3 * noise)


@pytest.mark.parametrize(
    ("a", "tau", "steps", "expected"),
    [(0.02, 0.1, 400, 0.2525), (0.5, 0.1, 30, 0.013333), (1.5, 0.3, 30, 0.12)],
)
def test_stationary_variance_is_the_discretized_one(
    quadratic, seeded, a: float, tau: float, steps: int, expected: float
) -> None:
    count = 100_000
    start = torch.zeros(10, 1, 100, 100)
    end = langevin(quadratic(a), start, LangevinConfig(steps, tau), generator=seeded())
    end = end.double()
    variance = tau**2 / (1 - (1 - a) ** 2)
    assert math.isclose(variance, expected, rel_tol=1e-3)
    assert abs(end.mean().item()) < 5 * math.sqrt(variance / count)
    assert abs(end.var().item() - variance) < 5 * variance * math.sqrt(2 / count)


def test_the_start_is_forgotten_at_the_rate_of_the_drift(quadratic, seeded) -> None:
    count, a, tau, steps = 40_000, 0.1, 0.1, 10
    end = langevin(
        quadratic(a), torch.ones(1, 1, 200, 200), LangevinConfig(steps, tau), generator=seeded()
    )
    decay = (1 - a) ** steps
    variance = tau**2 * (1 - decay**2) / (1 - (1 - a) ** 2)
    assert abs(end.mean().item() - decay) < 5 * math.sqrt(variance / count)


def test_no_steps_are_the_identity(quadratic, seeded) -> None:
    energy, generator = quadratic(0.1), seeded()
    end = langevin(energy, START, LangevinConfig(0, 0.1), generator=generator)
    assert torch.equal(end, START)
    assert energy.calls == 0
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_same_seed_same_chain_and_another_seed_another(tiny_energy, images, seeded) -> None:
    config = LangevinConfig(5, 0.1)
    ends = [langevin(tiny_energy, images, config, generator=seeded(s)) for s in (1, 1, 2)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_the_global_stream_is_used_only_when_asked_for(tiny_energy, images, seeded) -> None:
    config = LangevinConfig(5, 0.1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    own = langevin(tiny_energy, images, config, generator=seeded(7))
    assert torch.equal(torch.get_rng_state(), before)
    shared = langevin(tiny_energy, images, config, generator=None)
    assert not torch.equal(torch.get_rng_state(), before)
    assert torch.equal(own, shared)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_gives_the_same_and_no_graph(tiny_energy, images, seeded, mode) -> None:
    config = LangevinConfig(3, 0.1)
    expected = langevin(tiny_energy, images, config, generator=seeded())
    with mode():
        x = images.clone()
        end = langevin(tiny_energy, x, config, generator=seeded())
    assert torch.equal(end, expected)
    assert not end.requires_grad
    assert torch.equal(x, images)


def test_tensors_made_in_inference_mode_are_taken_outside_it(tiny_energy, images, seeded) -> None:
    with torch.inference_mode():
        x = images.clone()
    config = LangevinConfig(3, 0.1)
    expected = langevin(tiny_energy, images, config, generator=seeded())
    assert torch.equal(langevin(tiny_energy, x, config, generator=seeded()), expected)


def test_an_input_that_wants_a_gradient_gets_no_graph(quadratic, seeded) -> None:
    x = START.clone().requires_grad_(True)
    for steps in (0, 3):
        end = langevin(quadratic(0.1), x, LangevinConfig(steps, 0.1), generator=seeded())
        assert not end.requires_grad


def test_the_energy_is_evaluated_once_a_step(quadratic, seeded) -> None:
    energy = quadratic(0.1)
    langevin(energy, START, LangevinConfig(13, 0.1), generator=seeded())
    assert energy.calls == 13
    assert energy.a.grad is None


def test_the_log_has_energy_and_gradient_norm_before_every_step(quadratic, seeded) -> None:
    log, energy = ChainLog(), quadratic(0.1)
    langevin(energy, START, LangevinConfig(4, 0.1), generator=seeded(), log=log)
    assert len(log.energies) == len(log.gradient_norms) == 4
    for k in range(4):
        state = langevin(energy, START, LangevinConfig(k, 0.1), generator=seeded())
        torch.testing.assert_close(log.energies[k], energy(state).detach())
        norms = (0.1 * state).flatten(1).norm(dim=1)
        torch.testing.assert_close(log.gradient_norms[k], norms)
    mean = torch.stack(log.gradient_norms).mean()
    assert log.mean_gradient_norm() == mean
    assert ChainLog().mean_gradient_norm().isnan()


def test_chains_are_not_clipped(quadratic, seeded) -> None:
    end = langevin(quadratic(0.0), START, LangevinConfig(50, 1.0), generator=seeded())
    assert end.abs().max() > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_precision_of_the_images_is_kept(quadratic, seeded, dtype: torch.dtype) -> None:
    end = langevin(quadratic(0.1), START.to(dtype), LangevinConfig(2, 0.1), generator=seeded())
    assert end.dtype == dtype


def test_a_batch_of_one_and_an_empty_batch_work(tiny_energy, images, seeded) -> None:
    for count in (1, 0):
        x = images[:count]
        assert langevin(tiny_energy, x, LangevinConfig(2, 0.1), generator=seeded()).shape == x.shape


def test_the_gradient_is_each_images_own(quadratic) -> None:
    _, gradient = energy_and_gradient(quadratic(0.3), START)
    torch.testing.assert_close(gradient, 0.3 * START)


def test_bad_configurations_are_said() -> None:
    with pytest.raises(ValueError, match="steps: expected >= 0, got -1"):
        LangevinConfig(-1, 0.1)
    with pytest.raises(ValueError, match=r"tau: expected >= 0, got -0\.1"):
        LangevinConfig(1, -0.1)
