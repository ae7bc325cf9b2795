"""One update of Algorithm 2 by hand, and runs that stop and go on."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense.bank import CompactBank, DataBank, ImageBank, NoisyImages
from defense.ebm_training import EBMTrainConfig, EBMTrainer
from defense.langevin import ChainLog, LangevinConfig, langevin

TAU, SIGMA = 0.2, 0.1
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "sgd"])


def make_config(
    optimizer: str = "sgd",
    *,
    rate: float = 1e-2,
    steps: int = 3,
    precision: str = "float32",
    **switches: Any,
) -> EBMTrainConfig:
    return EBMTrainConfig(optimizer, rate, 4, LangevinConfig(steps, TAU), precision, **switches)


@pytest.fixture
def make_trainer(tiny_energy, seeded):
    """A trainer on twenty random images, the same at every call but for the generator's seed."""

    def make(config: EBMTrainConfig, seed: int = 0, kind=ImageBank, **options) -> EBMTrainer:
        images = 2 * torch.rand(20, 1, 8, 8, generator=seeded(5)) - 1
        bank = kind.uniform(images.shape, generator=seeded(6))
        energy, generator = copy.deepcopy(tiny_energy), seeded(seed)
        data = NoisyImages(images, SIGMA)
        return EBMTrainer(energy, data, bank, config, generator=generator, **options)

    return make


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def draws_of_one_update(
    trainer: EBMTrainer, seeded, log: ChainLog | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """X+, slots and X- of the first update of a trainer with seed 0; changes nothing."""
    config, generator = trainer.config, seeded(0)
    picks = torch.randint(20, (config.batch,), generator=generator)
    noise = torch.randn(config.batch, 1, 8, 8, generator=generator)
    data = trainer.data.images[picks] + SIGMA * noise
    slots = torch.randperm(20, generator=generator)[: config.batch]
    start = trainer.bank.states[slots]
    end = langevin(trainer.energy, start, config.langevin, generator=generator, log=log)
    return data, slots, end


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@OPTIMIZERS
@pytest.mark.parametrize("stop_after", [0, 2])
@pytest.mark.parametrize("kind", [ImageBank, CompactBank])
def test_resuming_equals_never_stopping(
    make_trainer, optimizer: str, stop_after: int, kind: type[ImageBank]
) -> None:
    whole, first = (make_trainer(make_config(optimizer), kind=kind) for _ in range(2))
    whole_stats = [whole.update() for _ in range(5)]
    for _ in range(stop_after):
        first.update()
    resumed = make_trainer(make_config(optimizer), seed=99, kind=kind)
    for _ in range(3):  # go astray first: everything that counts must be in the state
        resumed.update()
    resumed.load_state_dict(through_a_file(first.state_dict()))
    stats = [resumed.update() for _ in range(5 - stop_after)]
    assert torch.equal(weights(resumed.energy), weights(whole.energy))
    slots = torch.arange(20)
    assert torch.equal(resumed.bank.read(slots), whole.bank.read(slots))
    assert torch.equal(resumed.generator.get_state(), whole.generator.get_state())
    assert resumed.batches_done == whole.batches_done == 5
    assert [s.energy_gap for s in stats] == [s.energy_gap for s in whole_stats[stop_after:]]


def test_an_sgd_update_moves_by_the_rate_times_the_gradient_of_f(make_trainer, seeded) -> None:
    """The authors' scaling: f = (tau^2 / 2) U, not U, meets the learning rate."""
    rate = 0.3
    trainer = make_trainer(make_config("sgd", rate=rate))
    data, _, chains = draws_of_one_update(trainer, seeded)
    before, twin = weights(trainer.energy), copy.deepcopy(trainer.energy)
    (twin(data).mean() - twin(chains).mean()).backward()
    gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])
    trainer.update()
    moved = weights(trainer.energy) - before
    assert gradient.norm() > 1e-2
    torch.testing.assert_close(moved, -rate * gradient, rtol=1e-3, atol=1e-6)


def test_the_first_adam_update_moves_every_weight_by_the_rate(make_trainer, seeded) -> None:
    rate = 1e-3
    trainer = make_trainer(make_config("adam", rate=rate))
    data, _, chains = draws_of_one_update(trainer, seeded)
    before, twin = weights(trainer.energy), copy.deepcopy(trainer.energy)
    (twin(data).mean() - twin(chains).mean()).backward()
    gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])
    trainer.update()
    moved, clear = weights(trainer.energy) - before, gradient.abs() > 1e-5
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(moved[clear], -rate * gradient.sign()[clear], rtol=1e-3, atol=1e-6)


@OPTIMIZERS
def test_the_bank_receives_the_ends_of_its_own_chains(make_trainer, seeded, optimizer: str) -> None:
    trainer = make_trainer(make_config(optimizer))
    before = trainer.bank.states.clone()
    _, slots, chains = draws_of_one_update(trainer, seeded)
    trainer.update()
    others = [slot for slot in range(20) if slot not in slots.tolist()]
    assert torch.equal(trainer.bank.states[slots], chains)
    assert torch.equal(trainer.bank.states[others], before[others])
    assert (chains - before[slots]).flatten(1).norm(dim=1).min() > 0.1


def test_the_statistics_are_in_the_units_they_claim(make_trainer, seeded) -> None:
    trainer = make_trainer(make_config(rate=0.0))
    data, _, chains = draws_of_one_update(trainer, seeded)
    stats = trainer.update()
    with torch.no_grad():
        gap = (trainer.energy(data).mean() - trainer.energy(chains).mean()) / (TAU**2 / 2)
    torch.testing.assert_close(stats.energy_gap, gap)
    log, again = ChainLog(), make_trainer(make_config(rate=0.0))
    draws_of_one_update(again, seeded, log)
    torch.testing.assert_close(stats.gradient_norm, log.mean_gradient_norm())
    assert not stats.energy_gap.requires_grad


@OPTIMIZERS
def test_an_update_lowers_the_energy_of_data_against_chains(
    quadratic, seeded, optimizer: str
) -> None:
    """Data at the centre, chains far out: the gap is negative, and the well gets steeper."""
    data, bank = torch.zeros(4, 1, 2, 2), ImageBank(torch.full((4, 1, 2, 2), 3.0))
    config = EBMTrainConfig(optimizer, 0.01, 4, LangevinConfig(0, TAU), "float32")
    energy = quadratic(0.5)
    stats = EBMTrainer(energy, NoisyImages(data, 0.0), bank, config, generator=seeded()).update()
    assert stats.energy_gap.item() == pytest.approx(-0.5 / 2 * 36 / (TAU**2 / 2), rel=1e-5)
    moved = 0.01 if optimizer == "adam" else 0.01 * 18
    assert energy.a.item() == pytest.approx(0.5 + moved, rel=1e-4)


def test_the_chain_is_the_one_that_was_given(make_trainer) -> None:
    calls = []

    def frozen_chain(energy, x, config, *, generator, log=None):
        calls.append((len(x), config))
        return x

    trainer = make_trainer(make_config(steps=7), chain=frozen_chain)
    before = trainer.bank.states.clone()
    trainer.update()
    assert calls == [(4, LangevinConfig(7, TAU))]
    assert torch.equal(trainer.bank.states, before)


def test_the_global_stream_is_left_alone(make_trainer) -> None:
    trainer, before = make_trainer(make_config("adam")), torch.get_rng_state()
    trainer.update()
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer: expected adam or sgd, got 'adamw'"):
        make_config("adamw")
    with pytest.raises(ValueError, match=r"precision: expected one of .*, got 'float16'"):
        make_config(precision="float16")


def test_bfloat16_changes_the_update_a_little_and_leaves_the_weights_float32(make_trainer) -> None:
    moves = []
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(make_config(rate=1.0, precision=precision))
        before = weights(trainer.energy)
        trainer.update()
        moves.append(weights(trainer.energy) - before)
        assert moves[-1].dtype == torch.float32
    exact, low = moves
    assert 1e-5 < (low - exact).norm() / exact.norm() < 0.05


def test_the_gap_of_a_bfloat16_update_is_float32(make_trainer) -> None:
    stats = make_trainer(make_config(precision="bfloat16")).update()
    assert stats.energy_gap.dtype == torch.float32


def test_configurations_that_cannot_train_are_refused() -> None:
    with pytest.raises(ValueError, match=r"langevin\.tau: expected > 0, got 0"):
        EBMTrainConfig("adam", 1e-3, 4, LangevinConfig(3, 0.0), "float32")
    with pytest.raises(ValueError, match="batch: expected >= 1, got 0"):
        EBMTrainConfig("adam", 1e-3, 0, LangevinConfig(3, 0.1), "float32")
    with pytest.raises(ValueError, match="falls_over: expected >= 1 or None, got 0"):
        make_config(falls_over=0)
    with pytest.raises(ValueError, match=r"average: expected in \[0, 1\), got 1"):
        make_config(average=1.0)


def test_pairs_can_be_coupled_only_if_chains_start_at_data(make_trainer) -> None:
    with pytest.raises(ValueError, match="coupled: expected a bank of chains that start at data"):
        make_trainer(make_config(coupled=True))


@OPTIMIZERS
def test_the_rate_falls_to_zero_along_half_a_cosine(make_trainer, optimizer: str) -> None:
    config = make_config(optimizer, falls_over=8)
    rates = [config.rate(n) / config.learning_rate for n in (0, 2, 4, 6, 8, 9)]
    half = 0.5**0.5
    expected = [1, 0.5 + half / 2, 0.5, 0.5 - half / 2, 0, 0]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected), atol=1e-6, rtol=0)
    trainer = make_trainer(config)
    for _ in range(8):
        trainer.update()
    before = weights(trainer.energy)
    trainer.update()
    assert torch.equal(weights(trainer.energy), before), "nothing moves at a rate of zero"


def test_averaged_weights_are_the_average_of_all_weights_so_far(make_trainer) -> None:
    decay = 0.25
    trainer = make_trainer(make_config("adam", average=decay))
    plain = make_trainer(make_config("adam"))
    by_hand = None
    for update in range(4):
        trainer.update()
        plain.update()
        now = weights(trainer.energy)
        fades = min(decay, (1 + update) / (10 + update))  # 0, 2/11, 1/4, 1/4
        by_hand = now if by_hand is None else fades * by_hand + (1 - fades) * now
    assert torch.equal(weights(trainer.energy), weights(plain.energy)), "the training is the same"
    assert plain.trained is plain.energy
    torch.testing.assert_close(weights(trainer.trained), by_hand)


def data_bank(images: Tensor, seeded, life: int | None = 3) -> DataBank:
    return DataBank(NoisyImages(images, SIGMA, mirror=True), 12, life, generator=seeded(6))


def test_a_run_with_every_switch_resumes_as_if_never_stopped(tiny_energy, seeded) -> None:
    images = 2 * torch.rand(20, 1, 8, 8, generator=seeded(5)) - 1
    config = make_config("adam", coupled=True, average=0.9, falls_over=6)

    def make(seed: int) -> EBMTrainer:
        bank = data_bank(images, seeded)
        energy, generator = copy.deepcopy(tiny_energy), seeded(seed)
        return EBMTrainer(energy, bank.data, bank, config, generator=generator)

    whole, first, resumed = make(0), make(0), make(99)
    for _ in range(6):
        whole.update()
    for _ in range(2):
        first.update()
    for _ in range(3):
        resumed.update()
    resumed.load_state_dict(through_a_file(first.state_dict()))
    for _ in range(4):
        resumed.update()
    assert torch.equal(weights(resumed.trained), weights(whole.trained))
    for name, value in whole.bank.state_dict().items():
        assert torch.equal(resumed.bank.state_dict()[name], value), name


def test_coupled_pairs_give_the_same_mean_gap_with_a_fraction_of_its_spread(
    quadratic, seeded
) -> None:
    """Images far apart, chains that have not moved: the gap is 0 on average, coupled or not."""
    far_apart = torch.linspace(-3, 3, 40).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()

    def gaps(*, coupled: bool) -> Tensor:
        bank = DataBank(NoisyImages(far_apart, SIGMA), 4000, None, generator=seeded(6))
        config = make_config(rate=0.0, steps=0, coupled=coupled)
        trainer = EBMTrainer(quadratic(0.5), bank.data, bank, config, generator=seeded(1))
        return torch.stack([trainer.update().energy_gap for _ in range(1000)])

    free, paired = gaps(coupled=False), gaps(coupled=True)
    for sample in (free, paired):
        assert abs(sample.mean()) < 5 * sample.std() / len(sample) ** 0.5
    # U = a / tau^2 |x|^2: with noise n on an image x, the coupled gap has variance
    # (a / tau^2)^2 / batch * 2 * (4 sigma^2 E|x|^2 + 2 d sigma^4), d = 16 pixels.
    spread = (0.5 / TAU**2) * (
        2 * (4 * SIGMA**2 * far_apart.flatten(1).square().sum(1).mean() + 32 * SIGMA**4) / 4
    ) ** 0.5
    assert paired.std() == pytest.approx(float(spread), rel=0.1)
    assert paired.std() < 0.2 * free.std()
