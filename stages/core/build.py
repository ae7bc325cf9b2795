"""What params.yaml describes, as objects of the library: defenses, threat models, attacks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defense.attack import AttackConfig
from defense.energy import ConvEnergy
from defense.eot import EOTDefense
from defense.gradient.chain import GradientMode, MakeProduct, autograd_product
from defense.gradient.hessian import written_product
from defense.inference import flops
from defense.langevin import Chain, LangevinConfig
from defense.threat import ThreatModel
from defense.verdict import Sequential
from stages import StageError
from stages.core.classifiers import load_classifier
from stages.core.energies import Energy, load_energy
from stages.core.engine import choose_chain
from stages.core.hardware import Hardware
from stages.core.params import NamedAttack, Params


@dataclass(frozen=True)
class Nets:
    """A classifier and an energy of one dataset; builds defenses from them.

    ``counted`` wraps every chain, for example to count its steps; the default changes nothing.
    """

    params: Params
    dataset: str
    hardware: Hardware
    classifier: nn.Module
    energy: Energy
    counted: Callable[[Chain], Chain] = lambda chain: chain

    @classmethod
    def load(
        cls,
        params: Params,
        dataset: str,
        hardware: Hardware,
        *,
        classifier: Path,
        energy: Path,
    ) -> "Nets":
        """Load both networks; `StageError` if denoising is on and the energy states no sigma."""
        network = load_energy(params, dataset, hardware, energy)
        if params.langevin.denoise and network.sigma is None:
            raise StageError(
                f"{energy}: does not say the noise (sigma) on its training images, which "
                "langevin.denoise needs; train it again, or set langevin.denoise to false"
            )
        return cls(
            params,
            dataset,
            hardware,
            load_classifier(params, dataset, hardware, classifier),
            network,
        )

    def chain(self, steps: int) -> Chain:
        """What runs chains of so many steps."""
        precision = self.params.langevin.precision
        return self.counted(choose_chain(self.energy, steps, precision, self.hardware))

    def product(self) -> MakeProduct:
        """What makes the Hessian products of gradients through the chain."""
        if not isinstance(self.energy, ConvEnergy):
            return autograd_product
        return partial(written_product, precision=self.params.langevin.precision)

    def cost(self, steps: int, replicas: int) -> float:
        """Operations of one defended prediction, relative to one forward pass of the classifier."""
        data = self.params.dataset(self.dataset)
        x = torch.rand(1, *data.shape.image)
        x = x.to(self.hardware.device)
        once = flops(self.classifier, x, back=False)
        return replicas * (1 + steps * flops(self.energy, x) / once)

    def defense(
        self, steps: int, replicas: int, purpose: str, gradient: GradientMode = "identity"
    ) -> EOTDefense:
        """The defended classifier; every purpose has noise of its own."""
        return EOTDefense(
            self.classifier,
            self.energy,
            LangevinConfig(
                steps, self.params.dataset(self.dataset).tau, self.params.langevin.denoise
            ),
            replicas=replicas,
            max_chains=self.hardware.max_chains,
            seed=f"{self.params.seed}/{self.dataset}/{purpose}",
            chain=self.chain(steps),
            gradient=gradient,
            softness=self.params.evaluate.softness,
            product=self.product(),
        )


def threat(params: Params, scale: float = 1.0) -> ThreatModel:
    """The threat model of the experiment; its radius times ``scale``."""
    return ThreatModel(params.attack.threat.norm, params.attack.threat.eps_255 * scale)


def sequential(params: Params) -> Sequential:
    """The test by which a verdict may stop early."""
    return Sequential(**params.attack.sequential.model_dump())


def attack_config(
    params: Params, steps: int, *, early: bool, ball: ThreatModel | None = None, **options: Any
) -> AttackConfig:
    """An attack of so many steps in the ball of the experiment, or in another ``ball``.

    The length of a step is always the same share of the radius. ``early``: whether verdicts may
    stop early; ``options`` are other fields of `AttackConfig`.
    """
    ball = ball or threat(params)
    return AttackConfig(
        ball,
        steps,
        params.attack.threat.step_share * ball.eps_255,
        sequential=sequential(params),
        early_verdicts=early,
        **options,
    )


def named_attack(params: Params, named: NamedAttack, *, early: bool) -> AttackConfig:
    """One of evaluate.attacks, or BPDA+EOT (`Params.named`)."""
    return attack_config(
        params,
        named.steps,
        early=early,
        ball=threat(params, named.scale),
        restarts=named.restarts,
        stop_at_break=named.stop_at_break,
        rule=named.rule,
        loss=named.loss,
    )
