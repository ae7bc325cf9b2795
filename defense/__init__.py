"""Adversarial defense with long-run energy-based models: tensors in, tensors out.

rng, pixels         one generator per purpose; the two pixel ranges
energy, classifier  the networks: ConvEnergy, WideResNet
langevin            the chain, equation (3): the plain reference
written_gradient, compiled
                    the same call, fast: FastLangevin
chain_gradient, written_hessian
                    gradients through the chain, exact or smoothed; plain and fast
purifier, through   the purifier interface, the Langevin purifier, and gradients through it
eot                 EOTDefense, the defended classifier, equations (4)-(6)
threat, losses, step_rules
                    the ball (7)-(8), the attack losses, the update rules (PGD, APGD, Square)
verdict             four accuracy metrics, and a sequential test that stops early
attack, plain_attack
                    Algorithm 1 for every rule, loss and gradient; the plain version as printed
active_test         can an attack find an adversarial point that is known to exist?
bank, ebm_training  noisy data, persistent chains and Algorithm 2, equations (1)-(2)
classifier_training natural training of the classifier
inference           frozen networks: evaluation mode, batches, checks of their output
pretrained          load_energy, load_classifier: trained networks from their files
diagnostics         states along chains, and their energies
lyapunov, frechet   Lyapunov exponents, equations (12)-(13); the FID
precision, onednn   float32, tf32 or bfloat16; prepacked CPU kernels
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
