"""The persistent bank: which slots are drawn, which are changed."""

import math

import torch

from defense.bank import ImageBank


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
