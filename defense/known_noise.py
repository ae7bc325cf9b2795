"""The upper end of what an attacker can know of a stochastic defense: its noise."""

import torch
from torch import Tensor, nn

from defense.eot import EOTDefense
from defense.rng import make_generator


class KnownNoise(nn.Module):
    """A defense that draws the same noise in every call, so that an attacker can know it.

    Images (B,C,H,W) in [0, 1] -> the mean logits (B, classes) of ``defense``, which is now a
    deterministic function. Every image is purified by itself, with the generator of ``seed`` from
    its beginning, so its noise does not depend on the others in the batch. Use it as surrogate and
    as target: an attack on it then differentiates the very noise by which it is judged.
    """

    def __init__(self, defense: EOTDefense, seed: int | str) -> None:
        super().__init__()
        self.defense = defense
        self.noise_seed = seed

    def forward(self, x: Tensor) -> Tensor:
        logits = [
            self.defense(image, generator=make_generator(self.noise_seed, "known", device=x.device))
            for image in x.split(1)
        ]
        return torch.cat(logits)
