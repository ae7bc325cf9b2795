"""Flags: reasons to doubt an accuracy, found in its own record and reported beside it."""

import torch

from defense.attack import NEVER
from defense.verdict import is_right
from stages.core.records import AttackResult

UNREPEATED = 0.05  # flagged if fresh noise undoes more than this share of the breaks


def flags_of(result: AttackResult) -> list[str]:
    """The flags of one record, in words, from its tensors and conditions alone."""
    record, about, labels = result.record, result.about, result.images.labels
    flags = []
    broken = record.broken_at != NEVER
    attacked = ~record.losses[:, 0].isnan() | (record.not_finite > 0)
    gradient = about.get("gradient")
    if gradient in ("exact", "smoothed") and attacked.any() and not record.through_chain.any():
        flags.append("gradient is the identity: the energy is piecewise linear")
    unanswered = int((~torch.isfinite(record.clean_logits).all(1)).sum())
    if unanswered:
        flags.append(
            f"NaN or infinite logits on {unanswered} of {len(labels)} natural images, which "
            "count as wrong"
        )
    lost = int((record.not_finite > 0).sum())
    if lost:
        flags.append(
            f"NaN or infinite losses or gradients on {lost} of {len(labels)} images, which are "
            "not called robust"
        )
    flat = float((record.flat_steps[attacked] > 0).float().mean()) if attacked.any() else 0.0
    if flat > 0:
        flags.append(f"zero gradients on {flat:.0%} of the attacked images")
    if looks_like_probabilities(record.clean_logits):
        flags.append("outputs look like probabilities, not logits")
    if about.get("H_def") == 1:
        flags.append("a stochastic defense judged by a single replica")
    if broken.any():
        unrepeated = float(is_right(record.adversarial_logits, labels)[broken].float().mean())
        if unrepeated > UNREPEATED:
            flags.append(f"{unrepeated:.0%} of the breaks do not repeat with fresh noise")
    if gradient not in (None, "none") and attacked.any():
        first, _, last = record.losses[attacked & (record.not_finite == 0)].unbind(1)
        if len(first) and float(last.mean()) <= float(first.mean()) and not broken.any():
            flags.append("the loss did not rise")
    return flags


def looks_like_probabilities(logits: torch.Tensor) -> bool:
    """(B, classes): all in [0, 1], and they sum to one."""
    inside = bool(((logits >= 0) & (logits <= 1)).all())
    return inside and bool(((logits.sum(1) - 1).abs() < 1e-4).all())
