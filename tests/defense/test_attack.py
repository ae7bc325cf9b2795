"""Algorithm 1 with classifiers whose break step is known by hand.

Images are of one gray value, and `brightness` calls an image class 1 where its mean pixel exceeds a
threshold. From the image itself, with label 0, every l_inf update adds ALPHA to the mean.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from defense.attack import (
    NEVER,
    AttackConfig,
    AttackRecord,
    loss_gradient,
    run_attack,
    run_transfer,
)
from defense.eot import EOTDefense
from defense.langevin import LangevinConfig
from defense.losses import margin
from defense.threat import ThreatModel
from defense.verdict import CALLS, scores

GRAY, ALPHA = 0.5, 2 / 255


@dataclass(frozen=True)
class StartAt(ThreatModel):
    """The ball, with the starts of the restarts prescribed: the image plus so many ALPHA."""

    offsets: Iterator[float] = field(default_factory=lambda: itertools.repeat(0.0))

    def random_point(self, x: Tensor, *, generator) -> Tensor:
        return x + ALPHA * next(self.offsets)


def gray(*steps: float) -> Tensor:
    """Images (B,1,2,2) of the gray values GRAY + ALPHA * steps."""
    return (GRAY + ALPHA * torch.tensor(steps)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def level(steps: float) -> float:
    return GRAY + ALPHA * steps


def labels(count: int, label: int = 0) -> Tensor:
    return torch.full((count,), label)


def config(steps: int, *offsets: float, eps: float = 100.0, **options) -> AttackConfig:
    """Steps of ALPHA, one restart for each given offset; one from the image if there is none."""
    starts = {"offsets": iter(offsets)} if offsets else {}
    options = {"restarts": max(1, len(offsets)), "replicas": 1, **options}
    return AttackConfig(StartAt("linf", eps, **starts), steps, 2.0, **options)


@pytest.fixture
def attack(seeded):
    """`run_attack` with label 0 for every image and a fresh generator."""

    def run(surrogate, target, x, settings, y=None, **options) -> AttackRecord:
        y = labels(len(x)) if y is None else y
        return run_attack(surrogate, target, x, y, settings, generator=seeded(), **options)

    return run


def mean_steps(x: Tensor) -> list[float]:
    """How many ALPHA the mean pixel of each image lies above GRAY."""
    return [round(s, 3) for s in ((x.flatten(1).mean(1) - GRAY) / ALPHA).tolist()]


@pytest.mark.parametrize("stop_at_break", [True, False])
def test_each_image_breaks_at_its_own_step(brightness, attack, stop_at_break: bool) -> None:
    model, x = brightness(level(3.5)), gray(0, -2, 3, -4)
    record = attack(model, model, x, config(5, stop_at_break=stop_at_break))
    assert record.broken_at.tolist() == [4, NEVER, 1, NEVER]
    assert record.restart.tolist() == [0, NEVER, 0, NEVER]
    ends = [4.0, 3.0, 4.0, 1.0] if stop_at_break else [5.0, 3.0, 8.0, 1.0]
    assert mean_steps(record.adversarial) == ends
    assert record.robust(labels(4)).tolist() == [False, True, False, True]
    assert (record.adversarial_logits.argmax(1) == 1).tolist() == [True, False, True, False]


def test_an_l2_step_shares_its_length_among_the_pixels(brightness, attack) -> None:
    model, threat = brightness(level(1.75)), StartAt("l2", 100.0)
    record = attack(model, model, gray(0), AttackConfig(threat, 10, 2.0))
    assert record.broken_at.tolist() == [4]


@pytest.mark.parametrize(("steps", "broken_at"), [(3, NEVER), (4, 4), (5, 4)])
def test_n_updates_judge_the_last_iterate_too(
    brightness, attack, steps: int, broken_at: int
) -> None:
    surrogate, target = brightness(level(3.5)), brightness(level(3.5))
    record = attack(surrogate, target, gray(0), config(steps))
    assert record.broken_at.tolist() == [broken_at]
    judged = [mean_steps(batch)[0] for batch in surrogate.batches]
    assert judged == [float(n) for n in range(min(steps, 4) + 1)]


@pytest.mark.parametrize("steps", [0, 3])
def test_the_random_start_is_judged(brightness, attack, steps: int) -> None:
    model = brightness(level(3.5))
    record = attack(model, model, gray(0, -1), config(steps, 4.0))
    assert record.broken_at.tolist() == [0, NEVER if steps == 0 else 1]
    assert mean_steps(record.adversarial) == [4.0, 3.0 if steps == 0 else 4.0]


def test_the_ball_ends_the_walk(brightness, attack) -> None:
    model = brightness(level(3.5))
    record = attack(model, model, gray(0), config(20, eps=6.9))
    assert record.broken_at.tolist() == [NEVER]
    assert mean_steps(record.adversarial) == [3.45]


def test_misclassified_clean_images_are_never_attacked(brightness, attack) -> None:
    surrogate, target = brightness(level(3.5)), brightness(level(3.5))
    x, y = gray(0, 5, 0), torch.tensor([0, 0, 1])
    record = attack(surrogate, target, x, config(2), y)
    assert surrogate.batch_sizes == [1, 1, 1]
    assert record.broken_at.tolist() == [NEVER] * 3
    assert torch.equal(record.adversarial[1:], x[1:])
    assert record.clean_correct(y).tolist() == [True, False, False]
    assert record.robust(y).tolist() == [True, False, False]


def test_a_suspect_that_the_target_does_not_confirm_stays_robust(brightness, attack) -> None:
    surrogate, target = brightness(level(1.5)), brightness(level(50))
    record = attack(surrogate, target, gray(0), config(4))
    assert record.broken_at.tolist() == [NEVER]
    assert mean_steps(record.adversarial) == [4.0]
    asked = [mean_steps(batch)[0] for batch in target.batches]
    assert asked == [0.0, 2.0, 3.0, 4.0, 4.0]  # clean, three suspects, the final draw


def test_a_suspect_may_be_confirmed_later(brightness, attack) -> None:
    record = attack(brightness(level(1.5)), brightness(level(3.5)), gray(0), config(6))
    assert record.broken_at.tolist() == [4]


def test_a_break_that_the_surrogate_does_not_see_does_not_count(brightness, attack) -> None:
    surrogate, target = brightness(level(50)), brightness(level(1.5))
    record = attack(surrogate, target, gray(0), config(4))
    assert target.batch_sizes == [1, 1]
    assert record.broken_at.tolist() == [NEVER]
    assert record.adversarial_logits.argmax(1).tolist() == [1]


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("stop_at_break", [True, False])
def test_a_break_never_reverts(brightness, window, attack, stop_at_break, restarts) -> None:
    surrogate, target = brightness(level(0.5)), window(level(1.5), 2 * ALPHA)
    starts = [0.0] * restarts
    record = attack(surrogate, target, gray(0), config(6, *starts, stop_at_break=stop_at_break))
    assert record.broken_at.tolist() == [2]
    assert record.restart.tolist() == [0]
    assert record.robust(labels(1)).tolist() == [False]
    assert mean_steps(record.adversarial) == [2.0 if stop_at_break else 6.0]
    assert target.batch_sizes == [1, 1, 1, 1]  # clean, refused at 1, confirmed at 2, final


def test_only_suspects_are_verified_all_of_a_step_in_one_batch(brightness, attack) -> None:
    surrogate, target = brightness(level(1.5)), brightness(level(2.5))
    attack(surrogate, target, gray(0, 1, 0, -9), config(4))
    # Step by step: suspects at gray value 2 are refused, at 3 confirmed; the last one never is one.
    assert target.batch_sizes == [4, 1, 3, 2, 4]
    assert [mean_steps(batch) for batch in target.batches[1:4]] == [
        [2.0],
        [2.0, 3.0, 2.0],
        [3.0] * 2,
    ]
    assert surrogate.batch_sizes == [4, 4, 4, 3, 1]


def test_without_suspects_the_target_is_asked_twice(brightness, attack) -> None:
    target = brightness(level(90))
    attack(brightness(level(90)), target, gray(0, 1), config(3))
    assert target.batch_sizes == [2, 2]


def test_restarts_work_on_survivors_and_are_recorded(brightness, attack) -> None:
    surrogate, target = brightness(level(4.5)), brightness(level(4.5))
    x = gray(3, 0, -9)
    record = attack(surrogate, target, x, config(2, 0.0, 4.0, 1.0))
    assert record.broken_at.tolist() == [2, 1, NEVER]
    assert record.restart.tolist() == [0, 1, NEVER]
    assert surrogate.batch_sizes == [3, 3, 3, 2, 2, 1, 1, 1, 1]
    assert mean_steps(record.adversarial) == [5.0, 5.0, -3.0]  # of survivors the strongest


@pytest.mark.parametrize("offsets", [(0.0, 2.0), (2.0, 0.0)])
def test_without_stopping_the_iterate_of_the_largest_margin_is_kept(
    window, attack, offsets: tuple[float, float]
) -> None:
    # Steps of 5 ALPHA jump to and fro across the window from 1 to 5 ALPHA: 0, 5, 0, 5 and, nearest
    # to its middle at the very start, 2, 7, 2, 7.
    threat = StartAt("linf", 100.0, offsets=iter(offsets))
    settings = AttackConfig(threat, 3, 10.0, restarts=2, stop_at_break=False)
    surrogate, never = window(level(1), 4 * ALPHA), window(level(90), ALPHA)
    record = attack(surrogate, never, gray(0), settings)
    seen = [mean_steps(batch)[0] for batch in surrogate.batches]
    assert sorted(seen) == [0.0, 0.0, 2.0, 2.0, 5.0, 5.0, 7.0, 7.0]
    assert mean_steps(record.adversarial) == [2.0]
    assert record.broken_at.tolist() == [NEVER]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("stop_at_break", [True, False])
def test_every_record_is_allowed(
    tiny_classifier, tiny_energy, images, attack, norm: str, stop_at_break: bool
) -> None:
    surrogate, target = (
        EOTDefense(tiny_classifier, tiny_energy, LangevinConfig(2, 0.1), replicas=r, seed=r)
        for r in (2, 4)
    )
    threat, x = ThreatModel(norm, 40.0), images.repeat(4, 1, 1, 1).round(decimals=1)
    y = target(x).argmax(1)
    settings = AttackConfig(threat, 4, 25.0, restarts=2, stop_at_break=stop_at_break)
    record = attack(surrogate, target, x, settings, y)
    assert record.clean_correct(y).any()
    assert not torch.equal(record.adversarial, x)
    assert record.adversarial.min() >= 0
    assert record.adversarial.max() <= 1
    assert (threat.distance(record.adversarial, x) <= threat.eps + 1e-6).all()
    assert ((record.broken_at == NEVER) == (record.restart == NEVER)).all()


def test_inputs_are_left_alone_and_no_graph_is_kept(brightness, attack) -> None:
    model, x = brightness(level(1.5)), gray(0, 1)
    before = x.clone()
    record = attack(model, model, x, config(3))
    assert torch.equal(x, before)
    assert not any(value.requires_grad for value in vars(record).values())


def test_starts_are_drawn_from_the_given_generator_alone(brightness, seeded) -> None:
    x, y, model = gray(0, 0, 0), labels(3), brightness(level(90))
    settings = AttackConfig(ThreatModel("linf", 8.0), 0, 2.0)
    before = torch.get_rng_state()
    a, b, c = (
        run_attack(model, model, x, y, settings, generator=seeded(s)).adversarial for s in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_on_step_hears_how_many_images_are_still_robust(brightness, attack) -> None:
    heard: list[int] = []
    model, x = brightness(level(2.5)), gray(0, 1, 9, -9)
    attack(model, model, x, config(4), on_step=heard.append)
    assert heard == [3, 3, 2, 1, 1]


@pytest.mark.parametrize("restarts", [1, 2])
def test_with_nothing_left_to_attack_the_record_is_still_whole(
    brightness, attack, restarts: int
) -> None:
    surrogate, target = brightness(level(-1)), brightness(level(-1))
    x = gray(0, 1)
    record = attack(surrogate, target, x, config(3, *[0.0] * restarts))
    assert surrogate.batches == []
    assert torch.equal(record.adversarial, x)
    assert record.adversarial_logits.shape == (2, 2)
    assert not record.robust(labels(2)).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("threshold", "restarts"), [(-1.0, 1), (0.5, 2)])
def test_restarts_may_find_nobody_left(
    brightness, attack, norm: str, threshold: float, restarts: int
) -> None:
    model = brightness(level(threshold))
    settings = AttackConfig(ThreatModel(norm, 100.0), 5, 50.0, restarts=restarts)
    record = attack(model, model, gray(0, 0), settings)
    assert not record.robust(labels(2)).any()


def test_the_curve_over_steps_falls_from_clean_to_robust_accuracy(brightness, attack) -> None:
    model, x = brightness(level(4.5)), gray(4, 3, 1, 0, -5, 6)
    record, y = attack(model, model, x, config(5)), labels(6)
    curve = [int(record.robust(y, steps=n).sum()) for n in range(6)]
    assert curve == [5, 4, 3, 3, 2, 1]
    assert torch.equal(record.robust(y, steps=5), record.robust(y))
    assert record.broken_at.tolist() == [1, 2, 4, 5, NEVER, NEVER]


def test_margin_is_positive_where_the_prediction_is_wrong() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [-1.0, -2.0, -9.0]])
    assert margin(logits, torch.tensor([1, 2, 0])).tolist() == [-1.0, 1.0, -1.0]


def test_the_loss_gradient_of_an_image_does_not_depend_on_the_batch(
    tiny_classifier, images
) -> None:
    y = torch.tensor([0, 1, 2, 0, 1])
    together, logits = loss_gradient(tiny_classifier, images, y)
    pairs = zip(images.split(1), y.split(1), strict=True)
    alone = torch.cat([loss_gradient(tiny_classifier, x, label)[0] for x, label in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, tiny_classifier(images))
    assert not images.requires_grad


def test_a_step_along_the_loss_gradient_raises_the_loss(tiny_classifier, images) -> None:
    y = torch.tensor([0, 1, 2, 0, 1])
    loss = nn.CrossEntropyLoss(reduction="none")
    gradient, logits = loss_gradient(tiny_classifier, images, y)
    moved = ThreatModel("linf", 8.0).ascend(images, gradient, 0.5)
    assert (loss(tiny_classifier(moved), y) > loss(logits, y)).all()


def test_transferred_images_are_judged_once(brightness) -> None:
    target, x, y = brightness(level(2.5)), gray(0, 0, 3, 3), torch.tensor([0, 0, 0, 1])
    x_adv = gray(3, 2, 0, 3)
    record = run_transfer(target, x, x_adv, y, config(7))
    assert record.broken_at.tolist() == [7, NEVER, NEVER, NEVER]
    assert record.restart.tolist() == [0, NEVER, NEVER, NEVER]
    assert record.broken_at.dtype == record.restart.dtype == torch.int64
    assert record.robust(y).tolist() == [False, True, False, True]
    assert record.robust(y, steps=6).tolist() == [True, True, False, True]
    assert torch.equal(record.adversarial, x_adv)
    assert target.batch_sizes == [4, 4]


class Constant(nn.Module):
    """These logits on the first call, and the others on every later one, whatever the image."""

    def __init__(self, first: list[float], later: list[float]) -> None:
        super().__init__()
        self.script = itertools.chain([first], itertools.repeat(later))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(next(self.script)).expand(len(x), -1) + 0 * x.flatten(1)[:, :2]


def test_a_tie_is_judged_by_its_label_as_the_clean_image_is(attack) -> None:
    surrogate, target = Constant([0.0, 0.0], [0.0, 0.0]), Constant([0.0, 1.0], [0.0, 0.0])
    record = attack(surrogate, target, gray(0), config(2), labels(1, 1))
    assert record.adversarial_logits.argmax(1).tolist() == [0]
    assert record.broken_at.tolist() == [0]


def test_logits_that_are_no_numbers_do_not_pass_for_robustness(attack) -> None:
    nan = float("nan")
    model, target = Constant([nan, nan], [nan, nan]), Constant([1.0, 0.0], [nan, nan])
    record = attack(model, target, gray(0), config(2))
    assert not record.robust(labels(1)).any()


class Broken(nn.Module):
    """The brightness classifier, but for its logits or its gradients, which are no numbers."""

    def __init__(self, sound: nn.Module, what: str, calls: tuple[int, ...]) -> None:
        super().__init__()
        self.sound, self.what, self.calls, self.asked = sound, what, calls, 0

    def forward(self, x: Tensor) -> Tensor:
        now = self.asked in self.calls
        self.asked += 1
        if not now:
            return self.sound(x)
        if self.what == "logits":
            return self.sound(x) * torch.nan
        return self.sound(x) + 0 * (x - x.detach()).abs().sqrt().sum()  # a slope of 0/0


@pytest.mark.parametrize("what", ["logits", "gradients"])
@pytest.mark.parametrize("calls", [(0,), (2,), (0, 1, 2, 3, 4)])
def test_an_attack_without_numbers_makes_nothing_robust(
    brightness, attack, what: str, calls: tuple[int, ...]
) -> None:
    """The target is sound and never broken; the images were not attacked as they should be."""
    target = brightness(level(50))
    record = attack(Broken(brightness(level(50)), what, calls), target, gray(0, 1), config(4))
    assert record.not_finite.tolist() == [len(calls)] * 2
    assert record.broken_at.tolist() == [NEVER] * 2
    assert record.clean_correct(labels(2)).all()
    assert not record.robust(labels(2)).any()
    assert torch.isfinite(record.adversarial).all()


class Drawn(nn.Module):
    """A defense of somebody else: classes 1 and 0 by turns, draw by draw."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.replicas, self.mean, self.asked = 8, mean, list[int | None]()

    def replica_logits(self, x: Tensor, *, replicas: int | None = None, generator=None) -> Tensor:
        self.asked.append(replicas)
        count = self.replicas if replicas is None else replicas
        draws = torch.tensor([[0.0, self.mean + (-1.0) ** i] for i in range(count)])
        return draws[:, None].expand(count, len(x), 2).clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.replica_logits(x).mean(0) + 0 * x.flatten(1)[:, :2]


@pytest.mark.parametrize(("mean", "robust"), [(-0.5, True), (0.5, False)])
def test_anybodys_replicas_make_four_metrics(attack, mean: float, robust: bool) -> None:
    target = Drawn(mean)
    record = attack(target, target, gray(0, 0), config(1))
    assert target.asked[0] is None, "all of its replicas"
    assert record.clean_classes.tolist() == [[1, 0] * 4] * 2
    found = scores(record.clean_logits, record.clean_classes, labels(2), draws=8)
    assert found["mean_logits"].tolist() == [float(robust)] * 2
    assert found["average"].tolist() == [0.5] * 2
    assert found["worst"].tolist() == [0.0] * 2
    assert record.robust(labels(2)).tolist() == [robust] * 2


class Coin(nn.Module):
    """Draws its answers from torch's global stream, as dropout does."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        right = (torch.rand(len(x)) < self.share).float()
        return torch.stack([right, 1 - right], 1) + 0 * x.flatten(1)[:, :2]


def test_a_module_that_answers_at_random_is_asked_often(attack) -> None:
    torch.manual_seed(0)
    settings = config(1, replicas=60)
    record = attack(Coin(0.8), Coin(0.8), gray(0, 0, 0), settings)
    assert record.clean_classes.shape == (3, 60)
    shares = (record.clean_classes == 0).float().mean(1)
    assert ((shares - 0.8).abs() < 5 * (0.16 / 60) ** 0.5).all()
    assert record.clean_correct(labels(3)).all()


def test_a_module_that_always_says_the_same_is_asked_once(brightness, attack) -> None:
    target = brightness(level(50))
    record = attack(brightness(level(50)), target, gray(0, 0, 0), config(1, replicas=60))
    assert record.clean_classes.shape == (3, 1)
    tries = [3] * (CALLS + 2) + [1]  # of the first images, of all, of one alone
    assert target.batch_sizes == [*tries, 3, 3], "then the clean images and the final draw"


class Own(nn.Module):
    """Logits (B,2) of which the second is given by a function of the images."""

    def __init__(self, second) -> None:
        super().__init__()
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0 * x.flatten(1)[:, 0], self.second(x)], 1)


def test_a_masked_class_or_a_constant_hides_no_randomness(attack) -> None:
    class Masked(Coin):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return torch.cat([z + 1e4, torch.full((len(x), 1), -1e9)], 1)

    torch.manual_seed(0)
    record = attack(Coin(0.8), Masked(0.8), gray(0, 0, 0), config(1, replicas=60))
    assert record.clean_classes.shape == (3, 60)


def test_randomness_of_later_images_is_found(attack) -> None:
    def second(x: Tensor) -> Tensor:
        return torch.where(x.mean((1, 2, 3)) > level(50), torch.rand(len(x)) - 0.5, -1.0)

    x = gray(*[0.0] * 9, 60.0)
    record = attack(Own(second), Own(second), x, config(0, replicas=20))
    assert record.clean_classes.shape == (10, 20)


def test_a_target_that_looks_at_the_batch_is_refused(attack, brightness) -> None:
    target = Own(lambda x: 9 * (x.mean((1, 2, 3)) - x.mean()) - 1)
    with pytest.raises(ValueError, match="target: its answer to an image depends on the other"):
        attack(brightness(level(5)), target, gray(0, 3), config(1, replicas=60))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_target_without_numbers_is_never_right(attack, brightness, value: float) -> None:
    target = Own(lambda x: torch.where(x.mean((1, 2, 3)) > level(5), value, -1.0))
    record = attack(brightness(level(9)), target, gray(0, 20), config(1, replicas=60))
    assert record.clean_correct(labels(2)).tolist() == [True, False]


def test_replicas_of_another_shape_are_named(attack, brightness) -> None:
    for spoil, got in (
        (lambda z: z.transpose(0, 1), r"got \(2, 8, 2\)"),
        (lambda z: z[:2], r"got \(2, 2, 2\)"),
        (lambda z: z.mean(0), "got torch.Size"),
        (lambda z: z.tolist(), "got list"),
    ):
        odd = Drawn(-0.5)
        odd.replica_logits = lambda x, spoil=spoil, **o: spoil(Drawn(-0.5).replica_logits(x, **o))
        with pytest.raises(ValueError, match=f"replica_logits: expected .*{got}"):
            attack(brightness(level(9)), odd, gray(0, 0), config(1))


def test_a_defense_that_states_no_number_is_asked_for_that_of_the_attack(attack, brightness):
    class Stateless:
        def replica_logits(self, x: Tensor, *, replicas: int, generator=None) -> Tensor:
            return Drawn(-0.5).replica_logits(x, replicas=replicas)

    record = attack(brightness(level(9)), Stateless(), gray(0, 0), config(1, replicas=6))
    assert record.clean_classes.shape == (2, 6)


def test_a_function_is_no_model(attack, brightness) -> None:
    network = brightness(level(9))
    for pair, name in (((network, network.forward), "target"), ((lambda x: x, network), "surrog")):
        with pytest.raises(ValueError, match=f"{name}.*: expected an nn.Module"):
            attack(*pair, gray(0, 0), config(1))


def test_labels_beyond_the_classes_are_named_with_early_verdicts_too(attack) -> None:
    settings = config(1, early_verdicts=True)
    with pytest.raises(ValueError, match="labels: expected 0 to 1"):
        attack(Drawn(-0.5), Drawn(-0.5), gray(0, 0), settings, torch.tensor([0, 2]))


def test_a_model_without_gradients_is_named(attack, brightness) -> None:
    detached = Own(lambda x: x.detach().mean((1, 2, 3)))
    detached.forward = lambda x: torch.zeros(len(x), 2)
    with pytest.raises(ValueError, match="surrogate: its logits have no gradient"):
        attack(detached, brightness(level(9)), gray(0, 0), config(1))


def test_dropout_that_was_kept_on_is_said_to_be_switched_off(attack, brightness) -> None:
    target = nn.Sequential(nn.Dropout(0.5), brightness(level(9))).eval()
    target[0].train()
    with pytest.warns(UserWarning, match="Dropout in training mode inside a network in evaluation"):
        attack(brightness(level(9)), target, gray(0, 0), config(1))
    assert target[0].training


def test_transferred_images_are_those_of_the_images(brightness) -> None:
    x = gray(0, 30)
    for x_adv, message in (
        (x.flip(0), "x_adv: expected images within"),
        (x[:1], r"x_adv: expected \(2, 1, 2, 2\) as x"),
    ):
        with pytest.raises(ValueError, match=message):
            run_transfer(brightness(level(9)), x, x_adv, labels(2), config(1, eps=8.0))


def test_two_defenses_of_one_seed_are_refused(tiny_classifier, tiny_energy, images, seeded) -> None:
    def defense(seed: int | None) -> EOTDefense:
        chain = LangevinConfig(2, 0.1)
        return EOTDefense(tiny_classifier, tiny_energy, chain, replicas=2, seed=seed)

    def run(surrogate: EOTDefense, target: EOTDefense) -> AttackRecord:
        settings = AttackConfig(ThreatModel("linf", 8.0), 1, 2.0)
        return run_attack(surrogate, target, images, labels(5), settings, generator=seeded())

    with pytest.raises(ValueError, match="seed: surrogate and target share 3"):
        run(defense(3), defense(3))
    one = defense(3)
    with pytest.raises(ValueError, match="seed: surrogate and target share"):
        run(nn.Sequential(nn.Identity(), defense(3)), defense(3))
    for pair in ((defense(3), defense(4)), (defense(None), defense(None)), (one, one)):
        run(*pair)
    unseeded = defense(None)
    with pytest.raises(ValueError, match="seed: surrogate and target share"):
        run(copy.deepcopy(unseeded), unseeded)


def test_networks_in_training_mode_are_attacked_in_evaluation_mode_and_left(seeded) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 2))
    x, y = torch.rand(6, 1, 8, 8, generator=seeded(1)), labels(6)
    settings = AttackConfig(ThreatModel("linf", 8.0), 3, 2.0)

    def run() -> AttackRecord:
        return run_attack(network, network, x, y, settings, generator=seeded())

    at_rest = (network.eval(), run())[1]
    training = (network.train(), run())[1]
    assert all(module.training for module in network.modules())
    assert network[1].num_batches_tracked == 0
    assert torch.equal(training.adversarial, at_rest.adversarial)
    assert torch.equal(training.clean_logits, at_rest.clean_logits)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
@pytest.mark.parametrize("column", [False, True])
def test_labels_of_any_integer_type_are_taken(brightness, attack, dtype, column: bool) -> None:
    model = brightness(level(1.5))
    y = labels(2).to(dtype)
    record = attack(model, model, gray(0, 0), config(3), y[:, None] if column else y)
    assert record.broken_at.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (gray(0, 0), torch.zeros(2), "labels: expected whole numbers, got torch.float32"),
        (gray(0, 0), labels(3), r"labels: expected \(2,\) for 2 images, got \(3,\)"),
        (gray(0, 0), torch.tensor([0, 2]), "labels: expected 0 to 1, .* got 0 to 2"),
        (gray(0, 0), torch.tensor([-1, 0]), "labels: expected 0 to 1, .* got -1 to 0"),
        (255 * gray(1, 2), labels(2), r"x: expected pixels in \[0, 1\], got"),
        (2 * gray(-40, 1) - 1, labels(2), r"x: expected pixels in \[0, 1\], got"),
        (gray(0, 1) * torch.nan, labels(2), r"x: expected pixels in \[0, 1\], got"),
        ((255 * gray(0, 1)).byte(), labels(2), r"x: expected images \(B,C,H,W\), floating"),
    ],
)
def test_images_and_labels_are_checked_before_any_attack(
    brightness, attack, x: Tensor, y: Tensor, message: str
) -> None:
    model = brightness(level(1.5))
    with pytest.raises(ValueError, match=message):
        attack(model, model, x, config(3), y)
    with pytest.raises(ValueError, match=message):
        run_transfer(model, x, x, y, config(3))


def test_it_runs_in_inference_mode(brightness, attack) -> None:
    model = brightness(level(1.5))
    with torch.inference_mode():
        assert attack(model, model, gray(0), config(3)).broken_at.tolist() == [2]


def test_surrogate_and_target_may_differ_in_precision(brightness, attack) -> None:
    class Double(type(brightness(0.0))):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).double()

    record = attack(brightness(level(1.5)), Double(level(1.5)), gray(0), config(3))
    assert record.broken_at.tolist() == [2]


def test_bad_configurations_are_said() -> None:
    threat = ThreatModel("linf", 8.0)
    with pytest.raises(ValueError, match="steps: expected >= 0, got -1"):
        AttackConfig(threat, -1, 2.0)
    with pytest.raises(ValueError, match="restarts: expected >= 1, got 0"):
        AttackConfig(threat, 1, 2.0, restarts=0)
