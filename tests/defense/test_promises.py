"""What an honest evaluation has to show on a trained defense: real digits, a real energy.

The numbers are those of the checklists that docs/evaluation.md lists.
"""

import itertools

import pytest
import torch
from torch import Generator, Tensor

from defense.attack import AttackConfig, AttackRecord, run_attack, run_transfer
from defense.eot import EOTDefense
from defense.fast.langevin import FastLangevin
from defense.gradient.hessian import written_product
from defense.langevin import LangevinConfig, langevin
from defense.threat import ThreatModel
from tests.digits_model import DigitsModel

EPS, ALPHA, COUNT = 48.0, 12.0, 40
SLACK = 3 / COUNT
"""Images that noise may decide either way."""


def defend(model: DigitsModel, replicas: int, seed: str, **options) -> EOTDefense:
    options = {"chain": FastLangevin(), "product": written_product, **options}
    return EOTDefense(
        model.classifier,
        model.energy,
        LangevinConfig(20, model.tau),
        replicas=replicas,
        seed=seed,
        max_chains=400,
        **options,
    )


def attack(model: DigitsModel, H_adv: int = 8, eps: float = EPS, **options) -> AttackRecord:  # noqa: N803
    gradient = options.pop("gradient", "identity")
    settings = {"steps": 8, "step_255": ALPHA * eps / EPS, "early_verdicts": True, **options}
    return run_attack(
        defend(model, H_adv, "surrogate", gradient=gradient),
        defend(model, 60, "target"),
        model.images[:COUNT],
        model.labels[:COUNT],
        AttackConfig(ThreatModel("linf", eps), **settings),
        generator=Generator().manual_seed(0),
    )


def robust(record: AttackRecord, model: DigitsModel) -> float:
    return float(record.robust(model.labels[:COUNT]).float().mean())


@pytest.fixture(scope="module")
def usual(digits_model: DigitsModel) -> float:
    return robust(attack(digits_model), digits_model)


def test_7_iterating_is_no_weaker_than_a_single_step(digits_model, usual) -> None:
    single = attack(digits_model, steps=1, step_255=EPS)
    assert usual <= robust(single, digits_model) + SLACK


def test_8_and_11_accuracy_falls_with_the_radius_to_nothing(digits_model, usual) -> None:
    at = [robust(attack(digits_model, eps=eps), digits_model) for eps in (0.0, 24.0, 192.0)]
    curve = [at[0], at[1], usual, at[2]]
    assert all(a >= b - SLACK for a, b in itertools.pairwise(curve)), curve
    assert curve[0] > 0.85
    assert curve[-1] <= 0.1


@pytest.mark.parametrize("more", [{"steps": 16}, {"restarts": 2}])
def test_9_twice_the_effort_changes_little(digits_model, usual, more) -> None:
    found = robust(attack(digits_model, **more), digits_model)
    assert found <= usual + SLACK
    assert found >= usual - 0.15, "within a 95 % interval of 40 images"


def test_10_gradients_beat_transfer_noise_and_square_image_by_image(digits_model) -> None:
    labels = digits_model.labels[:COUNT]
    white = attack(digits_model).robust(labels) & attack(
        digits_model, loss="margin", restarts=2
    ).robust(labels)
    others = {
        "noise": attack(digits_model, rule="noise").robust(labels),
        "square": attack(digits_model, rule="square", loss="margin", steps=20).robust(labels),
        "transfer": transferred(digits_model).robust(labels),
    }
    for name, survived in others.items():
        missed = int((white & ~survived).sum())
        assert missed <= 2, f"{name} broke {missed} images that gradients did not"
        assert white.sum() <= survived.sum() + 2


def transferred(model: DigitsModel) -> AttackRecord:
    x, y = model.images[:COUNT], model.labels[:COUNT]
    config = AttackConfig(ThreatModel("linf", EPS), 20, ALPHA, stop_at_break=False)
    bare = run_attack(
        model.classifier, model.classifier, x, y, config, generator=Generator().manual_seed(0)
    )
    return run_transfer(defend(model, 60, "target"), x, bare.adversarial, y, config)


def test_12_fixed_randomness_leaves_less(digits_model, usual) -> None:
    """One frozen tape of noise, surrogate and target alike."""

    def frozen(energy, x: Tensor, config, *, generator, **options) -> Tensor:
        tape = Generator().manual_seed(9)
        return langevin(energy, x, config, generator=tape, **options)

    surrogate, target = (defend(digits_model, 1, who, chain=frozen) for who in ("first", "second"))
    ball = ThreatModel("linf", EPS)
    config = AttackConfig(ball, 30, 6.0, restarts=3, rule="apgd", loss="margin")
    survived = 0
    for x, y in zip(digits_model.images[:20].split(1), digits_model.labels[:20], strict=True):
        record = run_attack(surrogate, target, x, y[None], config, generator=Generator())
        survived += int(record.robust(y[None]))
    assert survived / 20 < usual


def test_13_averaged_gradients_are_no_weaker_than_single_ones(digits_model, usual) -> None:
    assert usual <= robust(attack(digits_model, H_adv=1), digits_model) + SLACK


def test_18_the_loss_rises_and_the_strongest_iterate_is_kept(digits_model) -> None:
    record = attack(digits_model, stop_at_break=False, loss="margin")
    first, largest, last = record.losses.unbind(1)
    assert last.mean() > first.mean() + 1.0
    assert (largest >= last).all()
    assert (largest > last).any(), "the last iterate is not always the best"


@pytest.mark.parametrize("loss", ["cross_entropy", "margin", "dlr"])
@pytest.mark.parametrize("rule", ["pgd", "apgd"])
def test_24_every_loss_and_rule_breaks_what_noise_does_not(digits_model, loss, rule) -> None:
    noise = robust(attack(digits_model, rule="noise"), digits_model)
    assert robust(attack(digits_model, loss=loss, rule=rule), digits_model) < noise - 0.15


def test_26_early_verdicts_agree_with_all_replicas(digits_model) -> None:
    record = attack(digits_model, early_verdicts=False)
    needed, agrees = record.early.unbind(1)
    assert agrees.float().mean() >= 0.95
    assert needed.float().mean() < 57, "of 60: a bound for every distribution has its price"


def test_29_without_a_perturbation_hardly_anything_breaks(digits_model) -> None:
    record = attack(digits_model, eps=0.0)
    clean = record.clean_correct(digits_model.labels[:COUNT])
    assert int((record.broken_at >= 0).sum()) <= 1
    assert clean.sum() >= 0.9 * COUNT


def test_32_the_same_seed_gives_the_same_record(digits_model) -> None:
    a, b = (attack(digits_model) for _ in range(2))
    assert all(torch.equal(getattr(a, k).nan_to_num(), getattr(b, k).nan_to_num()) for k in vars(a))


@pytest.mark.parametrize("smooth", [True, False])
def test_gradients_through_the_chain_are_stronger_than_bpda(
    digits_model, smooth_digits_model, smooth: bool
) -> None:
    model = smooth_digits_model if smooth else digits_model
    mode = "exact" if smooth else "smoothed"
    through, bpda = (
        sum(robust(attack(model, gradient=g, loss=loss), model) for loss in ("margin", "dlr"))
        for g in (mode, "identity")
    )
    assert through < bpda
