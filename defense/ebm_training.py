"""Training of the energy, Algorithm 2 of Hill et al. (2021)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from defense.bank import ImageBank
from defense.langevin import Chain, ChainLog, LangevinConfig, langevin
from defense.precision import Precision, arithmetic, check_precision


@dataclass(frozen=True)
class EBMTrainConfig:
    """One phase of Algorithm 2. All lengths are in net-range units.

    The network returns f = (tau^2 / 2) U. Adam is given the gradient of U, and SGD too, with its
    rate multiplied by tau^2 / 2, so that an SGD update moves the weights by ``learning_rate`` times
    the gradient of f: the authors' scaling.
    """

    optimizer: Literal["adam", "sgd"]
    learning_rate: float
    batch: int
    data_noise: float
    langevin: LangevinConfig
    precision: Precision  # of the weights' gradient; the chain has its own

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer: expected adam or sgd, got {self.optimizer!r}")
        if self.batch < 1:
            raise ValueError(f"batch: expected >= 1, got {self.batch}")
        check_precision(self.precision)
        if self.langevin.tau == 0:
            raise ValueError("langevin.tau: expected > 0, got 0")


@dataclass(frozen=True)
class UpdateStats:
    """What one watches in training, both on the device: read them seldom."""

    energy_gap: Tensor  # mean U(data) - mean U(chains); hovers around 0 when all is well
    gradient_norm: Tensor  # l_2 norm of df/dx, mean over the chains and their steps


class EBMTrainer:
    """Trains ``energy`` in place on ``images`` (M,C,S,S) in net range, with a persistent bank."""

    def __init__(
        self,
        energy: nn.Module,
        images: Tensor,
        bank: ImageBank,
        config: EBMTrainConfig,
        *,
        generator: Generator,
        chain: Chain = langevin,
    ) -> None:
        self.energy = energy
        self.images = images
        self.bank = bank
        self.config = config
        self.generator = generator
        self.chain = chain
        self.batches_done = 0
        self.half_tau2 = 0.5 * config.langevin.tau**2
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "adam":
            self.optimizer = torch.optim.Adam(
                energy.parameters(), lr=config.learning_rate, fused=True
            )
        else:
            scaled = config.learning_rate * self.half_tau2
            self.optimizer = torch.optim.SGD(energy.parameters(), lr=scaled)

    def update(self) -> UpdateStats:
        """One batch: data with noise against persistent chains, one step of the optimizer."""
        config, generator = self.config, self.generator

        # 1. Data X+ with Gaussian noise of size tau_data.
        picks = torch.randint(
            len(self.images), (config.batch,), generator=generator, device=self.images.device
        )
        data = self.images[picks]
        noise = torch.randn(data.shape, generator=generator, device=data.device)
        data = data + config.data_noise * noise

        # 2. Chains X- from the bank, K steps on, and back into the bank.
        slots, states = self.bank.draw(config.batch, generator=generator)
        log = ChainLog()
        states = self.chain(self.energy, states, config.langevin, generator=generator, log=log)
        self.bank.write(slots, states)

        # 3. The maximum-likelihood gradient, equation (2); both means from one pass.
        both = torch.cat([data, states]).contiguous(memory_format=torch.channels_last)
        with arithmetic(config.precision, both.device):
            data_energies, chain_energies = self.energy(both).float().chunk(2)
            energy_gap = (data_energies.mean() - chain_energies.mean()) / self.half_tau2
            self.optimizer.zero_grad(set_to_none=True)
            energy_gap.backward()
        self.optimizer.step()

        self.batches_done += 1
        return UpdateStats(energy_gap.detach(), log.mean_gradient_norm())

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as if never stopped; on a GPU up to rounding."""
        return {
            "energy": self.energy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bank": self.bank.state_dict(),
            "generator": self.generator.get_state(),
            "batches_done": self.batches_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` saved, into a trainer made with the same arguments."""
        self.energy.load_state_dict(state["energy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.bank.load_state_dict(state["bank"])
        self.generator.set_state(state["generator"])
        self.batches_done = state["batches_done"]
