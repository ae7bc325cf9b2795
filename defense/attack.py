"""The attack on a stochastic defense: Algorithm 1 of Hill et al. (2021), one loop for every attack.

| attack                    | surrogate (gradients)      | target (truth)        |
|---------------------------|----------------------------|-----------------------|
| BPDA+EOT (Algorithm 1)    | defense, H_adv replicas    | defense, H_def        |
| PGD on the bare classifier| classifier                 | classifier            |
| transfer                  | (images of the PGD above)  | defense, H_def        |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from defense.threat import ThreatModel

NEVER = -1
"""``broken_at`` of an image that no iterate broke."""


@dataclass(frozen=True)
class AttackConfig:
    """N = ``steps`` updates of length ``step_255`` / 255 (alpha), from ``restarts`` random starts.

    ``stop_at_break`` ends the work on an image at its first verified break (Algorithm 1). Without
    it every image, right or wrong when clean, goes through all steps and restarts, and its iterate
    with the largest margin is kept: the strongest image to hand on to another model.
    """

    threat: ThreatModel
    steps: int
    step_255: float
    restarts: int = 1
    stop_at_break: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: expected >= 0, got {self.steps}")
        if not self.step_255 >= 0:
            raise ValueError(f"step_255: expected >= 0, got {self.step_255}")
        if self.restarts < 1:
            raise ValueError(f"restarts: expected >= 1, got {self.restarts}")


@dataclass(frozen=True)
class AttackRecord:
    """What an attack found on B images; accuracy and its curve over steps follow from it alone."""

    adversarial: Tensor  # (B,C,H,W) pixels: the breaking iterate, else the last or strongest one
    clean_logits: Tensor  # (B, classes) target on the clean image
    adversarial_logits: Tensor  # (B, classes) target on ``adversarial``, drawn afresh
    broken_at: Tensor  # (B,) int64: updates before the first verified break, or NEVER
    restart: Tensor  # (B,) int64: the restart that broke it, or NEVER

    def clean_correct(self, labels: Tensor) -> Tensor:
        """(B,) bool: the target is right about the clean image (the first check of Algorithm 1)."""
        return is_right(self.clean_logits, labels)

    def robust(self, labels: Tensor, *, steps: int | None = None) -> Tensor:
        """(B,) bool: right when clean and not broken within ``steps`` updates (default: ever).

        With several restarts, ``steps`` counts within the one that broke the image first.
        """
        broken = self.broken_at != NEVER
        if steps is not None:
            broken &= self.broken_at <= steps
        return self.clean_correct(labels) & ~broken


def is_right(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) bool: the prediction is y. Logits that are not finite are never right."""
    return (logits.argmax(1) == y) & torch.isfinite(logits).all(1)


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the cross-entropy in x, (B,C,H,W), and the model's logits (B, classes).

    For an `EOTDefense` this is equation (10) times a positive constant: the loss of the mean
    logits, its gradient averaged over the purified replicas and applied to the image.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.clone().detach().requires_grad_(True), y.clone()
        logits = model(x)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    return gradient, logits.detach()


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus the right one, (B,): positive where the prediction is wrong."""
    right = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return wrong - right


@torch.no_grad()
def run_attack(
    surrogate: nn.Module,
    target: nn.Module,
    x: Tensor,
    y: Tensor,
    config: AttackConfig,
    *,
    generator: Generator,
    on_step: Callable[[int], None] | None = None,
) -> AttackRecord:
    """Attack images x (B,C,H,W) in [0, 1] with labels y (B,); Hill et al. (2021), Algorithm 1.

    The surrogate gives gradients and points out suspects; only the target can declare a break, all
    suspects of a step in one batch. A break is final. N updates make N + 1 iterates, the random
    start and the last one included, and each is judged. Both models own their noise; ``generator``
    draws the random starts; ``on_step`` is told after every step how many images are still robust.
    """
    clean_logits = target(x)
    adversarial = x.clone()
    broken_at = torch.full_like(y, NEVER)
    broken_in = torch.full_like(y, NEVER)
    best_margin = torch.full_like(x[:, 0, 0, 0], -torch.inf)
    right = is_right(clean_logits, y)

    for restart in range(config.restarts):
        unbroken = right & (broken_at == NEVER)
        attacked = unbroken if config.stop_at_break else torch.ones_like(unbroken)
        active = attacked.nonzero().flatten()
        x_adv = config.threat.random_point(x[active], generator=generator)
        for step in range(config.steps + 1):
            if len(active) == 0:
                break
            gradient, logits = loss_gradient(surrogate, x_adv, y[active])

            # Keep what a later reader should see of each image: the last iterate, or the strongest.
            margins = margin(logits, y[active]).to(x.dtype)
            kept = slice(None) if config.stop_at_break else margins > best_margin[active]
            adversarial[active[kept]] = x_adv[kept]
            best_margin[active[kept]] = margins[kept]

            # Suspects of the small sample are struck only if the large sample agrees.
            suspects = ~is_right(logits, y[active]) & (broken_at[active] == NEVER)
            struck = torch.zeros_like(suspects)
            if suspects.any():
                struck[suspects] = ~is_right(target(x_adv[suspects]), y[active[suspects]])
            broken_at[active[struck]] = step
            broken_in[active[struck]] = restart

            x_adv = config.threat.ascend(x_adv, gradient, config.step_255)
            x_adv = config.threat.project(x_adv, x[active])
            if config.stop_at_break:
                active, x_adv = active[~struck], x_adv[~struck]
            if on_step is not None:
                on_step(int((right & (broken_at == NEVER)).sum()))

    return AttackRecord(adversarial, clean_logits, target(adversarial), broken_at, broken_in)


@torch.no_grad()
def run_transfer(
    target: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, steps: int
) -> AttackRecord:
    """Judge images made elsewhere: x and x_adv (B,C,H,W) in [0, 1], labels y (B,).

    ``steps`` is what it took to make them; a broken image is recorded at that step.
    """
    clean_logits, adversarial_logits = target(x), target(x_adv)
    broken = is_right(clean_logits, y) & ~is_right(adversarial_logits, y)
    broken_at = torch.where(broken, steps, NEVER)
    return AttackRecord(
        x_adv, clean_logits, adversarial_logits, broken_at, torch.where(broken, 0, NEVER)
    )
