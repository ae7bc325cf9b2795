"""An active test of an attack: can it find an adversarial point that is known to exist?

The test of Zimmermann, Brendel, Tramer & Carlini (2022); of the thirteen published evaluations that
they tested, eleven failed it. A binary readout replaces the classifier's last layer. It predicts
class 1 at one planted point on the boundary of the ball, and class 0 at the image and at random
points of the ball. The attack starts from the image, with label 0. If it finds class 1 for fewer
than `BELIEVED` of the images, its failure to break a defense says little.
The defense around the readout is unchanged and keeps its noise; the caller seeds it per image:

    planted = plant(classifier, make_defense, x, config, generator=generator)
    run_attack(make_surrogate(planted.readout), make_target(planted.readout), x, zeros, ...)
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from defense.eot import EOTDefense
from defense.inference import freeze
from defense.threat import ThreatModel
from defense.verdict import SEQUENTIAL, Sequential, wrong

BELIEVED = 0.95
"""Smallest share of the planted points that a sufficiently strong attack finds."""

GAIN = 10.0
"""How far the readout's logit margin rises from the inner points to the planted one.

Small enough that the gradient of the cross-entropy does not vanish.
"""

MakeDefense = Callable[[nn.Module, str], EOTDefense]
"""A network (features or readout) and the purpose of the noise -> a defense, H_def replicas."""


@dataclass(frozen=True)
class PlantConfig:
    """How to plant a point in the ball ``threat``.

    Class 0 is ``inner_points`` random points within ``inner_share`` of the radius, one replica
    each. The decision threshold lies ``sureness`` standard errors of the target's mean logits
    below the planted point, and at least 1 - ``closeness`` of the way back to the inner points.
    ``replicas`` of the planted point fit the readout, with a covariance shrunk towards the identity
    by ``ridge``; as many more set the threshold. If more than ``random_share`` of ``random_points``
    in the whole ball are class 1, the test is too easy and is rejected; ``sequential`` may stop the
    verdicts on these points early.
    """

    threat: ThreatModel
    inner_points: int = 1024
    inner_share: float = 0.95
    replicas: int = 1024
    ridge: float = 0.1
    sureness: float = 4.0
    closeness: float = 0.99
    random_points: int = 100
    random_share: float = 0.05
    sequential: Sequential = SEQUENTIAL

    def __post_init__(self) -> None:
        for name, low, high in (
            ("inner_points", 2, torch.inf),
            ("inner_share", 0.0, 1.0),
            ("replicas", 2, torch.inf),
            ("ridge", 1e-6, 1.0),
            ("closeness", 0.5, 1.0),
            ("random_points", 1, torch.inf),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Planted:
    """A test that is known to have a solution."""

    readout: nn.Module  # pixels (B,C,H,W) in [0, 1] -> 2 logits
    planted: Tensor  # (1,C,H,W) pixels in the ball and in [0, 1]; the target says 1
    random_hits: float  # share of random points of the ball that the target calls 1
    errors: float  # gap from inner to planted points, in standard errors of the target's mean


def last_linear(classifier: nn.Module) -> str:
    """Name of the last nn.Linear, in the order in which the modules are registered."""
    last = ""
    for name, module in classifier.named_modules():
        last = name if isinstance(module, nn.Linear) else last
    if not last:
        raise ValueError("classifier: expected one with an nn.Linear inside")
    return last


def features_of(classifier: nn.Module) -> nn.Module:
    """A frozen copy that ends before the last nn.Linear: pixels (B,C,H,W) -> features (B,D)."""
    features = copy.deepcopy(classifier)
    features.set_submodule(last_linear(classifier), nn.Identity())
    return freeze(features)


def edge_point(threat: ThreatModel, x: Tensor, *, generator: Generator) -> Tensor:
    """A random corner of the l_inf ball or point of the l_2 sphere around x, clipped to [0, 1]."""
    direction = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return threat.project(threat.ascend(x, direction, threat.eps_255), x)


def direction_between(inner: Tensor, planted: Tensor, ridge: float) -> Tensor:
    """Fisher's discriminant (D,), with ridge, from ``inner`` (M,D) to mean ``planted`` (D,).

    The covariance is that of the standardized inner features. A constant feature has weight zero.
    """
    spread = inner.std(0)
    spread = torch.where(spread > 1e-6 * spread.amax(), spread, torch.inf)
    z, gap = (inner - inner.mean(0)) / spread, (planted - inner.mean(0)) / spread
    covariance = (1.0 - ridge) * z.T @ z / (len(z) - 1) + ridge * torch.eye(len(gap)).to(z)
    weights: Tensor = torch.linalg.solve(covariance, gap) / spread
    return weights


@torch.no_grad()
def plant(
    classifier: nn.Module,
    make_defense: MakeDefense,
    x: Tensor,
    config: PlantConfig,
    *,
    generator: Generator,
) -> Planted | None:
    """Plant a point around x (1,C,H,W) in [0, 1]; None if the target does not confirm it.

    The target confirms it by predicting 1 at the planted point, 0 at x, and 1 for no more than
    ``config.random_share`` of random points of the ball. `ValueError` if the classifier's last
    nn.Linear does not compute its logits.
    """
    features, head = features_of(classifier), classifier.get_submodule(last_linear(classifier))
    if not torch.allclose(head(features(x)), classifier(x), atol=1e-4):
        raise ValueError("classifier: expected one whose last nn.Linear makes the logits")
    threat, defense = config.threat, make_defense(features, "plant")
    smaller = replace(threat, eps_255=config.inner_share * threat.eps_255)
    hidden = edge_point(threat, x, generator=generator)
    around = x.expand(config.inner_points, -1, -1, -1)
    points = smaller.random_point(around, generator=generator)

    # Features of single replicas. Half of the planted point's fit w; the other half, which w has
    # not seen, sets the threshold.
    inner = defense.replica_logits(points, replicas=1)[0].double()
    planted_features = defense.replica_logits(hidden, replicas=2 * config.replicas)[:, 0].double()
    fit, fresh = planted_features.split(config.replicas)
    w = direction_between(inner, fit.mean(0), config.ridge)
    low, high = inner @ w, fresh @ w
    reach = float(high.mean() - low.mean())
    error = float(high.std(correction=0)) / defense.replicas**0.5
    back = max(config.sureness * error, (1.0 - config.closeness) * reach)
    if not reach > 2.0 * back:
        return None

    decision = high.mean() - back
    linear = skip_init(nn.Linear, len(w), 2, device=x.device, dtype=x.dtype)
    # Margin z_1 - z_0 = GAIN (w f - decision) / reach: it rises by GAIN over ``reach``.
    linear.weight.copy_(0.5 * GAIN / reach * torch.stack([-w, w]))
    linear.bias.copy_(0.5 * GAIN / reach * torch.stack([decision, -decision]))
    readout = freeze(nn.Sequential(features, linear))

    target = make_defense(readout, "verify")
    balls = threat.random_point(x.expand(config.random_points, -1, -1, -1), generator=generator)
    zeros = torch.zeros(len(balls), dtype=torch.int64, device=x.device)
    hits = wrong(target, balls, zeros, config.sequential)
    found = wrong(target, torch.cat([hidden, x]), zeros.new_zeros(2))
    random_hits = float(hits.double().mean())
    if found.tolist() != [True, False] or random_hits > config.random_share:
        return None
    return Planted(readout, hidden, random_hits, reach / error if error else torch.inf)
