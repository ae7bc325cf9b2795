"""The persistent image bank of Algorithm 2: the states of all training chains."""

import torch
from torch import Generator, Tensor


class ImageBank:
    """Chain states (M,C,H,W) in net range, never clipped; a drawn chain returns to its own slot."""

    def __init__(self, states: Tensor) -> None:
        self.states = states

    @classmethod
    def uniform(cls, shape: torch.Size | tuple[int, ...], *, generator: Generator) -> "ImageBank":
        """The bank's start: uniform noise in [-1, 1], on the generator's device (Algorithm 2)."""
        return cls(2.0 * torch.rand(shape, generator=generator, device=generator.device) - 1.0)

    def draw(self, count: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
        """``count`` distinct slots (n,) and their states (n,C,H,W)."""
        if count > len(self.states):
            raise ValueError(f"count: expected <= {len(self.states)}, got {count}")
        order = torch.randperm(len(self.states), generator=generator, device=generator.device)
        slots = order[:count]
        return slots, self.states[slots]

    def write(self, slots: Tensor, states: Tensor) -> None:
        """Put states (n,C,H,W) back into the slots that they came from."""
        self.states[slots] = states
