"""Four metrics by hand; early verdicts against the error that they state."""

import pytest
import torch
from torch import Tensor

from defense.eot import EOTDefense
from defense.langevin import LangevinConfig
from defense.verdict import (
    NO_CLASS,
    Sequential,
    answer,
    classes_of,
    clear_verdict,
    is_right,
    mean_logit_draws,
    replicated,
    safe_and_borderline,
    scores,
    wealth_against_half,
    wrong,
)


def said(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int16)


def test_four_metrics_of_the_same_replicas() -> None:
    classes = said([0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 2, 0], [1, 1, 1, 0])
    logits = torch.tensor([[2.0, 0, 0], [2.0, 0, 0], [0, 0, 2.0], [2.0, 0, 0]])
    found = scores(logits, classes, torch.zeros(4, dtype=torch.int64), draws=4)
    assert found["mean_logits"].tolist() == [1, 1, 0, 1]
    assert found["average"].tolist() == [1, 0.75, 0.5, 0.25]
    assert found["majority"].tolist() == [1, 1, 1, 0]
    assert found["worst"].tolist() == [1, 0, 0, 0]


def test_only_the_first_draws_count_and_a_tie_is_no_majority() -> None:
    found = scores(torch.zeros(1, 3), said([0, 1, 0, 0]), torch.tensor([0]), draws=2)
    assert found["average"].tolist() == [0.5]
    assert found["majority"].tolist() == [0]


def test_replicas_that_are_no_numbers_are_never_right() -> None:
    logits = torch.tensor([[[1.0, 0.0]], [[float("nan"), 0.0]], [[float("inf"), 0.0]]])
    classes = classes_of(logits)
    assert classes.tolist() == [[0, NO_CLASS, NO_CLASS]]
    found = scores(logits[0], classes, torch.tensor([0]), draws=3)
    assert found["average"].tolist() == [pytest.approx(1 / 3)]
    assert found["worst"].tolist() == [0]
    assert not is_right(logits.mean(0), torch.tensor([0])).any()


def noisy(margins: Tensor, count: int, seed: int = 0, classes: int = 4) -> Tensor:
    """Replicas (count,B,classes) whose class 1 beats class 0 by ``margins`` (B,) on average."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, len(margins), classes, generator=generator)
    logits[:, :, 1] += margins
    logits[:, :, 2:] -= 9.0
    return logits


def test_clear_verdicts_are_clear_both_ways() -> None:
    y = torch.zeros(3, dtype=torch.int64)
    seen = noisy(torch.tensor([6.0, 0.0, -6.0]), 60)
    is_wrong, right = clear_verdict(seen, y, 150, 1e-3, 20.0)
    assert is_wrong.tolist() == [True, False, False]
    assert right.tolist() == [False, False, True]


def jumps(count: int, images: int, jump: float, share: float) -> Tensor:
    """Right by 1 on average, but for a share of the replicas that are wrong by ``jump``."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.zeros(count, images, 3)
    rare = torch.rand(count, images, generator=generator) < share
    logits[:, :, 1] = -1.0 + 0.5 * torch.randn(count, images, generator=generator) + jump * rare
    logits[:, :, 2] = -9.0
    return logits


HEAVY = {
    "normal, right by a little": lambda: noisy(torch.full((3000,), -0.3), 150),
    "normal, wrong by a little": lambda: noisy(torch.full((3000,), 0.3), 150),
    "normal, right": lambda: noisy(torch.full((3000,), -5.0), 150),
    "one in ten jumps": lambda: jumps(150, 3000, 12.0, 0.1),
    "one in thirty jumps": lambda: jumps(150, 3000, 18.0, 0.033),
    "one in a hundred jumps": lambda: jumps(150, 3000, 19.0, 0.01),
    "one in ten jumps beyond the clip": lambda: jumps(150, 3000, 30.0, 0.1),
}


@pytest.mark.parametrize("name", HEAVY)
@pytest.mark.parametrize("error", [0.05, 0.005])
def test_early_verdicts_differ_from_those_of_all_no_more_often_than_stated(
    name: str, error: float
) -> None:
    """Whatever the distribution, as long as the differences lie within the clip; and in one case
    where they do not, since a jump that was seen leaves the verdict open.
    """
    replicas = HEAVY[name]()
    y = torch.zeros(replicas.shape[1], dtype=torch.int64)
    found = Sequential(error).replayed(replicas, y)
    differs = is_right(found.logits, y) != is_right(replicas.mean(0), y)
    assert float(differs.double().mean()) <= error + 3 * (error / len(y)) ** 0.5


def test_the_bound_is_needed() -> None:
    """Jumps that are rare, and larger than the clip: most are not there when the verdict falls."""
    replicas = jumps(150, 3000, 3000.0, 0.005) - torch.tensor([0.0, 8.0, 0.0])
    y = torch.zeros(3000, dtype=torch.int64)
    found = Sequential(1e-3).replayed(replicas, y)
    differs = is_right(found.logits, y) != is_right(replicas.mean(0), y)
    assert float(differs.double().mean()) > 0.01


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_wealth_grows_only_against_what_is_false(share: float) -> None:
    """Values 0 and 1: no bet beats a fair coin, nor an unfair one on its other side."""
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(100, 4000, generator=generator).argsort(0)
    values = (order < 100 * share).double()  # of 100 values, in random order
    for seen in (20, 60, 100):
        wealth = wealth_against_half(values[:seen], 100)
        assert float(wealth.mean()) <= 1 + 3 * float(wealth.std()) / 4000**0.5
    assert float((wealth_against_half(1 - values, 100) > 1000).double().mean()) == float(
        share < 0.5
    )


def test_clear_images_take_few_replicas_and_doubtful_ones_all() -> None:
    y = torch.zeros(3, dtype=torch.int64)
    found = Sequential(1e-3).replayed(noisy(torch.tensor([12.0, 0.0, -12.0]), 150), y)
    assert found.drawn[1] == 150
    assert max(found.drawn[0], found.drawn[2]) <= 34
    assert is_right(found.logits, y)[[0, 2]].tolist() == [False, True]
    assert found.replicas.shape == (10, 3, 4)


def test_the_verdict_of_a_doubtful_image_is_that_of_all_replicas() -> None:
    y, replicas = torch.zeros(200, dtype=torch.int64), noisy(torch.zeros(200), 150)
    found = Sequential(1e-3).replayed(replicas, y)
    doubtful = found.drawn == 150
    assert doubtful.sum() > 150
    torch.testing.assert_close(found.logits[doubtful], replicas.mean(0)[doubtful])


def test_looks_are_half_as_many_again() -> None:
    assert Sequential(0.1).looks(150) == [10, 15, 23, 35, 53, 80, 120]
    assert Sequential(0.1).looks(10) == []
    assert Sequential(0.1).looks(4) == []


def test_fewer_replicas_than_the_first_look_are_all_drawn() -> None:
    y, replicas = torch.zeros(2, dtype=torch.int64), noisy(torch.tensor([6.0, -6.0]), 4)
    found = Sequential(1e-3).replayed(replicas, y)
    assert found.drawn.tolist() == [4, 4]
    torch.testing.assert_close(found.logits, replicas.mean(0))


def test_a_defense_draws_only_what_is_doubtful(tiny_classifier, tiny_energy, images) -> None:
    asked: list[tuple[int, int]] = []

    class Counting(EOTDefense):
        def replica_logits(self, x, *, generator=None, replicas=None):
            asked.append((len(x), replicas or self.replicas))
            return super().replica_logits(x, generator=generator, replicas=replicas)

    defense = Counting(tiny_classifier, tiny_energy, LangevinConfig(1, 0.01), replicas=30)
    y = torch.zeros(5, dtype=torch.int64)
    found = answer(defense, images, y, Sequential(0.05))
    assert asked[0] == (5, 10)
    assert sum(count * b for b, count in asked) == int(found.drawn.sum())
    asked.clear()
    whole = answer(defense, images, y)
    assert asked == [(5, 30)]
    assert whole.replicas.shape == (30, 5, 3)


def test_a_network_has_one_answer(tiny_classifier, images) -> None:
    y = torch.zeros(5, dtype=torch.int64)
    network = replicated(tiny_classifier, images[:2], 50)
    found = answer(network, images, y, Sequential(0.1))
    assert torch.equal(wrong(network, images, y), ~is_right(found.logits, y))
    assert torch.equal(found.logits, tiny_classifier(images))
    assert found.drawn.tolist() == [1] * 5


def test_bad_tests_are_said() -> None:
    with pytest.raises(ValueError, match="error: expected between 0 and 1, got 0"):
        Sequential(0)
    with pytest.raises(ValueError, match="first: expected >= 2, got 1"):
        Sequential(0.1, first=1)
    with pytest.raises(ValueError, match="clip: expected > 0, got 0"):
        Sequential(0.1, clip=0.0)


def test_draws_are_means_over_their_own_replicas() -> None:
    replica_logits = torch.arange(7.0).view(7, 1, 1).expand(7, 2, 3)
    draws = mean_logit_draws(replica_logits, 3)
    assert draws.shape == (2, 2, 3)
    assert draws[:, 0, 0].tolist() == [1.0, 4.0]
    assert torch.equal(mean_logit_draws(replica_logits, 1), replica_logits)
    assert mean_logit_draws(replica_logits, 7).shape == (1, 2, 3)


@pytest.mark.parametrize("count", [0, 8])
def test_a_mean_needs_one_replica_and_no_more_than_there_are(count: int) -> None:
    with pytest.raises(ValueError, match="count: expected 1 to 7"):
        mean_logit_draws(torch.zeros(7, 2, 3), count)


def test_the_surest_and_the_least_sure_image_are_right_ones() -> None:
    margins = torch.tensor([[9.0, 1.0, 5.0, -8.0], [11.0, 0.0, 4.0, -9.0], [10.0, 2.0, 6.0, -7.0]])
    replica_logits = torch.stack([margins, torch.zeros_like(margins)], dim=2)
    assert safe_and_borderline(replica_logits, torch.zeros(4).long()).tolist() == [0, 1]
    assert safe_and_borderline(replica_logits[:, :2], torch.tensor([1, 0])).tolist() == [1, 1]
