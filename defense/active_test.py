"""Is an attack strong enough to be believed? It has to find what was hidden in the ball.

The active test of Zimmermann, Brendel, Tramer & Carlini (2022), which eleven of the thirteen
published evaluations that they tried failed: the classifier's last layer gives way to a binary
readout that says 1 at one planted point on the edge of the ball, and 0 at the image and at random
points of the ball. An attack that, from (image, label 0), finds a 1 for fewer than `BELIEVED` of
the images says little where it finds nothing.
The defense around the readout stays as it is, noise and all; seeds are the caller's, one per image:

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
"""Share of the planted points that a sufficient attack finds at least."""

GAIN = 10.0
"""The readout's logit difference from inner to planted points: cross-entropy does not vanish."""

MakeDefense = Callable[[nn.Module, str], EOTDefense]
"""Features or readout, and what the noise is for -> the defense around it, H_def replicas."""


@dataclass(frozen=True)
class PlantConfig:
    """How a point is hidden in the ball ``threat``.

    ``inner_points`` random points, one replica each, within ``inner_share`` of the radius are class
    0. The decision lies ``sureness`` standard errors of the target's mean logits before the planted
    point, but at least 1 - ``closeness`` of the way back to the inner points. ``replicas`` of the
    planted point are drawn for the fit, as many for the decision. At most ``random_share`` of
    ``random_points`` of the whole ball may be class 1, or the test would be too easy; verdicts on
    these may be ``sequential``.
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
    errors: float  # standard errors of the target's mean between inner and planted points


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
    """A random corner (l_inf) or point of the sphere (l_2) around x, cut off at the pixel box."""
    direction = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return threat.project(threat.ascend(x, direction, threat.eps_255), x)


def direction_between(inner: Tensor, planted: Tensor, ridge: float) -> Tensor:
    """(D,) along which mean features (D,) stand out most from a cloud (M,D): Fisher's, with ridge.

    The covariance is that of standardized features; a feature that never varies has no weight.
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
    """Hide a point around x (1,C,H,W) in [0, 1]; None if the target does not confirm it.

    Confirmed: the target says 1 at the planted point, 0 at x and at most random points of the ball.
    """
    features, head = features_of(classifier), classifier.get_submodule(last_linear(classifier))
    if not torch.allclose(head(features(x)), classifier(x), atol=1e-4):
        raise ValueError("classifier: expected one whose last nn.Linear makes the logits")
    threat, defense = config.threat, make_defense(features, "plant")
    smaller = replace(threat, eps_255=config.inner_share * threat.eps_255)
    hidden = edge_point(threat, x, generator=generator)
    around = x.expand(config.inner_points, -1, -1, -1)
    points = smaller.random_point(around, generator=generator)

    # Features of single replicas; half of the planted point's for the fit, half for the decision.
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
