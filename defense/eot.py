"""The defended classifier: Expectation Over Transformation, equations (4)-(6)."""

import secrets
import warnings
from typing import Any, Self, get_args

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from defense.chain_gradient import (
    GradientMode,
    MakeProduct,
    Segment,
    autograd_product,
    pull_back,
    run_in_segments,
    smoothed,
)
from defense.inference import evaluation_mode, logits_of
from defense.langevin import Chain, LangevinConfig, denoised, denoising_factor, langevin
from defense.pixels import check_pixels, to_net, to_pixels
from defense.rng import make_generator

CLASSIFIER_PIXELS = 512 * 32 * 32
"""Pixels that the classifier sees at once: 512 purified CIFAR images."""

LOOKAHEAD = 0.1
"""How far an attack may look beyond [0, 1].

Attacks with momentum, such as Nesterov's, ask for gradients a few steps ahead of the clipped image.
"""


class _StraightThrough(torch.autograd.Function):
    """Value of the second argument, gradient of the first: BPDA with the identity, g(x) = x."""

    @staticmethod
    def forward(x: Tensor, purified: Tensor) -> Tensor:
        return purified.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[0], None


def straight_through(x: Tensor, purified: Tensor) -> Tensor:
    """The purified images exactly, with d(output)/dx = identity (Athalye et al. 2018, BPDA)."""
    output: Tensor = _StraightThrough.apply(x, purified)
    return output


class _ThroughChain(torch.autograd.Function):
    """Purified pixels, differentiated through the chain: modes exact and smoothed."""

    @staticmethod
    def forward(ctx: Any, copies: Tensor, defense: "EOTDefense", generator: Generator) -> Tensor:
        ctx.defense = defense
        with evaluation_mode(defense.energy):
            purified, ctx.kept = defense.purify_in_segments(copies, generator)
        return purified

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        with evaluation_mode(ctx.defense.energy):
            return ctx.defense.pull_back(gradient[0], ctx.kept), None, None


class EOTDefense(nn.Module):
    """Mean logits of H purified replicas: F_H(x) = 1/H sum_h f(T_h(x)) (Hill et al. 2021, eq. 5).

    Images (B,C,H,W) in [0, 1] -> logits (B, classes), for any ``classifier`` that maps pixels in
    [0, 1] to logits. ``config.steps = 0`` with ``replicas = 1`` is the classifier itself. With
    ``config.denoise`` the noise that a chain ends with is taken off before it is classified. An
    attack that asks a module for logits and gradients runs on it as it is. ``gradient`` says what
    it is given: "identity" the BPDA+EOT gradient (eq. 10); "exact" the gradient of these very
    chains, noise and all; "smoothed" the same with the corners of a (leaky) ReLU energy rounded
    over about sqrt(``softness``) on the way back. An exact gradient that is no other than the
    identity is warned of, and `chain_moved_gradient` stays False.

    The noise comes from the module's own generator, seeded by ``seed`` (a number or a name) and
    advanced by every call: an attack library that re-seeds torch's global stream does not repeat
    it. Without a seed every instance has a stream of its own, and `seed` says which it drew. At
    most ``max_chains`` chains run at a time; the order of the noise depends on that number,
    so it belongs to a record. An attacker's view and its judge need different seeds. Classifier and
    energy are asked in evaluation mode, and left in the mode that they were in.
    """

    def __init__(
        self,
        classifier: nn.Module,
        energy: nn.Module,
        config: LangevinConfig,
        *,
        replicas: int,
        max_chains: int = 2048,
        seed: int | str | None = None,
        chain: Chain = langevin,
        gradient: GradientMode = "identity",
        softness: float = 0.01,
        product: MakeProduct = autograd_product,
        segment: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(classifier, nn.Module):
            raise ValueError(f"classifier: expected an nn.Module, got {type(classifier).__name__}")
        if gradient not in get_args(GradientMode):
            raise ValueError(
                f"gradient: expected one of {get_args(GradientMode)}, got {gradient!r}"
            )
        if gradient == "smoothed":
            smoothed(energy, softness)  # or an error, now and not in the middle of an attack
        if config.denoise:
            denoising_factor(energy, config.tau)  # the same
        if type(replicas) is not int or replicas < 1:
            raise ValueError(f"replicas: expected a whole number >= 1, got {replicas!r}")
        if max_chains < 1:
            raise ValueError(f"max_chains: expected >= 1, got {max_chains}")
        self.classifier = classifier
        self.energy = energy
        self.config = config
        self.replicas = replicas
        self.max_chains = max_chains
        self.seed = secrets.randbits(63) if seed is None else seed
        self.chain = chain
        self.gradient = gradient
        self.softness = softness
        self.product = product
        self.segment = segment
        self.gradient_came_back = False
        self.chain_moved_gradient = False
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

    def purify(self, x: Tensor, *, generator: Generator | None = None) -> Tensor:
        """One chain per image: (N,C,H,W) in [0, 1] -> purified pixels, unclamped, no gradient."""
        if self.config.steps == 0:
            return x.detach()
        generator = generator or self.own_generator(x.device)
        with evaluation_mode(self.energy):
            parts = [
                self._without_noise(
                    self.chain(self.energy, to_net(part), self.config, generator=generator)
                )
                for part in x.detach().split(self.max_chains)
            ]
        return to_pixels(torch.cat(parts))

    def _without_noise(self, end: Tensor) -> Tensor:
        """What the classifier is shown of the end of a chain, in net range."""
        if not self.config.denoise:
            return end
        return denoised(self.energy, end, self.config.tau, chain=self.chain)

    def purify_in_segments(
        self, x: Tensor, generator: Generator
    ) -> tuple[Tensor, list[tuple[list[Segment], Tensor]]]:
        """`purify`, with what the way back needs, for each part of at most ``max_chains``.

        That are the segments of its chains and where they end.
        """
        shown, kept = [], []
        for part in x.detach().split(self.max_chains):
            end, segments = run_in_segments(
                self.chain,
                self.energy,
                to_net(part),
                self.config,
                generator=generator,
                length=self.segment,
            )
            shown.append(self._without_noise(end))
            kept.append((segments, end))
        return to_pixels(torch.cat(shown)), kept

    def pull_back(self, v: Tensor, kept: list[tuple[list[Segment], Tensor]]) -> Tensor:
        """v^T d(purified)/dx, (N,C,H,W); to net range and back again, scales cancel."""
        energy = self.energy
        if self.gradient == "smoothed":
            energy = smoothed(energy, self.softness)
        pulled = []
        for part, (segments, end) in zip(v.split(self.max_chains), kept, strict=True):
            product = self.product(energy, part, self.config.steps)
            if self.config.denoise:
                part = part - denoising_factor(energy, self.config.tau) * product(end, part)
            pulled.append(
                pull_back(self.chain, self.energy, self.config, segments, part, product=product)
            )
        back = torch.cat(pulled)
        self.chain_moved_gradient |= not torch.equal(back, v)
        self.gradient_came_back |= bool(v.any())
        if self.gradient_came_back and not self.chain_moved_gradient:
            warnings.warn(
                "the exact gradient through this chain is the identity, as in BPDA: its energy is "
                "piecewise linear. Agreement of the two proves nothing; use gradient='smoothed'",
                stacklevel=2,
            )
        return back

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

    def _purified(self, copies: Tensor, generator: Generator | None) -> Tensor:
        """Purified pixels whose gradient is the mode's."""
        through = copies.requires_grad and self.gradient != "identity" and self.config.steps > 0
        if not through:
            return straight_through(copies, self.purify(copies, generator=generator))
        generator = generator or self.own_generator(copies.device)
        purified: Tensor = _ThroughChain.apply(copies, self, generator)
        return purified

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

    def forward(self, x: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.replica_logits(x, generator=generator).mean(0)
