"""Losses by hand."""

import pytest
import torch

from defense.losses import LOSSES, cross_entropy, dlr, margin

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0], [1.0, 3.0, 2.0, 0.0], [-1.0, -2.0, -9.0, -3.0]])
Y = torch.tensor([1, 2, 0])


def test_margin_is_positive_where_the_prediction_is_wrong() -> None:
    assert margin(LOGITS, Y).tolist() == [-1.0, 1.0, -1.0]


def test_dlr_is_the_margin_over_the_first_minus_the_third() -> None:
    assert dlr(LOGITS, Y).tolist() == [-0.5, 0.5, -0.5]


def test_neither_shift_nor_scale_of_the_logits_changes_dlr() -> None:
    torch.testing.assert_close(dlr(7 * LOGITS + 3, Y), dlr(LOGITS, Y))


def test_dlr_needs_three_classes() -> None:
    with pytest.raises(ValueError, match="dlr: expected at least 3 classes, got 2"):
        dlr(LOGITS[:, :2], Y)


def test_cross_entropy_vanishes_where_margin_does_not() -> None:
    sure = torch.tensor([[200.0, 0.0, 0.0]])
    assert cross_entropy(sure, torch.tensor([0])).item() == 0
    assert margin(sure, torch.tensor([0])).item() == -200


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_larger_where_the_right_logit_is_smaller(name: str) -> None:
    smaller = LOGITS.clone()
    smaller[torch.arange(3), Y] -= 0.5
    assert (LOSSES[name](smaller, Y) > LOSSES[name](LOGITS, Y)).all()
