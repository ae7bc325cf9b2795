"""The fast chain against the plain one: the same noise, the same steps, the same conditions."""

import copy
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from defense.energy import ACTIVATIONS
from defense.eot import EOTDefense
from defense.fast import langevin as fast_langevin, onednn, written_gradient
from defense.fast.langevin import FastLangevin, bytes_per_image, images_at_once, padded_batch
from defense.fast.precision import Precision, arithmetic
from defense.fast.written_gradient import WrittenGradient, slope_of
from defense.gradient.hessian import written_product
from defense.langevin import ChainLog, LangevinConfig, energy_and_gradient, langevin
from tests.chains import (
    SHAPES,
    TWENTY,
    assert_same_log,
    make_energy,
    make_images,
    relative_difference,
    seeded,
    torch_threads,
)


@pytest.fixture(autouse=True)
def both_transposes_in_small_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_gradient, "VECTOR_BYTES", 32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from torch's own threads, and wait for them on a busy machine."""
    with torch_threads(1):
        yield


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_twenty_steps_agree_with_the_plain_chain(shape: str, activation: str, threads: int) -> None:
    energy, x = make_energy(shape, activation), make_images(shape)
    expected = langevin(energy, x, TWENTY, generator=seeded())
    with torch_threads(threads):
        actual = FastLangevin()(energy, x, TWENTY, generator=seeded())
    assert relative_difference(expected, x) > 0.1
    assert relative_difference(actual, expected) < 1e-5
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_few_steps_are_prepared_otherwise_and_agree_as_well(shape: str) -> None:
    energy, x, few = make_energy(shape, "silu"), make_images(shape), LangevinConfig(4, 0.01)
    expected = langevin(energy, x, few, generator=seeded())
    actual = FastLangevin()(energy, x, few, generator=seeded())
    assert relative_difference(actual, expected) < 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_without_the_cpu_library(
    shape: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_can_be_trusted", lambda dtype: False)
    energy, x = make_energy(shape, activation), make_images(shape)
    with torch.inference_mode():
        actual = WrittenGradient(energy, list(x.shape), torch.float32, 20)(x)
    assert relative_difference(actual, energy_and_gradient(energy, x)[1]) < 1e-5


def test_pieces_do_not_change_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    energy, x = make_energy(activation="silu"), make_images(count=17)
    generators = seeded(), seeded()
    logs = ChainLog(), ChainLog()
    expected = langevin(energy, x, TWENTY, generator=generators[0], log=logs[0])
    monkeypatch.setattr(fast_langevin, "CACHED_VALUES", 0)
    monkeypatch.setattr(fast_langevin, "SMALLEST_SHARE", 3)
    assert images_at_once(energy, "float32", x.device) == 3
    actual = FastLangevin()(energy, x, TWENTY, generator=generators[1], log=logs[1])
    assert relative_difference(actual, expected) < 1e-5
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert_same_log(logs[1], logs[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_is_the_plain_chains_and_changes_nothing(shape: str, activation: str) -> None:
    energy, x = make_energy(shape, activation), make_images(shape)
    logs = ChainLog(), ChainLog()
    langevin(energy, x, TWENTY, generator=seeded(), log=logs[0])
    logged = FastLangevin()(energy, x, TWENTY, generator=seeded(), log=logs[1])
    assert_same_log(logs[1], logs[0])
    assert torch.equal(logged, FastLangevin()(energy, x, TWENTY, generator=seeded()))


def test_same_seed_gives_the_same_bits() -> None:
    energy, x, chain = make_energy(), make_images(count=40), FastLangevin()
    runs = [chain(energy, x, TWENTY, generator=seeded()) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_changed_weights_are_seen_at_the_next_call() -> None:
    energy, x, chain = make_energy(activation="silu"), make_images(), FastLangevin()
    before = chain(energy, x, TWENTY, generator=seeded())
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.mul_(0.5)
    after = chain(energy, x, TWENTY, generator=seeded())
    expected = langevin(energy, x, TWENTY, generator=seeded())
    assert relative_difference(before, expected) > 1e-2
    assert relative_difference(after, expected) < 1e-5


def test_weights_may_be_channels_last() -> None:
    energy, x = make_energy("paper", "silu"), make_images("paper")
    expected = langevin(energy, x, TWENTY, generator=seeded())
    energy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    actual = FastLangevin()(energy, x, TWENTY, generator=seeded())
    assert relative_difference(actual, expected) < 1e-5


def test_no_steps_are_the_identity_and_an_empty_batch_stays_empty() -> None:
    energy, x, chain = make_energy(), make_images(), FastLangevin()
    assert torch.equal(chain(energy, x, LangevinConfig(0, 0.01), generator=None), x)
    assert chain(energy, x[:0], TWENTY, generator=seeded()).shape == x[:0].shape


def test_tau_zero_is_gradient_descent() -> None:
    energy, x = make_energy(activation="softplus"), make_images()
    config = LangevinConfig(steps=3, tau=0.0)
    expected = x
    for _ in range(3):
        expected = expected - energy_and_gradient(energy, expected)[1]
    actual = FastLangevin()(energy, x, config, generator=seeded())
    assert relative_difference(actual, expected) < 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_gives_the_same_and_no_graph(mode: type) -> None:
    energy, x = make_energy(), make_images()
    expected = FastLangevin()(energy, x, TWENTY, generator=seeded())
    with mode():
        inputs = x.clone()
        actual = FastLangevin()(energy, inputs, TWENTY, generator=seeded())
    assert torch.equal(actual, expected)
    assert torch.equal(inputs, x)
    assert not actual.requires_grad
    assert actual.is_inference() == (mode is torch.inference_mode)


def test_result_and_energy_can_be_trained_on() -> None:
    energy = make_energy()
    states = FastLangevin()(energy, make_images(), TWENTY, generator=seeded())
    energy(states).mean().backward()
    assert all(parameter.grad is not None for parameter in energy.parameters())


def test_the_global_stream_is_used_only_when_asked_for() -> None:
    energy, x, chain = make_energy(activation="silu"), make_images(), FastLangevin()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    chain(energy, x, TWENTY, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)
    expected = langevin(energy, x, TWENTY, generator=None)
    torch.set_rng_state(state)
    assert relative_difference(chain(energy, x, TWENTY, generator=None), expected) < 1e-5


@pytest.mark.parametrize("shape", ["digits", "paper"])
def test_bfloat16_keeps_a_float32_state_and_the_mean_step(shape: str) -> None:
    energy, x = make_energy(shape, "silu"), make_images(shape, count=16)
    one = LangevinConfig(steps=1, tau=0.01)
    expected = langevin(energy, x, one, generator=seeded())
    actual = FastLangevin(precision="bfloat16")(energy, x, one, generator=seeded())
    step, error = expected - x, actual - expected
    assert actual.dtype == torch.float32
    assert 1e-6 < error.norm() / step.norm() < 2e-2
    assert abs(error.mean()) < 2e-2 * step.abs().mean()


def test_bfloat16_without_the_private_operators_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    energy, x = make_energy("paper", "silu"), make_images("paper", count=4)
    chain, one = FastLangevin(precision="bfloat16"), LangevinConfig(steps=1, tau=0.0)
    with_it = chain(energy, x, one, generator=seeded())
    monkeypatch.setattr(onednn, "_can_be_trusted", lambda dtype: dtype != torch.bfloat16)
    without = chain(energy, x, one, generator=seeded())
    assert (without - with_it).norm() / (with_it - x).norm() < 2e-2


def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so_once(without_bfloat16) -> None:
    energy, x = make_energy(activation="silu"), make_images()
    expected = FastLangevin()(energy, x, TWENTY, generator=seeded())
    with pytest.warns(UserWarning, match="no bfloat16 kernels: computing in float32"):
        actual = FastLangevin(precision="bfloat16")(energy, x, TWENTY, generator=seeded())
    assert torch.equal(actual, expected)
    product = written_product(energy, x, 1)(x, x)
    with warnings.catch_warnings(), arithmetic("bfloat16", x.device):
        warnings.simplefilter("error")
        assert energy(x).dtype == torch.float32
        assert torch.equal(written_product(energy, x, 1, precision="bfloat16")(x, x), product)


@pytest.mark.parametrize("shape", ["digits", "paper"])
def test_a_callers_autocast_does_not_reach_the_chain(shape: str) -> None:
    energy, x, chain = make_energy(shape), make_images(shape), FastLangevin()
    expected = chain(energy, x, TWENTY, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chain(energy, x, TWENTY, generator=seeded()), expected)


def test_tf32_is_float32_on_a_cpu() -> None:
    energy, x = make_energy(), make_images()
    expected = FastLangevin()(energy, x, TWENTY, generator=seeded())
    actual = FastLangevin(precision="tf32")(energy, x, TWENTY, generator=seeded())
    assert torch.equal(actual, expected)


def test_copies_and_pickles_work() -> None:
    energy, x, chain = make_energy(), make_images(), FastLangevin(precision="bfloat16")
    expected = chain(energy, x, TWENTY, generator=seeded())
    for twin in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert twin.precision == "bfloat16"
        assert torch.equal(twin(energy, x, TWENTY, generator=seeded()), expected)


def test_what_it_cannot_do_is_said() -> None:
    energy, x, chain = make_energy(), make_images(), FastLangevin()
    with pytest.raises(ValueError, match="energy: expected a ConvEnergy, got Linear"):
        chain(nn.Linear(2, 2), x, TWENTY, generator=seeded())
    with pytest.raises(ValueError, match=r"x: expected float32, got torch\.float64"):
        chain(energy, x.double(), TWENTY, generator=seeded())
    with pytest.raises(ValueError, match=r"x: expected images \(N,1,8,8\), got shape"):
        chain(energy, make_images("paper"), TWENTY, generator=seeded())
    with pytest.raises(ValueError, match=r"precision: expected one of .*, got 'float16'"):
        FastLangevin(precision="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation: expected one with a written-out slope"):
        slope_of(nn.Tanh())


def test_padded_batches_are_few_and_at_most_a_quarter_larger() -> None:
    sizes = [padded_batch(count) for count in range(64, 1025)]
    assert all(count <= size <= 1.25 * count for count, size in enumerate(sizes, 64))
    assert len(set(sizes)) <= 17
    assert padded_batch(1) == 16


def test_what_fits_a_gpus_memory_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    energy = make_energy("paper")
    need = bytes_per_image(energy, "float32")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (200 * need, 10**12))
    device = torch.device("cuda")
    assert images_at_once(energy, "float32", device) == 100
    assert images_at_once(energy, "bfloat16", device) == 200
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10**12))
    assert images_at_once(energy, "float32", device) == 1


class LiveBytes(TorchDispatchMode):
    """The most memory that tensors made inside have held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            storage = out.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, key, size)
        return out

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_stated_memory_is_enough_and_not_much_more(
    shape: str, activation: str, precision: Precision
) -> None:
    energy, x = make_energy(shape, activation), make_images(shape, count=50)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with torch.no_grad():
        gradient = WrittenGradient(energy, list(x.shape), dtype, 20)
        gradient(x)
        with LiveBytes() as memory:
            gradient(x)
    stated = 50 * bytes_per_image(energy, precision)
    assert 0.4 * stated < memory.peak < stated


@pytest.mark.parametrize("count", [1, 16])
def test_a_last_piece_of_one_image_moves_too(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_langevin, "CACHED_VALUES", 0)
    monkeypatch.setattr(fast_langevin, "SMALLEST_SHARE", 3)
    energy, x = make_energy(activation="silu"), make_images(count=count)
    expected = langevin(energy, x, TWENTY, generator=seeded())
    actual = FastLangevin()(energy, x, TWENTY, generator=seeded())
    assert relative_difference(actual, expected) < 1e-5


def test_a_piece_grows_with_the_threads() -> None:
    energy, cpu, shares = make_energy(), torch.device("cpu"), []
    for threads in (1, 2):
        with torch_threads(threads):
            shares.append(images_at_once(energy, "float32", cpu))
    assert shares[1] == 2 * shares[0]


@pytest.mark.parametrize(("steps", "products"), [(4, 0), (20, 2)])
def test_a_matrix_is_made_only_for_many_steps(
    steps: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    linear = onednn.linear
    monkeypatch.setattr(written_gradient, "linear", lambda *about: made.append(1) or linear(*about))
    WrittenGradient(make_energy(), [7, 1, 8, 8], torch.float32, steps)
    assert len(made) == products


def test_the_log_of_a_bfloat16_chain_is_float32_and_close() -> None:
    energy, x = make_energy(activation="silu"), make_images(count=16)
    logs, one = (ChainLog(), ChainLog()), LangevinConfig(steps=1, tau=0.01)
    langevin(energy, x, one, generator=seeded(), log=logs[0])
    FastLangevin(precision="bfloat16")(energy, x, one, generator=seeded(), log=logs[1])
    for rows in ("energies", "gradient_norms"):
        (exact,), (low,) = (getattr(log, rows) for log in logs)
        assert low.dtype == torch.float32
        assert 0 < relative_difference(low, exact) < 2e-2


def test_the_last_layer_of_logged_energies_is_not_rounded() -> None:
    energy = make_energy()
    row = WrittenGradient(energy, [7, 1, 8, 8], torch.bfloat16, 1).last_row
    assert torch.equal(row, energy.layers[-1].weight.detach().permute(0, 2, 3, 1).flatten())


def test_torch_compile_leaves_the_chain_alone(tiny_classifier) -> None:
    energy, x = make_energy(), (make_images(count=4) + 1) / 2
    plain, other = (
        EOTDefense(tiny_classifier, energy, TWENTY, replicas=2, seed=1, chain=FastLangevin())
        for _ in range(2)
    )
    assert torch.equal(torch.compile(other, backend="eager")(x), plain(x))
