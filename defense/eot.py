"""The defended classifier: Expectation Over Transformation, equations (4)-(6)."""

import inspect
import secrets
import warnings
from typing import Any, Self, get_args

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from defense.gradient.chain import GradientMode
from defense.inference import evaluation_mode, logits_of
from defense.langevin import LangevinConfig
from defense.pixels import check_pixels
from defense.purifier import LangevinPurifier, Purifier, Reversible
from defense.rng import make_generator
from defense.through import purified_with_gradient

CLASSIFIER_PIXELS = 512 * 32 * 32
"""Pixels in one batch of the classifier: 512 purified CIFAR images."""

LOOKAHEAD = 0.1
"""How far the pixels of an image may lie outside [0, 1].

Attacks with Nesterov momentum evaluate gradients a few steps ahead of the clipped image.
"""


class EOTDefense(nn.Module):
    """Mean logits of H purified replicas: F_H(x) = 1/H sum_h f(T_h(x)) (Hill et al. 2021, eq. 5).

    Images (B,C,H,W) in [0, 1] -> logits (B, classes), for any ``classifier`` f that maps pixels in
    [0, 1] to logits and any ``purifier`` T (`Purifier`). ``EOTDefense(classifier, energy, config,
    chain=..., ...)`` is short for the paper's: ``purifier`` is then ``LangevinPurifier(energy,
    config, chain=..., ...)``.

    Any attack that needs only a module's logits and gradients runs on it unchanged. ``gradient``
    selects the gradient: "identity" is that of BPDA+EOT (eq. 10); "exact" is the purifier's own,
    for the noise that it drew; "smoothed" (with an energy) is that of a `LangevinPurifier` with a
    ``softness``, by default 0.01. If the exact gradient turns out to be the identity, a warning
    says so and `gradient_is_identity` is True; it is None before the first backward pass.

    The noise comes from the module's own generator, seeded by ``seed`` (a number or a name) and
    advanced by every call, so an attack library that re-seeds torch's global generator does not
    repeat it. Without a seed every instance draws one at random and keeps it in `seed`. At most
    ``max_chains`` copies are purified at a time; this number changes the order of the noise, so
    record it. Surrogate and target need different seeds. Classifier and purifier run in evaluation
    mode, and their modes are restored.
    """

    def __init__(
        self,
        classifier: nn.Module,
        purifier: Purifier | nn.Module,
        config: LangevinConfig | None = None,
        *,
        replicas: int,
        max_chains: int = 2048,
        seed: int | str | None = None,
        gradient: GradientMode = "identity",
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(classifier, nn.Module):
            raise ValueError(f"classifier: expected an nn.Module, got {type(classifier).__name__}")
        if gradient not in get_args(GradientMode):
            raise ValueError(
                f"gradient: expected one of {get_args(GradientMode)}, got {gradient!r}"
            )
        if type(replicas) is not int or replicas < 1:
            raise ValueError(f"replicas: expected a whole number >= 1, got {replicas!r}")
        if max_chains < 1:
            raise ValueError(f"max_chains: expected >= 1, got {max_chains}")
        self.classifier = classifier
        self.purifier = _purifier(purifier, config, gradient, options)
        self.replicas = replicas
        self.max_chains = max_chains
        self.seed = secrets.randbits(63) if seed is None else seed
        self.gradient = gradient
        self.gradient_is_identity: bool | None = None
        self._generators: dict[str, Generator] = {}
        self.training = False

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the defense is not trained, and its parts keep the modes they were given."""
        return self

    def own_generator(self, device: torch.device) -> Generator:
        """The module's generator on a device, made at its first use there."""
        key = str(device)
        if key not in self._generators:
            self._generators[key] = make_generator(self.seed, "defense", device=device)
        return self._generators[key]

    def forward(self, x: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.replica_logits(x, generator=generator).mean(0)

    def replica_logits(
        self, x: Tensor, *, generator: Generator | None = None, replicas: int | None = None
    ) -> Tensor:
        """Logits of every replica: (B,C,H,W) in [0, 1] -> (replicas, B, classes).

        ``replicas`` overrides the module's own number.
        """
        replicas = self.replicas if replicas is None else replicas
        check_pixels(x, beyond=LOOKAHEAD)
        copies = x.repeat(replicas, 1, 1, 1)
        purified = self._purified(copies, generator)
        pieces = purified.split(max(1, CLASSIFIER_PIXELS // x.shape[2:].numel()))
        again = len(pieces) > 1
        logits = torch.cat([self._classify(piece, again=again) for piece in pieces])
        stacked: Tensor = logits.unflatten(0, (replicas, len(x)))
        return stacked

    @torch.no_grad()
    def purify(self, x: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Each image once: (N,C,H,W) in [0, 1] -> purified pixels, unclamped, no gradient."""
        return self._purified(x.detach(), generator)

    def _purified(self, copies: Tensor, generator: Generator | None) -> Tensor:
        """Purify each copy once, ``max_chains`` at a time; differentiable as ``gradient`` says."""
        generator = generator or self.own_generator(copies.device)
        parts = [
            purified_with_gradient(
                self.purifier,
                part,
                generator=generator,
                identity=self.gradient == "identity",
                watch=self._compare_gradients,
            )
            for part in copies.split(self.max_chains)
        ]
        return torch.cat(parts)

    def _compare_gradients(self, v: Tensor, back: Tensor) -> None:
        """Warn if the purifier has so far returned every gradient unchanged; zeros don't count."""
        if not v.any():
            return
        same = torch.equal(back, v)
        self.gradient_is_identity = same and self.gradient_is_identity is not False
        if self.gradient_is_identity:
            warnings.warn(
                "the exact gradient through this purifier is the identity, as in BPDA: an energy "
                "of leaky ReLUs is piecewise linear. Agreement of the two proves nothing; use "
                "gradient='smoothed'",
                stacklevel=2,
            )

    def _classify(self, pixels: Tensor, *, again: bool) -> Tensor:
        """Logits of one piece; ``again`` recomputes its activations in the backward pass.

        With several pieces this keeps the memory of a backward pass to that of one piece, whatever
        the number of replicas.
        """
        if not again or not torch.is_grad_enabled():
            return self._ask_classifier(pixels)
        logits: Tensor = checkpoint(self._ask_classifier, pixels, use_reentrant=False)
        return logits

    def _ask_classifier(self, pixels: Tensor) -> Tensor:
        with evaluation_mode(self.classifier):
            return logits_of(self.classifier(pixels), len(pixels))


def _purifier(
    purifier: Any, config: LangevinConfig | None, gradient: GradientMode, options: dict[str, Any]
) -> Purifier:
    """The given purifier, or a `LangevinPurifier` of an energy; `ValueError` if it does not fit."""
    if config is not None:
        if gradient == "smoothed":
            options = {"softness": 0.01, **options}
        else:
            options = {name: value for name, value in options.items() if name != "softness"}
        return LangevinPurifier(purifier, config, **options)
    call = purifier.forward if isinstance(purifier, nn.Module) else purifier
    if not callable(call) or "generator" not in inspect.signature(call).parameters:
        raise ValueError(
            f"purifier: expected one that is called with (x, generator=...), got "
            f"{type(purifier).__name__}; with an energy, give a LangevinConfig, too"
        )
    if options:
        raise ValueError(
            f"{next(iter(options))}: belongs to a purifier; with an energy, a LangevinConfig is "
            "the third argument"
        )
    if gradient == "smoothed":
        raise ValueError(
            "gradient: expected 'identity' or 'exact' of a purifier; "
            "LangevinPurifier(..., softness=0.01) smooths its own"
        )
    ways = isinstance(purifier, Reversible) or getattr(purifier, "differentiable", False)
    if gradient == "exact" and not ways:
        raise ValueError(
            f"gradient: {type(purifier).__name__} has neither `with_way_back` nor "
            "`differentiable = True`, so only gradient='identity' (BPDA) is possible"
        )
    fits: Purifier = purifier
    return fits
