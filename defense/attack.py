"""The attack on a stochastic defense: Algorithm 1 of Hill et al. (2021), one loop for every attack.

| attack                     | surrogate (losses, gradients) | target (truth)  | rule        |
|----------------------------|-------------------------------|-----------------|-------------|
| BPDA+EOT (Algorithm 1)     | defense, H_adv, identity      | defense, H_def  | PGD         |
| PGD+EOT through the chain  | defense, H_adv, exact         | defense, H_def  | PGD or APGD |
| the same, smoothed ReLUs   | defense, H_adv, smoothed      | defense, H_def  | PGD or APGD |
| gradient-free              | defense, H_adv                | defense, H_def  | Square      |
| controls                   | defense, H_adv                | defense, H_def  | noise       |
| PGD on the bare classifier | classifier                    | classifier      | PGD         |
| transfer                   | (images of the PGD above)     | defense, H_def  |             |

`defense.plain_attack` is Algorithm 1 as printed, without the speed-ups of this loop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from defense.inference import evaluation_mode, labels_of, logits_of
from defense.losses import LOSSES, Loss, cross_entropy, margin
from defense.pixels import check_pixels
from defense.rules import RuleName, make_rule
from defense.threat import ThreatModel
from defense.verdict import (
    SEQUENTIAL,
    Answer,
    Replicated,
    Sequential,
    answer,
    classes_of,
    is_right,
    replicated,
)

NEVER = -1
"""``broken_at`` of an image that no iterate broke."""

NOT_MEASURED = -1


@dataclass(frozen=True)
class AttackConfig:
    """N = ``steps`` updates of length ``step_255`` / 255 (alpha), from ``restarts`` starts.

    ``stop_at_break`` stops attacking an image at its first verified break (Algorithm 1). Without
    it every image, right or wrong when clean, goes through all steps and restarts. ``rule`` chooses
    the next iterate (only "pgd" uses ``step_255``); ``loss`` is what it maximizes. With
    ``early_verdicts`` the target draws no more replicas than the ``sequential`` test needs.
    ``replicas`` is H_def for a stochastic target that does not define ``replicas`` itself.
    """

    threat: ThreatModel
    steps: int
    step_255: float
    restarts: int = 1
    stop_at_break: bool = True
    rule: RuleName = "pgd"
    loss: Literal["cross_entropy", "margin", "dlr"] = "cross_entropy"
    sequential: Sequential = SEQUENTIAL
    early_verdicts: bool = False
    replicas: int = 150

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: expected >= 0, got {self.steps}")
        if not self.step_255 >= 0:
            raise ValueError(f"step_255: expected >= 0, got {self.step_255}")
        if self.restarts < 1:
            raise ValueError(f"restarts: expected >= 1, got {self.restarts}")
        if self.replicas < 1:
            raise ValueError(f"replicas: expected >= 1, got {self.replicas}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {list(LOSSES)}, got {self.loss!r}")
        make_rule(self.rule, self.threat, self.steps, self.step_255, Generator())

    def early(self) -> Sequential | None:
        """The sequential test if early verdicts are allowed, else None."""
        return self.sequential if self.early_verdicts else None


@dataclass(frozen=True)
class Found:
    """What the search of an attack found on B images."""

    adversarial: Tensor  # (B,C,H,W) pixels: the break that stopped it, else the largest margin
    broken_at: Tensor  # (B,) int64: updates before the first verified break, or NEVER
    restart: Tensor  # (B,) int64: the restart that broke it, or NEVER
    losses: Tensor  # (B,3) surrogate loss: first, largest, last; NaN: not attacked
    not_finite: Tensor  # (B,) int64: steps with a non-finite loss or gradient
    flat_steps: Tensor  # (B,) int64: steps at which the gradient was zero everywhere
    verified: Tensor  # (B,2) int64: suspects judged by the target, replicas drawn for them
    through_chain: Tensor  # (B,) bool: False if the gradient of the chain was the identity


@dataclass(frozen=True)
class Judged:
    """The target's output for B clean images and, with fresh noise, for the adversarial ones."""

    clean_logits: Tensor  # (B, classes) mean over its replicas
    clean_classes: Tensor  # (B,R) int16: predicted class of each of R replicas
    adversarial_logits: Tensor  # (B, classes)
    adversarial_classes: Tensor  # (B,R) int16
    early: Tensor  # (B,2) int64: replicas that the sequential test needs for the adversarial
    # image; 1 if its verdict agrees with that of all replicas, 0 if not, or NOT_MEASURED


@dataclass(frozen=True)
class AttackRecord(Judged, Found):
    """An attack on B images; every accuracy and the curve over steps follow from it."""

    def clean_correct(self, labels: Tensor) -> Tensor:
        """(B,) bool: the target is right about the clean image (the first check of Algorithm 1)."""
        return is_right(self.clean_logits, labels)

    def robust(self, labels: Tensor, *, steps: int | None = None) -> Tensor:
        """(B,) bool: right when clean and not broken within ``steps`` updates (default: ever).

        With several restarts, ``steps`` counts within the one that first broke the image. An image
        with a non-finite loss or gradient at any step does not count as robust.
        """
        broken = self.broken_at != NEVER
        if steps is not None:
            broken &= self.broken_at <= steps
        return self.clean_correct(labels) & ~broken & (self.not_finite == 0)


def ask(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, *, gradient: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradient of the loss in x (B,C,H,W) or None, the loss (B,) and the logits (B, classes).

    For an `EOTDefense` with gradient="identity" it is H_adv times equation (10): the loss is that
    of the mean logits, and its gradients at the purified copies are summed, not averaged. The
    update (8) does not depend on that factor.
    """
    if not gradient:
        with torch.no_grad():
            logits = logits_of(model(x), len(x))
        return None, loss(logits, y), logits
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.clone().detach().requires_grad_(True), y.clone()
        logits = logits_of(model(x), len(x))
        losses = loss(logits, y)
        if not losses.requires_grad:
            raise ValueError(
                "surrogate: its logits have no gradient in the pixels (detached, or under no_grad "
                "inside), and this attack follows one"
            )
        (slope,) = torch.autograd.grad(losses.sum(), x)
    return slope, losses.detach(), logits.detach()


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the cross-entropy in x, (B,C,H,W), and the model's logits (B, classes)."""
    gradient, _, logits = ask(model, x, y, cross_entropy, gradient=True)
    assert gradient is not None
    return gradient, logits


class Finds:
    """Running results of a search over images x (B,C,H,W); fields as in `Found`."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.adversarial = x.clone()
        self.broken_at, self.restart = torch.full_like(y, NEVER), torch.full_like(y, NEVER)
        self.losses = torch.full((len(x), 3), torch.nan, dtype=x.dtype, device=x.device)
        self.flat_steps, self.verified = torch.zeros_like(y), y.new_zeros(len(y), 2)
        self.not_finite = torch.zeros_like(y)
        self._margins = torch.full_like(x[:, 0, 0, 0], -torch.inf)

    def unbroken(self) -> Tensor:
        """(B,) bool."""
        return self.broken_at == NEVER

    def look(
        self, active: Tensor, x_adv: Tensor, margins: Tensor, losses: Tensor, slope: Tensor | None
    ) -> None:
        """Record iterates of images ``active`` (b,): largest margin, losses, bad gradients."""
        stronger = margins > self._margins[active]
        self.adversarial[active[stronger]] = x_adv[stronger]
        self._margins[active[stronger]] = margins[stronger].to(x_adv.dtype)
        first, largest, _ = self.losses[active].unbind(1)
        losses = losses.to(x_adv.dtype)
        first = torch.where(first.isnan(), losses, first)
        self.losses[active] = torch.stack([first, torch.fmax(largest, losses), losses], dim=1)
        finite = torch.isfinite(losses)
        if slope is not None:
            self.flat_steps[active] += (slope.flatten(1) == 0).all(1)
            finite &= torch.isfinite(slope).flatten(1).all(1)
        self.not_finite[active] += ~finite

    def strike(self, images: Tensor, step: int, restart: int) -> None:
        """Record verified breaks of ``images``, indices (b,) or a mask (B,)."""
        self.broken_at[images], self.restart[images] = step, restart

    def found(self, *, through_chain: bool) -> Found:
        """The final results."""
        kept = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return Found(through_chain=torch.full_like(self.unbroken(), through_chain), **kept)


@torch.no_grad()
def search(
    surrogate: nn.Module,
    target: Replicated,
    x: Tensor,
    y: Tensor,
    right: Tensor,
    config: AttackConfig,
    *,
    generator: Generator,
    on_step: Callable[[int], None] | None = None,
) -> Finds:
    """The loops of Algorithm 1 over images x (B,C,H,W); ``right`` (B,): the clean verdicts.

    The surrogate gives losses and gradients and points out suspects; only the target can declare a
    break, all suspects of a step in one batch. A break is final. N updates make N + 1 iterates,
    the random start and the last one included, and each is judged.
    """
    finds, loss = Finds(x, y), LOSSES[config.loss]
    for restart in range(config.restarts):
        rule = make_rule(config.rule, config.threat, config.steps, config.step_255, generator)
        attacked = right & finds.unbroken() if config.stop_at_break else torch.ones_like(right)
        active = attacked.nonzero().flatten()
        x_adv = rule.start(x[active])
        for step in range(config.steps + 1):
            if len(active) == 0:
                break
            labels = y[active]
            slope, losses, logits = ask(surrogate, x_adv, labels, loss, gradient=rule.asks_gradient)
            finds.look(active, x_adv, margin(logits, labels), losses, slope)
            if slope is not None:  # never step along NaN or infinity
                slope = torch.where(torch.isfinite(slope), slope, 0.0)

            # Algorithm 1: the small sample (H_adv) flags suspects, the large one (H_def) decides.
            suspects = ~is_right(logits, labels) & finds.unbroken()[active]
            struck = torch.zeros_like(suspects)
            if suspects.any():
                verdict = answer(target, x_adv[suspects], labels[suspects], config.early())
                struck[suspects] = ~is_right(verdict.logits, labels[suspects])
                finds.verified[active[suspects], 0] += 1
                finds.verified[active[suspects], 1] += verdict.drawn
                finds.strike(active[struck], step, restart)

            looked_at, x_adv = x_adv, rule.next(x_adv, losses, slope)
            if config.stop_at_break and struck.any():
                finds.adversarial[active[struck]] = looked_at[struck]
                active, x_adv = active[~struck], x_adv[~struck]
                rule.keep(~struck)
            if on_step is not None:
                on_step(int((right & finds.unbroken()).sum()))
    return finds


@torch.no_grad()
def run_attack(
    surrogate: nn.Module,
    target: nn.Module | Replicated,
    x: Tensor,
    y: Tensor,
    config: AttackConfig,
    *,
    generator: Generator,
    on_step: Callable[[int], None] | None = None,
) -> AttackRecord:
    """Attack images x (B,C,H,W) in [0, 1] with labels y (B,); Hill et al. (2021), Algorithm 1.

    The target judges the clean images, `search` attacks them, and the target judges the result
    again with fresh noise. Both models draw their own noise; ``generator`` draws the rule's random
    choices. ``on_step`` is called after every step with the number of images still robust.

    Both models run in evaluation mode, and their modes are restored. Any module from pixels to
    logits will do; a stochastic one is judged by all its replicas, see `Replicated`. `ValueError`
    for invalid pixels, labels or outputs, and if surrogate and target would draw the same noise.
    """
    check_pixels(x)
    y = labels_of(y, len(x))
    check_models(surrogate=surrogate, target=target)
    refuse_shared_noise(surrogate, target)
    modules = [model for model in (surrogate, target) if isinstance(model, nn.Module)]
    with evaluation_mode(*modules):
        judge = replicated(target, x, config.replicas)
        return _run(surrogate, judge, x, y, config, generator=generator, on_step=on_step)


def check_models(**models: object) -> None:
    """`ValueError` unless each is an nn.Module; a target may have `replica_logits` instead.

    A plain function hides the network inside it, so its mode could not be checked.
    """
    for name, model in models.items():
        if not isinstance(model, nn.Module) and (
            name == "surrogate" or not hasattr(model, "replica_logits")
        ):
            raise ValueError(
                f"{name}: expected an nn.Module from pixels to logits, got {type(model).__name__}; "
                "wrap the function in an nn.Module that holds its network"
            )


def refuse_shared_noise(surrogate: nn.Module, target: nn.Module | Replicated) -> None:
    """`ValueError` if two defenses share a seed: the attacker would know the target's noise."""
    ours, theirs = seeds_of(surrogate), seeds_of(target)
    for seed in ours.keys() & theirs.keys():
        if ours[seed] is not theirs[seed]:
            raise ValueError(
                f"seed: surrogate and target share {seed!r}, so the attacker knows the noise; give "
                "them different seeds, or none"
            )


def seeds_of(model: nn.Module | Replicated) -> dict[int | str, object]:
    """Seed -> the model, or the submodule of it, that draws its replicas with that seed."""
    parts = list[object](model.modules()) if isinstance(model, nn.Module) else [model]
    found = (
        (getattr(part, "seed", None), part) for part in parts if hasattr(part, "replica_logits")
    )
    return {seed: part for seed, part in found if isinstance(seed, int | str)}


def _run(
    surrogate: nn.Module,
    target: Replicated,
    x: Tensor,
    y: Tensor,
    config: AttackConfig,
    *,
    generator: Generator,
    on_step: Callable[[int], None] | None,
) -> AttackRecord:
    """`run_attack` after its checks."""
    clean = answer(target, x, y, config.early())
    right = is_right(clean.logits, y)
    finds = search(surrogate, target, x, y, right, config, generator=generator, on_step=on_step)
    moved = not getattr(surrogate, "gradient_is_identity", False)
    found = finds.found(through_chain=moved)
    judged = _judged(target, found.adversarial, y, clean, config)
    return AttackRecord(**vars(judged), **vars(found))


def _judged(
    target: Replicated, adversarial: Tensor, y: Tensor, clean: Answer, config: AttackConfig
) -> Judged:
    """The target's clean answer, and a fresh one on the adversarial images."""
    afresh = answer(target, adversarial, y, config.early())
    needed, agrees = afresh.drawn, torch.full_like(y, NOT_MEASURED)
    if not config.early_verdicts:
        early = config.sequential.replayed(afresh.replicas, y)
        needed = early.drawn
        agrees = (is_right(early.logits, y) == is_right(afresh.logits, y)).to(y.dtype)
    return Judged(
        clean.logits,
        classes_of(clean.replicas),
        afresh.logits,
        classes_of(afresh.replicas),
        torch.stack([needed, agrees], dim=1),
    )


@torch.no_grad()
def run_transfer(
    target: nn.Module | Replicated, x: Tensor, x_adv: Tensor, y: Tensor, config: AttackConfig
) -> AttackRecord:
    """Judge images made elsewhere: x and x_adv (B,C,H,W) in [0, 1], labels y (B,).

    ``config`` is that of the attack that made them; a break is recorded at its last step. Modes,
    outputs and errors are as in `run_attack`, with a `ValueError` for x_adv outside the ball, too.
    """
    check_pixels(x)
    check_pixels(x_adv)
    if x.shape != x_adv.shape:
        raise ValueError(f"x_adv: expected {tuple(x.shape)} as x, got {tuple(x_adv.shape)}")
    farthest = float(config.threat.distance(x_adv, x).max()) if len(x) else 0.0
    if farthest > config.threat.eps + 1e-6:
        raise ValueError(
            f"x_adv: expected images within {config.threat.eps:.6f} of x ({config.threat.norm}, "
            f"pixels in [0, 1]), got {farthest:.6f}: are they of the same images, in order?"
        )
    y = labels_of(y, len(x))
    check_models(target=target)
    with evaluation_mode(*([target] if isinstance(target, nn.Module) else [])):
        judge = replicated(target, x, config.replicas)
        clean = answer(judge, x, y, config.early())
        judged = _judged(judge, x_adv, y, clean, config)
    finds, broken = Finds(x_adv, y), is_right(clean.logits, y)
    broken &= ~is_right(judged.adversarial_logits, y)
    finds.strike(broken, config.steps, 0)
    return AttackRecord(**vars(judged), **vars(finds.found(through_chain=True)))
