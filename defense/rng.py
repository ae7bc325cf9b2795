"""Random generators: one for each seed and purpose."""

import hashlib

import torch
from torch import Generator


def make_generator(
    seed: int | str, *purpose: str | int, device: torch.device | str = "cpu"
) -> Generator:
    """A fresh generator that depends only on the seed and on what the numbers are for.

    ``make_generator(0, "attack", "digits", 3)`` is the same stream in every process and in any
    order of calls, so that a shard can be repeated or resumed alone. The global stream is left
    untouched.
    """
    key = repr((seed, *purpose)).encode()
    generator = Generator(device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8]) >> 1)
    return generator
