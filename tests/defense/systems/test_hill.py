"""The defense of the paper as a system: the same purifier as `LangevinPurifier`."""

import torch

from defense.energy import ConvEnergy
from defense.inference import freeze
from defense.langevin import LangevinConfig
from defense.purifier import LangevinPurifier
from defense.rng import make_generator
from defense.systems.hill import Hill


def test_it_is_the_langevin_purifier() -> None:
    torch.manual_seed(0)
    energy = freeze(ConvEnergy(image_size=8, channels=1, width=4, activation="silu", sigma=0.1))
    x = torch.rand(3, 1, 8, 8)
    found = Hill(softness=None, steps=5, tau=0.05, denoise=True).purifier(energy)
    plain = LangevinPurifier(energy, LangevinConfig(5, 0.05, denoise=True))
    torch.testing.assert_close(
        found(x, generator=make_generator(0)), plain(x, generator=make_generator(0))
    )
    one, other = (
        purifier.with_way_back(x, generator=make_generator(1))[1](torch.ones_like(x))
        for purifier in (found, plain)
    )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
