"""The defended classifier: Expectation Over Transformation, equations (4)-(6)."""

from typing import Any, Self

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from defense.langevin import Chain, LangevinConfig, langevin
from defense.pixels import to_net, to_pixels
from defense.rng import make_generator

CLASSIFIER_PIXELS = 512 * 32 * 32
"""Pixels that the classifier sees at once: 512 purified CIFAR images."""


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


class EOTDefense(nn.Module):
    """Mean logits of H purified replicas: F_H(x) = 1/H sum_h f(T_h(x)) (Hill et al. 2021, eq. 5).

    Images (B,C,H,W) in [0, 1] -> logits (B, classes), for any ``classifier`` that maps pixels in
    [0, 1] to logits. ``config.steps = 0`` with ``replicas = 1`` is the classifier itself. The
    gradient of the output is the BPDA+EOT gradient (eq. 10), so an attack that asks a module for
    logits and gradients runs on it as it is.

    The noise comes from the module's own generator, seeded by ``seed`` (a number or a name) and
    advanced by every call: an attack library that re-seeds torch's global stream does not repeat
    it. At most ``max_chains`` chains run at a time; the order of the noise depends on that number,
    so it belongs to a record. An attacker's view and its judge need different seeds.
    """

    def __init__(
        self,
        classifier: nn.Module,
        energy: nn.Module,
        config: LangevinConfig,
        *,
        replicas: int,
        max_chains: int = 2048,
        seed: int | str = 0,
        chain: Chain = langevin,
    ) -> None:
        super().__init__()
        if replicas < 1:
            raise ValueError(f"replicas: expected >= 1, got {replicas}")
        if max_chains < 1:
            raise ValueError(f"max_chains: expected >= 1, got {max_chains}")
        self.classifier = classifier
        self.energy = energy
        self.config = config
        self.replicas = replicas
        self.max_chains = max_chains
        self.seed = seed
        self.chain = chain
        self._generators: dict[str, Generator] = {}
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a defense never updates the classifier's batch statistics."""
        return super().train(False)

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
        parts = [
            self.chain(self.energy, to_net(part), self.config, generator=generator)
            for part in x.detach().split(self.max_chains)
        ]
        return to_pixels(torch.cat(parts))

    def replica_logits(self, x: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Logits of every replica: (B,C,H,W) in [0, 1] -> (replicas, B, classes)."""
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"x: expected images (B,C,H,W), floating, got {tuple(x.shape)} {x.dtype}"
            )
        if x.numel():
            low, high = (float(end) for end in x.detach().aminmax())
            if not -0.01 <= low <= high <= 1.01:
                raise ValueError(f"x: expected pixels in [0, 1], got {low} to {high}")
        copies = x.repeat(self.replicas, 1, 1, 1)
        purified = straight_through(copies, self.purify(copies, generator=generator))
        pieces = purified.split(max(1, CLASSIFIER_PIXELS // x.shape[2:].numel()))
        again = len(pieces) > 1
        logits = torch.cat([self._classify(piece, again=again) for piece in pieces])
        stacked: Tensor = logits.unflatten(0, (self.replicas, len(x)))
        return stacked

    def _classify(self, pixels: Tensor, *, again: bool) -> Tensor:
        """Logits of one piece, one of several if its activations are to be made again.

        Then the memory of a backward pass is that of one piece, whatever the number of replicas.
        """
        if not again or not torch.is_grad_enabled():
            return torch.as_tensor(self.classifier(pixels))
        logits: Tensor = checkpoint(self.classifier, pixels, use_reentrant=False)
        return logits

    def forward(self, x: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.replica_logits(x, generator=generator).mean(0)
