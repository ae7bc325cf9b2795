"""The persistent bank: which slots are drawn, which are changed."""

import math

import pytest
import torch

from defense.bank import CompactBank, DataBank, ImageBank, NoisyImages


def test_only_drawn_slots_change_and_each_chain_returns_to_its_own(seeded) -> None:
    bank = ImageBank(torch.arange(20.0).view(20, 1, 1, 1).repeat(1, 1, 2, 2))
    before = bank.states.clone()
    slots, states = bank.draw(6, generator=seeded())
    assert torch.equal(states, before[slots])
    states += 100
    assert torch.equal(bank.states, before)
    bank.write(slots, states)
    others = [slot for slot in range(20) if slot not in slots.tolist()]
    assert torch.equal(bank.states[slots], before[slots] + 100)
    assert torch.equal(bank.states[others], before[others])


def test_drawn_slots_are_distinct_and_every_slot_has_its_turn(seeded) -> None:
    bank, generator, times = ImageBank(torch.zeros(10, 1, 2, 2)), seeded(), torch.zeros(10)
    for _ in range(1000):
        slots, states = bank.draw(3, generator=generator)
        assert len(set(slots.tolist())) == len(states) == 3
        times[slots] += 1
    assert ((times - 300).abs() < 5 * math.sqrt(1000 * 0.3 * 0.7)).all()


def test_the_whole_bank_can_be_drawn(seeded) -> None:
    slots, _ = ImageBank(torch.zeros(10, 1, 2, 2)).draw(10, generator=seeded())
    assert sorted(slots.tolist()) == list(range(10))


def test_it_starts_as_uniform_noise_in_net_range(seeded) -> None:
    states = ImageBank.uniform((100, 3, 10, 10), generator=seeded()).states.double()
    count = states.numel()
    assert states.shape == (100, 3, 10, 10)
    assert -1 <= states.min() < -0.999
    assert 0.999 < states.max() <= 1
    assert abs(states.mean().item()) < 5 * math.sqrt(1 / 3 / count)
    assert abs(states.square().mean().item() - 1 / 3) < 5 * math.sqrt(4 / 45 / count)


def test_the_generator_alone_decides(seeded) -> None:
    before = torch.get_rng_state()
    banks = [ImageBank.uniform((4, 1, 2, 2), generator=seeded(s)) for s in (1, 1, 2)]
    slots = [banks[0].draw(4, generator=seeded(s))[0].tolist() for s in (1, 1)]
    assert torch.equal(banks[0].states, banks[1].states)
    assert not torch.equal(banks[0].states, banks[2].states)
    assert slots[0] == slots[1]
    assert torch.equal(torch.get_rng_state(), before)


def compact(count: int, seeded) -> tuple[torch.Tensor, CompactBank]:
    states = torch.randn(count, 3, 8, 8, generator=seeded(1)) * torch.linspace(0.1, 3, count).view(
        -1, 1, 1, 1
    )
    return states, CompactBank(states.clone())


def test_a_compact_bank_is_within_half_a_level_of_what_was_written(seeded) -> None:
    states, bank = compact(50, seeded)
    kept = bank.read(torch.arange(50))
    low, high = (end.view(-1, 1, 1, 1) for end in states.flatten(1).aminmax(dim=1))
    assert ((kept - states).abs() <= 0.501 * (high - low) / 255).all()
    assert kept.flatten(1).amin(1).equal(low.flatten())
    error = kept - states
    assert abs(error.mean()) < 5 * error.std() / error.numel() ** 0.5, "rounding has no bias"


def test_writing_to_a_compact_bank_changes_nothing_else(seeded) -> None:
    _, bank = compact(20, seeded)
    before = bank.read(torch.arange(20))
    slots, drawn = bank.draw(6, generator=seeded())
    bank.write(slots, drawn + 1)
    others = [slot for slot in range(20) if slot not in slots.tolist()]
    assert bank.read(torch.tensor(others)).equal(before[others])
    torch.testing.assert_close(bank.read(slots), before[slots] + 1, atol=1e-5, rtol=0)


def test_a_compact_bank_takes_a_quarter(seeded) -> None:
    def size(bank: ImageBank) -> int:
        return sum(value.nbytes for value in bank.state_dict().values())

    states, bank = compact(50, seeded)
    assert 0.25 < size(bank) / size(ImageBank(states)) < 0.27


def test_a_state_without_contrast_is_kept(seeded) -> None:
    states = torch.tensor([0.3, -2.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4).contiguous()
    assert CompactBank(states).read(torch.arange(2)).equal(states)


def test_a_compact_bank_goes_on_from_a_file(seeded) -> None:
    _, bank = compact(10, seeded)
    other = CompactBank(torch.zeros(10, 3, 8, 8))
    other.load_state_dict(bank.state_dict())
    again = CompactBank.from_state_dict(bank.state_dict())
    for copy in (other, again):
        assert copy.read(torch.arange(10)).equal(bank.read(torch.arange(10)))
    with pytest.raises(ValueError, match=r"bank: expected \(9, 3, 8, 8\)"):
        CompactBank(torch.zeros(9, 3, 8, 8)).load_state_dict(bank.state_dict())


def test_chains_from_a_compact_bank_settle_where_others_do(seeded) -> None:
    """The known variance of a quadratic well, after as many writes as a training makes."""
    tau, curvature = 0.1, 0.02  # x' = (1 - c) x + tau z has variance tau^2 / (1 - (1 - c)^2)
    expected = tau**2 / (1 - (1 - curvature) ** 2)
    generator = seeded(3)
    bank = CompactBank(torch.randn(200, 1, 8, 8, generator=generator) * expected**0.5)
    for _ in range(2000):
        slots, x = bank.draw(50, generator=generator)
        for _ in range(4):
            x = x - curvature * x + tau * torch.randn(x.shape, generator=generator)
        bank.write(slots, x)
    x = bank.read(torch.arange(200)).double()
    error = expected * (2 / x.numel()) ** 0.5
    assert abs(x.square().mean() - expected) < 5 * error
    assert abs(x.mean()) < 5 * (expected / x.numel()) ** 0.5


def ramps(count: int) -> torch.Tensor:
    """Images (count,1,4,4) that are dark on the left, each of its own brightness."""
    ramp = torch.linspace(-0.5, 0.5, 4).expand(1, 4, 4)
    return ramp + torch.arange(count).view(-1, 1, 1, 1)


def test_noisy_images_are_the_images_with_noise_of_their_size(seeded) -> None:
    images = ramps(3)
    data = NoisyImages(images, 0.2)
    noise = data.at(torch.tensor([2] * 2000), generator=seeded()) - images[2]
    assert abs(noise.mean()) < 5 * 0.2 / noise.numel() ** 0.5
    assert noise.std() == pytest.approx(0.2, rel=0.02)
    assert not torch.equal(noise[0], noise[1])


def test_every_place_has_its_turn_and_the_second_half_is_mirrored(seeded) -> None:
    images, generator = ramps(3), seeded()
    data = NoisyImages(images, 0.0, mirror=True)
    places = data.places(6000, generator=generator)
    assert ((places.bincount(minlength=6) - 1000).abs() < 5 * (6000 / 6 * 5 / 6) ** 0.5).all()
    drawn = data.at(torch.tensor([1, 4]), generator=generator)
    assert torch.equal(drawn[0], images[1])
    assert torch.equal(drawn[1], images[1].flip(2))
    assert set(NoisyImages(images, 0.0).places(200, generator=generator).tolist()) == {0, 1, 2}


def test_chains_start_at_their_origin_and_start_anew_when_they_are_old(seeded) -> None:
    data, generator = NoisyImages(ramps(50), 0.0), seeded()
    bank = DataBank(data, 30, 4, generator=generator)
    slots = torch.arange(30)
    torch.testing.assert_close(bank.read(slots), data.images[bank.origins], atol=1e-2, rtol=0)
    assert set(bank.visits.tolist()) == {0, 1, 2, 3}, "of all ages from the start"
    for _ in range(40):
        old = bank.visits.clone()
        origins = bank.origins.clone()
        slots, states = bank.draw(10, generator=generator)
        renewed = old[slots] >= 4
        assert torch.equal(bank.visits[slots], torch.where(renewed, 0, old[slots]))
        kept = ~renewed
        assert torch.equal(bank.origins[slots[kept]], origins[slots[kept]])
        torch.testing.assert_close(
            states[renewed], data.images[bank.origins[slots[renewed]]], atol=1e-6, rtol=0
        )
        bank.write(slots, states + 0.01)
        torch.testing.assert_close(bank.read(slots), states + 0.01, atol=1e-2, rtol=0)
    assert bank.visits.max() <= 4


def test_chains_without_a_life_stay(seeded) -> None:
    bank = DataBank(NoisyImages(ramps(50), 0.0), 5, None, generator=seeded())
    origins = bank.origins.clone()
    for _ in range(20):
        slots, states = bank.draw(5, generator=seeded())
        bank.write(slots, states)
    assert torch.equal(bank.origins, origins)


def test_a_data_bank_goes_on_from_a_file(seeded) -> None:
    data = NoisyImages(ramps(50), 0.1)
    bank, other = (DataBank(data, 8, 3, generator=seeded(s)) for s in (1, 2))
    other.load_state_dict(bank.state_dict())
    first, second = (b.draw(4, generator=seeded(5)) for b in (bank, other))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("count", "life", "said"), [(0, 3, "count"), (4, 0, "life")])
def test_impossible_banks_are_refused(seeded, count: int, life: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}: expected >= 1"):
        DataBank(NoisyImages(ramps(3), 0.1), count, life, generator=seeded())
