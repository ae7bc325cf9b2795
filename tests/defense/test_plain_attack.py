"""Algorithm 1 as printed and as scheduled: the same verdicts."""

import pytest
import torch

from defense.attack import AttackConfig, run_attack
from defense.plain_attack import algorithm_1
from defense.threat import ThreatModel


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_on_a_deterministic_model_both_say_the_same(
    tiny_classifier, images, norm: str, steps: int, seeded
) -> None:
    x = images.repeat(4, 1, 1, 1)
    y = tiny_classifier(x).argmax(1)
    threat = ThreatModel(norm, 8.0 if norm == "linf" else 40.0)
    options = {"steps": steps, "step_255": 2.0}
    right, broken_at = algorithm_1(
        tiny_classifier, tiny_classifier, x, y, threat, generator=seeded(), **options
    )
    record = run_attack(
        tiny_classifier, tiny_classifier, x, y, AttackConfig(threat, **options), generator=seeded()
    )
    assert right.all()
    assert torch.equal(record.broken_at, broken_at)
    if steps == 7:
        assert 0 < (broken_at >= 0).sum() < len(x)


def test_verdicts_by_hand(brightness, seeded) -> None:
    gray = torch.tensor([0.5, 0.49, 0.3, 0.6]).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    model = brightness(0.55)
    right, broken_at = algorithm_1(
        model,
        model,
        gray,
        torch.zeros(4, dtype=torch.int64),
        ThreatModel("linf", 25.5),
        steps=40,
        step_255=2.55,
        generator=seeded(),
    )
    assert right.tolist() == [True, True, True, False]
    assert (broken_at >= 0).tolist() == [True, True, False, False]
