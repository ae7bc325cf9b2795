"""Where attacks look next: one contract for all rules, then what each is known to do."""

import itertools

import pytest
import torch
from torch import Generator, Tensor

from defense.rules import APGD, PGD, Noise, Square, StepRule, make_rule
from defense.rules.apgd import checkpoints
from defense.threat import ThreatModel

BALL = ThreatModel("linf", 16.0)
RULES = ("pgd", "apgd", "square", "noise")


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=seeded(1))


def linear(x: Tensor) -> tuple[Tensor, Tensor]:
    """A loss that grows along a fixed direction, and its gradient."""
    direction = torch.randn(x.shape[1:], generator=seeded(2))
    return (x * direction).flatten(1).sum(1), direction.expand_as(x)


def climb(rule: StepRule, x: Tensor, steps: int) -> list[Tensor]:
    iterates = [rule.start(x)]
    for _ in range(steps):
        losses, gradient = linear(iterates[-1])
        iterates.append(rule.next(iterates[-1], losses, gradient if rule.asks_gradient else None))
    return iterates


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", RULES)
def test_every_proposal_is_allowed(name: str, norm: str) -> None:
    if (name, norm) == ("square", "l2"):
        pytest.skip("refused")
    ball, x = ThreatModel(norm, 16.0 if norm == "linf" else 128.0), images().round(decimals=1)
    for x_adv in climb(make_rule(name, ball, 9, 4.0, seeded()), x, 9):
        assert x_adv.shape == x.shape
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        assert (ball.distance(x_adv, x) <= ball.eps + 1e-6).all()


@pytest.mark.parametrize("name", RULES)
def test_the_generator_decides_everything(name: str) -> None:
    runs = [climb(make_rule(name, BALL, 5, 4.0, seeded(s)), images(), 5)[-1] for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    if name != "apgd":  # which ends at the same corner from everywhere
        assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", ["pgd", "apgd", "square"])
def test_images_that_are_left_out_do_not_change_the_others(name: str) -> None:
    mask, x = torch.tensor([True, False, True, True]), images()
    rule = make_rule(name, BALL, 9, 4.0, seeded())
    x_adv = climb(rule, x, 4)[-1]
    rule.keep(mask)
    losses, gradient = linear(x_adv[mask])
    after = rule.next(x_adv[mask], losses, gradient if rule.asks_gradient else None)
    assert after.shape == (3, 3, 8, 8)
    assert (BALL.distance(after, x[mask]) <= BALL.eps + 1e-6).all()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("eps", [0.0])
def test_without_a_radius_nothing_moves(name: str, eps: float) -> None:
    x = images()
    for x_adv in climb(make_rule(name, ThreatModel("linf", eps), 3, 0.0, seeded()), x, 3):
        assert torch.equal(x_adv, x)


def test_pgd_takes_the_projected_steepest_step() -> None:
    x, rule = images(), PGD(BALL, 4.0, seeded())
    start = rule.start(x)
    losses, gradient = linear(start)
    expected = BALL.project(BALL.ascend(start, gradient, 4.0), x)
    assert torch.equal(rule.next(start, losses, gradient), expected)


@pytest.mark.parametrize("rule", [PGD(BALL, 8.0, seeded()), APGD(BALL, 20, seeded())])
def test_gradient_rules_reach_the_corner_of_a_linear_loss(rule: StepRule) -> None:
    x = images()
    best = BALL.project(BALL.ascend(x, linear(x)[1], BALL.eps_255), x)
    end = climb(rule, x, 20)[-1]
    assert (linear(end)[0] > 0.98 * linear(best)[0] + 0.02 * linear(x)[0]).all()


def test_checkpoints_are_those_of_the_paper() -> None:
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_apgd_halves_its_step_where_the_loss_does_not_rise_and_returns_to_the_best() -> None:
    x, rule = images(2), APGD(BALL, 20, seeded())
    x_adv = rule.start(x)
    first = x_adv.clone()
    for n in range(6):  # the first checkpoint is after 5 steps
        losses = torch.tensor([10.0 - n, float(n)])  # the first image only gets worse
        gradient = torch.ones_like(x_adv)
        before = rule.state.step.clone()
        x_adv = rule.next(x_adv, losses, gradient)
    assert rule.state.step.tolist() == [0.5 * before[0].item(), before[1].item()]
    assert torch.equal(rule.state.best[0], first[0])


def test_square_starts_with_stripes_and_changes_a_square_by_eps() -> None:
    x, rule = torch.full((3, 1, 8, 8), 0.5), Square(BALL, 50, seeded())
    start = rule.start(x)
    torch.testing.assert_close((start - x).abs(), torch.full_like(x, BALL.eps))
    assert (start == start[:, :, :1]).all(), "columns are of one value"
    proposal = rule.next(start, torch.zeros(3), None)
    changed = (proposal != start).flatten(1).sum(1)
    assert (changed <= 49).all()
    torch.testing.assert_close((proposal - x).abs(), torch.full_like(x, BALL.eps))


def test_square_asks_a_better_proposal_again_and_keeps_the_second_answer() -> None:
    x, rule = images(1), Square(BALL, 50, seeded())
    start = rule.start(x)
    first = rule.next(start, torch.tensor([0.0]), None)
    again = rule.next(first, torch.tensor([5.0]), None)  # lucky: better than 0
    assert torch.equal(again, first)
    other = rule.next(again, torch.tensor([1.0]), None)  # still better, but by less
    assert rule.best_loss.tolist() == [1.0]
    assert torch.equal(rule.best, first)
    assert not torch.equal(other, first)


def test_square_drops_a_proposal_whose_second_answer_is_worse() -> None:
    x, rule = images(1), Square(BALL, 50, seeded())
    start = rule.start(x)
    first = rule.next(start, torch.tensor([0.0]), None)
    rule.next(first, torch.tensor([5.0]), None)
    rule.next(first, torch.tensor([-1.0]), None)
    assert torch.equal(rule.best, start)
    assert rule.best_loss.tolist() == [0.0]


def test_square_climbs_without_gradients() -> None:
    x = images()
    iterates = climb(Square(BALL, 400, seeded()), x, 400)
    start, end = linear(x)[0], torch.stack([linear(x_adv)[0] for x_adv in iterates]).amax(0)
    corner = linear(BALL.project(BALL.ascend(x, linear(x)[1], BALL.eps_255), x))[0]
    assert ((end - start) > 0.4 * (corner - start)).all()


def test_noise_forgets() -> None:
    rule = Noise(BALL, seeded())
    points = climb(rule, images(), 3)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(points))


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="square: expected norm linf, got l2"):
        make_rule("square", ThreatModel("l2", 8.0), 5, 1.0, seeded())
    with pytest.raises(ValueError, match="rule: expected pgd, apgd, square or noise, got 'fgsm'"):
        make_rule("fgsm", BALL, 5, 1.0, seeded())
