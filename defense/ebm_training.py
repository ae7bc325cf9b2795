"""Training of the energy, Algorithm 2 of Hill et al. (2021).

Four options beyond the paper make training cheaper, each off by default: coupled pairs, a learning
rate that decays to zero, averaged weights, and (in `defense.bank`) chains that start at data.
docs/method.md says what each is good for.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel

from defense.bank import DataBank, ImageBank, NoisyImages
from defense.fast.precision import Precision, arithmetic, check_precision
from defense.langevin import Chain, ChainLog, LangevinConfig, langevin


@dataclass(frozen=True)
class EBMTrainConfig:
    """One phase of Algorithm 2. All lengths are in net-range units.

    The network returns f = (tau^2 / 2) U. Adam and SGD both get the gradient of U. The SGD rate is
    multiplied by tau^2 / 2, so that an update moves the weights by ``learning_rate`` times the
    gradient of f, the authors' scaling.

    ``falls_over``: number of updates over which the rate decays to zero along half a cosine; None
    keeps it constant. ``coupled``: the data of a batch are the images from which its chains once
    started, so that most of the variation between images cancels in the energy gap; it needs a
    `DataBank`. ``average``: decay of an exponential moving average of the weights; 0 for none.
    """

    optimizer: Literal["adam", "sgd"]
    learning_rate: float
    batch: int
    langevin: LangevinConfig
    precision: Precision  # of the weights' gradient; the chain has its own
    falls_over: int | None = None
    coupled: bool = False
    average: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer: expected adam or sgd, got {self.optimizer!r}")
        if self.batch < 1:
            raise ValueError(f"batch: expected >= 1, got {self.batch}")
        check_precision(self.precision)
        if self.langevin.tau == 0:
            raise ValueError("langevin.tau: expected > 0, got 0")
        if self.falls_over is not None and self.falls_over < 1:
            raise ValueError(f"falls_over: expected >= 1 or None, got {self.falls_over}")
        if not 0.0 <= self.average < 1.0:
            raise ValueError(f"average: expected in [0, 1), got {self.average}")

    def rate(self, updates: int) -> float:
        """The learning rate after ``updates`` updates."""
        if self.falls_over is None:
            return self.learning_rate
        done = min(1.0, updates / self.falls_over)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class UpdateStats:
    """Training diagnostics, both on the device: reading one waits for the GPU, so read rarely."""

    energy_gap: Tensor  # mean U(data) - mean U(chains); hovers around 0 when all is well
    gradient_norm: Tensor  # l_2 norm of df/dx, mean over the chains and their steps


class EBMTrainer:
    """Trains ``energy`` in place on ``data`` against the chains of a persistent ``bank``.

    `trained` is the result: the averaged weights if there is an average.
    """

    def __init__(
        self,
        energy: nn.Module,
        data: NoisyImages,
        bank: ImageBank,
        config: EBMTrainConfig,
        *,
        generator: Generator,
        chain: Chain = langevin,
    ) -> None:
        self.energy = energy
        if config.coupled and not isinstance(bank, DataBank):
            raise ValueError("coupled: expected a bank of chains that start at data (DataBank)")
        self.data = data
        self.bank = bank
        self.config = config
        self.generator = generator
        self.chain = chain
        self.batches_done = 0
        self.half_tau2 = 0.5 * config.langevin.tau**2
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "adam":
            self.optimizer = torch.optim.Adam(energy.parameters(), fused=True)
        else:
            self.optimizer = torch.optim.SGD(energy.parameters())
        self.average = AveragedModel(energy, avg_fn=self._average) if config.average else None

    @property
    def trained(self) -> nn.Module:
        """The trained energy: the averaged weights if ``average`` is on, else the current ones."""
        trained: nn.Module = self.average.module if self.average else self.energy
        return trained

    def update(self) -> UpdateStats:
        """One update of Algorithm 2: noisy data against persistent chains, one optimizer step."""
        config, generator = self.config, self.generator

        # 1. Data X+ with Gaussian noise of size tau_data, and chains from the bank.
        if config.coupled:
            slots, states = self.bank.draw(config.batch, generator=generator)
            places = cast(DataBank, self.bank).origins[slots]
            data = self.data.at(places, generator=generator)
        else:
            data = self.data.at(
                self.data.places(config.batch, generator=generator), generator=generator
            )
            slots, states = self.bank.draw(config.batch, generator=generator)

        # 2. K more Langevin steps give the samples X-, which go back into the bank.
        log = ChainLog()
        states = self.chain(self.energy, states, config.langevin, generator=generator, log=log)
        self.bank.write(slots, states)

        # 3. The gradient of the energy gap is equation (2). One pass computes both means.
        both = torch.cat([data, states]).contiguous(memory_format=torch.channels_last)
        with arithmetic(config.precision, both.device):
            data_energies, chain_energies = self.energy(both).float().chunk(2)
            energy_gap = (data_energies.mean() - chain_energies.mean()) / self.half_tau2
            self.optimizer.zero_grad(set_to_none=True)
            energy_gap.backward()
        self._set_rate()
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.energy)

        self.batches_done += 1
        return UpdateStats(energy_gap.detach(), log.mean_gradient_norm())

    def _average(self, mean: Tensor, now: Tensor, updates: Tensor | int) -> Tensor:
        """The next average of a weight. The decay starts low, so that early weights fade faster."""
        decay = min(self.config.average, float((1 + updates) / (10 + updates)))
        return torch.lerp(mean, now, 1.0 - decay)

    def _set_rate(self) -> None:
        """Set the learning rate of this update; for SGD times tau^2 / 2."""
        rate = self.config.rate(self.batches_done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.config.optimizer == "adam" else rate * self.half_tau2

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume the same run exactly; on a GPU up to rounding."""
        average = {"average": self.average.state_dict()} if self.average else {}
        return {
            **average,
            "energy": self.energy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bank": self.bank.state_dict(),
            "generator": self.generator.get_state(),
            "batches_done": self.batches_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` saved, into a trainer made with the same arguments."""
        self.energy.load_state_dict(state["energy"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.bank.load_state_dict(state["bank"])
        self.generator.set_state(state["generator"])
        self.batches_done = state["batches_done"]
