"""Each flag from a record that deserves it, and none from one that does not."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from defense.attack import NEVER, NOT_MEASURED, AttackRecord
from stages.core.artifacts import Images
from stages.core.records import AttackResult
from stages.reporting.findings import active_test, findings, verification
from stages.reporting.flags import flags_of
from stages.reporting.rows import accuracies

N = 20


def result(broken: int = 5, repeated: int | None = None, **about: Any) -> AttackResult:
    """N images of label 0; the first ``broken`` were broken, ``repeated`` of them twice."""
    repeated = broken if repeated is None else repeated
    images = torch.zeros(N, 1, 4, 4, dtype=torch.uint8)
    labels = torch.zeros(N, dtype=torch.int64)
    clean = torch.tensor([[5.0, 0.0, -1.0]]).repeat(N, 1)
    afresh = clean.clone()
    afresh[:repeated] = torch.tensor([0.0, 5.0, -1.0])
    record = AttackRecord(
        adversarial=torch.zeros(N, 1, 4, 4),
        clean_logits=clean,
        clean_classes=torch.zeros(N, 4, dtype=torch.int16),
        adversarial_logits=afresh,
        adversarial_classes=afresh.argmax(1, keepdim=True).repeat(1, 4).to(torch.int16),
        broken_at=torch.where(torch.arange(N) < broken, 3, NEVER),
        restart=torch.where(torch.arange(N) < broken, 0, NEVER),
        losses=torch.tensor([[-5.0, 2.0, 1.0]]).repeat(N, 1),
        not_finite=torch.zeros(N, dtype=torch.int64),
        flat_steps=torch.zeros(N, dtype=torch.int64),
        verified=torch.zeros(N, 2, dtype=torch.int64),
        early=torch.tensor([[10, 1]]).repeat(N, 1),
        through_chain=torch.ones(N, dtype=torch.bool),
    )
    usual = {"attack": "exact", "gradient": "exact", "H_def": 150, "eps_255": 8.0, "cost": 1234.0}
    return AttackResult(Images(images, labels, labels), record, {**usual, **about})


def changed(**fields: torch.Tensor) -> AttackResult:
    plain = result()
    return replace(plain, record=replace(plain.record, **fields))


def test_a_sound_record_has_no_flag() -> None:
    assert flags_of(result()) == []


def test_an_exact_gradient_that_is_the_identity_is_flagged() -> None:
    (flag,) = flags_of(changed(through_chain=torch.zeros(N, dtype=torch.bool)))
    assert flag == "gradient is the identity: the energy is piecewise linear"
    identity = result(gradient="identity")
    identity.record.through_chain[:] = False
    assert flags_of(identity) == []


def test_attacks_without_numbers_are_flagged_and_make_nothing_robust() -> None:
    sound = result()
    lost = result()
    lost.record.not_finite[-3:] = 2
    lost.record.losses[-3:] = torch.nan
    assert not any("NaN" in flag for flag in flags_of(sound))
    said = f"NaN or infinite losses or gradients on 3 of {N} images, which are not called robust"
    assert said in flags_of(lost)
    labels = lost.images.labels
    assert int(sound.record.robust(labels).sum()) - int(lost.record.robust(labels).sum()) == 3


def test_zero_gradients_are_flagged_with_their_share() -> None:
    flat = (torch.arange(N) < 5).to(torch.int64)
    assert flags_of(changed(flat_steps=flat)) == ["zero gradients on 25% of the attacked images"]


def test_probabilities_in_place_of_logits_are_flagged() -> None:
    logits = torch.tensor([[0.9, 0.1, 0.0]]).repeat(N, 1)
    assert flags_of(changed(clean_logits=logits)) == ["outputs look like probabilities, not logits"]


def test_a_single_replica_is_flagged() -> None:
    assert flags_of(result(H_def=1)) == ["a stochastic defense judged by a single replica"]


@pytest.mark.parametrize(("repeated", "flagged"), [(5, False), (4, True)])
def test_breaks_that_fresh_noise_takes_back_are_flagged(repeated: int, flagged: bool) -> None:
    flags = flags_of(result(repeated=repeated))
    assert (flags == ["20% of the breaks do not repeat with fresh noise"]) == flagged


def test_a_loss_that_does_not_rise_is_flagged() -> None:
    record = result(broken=0)
    record.record.losses[:] = torch.tensor([1.0, 1.0, 0.5])
    assert flags_of(record) == ["the loss did not rise"]


def evaluation(**broken: int) -> list[AttackResult]:
    """Records by attack name and number of broken images; gradients as the names say."""
    kinds = {"transfer": None, "square": "none", "no_attack": "none"}
    scale = {"no_attack": 0.0, "huge": 64.0}
    results = []
    for name, count in broken.items():
        gradient = kinds.get(name, "identity")
        found = result(count, attack=name, eps_255=scale.get(name, 8.0))
        found.about["gradient"] = gradient
        results.append(found)
    return results


def said(word: str, **broken: int) -> str:
    lines = findings(evaluation(transfer=2, **broken), 8.0)
    return next(text for text in lines if word in text)


def test_gradient_free_attacks_must_not_win() -> None:
    assert said("gradient attack", identity=5, square=4).startswith("the strongest attack with")
    text = said("gradient attack", identity=5, square=7)
    assert text.startswith("FLAG: square beats every gradient attack")
    assert "square 2" in text, "two images that no gradient attack broke"


def test_accuracy_has_to_fall_to_chance_at_a_huge_radius() -> None:
    assert said("64/255", identity=5, huge=20).endswith("as it should be")
    assert said("64/255", identity=5, huge=3).startswith("FLAG: at eps = 64/255")


def test_false_breaks_are_counted() -> None:
    assert "breaks 1 of 20 images" in said("false breaks", identity=5, no_attack=1)


def test_the_ensemble_is_the_worst_case_over_attacks() -> None:
    assert "0.6500" in said("every attack", identity=5, square=7)


def test_the_cost_is_said() -> None:
    assert "1,234 times" in said("costs", identity=5)


def test_savings_and_agreement_of_early_verdicts_are_said() -> None:
    text = verification([result()])
    assert text.startswith("sequential verdicts on the saved images take 10 of 150 replicas")
    assert text.endswith("all replicas say the same of 20 of 20")
    early = changed(early=torch.tensor([[10, NOT_MEASURED]]).repeat(N, 1))
    assert "all replicas say" not in verification([early])


def test_a_defense_in_which_nothing_can_be_planted_is_flagged() -> None:
    nothing = torch.zeros(N, dtype=torch.bool)
    tensors = {"planted": nothing, "found": nothing, "random_hits": torch.zeros(N)}
    assert active_test(tensors, {}).startswith("FLAG: active test: nothing could be planted")


def test_images_are_compared_with_bpda_one_by_one() -> None:
    text = said("image by image", identity=5, smoothed=14)
    assert "smoothed breaks 9 that identity does not, identity breaks 0" in text
    assert "p = 0.0039" in text


@pytest.mark.parametrize(("found", "flagged"), [(20, False), (19, False), (18, True)])
def test_an_attack_that_misses_what_was_planted_is_flagged(found: int, flagged: bool) -> None:
    planted = torch.ones(N + 1, dtype=torch.bool)
    planted[-1] = False  # not counted
    tensors = {"planted": planted, "found": torch.arange(N + 1) < found}
    tensors["random_hits"] = torch.full((N + 1,), 0.01)
    text = active_test(tensors, {"attack": "identity"})
    assert f"finds {found} of 20 planted" in text
    assert text.startswith("FLAG: ") == flagged


def test_every_metric_of_a_record_has_its_interval() -> None:
    found = accuracies(result(), draws=4)
    suffixes = ("", "_average", "_majority", "_worst")
    assert set(found) == {
        "adversarial",
        *(f"natural{s}" for s in suffixes),
        *(f"adversarial_afresh{s}" for s in suffixes),
    }
    for accuracy in found.values():
        low, high = accuracy.interval
        assert 0 <= low <= accuracy.value <= high <= 1
        assert high - low > 0.1
    assert found["adversarial"].value == found["adversarial_afresh"].value == 0.75
