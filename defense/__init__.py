"""Adversarial defense with long-run energy-based models: tensors in, tensors out.

rng, pixels         one generator per purpose; the two pixel ranges
energy              ConvEnergy, the network f(x)
langevin            the chain, equation (3): the plain reference
purifier, through   the purifier interface, the Langevin purifier, and gradients through it
eot                 EOTDefense, the defended classifier, equations (4)-(6)
threat, losses      the ball (7)-(8), the attack losses
attack, plain_attack
                    Algorithm 1 for every rule, loss and gradient; the plain version as printed
verdict             four accuracy metrics, and a sequential test that stops early
bank, ebm_training  noisy data, persistent chains and Algorithm 2, equations (1)-(2)
classifier_training natural and adversarial training of the classifier
inference           frozen networks: evaluation mode, batches, checks of their output

fast/               the chain again, fast: FastLangevin; precision; prepacked CPU kernels
gradient/           gradients through the chain, exact or smoothed; Hessian products
rules/              the update rules: PGD, APGD, Square, noise
nets/               WideResNet; load_energy, load_classifier
systems/            purification defenses of other papers
known_noise         an attacker who knows the defender's noise
studies/            energies along chains, Lyapunov exponents (12)-(13), the FID, planted attacks
"""

from defense.attack import NEVER, AttackConfig, AttackRecord, run_attack, run_transfer
from defense.energy import ConvEnergy
from defense.eot import EOTDefense
from defense.fast.langevin import FastLangevin
from defense.gradient.hessian import written_product
from defense.inference import freeze
from defense.langevin import Chain, LangevinConfig, langevin
from defense.nets.pretrained import load_classifier, load_energy
from defense.nets.wide_resnet import WideResNet
from defense.purifier import LangevinPurifier, Purifier
from defense.threat import ThreatModel
from defense.through import straight_through
from defense.verdict import Replicated, Sequential

__all__ = [
    "NEVER",
    "AttackConfig",
    "AttackRecord",
    "Chain",
    "ConvEnergy",
    "EOTDefense",
    "FastLangevin",
    "LangevinConfig",
    "LangevinPurifier",
    "Purifier",
    "Replicated",
    "Sequential",
    "ThreatModel",
    "WideResNet",
    "freeze",
    "langevin",
    "load_classifier",
    "load_energy",
    "run_attack",
    "run_transfer",
    "straight_through",
    "written_product",
]
