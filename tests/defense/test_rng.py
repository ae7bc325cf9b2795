"""One seed and a purpose make one stream."""

import itertools

import torch

from defense.rng import make_generator


def first_numbers(*key: str | int) -> tuple[float, ...]:
    return tuple(torch.rand(4, generator=make_generator(*key)).tolist())


def test_the_same_key_gives_the_same_numbers() -> None:
    assert first_numbers(0, "attack", "digits", 3) == first_numbers(0, "attack", "digits", 3)


def test_every_part_of_the_key_counts() -> None:
    keys = [(0,), (1,), (0, "attack"), (0, "attack", 1), (0, "attack", 2), (0, 1, "attack")]
    streams = [first_numbers(*key) for key in keys]
    assert all(a != b for a, b in itertools.combinations(streams, 2))


def test_the_stream_is_the_same_in_every_process() -> None:
    assert make_generator(0, "attack").initial_seed() == 6961199328643425381


def test_the_global_stream_is_left_alone() -> None:
    before = torch.get_rng_state()
    first_numbers(0, "attack")
    assert torch.equal(torch.get_rng_state(), before)
