"""The active test: what is planted is there, a capable attack finds it and a crippled one does not.

The nets have random weights, and chains of few steps: what matters is that features follow pixels.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor, nn

from defense.attack import NEVER, AttackConfig, run_attack
from defense.energy import ConvEnergy
from defense.eot import EOTDefense
from defense.inference import freeze
from defense.langevin import LangevinConfig
from defense.nets.wide_resnet import WideResNet
from defense.studies.active_test import (
    GAIN,
    PlantConfig,
    Planted,
    direction_between,
    edge_point,
    features_of,
    plant,
)
from defense.threat import ThreatModel
from defense.verdict import is_right

LINF, L2 = ThreatModel("linf", 16.0), ThreatModel("l2", 128.0)
SMALL = PlantConfig(LINF, inner_points=256, replicas=128, random_points=50)
ZERO = torch.zeros(1, dtype=torch.int64)
COUNT = 20


@pytest.fixture
def net() -> nn.Module:
    """A smooth net of 8x8 gray images whose last linear layer is deep inside."""
    torch.manual_seed(4)
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Softplus(), nn.Flatten())
    top = nn.Sequential(nn.Linear(256, 32), nn.Softplus(), nn.Linear(32, 3))
    return freeze(nn.Sequential(body, top))


@pytest.fixture
def around(tiny_energy: ConvEnergy) -> Callable[..., Callable[[nn.Module, str], EOTDefense]]:
    """``around(steps, replicas)`` makes defenses of a net; with 0 and 1 the bare net."""

    def make(steps: int = 0, replicas: int = 1) -> Callable[[nn.Module, str], EOTDefense]:
        config = LangevinConfig(steps, 0.02)
        return lambda module, seed: EOTDefense(
            module, tiny_energy, config, replicas=replicas, seed=seed
        )

    return make


@pytest.fixture
def pictures(seeded: Callable[..., Generator]) -> Tensor:
    """Gray images, some of whose pixels lie at the ends of the box."""
    return (1.4 * torch.rand(COUNT, 1, 8, 8, generator=seeded(5)) - 0.2).clamp(0.0, 1.0)


def says(model: nn.Module, x: Tensor) -> int:
    return int(model(x).argmax(1))


def share_found(tests: list[tuple[Tensor, Planted]], make, config: AttackConfig) -> float:
    found = []
    for x, test in tests:
        surrogate, target = make(test.readout, "attacker"), make(test.readout, "judge")
        generator = Generator().manual_seed(6)
        record = run_attack(surrogate, target, x, ZERO, config, generator=generator)
        assert is_right(record.clean_logits, ZERO).all()
        found.append(int(record.broken_at) != NEVER)
    return sum(found) / len(found)


class TestFeatures:
    def test_are_the_classifier_without_its_last_layer(self, tiny_classifier, images):
        features = features_of(tiny_classifier)(images)
        assert features.shape == (5, 64)
        assert torch.equal(tiny_classifier.head(features), tiny_classifier(images))

    def test_of_a_nested_network_leave_it_alone(self, net, images):
        before = net(images)
        assert features_of(net)(images).shape == (5, 32)
        assert torch.equal(net[1][2](features_of(net)(images)), before)
        assert torch.equal(net(images), before)

    def test_need_a_linear_layer(self, brightness):
        with pytest.raises(ValueError, match=r"nn\.Linear"):
            features_of(brightness(0.5))

    def test_need_the_linear_layer_that_makes_the_logits(self, net, around, images, seeded):
        sharper = nn.Sequential(net, nn.Softmax(1))
        with pytest.raises(ValueError, match="makes the logits"):
            plant(sharper, around(), images[:1], SMALL, generator=seeded())


class TestEdgePoint:
    @pytest.mark.parametrize("threat", [LINF, L2])
    def test_lies_on_the_edge(self, threat, seeded):
        x = torch.full((3, 1, 8, 8), 0.5)
        edge = edge_point(threat, x, generator=seeded())
        assert torch.allclose(threat.distance(edge, x), torch.full((3,), threat.eps), rtol=1e-5)

    @pytest.mark.parametrize("threat", [LINF, L2])
    def test_lies_in_the_ball_and_the_box(self, threat, pictures, seeded):
        edge = edge_point(threat, pictures, generator=seeded())
        assert (threat.distance(edge, pictures) <= threat.eps * (1 + 1e-5)).all()
        assert edge.min() >= 0.0 and edge.max() <= 1.0


class TestDirection:
    def test_is_fishers(self, seeded):
        """Two independent features, one ten times as wide: weights go as gap over variance."""
        spread = torch.tensor([1.0, 10.0], dtype=torch.float64)
        inner = spread * torch.randn(20_000, 2, generator=seeded(), dtype=torch.float64)
        w = direction_between(inner, inner.mean(0) + torch.tensor([1.0, 20.0]), 1e-6)
        assert float(w[1] / w[0]) == pytest.approx(20.0 / 100.0, rel=0.05)

    def test_ignores_features_that_never_vary(self, seeded):
        inner = torch.randn(100, 3, generator=seeded(), dtype=torch.float64)
        inner[:, 1] = 0.3
        w = direction_between(inner, torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64), 0.1)
        assert w[1] == 0.0 and w.isfinite().all()


class TestPlant:
    @pytest.mark.parametrize("threat", [LINF, L2])
    def test_a_solution_that_the_bare_net_confirms(self, threat, net, around, pictures, seeded):
        x = pictures[:1]
        test = plant(net, around(), x, replace(SMALL, threat=threat), generator=seeded())
        assert test is not None
        assert says(test.readout, test.planted) == 1 and says(test.readout, x) == 0
        assert float(threat.distance(test.planted, x)) <= threat.eps * (1 + 1e-5)
        assert test.planted.min() >= 0.0 and test.planted.max() <= 1.0
        assert test.random_hits <= SMALL.random_share

    def test_a_solution_that_fresh_noise_confirms(self, net, around, pictures, seeded):
        x, make = pictures[:1], around(2, 60)
        test = plant(net, make, x, SMALL, generator=seeded())
        assert test is not None
        for seed in ("one", "another"):
            target = make(test.readout, seed)
            assert says(target, test.planted) == 1 and says(target, x) == 0
        assert test.errors > 2 * SMALL.sureness

    def test_logits_are_no_surer_than_a_trained_nets(self, net, around, pictures, seeded):
        test = plant(net, around(), pictures[:1], SMALL, generator=seeded())
        assert test is not None
        logits = test.readout(torch.cat([test.planted, pictures[:1]]))
        differences = logits[:, 1] - logits[:, 0]
        assert float(differences[0]) == pytest.approx(GAIN * (1 - SMALL.closeness), rel=0.01)
        assert -2 * GAIN < float(differences[1]) < -0.5 * GAIN

    def test_the_same_generator_plants_the_same(self, net, around, pictures, seeded):
        one, two = (
            plant(net, around(2, 60), pictures[:1], SMALL, generator=seeded()) for _ in range(2)
        )
        assert one is not None and two is not None
        assert torch.equal(one.planted, two.planted)
        assert torch.equal(one.readout(pictures), two.readout(pictures))

    def test_the_global_stream_is_left_alone(self, net, around, pictures, seeded):
        before = torch.get_rng_state()
        plant(net, around(2, 60), pictures[:1], SMALL, generator=seeded())
        assert torch.equal(torch.get_rng_state(), before)

    def test_none_where_the_features_do_not_see_the_point(self, net, around, pictures, seeded):
        blind = nn.Sequential(nn.Hardtanh(2.0, 3.0), net)
        assert plant(freeze(blind), around(), pictures[:1], SMALL, generator=seeded()) is None

    def test_none_where_noise_drowns_the_point(self, net, tiny_energy, pictures, seeded):
        def loud(module: nn.Module, seed: str) -> EOTDefense:
            return EOTDefense(module, tiny_energy, LangevinConfig(2, 2.0), replicas=2, seed=seed)

        assert plant(net, loud, pictures[:1], SMALL, generator=seeded()) is None

    def test_none_where_random_points_solve_it(self, net, around, pictures, seeded):
        """One feature, the mean pixel: half of what lies in the ball is on the planted side."""
        torch.manual_seed(0)
        mean = nn.Linear(64, 1)
        nn.init.constant_(mean.weight, 1 / 64)
        dull = freeze(nn.Sequential(nn.Flatten(), mean, nn.Linear(1, 2)))
        outcomes = [
            plant(dull, around(), x[None], SMALL, generator=seeded(i))
            for i, x in enumerate(pictures)
        ]
        assert any(outcome is None for outcome in outcomes)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("inner_points", 1),
            ("inner_share", 1.1),
            ("replicas", 0),
            ("ridge", 0.0),
            ("closeness", 0.4),
            ("random_points", 0),
        ],
    )
    def test_refuses(self, name, value):
        with pytest.raises(ValueError, match=name):
            PlantConfig(LINF, **{name: value})


class TestAttacks:
    @pytest.fixture
    def tests(self, net, around, pictures) -> list[tuple[Tensor, Planted]]:
        planted = []
        for i, x in enumerate(pictures.split(1)):
            generator = Generator().manual_seed(i)
            test = plant(net, around(), x, SMALL, generator=generator)
            assert test is not None
            planted.append((x, test))
        return planted

    @pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
    def test_a_capable_one_is_believed(self, tests, around, loss):
        config = AttackConfig(LINF, 40, 2.0, loss=loss)
        assert share_found(tests, around(), config) >= 0.95

    def test_one_tiny_step_is_not(self, tests, around):
        assert share_found(tests, around(), AttackConfig(LINF, 1, 0.1)) <= 0.2

    def test_random_points_are_not(self, tests, around):
        assert share_found(tests, around(), AttackConfig(LINF, 40, 0.0, rule="noise")) <= 0.2

    def test_a_capable_one_finds_it_through_the_noise(self, net, around, pictures):
        make, tests = around(2, 60), []
        for i, x in enumerate(pictures[:5].split(1)):
            test = plant(net, make, x, SMALL, generator=Generator().manual_seed(i))
            assert test is not None
            tests.append((x, test))
        assert share_found(tests, make, AttackConfig(LINF, 20, 2.0)) == 1.0


def test_a_wide_resnet_is_planted_too(tiny_classifier: WideResNet, around, images, seeded):
    test = plant(tiny_classifier, around(), images[:1], SMALL, generator=seeded())
    assert test is not None and says(test.readout, test.planted) == 1
