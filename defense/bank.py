"""The data and the chains that Algorithm 2 compares: noisy images, and the persistent bank."""

from typing import Self

import torch
from torch import Generator, Tensor


class NoisyImages:
    """Training images (M,C,H,W) in net range plus Gaussian noise, as Algorithm 2 uses them.

    Every read draws fresh noise of standard deviation ``sigma`` (tau_data in Algorithm 2). A place
    is an index, 0 to M - 1; with ``mirror`` 0 to 2M - 1, the second half being horizontal flips.
    """

    def __init__(self, images: Tensor, sigma: float, *, mirror: bool = False) -> None:
        self.images = images
        self.sigma = sigma
        self.mirror = mirror

    def places(self, count: int, *, generator: Generator) -> Tensor:
        """Indices (n,) int64, drawn uniformly with replacement."""
        there = len(self.images) * (2 if self.mirror else 1)
        return torch.randint(there, (count,), generator=generator, device=self.images.device)

    def clean(self, places: Tensor) -> Tensor:
        """The images (n,C,H,W) at indices ``places`` (n,), without noise."""
        clean = self.images[places % len(self.images)]
        mirrored = (places >= len(self.images)).view(-1, 1, 1, 1)
        return torch.where(mirrored, clean.flip(3), clean) if mirrored.any() else clean

    def at(self, places: Tensor, *, generator: Generator) -> Tensor:
        """Noisy images (n,C,H,W) at indices ``places`` (n,)."""
        clean = self.clean(places)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        return clean + self.sigma * noise


class ImageBank:
    """Chain states (M,C,H,W) in net range, never clipped; a drawn chain returns to its own slot."""

    def __init__(self, states: Tensor) -> None:
        self.states = states

    @classmethod
    def uniform(cls, shape: torch.Size | tuple[int, ...], *, generator: Generator) -> Self:
        """The bank's start: uniform noise in [-1, 1], on the generator's device (Algorithm 2)."""
        return cls(2.0 * torch.rand(shape, generator=generator, device=generator.device) - 1.0)

    def __len__(self) -> int:
        return len(self.states)

    def draw(self, count: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
        """``count`` distinct slots (n,) and their states (n,C,H,W)."""
        if count > len(self):
            raise ValueError(f"count: expected <= {len(self)}, got {count}")
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        slots = order[:count]
        return slots, self.read(slots)

    def read(self, slots: Tensor) -> Tensor:
        """The states (n,C,H,W) in these slots (n,)."""
        return self.states[slots]

    def write(self, slots: Tensor, states: Tensor) -> None:
        """Put states (n,C,H,W) back into the slots that they came from."""
        self.states[slots] = states

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors to save, by name."""
        return {"states": self.states}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore what `state_dict` saved; `ValueError` if that bank had another size."""
        mine = self.state_dict()
        for name, value in mine.items():
            if saved[name].shape != value.shape:
                raise ValueError(f"bank: expected {tuple(value.shape)}, got {saved[name].shape}")
        for name, value in mine.items():
            value.copy_(saved[name])


class CompactBank(ImageBank):
    """An `ImageBank` with 8 bits per value: a quarter of the memory, and of every checkpoint.

    Each state has its own 256 levels between its minimum and maximum. A write rounds by at most
    half a level, about 0.004 for an image that spans [-1, 1]. That is small beside the Langevin
    noise added between two writes, tau sqrt(K), which is 0.1 in the paper.
    """

    def __init__(self, states: Tensor) -> None:
        self.levels = torch.empty_like(states, dtype=torch.uint8)
        self.low, self.step = states.new_empty(2, len(states), 1, 1, 1)
        self.write(torch.arange(len(states), device=states.device), states)

    @classmethod
    def from_state_dict(cls, saved: dict[str, Tensor]) -> Self:
        """The bank whose `state_dict` was saved."""
        bank = cls.__new__(cls)
        bank.levels, bank.low, bank.step = saved["levels"], saved["low"], saved["step"]
        return bank

    def __len__(self) -> int:
        return len(self.levels)

    def read(self, slots: Tensor) -> Tensor:
        return torch.addcmul(self.low[slots], self.step[slots], self.levels[slots].float())

    def write(self, slots: Tensor, states: Tensor) -> None:
        low, high = (end.view(-1, 1, 1, 1) for end in states.flatten(1).aminmax(dim=1))
        step = (high - low) / 255
        levels = ((states - low) / step.clamp_min(1e-12)).round()
        self.levels[slots], self.low[slots], self.step[slots] = levels.to(torch.uint8), low, step

    def state_dict(self) -> dict[str, Tensor]:
        return {"levels": self.levels, "low": self.low, "step": self.step}


class DataBank(CompactBank):
    """Chains from noisy training images; after ``life`` visits each restarts from another image.

    Purification starts at images, not at noise, so only there must the energy be right. A bank of a
    few thousand chains is therefore enough for a training set of any size. With ``life`` None
    chains never restart. Initial ages are uniform, so that every batch has a few young chains.
    """

    def __init__(
        self, data: NoisyImages, count: int, life: int | None, *, generator: Generator
    ) -> None:
        if count < 1:
            raise ValueError(f"count: expected >= 1, got {count}")
        if life is not None and life < 1:
            raise ValueError(f"life: expected >= 1 or None, got {life}")
        self.data = data
        self.life = life
        self.origins = data.places(count, generator=generator)  # (M,) where each chain started
        self.visits = torch.zeros_like(self.origins)
        super().__init__(data.at(self.origins, generator=generator))
        self.visits.random_(0, life or 1, generator=generator)

    def draw(self, count: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
        slots, states = super().draw(count, generator=generator)
        if self.life is None:
            return slots, states
        old = self.visits[slots] >= self.life
        places = self.data.places(count, generator=generator)
        fresh = self.data.at(places, generator=generator)
        self.origins[slots[old]] = places[old]
        self.visits[slots[old]] = 0
        return slots, torch.where(old.view(-1, 1, 1, 1), fresh, states)

    def write(self, slots: Tensor, states: Tensor) -> None:
        super().write(slots, states)
        self.visits[slots] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), "origins": self.origins, "visits": self.visits}
