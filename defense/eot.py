"""The defended classifier: Expectation Over Transformation, equations (4)-(6)."""

import inspect
import secrets
import warnings
from typing import Any, Self, get_args

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from defense.chain_gradient import GradientMode
from defense.inference import evaluation_mode, logits_of
from defense.langevin import LangevinConfig
from defense.pixels import check_pixels
from defense.purifier import LangevinPurifier, Purifier, Reversible
from defense.rng import make_generator
from defense.through import purified_with_gradient

CLASSIFIER_PIXELS = 512 * 32 * 32
"""Pixels that the classifier sees at once: 512 purified CIFAR images."""

LOOKAHEAD = 0.1
"""How far an attack may look beyond [0, 1].

Attacks with momentum, such as Nesterov's, ask for gradients a few steps ahead of the clipped image.
"""


class EOTDefense(nn.Module):
    """Mean logits of H purified replicas: F_H(x) = 1/H sum_h f(T_h(x)) (Hill et al. 2021, eq. 5).

    Images (B,C,H,W) in [0, 1] -> logits (B, classes), for any ``classifier`` f that maps pixels in
    [0, 1] to logits and any ``purifier`` T (`Purifier`). ``EOTDefense(classifier, energy, config,
    chain=..., ...)`` is short for the paper's: ``purifier`` is then ``LangevinPurifier(energy,
    config, chain=..., ...)``.

    An attack that asks a module for logits and gradients runs on it as it is. ``gradient`` says
    what it is given: "identity" the BPDA+EOT gradient (eq. 10); "exact" that of the purifier, for
    the noise which it drew; "smoothed" (with an energy) that of a `LangevinPurifier` with a
    ``softness``, by default 0.01. An exact gradient that is the identity after all is warned of,
    and `gradient_is_identity` says True; it is None until a gradient has come back.

    The noise comes from the module's own generator, seeded by ``seed`` (a number or a name) and
    advanced by every call: an attack library that re-seeds torch's global stream does not repeat
    it. Without a seed every instance has a stream of its own, and `seed` says which it drew. At
    most ``max_chains`` copies are purified at a time; the order of the noise depends on that, so
    the number belongs to a record. An attacker's view and its judge need different seeds.
    Classifier and purifier are asked in evaluation mode, and left in the mode that they were in.
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
        """Nothing changes: nothing here is trained, and the mode of its parts is their owner's."""
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

        ``replicas`` is another number of them than the module's own.
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
        """Each copy once, in parts; its gradient is the mode's."""
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
        """Note, and warn, if all that came back so far is what was sent; zeros say nothing."""
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
        """Logits of one piece, one of several if its activations are to be made again.

        Then the memory of a backward pass is that of one piece, whatever the number of replicas.
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
    """The purifier that was given, or the one of an energy; `ValueError` if it does not fit."""
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
            "`differentiable = True`, so only 'identity' (BPDA) is known of it"
        )
    fits: Purifier = purifier
    return fits
