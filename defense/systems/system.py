"""What a system is: a defense that purifies images before a classifier sees them."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from defense.purifier import Purifier


@dataclass(frozen=True)
class Fit:
    """``updates`` of Adam, on random batches of ``batch`` images.

    The rate falls from ``learning_rate`` to zero along half a cosine.
    """

    updates: int
    batch: int
    learning_rate: float

    def __post_init__(self) -> None:
        for name in ("updates", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected > 0, got {self.learning_rate}")


@dataclass(frozen=True)
class System:
    """One defense. The fields of a subclass are its settings.

    A subclass states who proposed it and overrides `purifier`. If a network is to be trained, it
    has a field ``fit`` and overrides `network` and `loss`; if that network is the classifier,
    `classifier`, too.
    """

    title: ClassVar[str]
    source: ClassVar[str]  # authors and year, as in the rows of Tables 1-3
    own_attack: ClassVar[str]  # the strongest of its own paper that the suite has; "": none

    @property
    def training(self) -> Fit | None:
        """How its network is trained; None if it has none, or takes it as it is."""
        fit: Fit | None = getattr(self, "fit", None)
        return fit

    def network(self, shape: tuple[int, int, int], bare: nn.Module) -> nn.Module | None:
        """The network before its training, for images of (C,H,W); ``bare`` is the classifier."""
        return None

    def loss(
        self, network: Any, bare: nn.Module, x: Tensor, y: Tensor, *, generator: Generator
    ) -> Tensor:
        """The loss (scalar) of a batch of pixels x (B,C,H,W) with labels y (B,)."""
        raise NotImplementedError

    def classifier(self, bare: nn.Module, network: Any) -> nn.Module:
        """The classifier that sees the purified images."""
        return bare

    def purifier(self, network: Any) -> Purifier:
        """The purifier, with its trained network."""
        raise NotImplementedError


class Trainer:
    """Trains a system's network in place, on pixels x (N,C,H,W) and labels y (N,).

    ``bare`` is the classifier to be defended, frozen; ``fit`` is ``system.training``.
    """

    def __init__(
        self,
        system: System,
        fit: Fit,
        network: nn.Module,
        bare: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generator,
    ) -> None:
        self.system, self.fit, self.network, self.bare = system, fit, network, bare
        self.x, self.y, self.generator = x, y, generator
        network.train().requires_grad_(True)
        self.adam = torch.optim.Adam(network.parameters(), lr=fit.learning_rate)
        self.falling = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, fit.updates)
        self.done = 0  # updates

    def step(self) -> float:
        """One update; returns its loss."""
        count, device = self.fit.batch, self.x.device
        picked = torch.randint(len(self.x), (count,), generator=self.generator, device=device)
        loss = self.system.loss(
            self.network, self.bare, self.x[picked], self.y[picked], generator=self.generator
        )
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.adam.step()
        self.falling.step()
        self.done += 1
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume the same training."""
        return {
            "network": self.network.state_dict(),
            "adam": self.adam.state_dict(),
            "falling": self.falling.state_dict(),
            "generator": self.generator.get_state(),
            "done": self.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, into a trainer made with the same arguments."""
        self.network.load_state_dict(state["network"])
        self.adam.load_state_dict(state["adam"])
        self.falling.load_state_dict(state["falling"])
        self.generator.set_state(state["generator"])
        self.done = state["done"]


@dataclass(frozen=True)
class RetrainedSystem(System):
    """A system whose network is the classifier, trained further on what its purifier returns.

    With ``fit`` None the bare classifier stays as it is.
    """

    fit: Fit | None

    def network(self, shape: tuple[int, int, int], bare: nn.Module) -> nn.Module | None:
        return copy.deepcopy(bare) if self.fit else None

    def loss(
        self, network: Any, bare: nn.Module, x: Tensor, y: Tensor, *, generator: Generator
    ) -> Tensor:
        with torch.no_grad():
            purified = self.purifier(None)(x, generator=generator)
        return nn.functional.cross_entropy(network(purified), y)

    def classifier(self, bare: nn.Module, network: Any) -> nn.Module:
        return bare if network is None else network
