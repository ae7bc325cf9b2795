"""PixelDefend: what the PixelCNN may see, and the decoding against ART's and by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from defense.rng import make_generator
from defense.systems import Fit
from defense.systems.pixeldefend import GreedyDecoding, PixelCNN, PixelDefend

SIDE = 5


def network(levels: int = 17) -> PixelCNN:
    torch.manual_seed(0)
    return PixelCNN(levels, width=8, layers=4).eval().requires_grad_(False)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 1, SIDE, SIDE, generator=make_generator(0, "images"))


@pytest.mark.parametrize("at", [0, 1, 7, 12, 13, 24])
def test_a_pixel_sees_all_pixels_before_it_and_no_other(at: int) -> None:
    """Also those in the upper right, the blind spot of a single masked stack."""
    x = images(1).requires_grad_(True)
    logits = network()(x).flatten(2)[0, :, at]
    (slope,) = torch.autograd.grad(logits.square().sum(), x)
    seen = slope.flatten() != 0
    before = torch.arange(SIDE * SIDE) < at
    rows = torch.arange(SIDE * SIDE) // SIDE
    reach = 2 + 3  # rows up: of the first layer, and one more of each other layer
    assert not (seen & ~before).any()
    near = before & (at // SIDE - rows <= reach)
    columns = (torch.arange(SIDE * SIDE) % SIDE - at % SIDE).abs()
    assert seen[near & (columns <= reach)].all()


def test_levels_are_those_of_the_pixels() -> None:
    net = network()
    levels = torch.arange(17) / 16
    assert net.level(levels).tolist() == list(range(17))
    assert net.level(torch.tensor([-0.2, 0.031, 0.032, 1.4])).tolist() == [0, 0, 1, 16]


def greedy(net: PixelCNN, x: Tensor, radius: float) -> Tensor:
    """One pixel of one image after the other."""
    out = x.clone()
    for image in out.split(1):
        for row in range(SIDE):
            for column in range(SIDE):
                old = float(image[0, 0, row, column])
                said = net(image)[0, :, row, column].tolist()
                allowed = [k for k in range(17) if abs(k / 16 - old) <= radius]
                image[0, 0, row, column] = max(allowed, key=lambda k: said[k]) / 16
    return out


def test_decoding_takes_the_likeliest_level_within_the_radius() -> None:
    net, x = network(), images()
    purified = GreedyDecoding(net, 0.1)(x, generator=make_generator(0))
    assert torch.equal(purified, greedy(net, x, 0.1))
    assert float((purified - x).abs().max()) <= 0.1 + 1e-6
    assert not torch.equal(purified, net.level(x) / 16), "the network has no say"


def test_without_a_radius_pixels_go_to_their_nearest_level() -> None:
    net, x = network(), images()
    purified = GreedyDecoding(net, 0.0)(x, generator=make_generator(0))
    torch.testing.assert_close(purified, net.level(x) / 16)


def test_decoding_is_that_of_art() -> None:
    preprocessor = pytest.importorskip("art.defences.preprocessor")
    classification = pytest.importorskip("art.estimators.classification")

    class Activations(nn.Module):
        """What ART asks: probabilities (N, pixels, 256)."""

        def __init__(self, net: PixelCNN) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            logits = self.net(x.view(-1, 1, SIDE, SIDE))
            return torch.softmax(logits.flatten(2), 1).transpose(1, 2)

    net = network(256)
    wrapped = classification.PyTorchClassifier(
        Activations(net), nn.CrossEntropyLoss(), (1, SIDE, SIDE), 2, clip_values=(0, 1)
    )

    def activations(x: np.ndarray, *_: object, **__: object) -> np.ndarray:
        return Activations(net)(torch.from_numpy(x)).numpy()

    wrapped.get_activations = activations
    x = (255 * (0.2 + 0.6 * images(2))).round() / 255  # nearer to 0 and 1 ART's bytes overflow
    theirs = preprocessor.PixelDefend(
        eps=16, pixel_cnn=wrapped, clip_values=(0.0, 1.0), verbose=False
    )(x.numpy())[0]
    ours = GreedyDecoding(net, 16.01 / 255)(x, generator=make_generator(0))
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-4, rtol=0.0)


def test_its_loss_is_the_cross_entropy_of_each_pixel() -> None:
    system = PixelDefend(17, 8, 4, 64, Fit(1, 2, 1e-3))
    net, x = network(), (16 * images()).round() / 16
    loss = system.loss(net, nn.Identity(), x, torch.zeros(3), generator=make_generator(0))
    said = torch.log_softmax(net(x), 1)
    by_hand = [
        -said[i, round(16 * float(x[i, 0, r, c])), r, c]
        for i in range(3)
        for r in range(SIDE)
        for c in range(SIDE)
    ]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())


def test_colour_is_refused() -> None:
    with pytest.raises(ValueError, match="grey ones, got 3 channels"):
        PixelDefend(17, 8, 4, 64, Fit(1, 2, 1e-3)).network((3, 8, 8), nn.Identity())
