"""ME-Net: matrix estimation against numpy, and what the masks do."""

import numpy as np
import torch
from torch import nn

from defense.rng import make_generator
from defense.systems.menet import MaskAndEstimate, MENet, usvt


def test_usvt_is_chatterjees_estimator() -> None:
    generator = make_generator(0, "usvt")
    x = 2 * torch.rand(5, 6, 9, generator=generator) - 1
    seen = (torch.rand(5, 6, 9, generator=generator) < 0.6).float()
    found = usvt(x, seen, 0.7)
    for i in range(5):
        known, mask = (x[i] * seen[i]).double().numpy(), seen[i].double().numpy()
        share = mask.mean()
        u, s, v = np.linalg.svd(known, full_matrices=False)
        kept = np.where(s >= 0.7 * np.sqrt(9 * share), s, 0)
        assert 0 < (kept > 0).sum() < 6, "the threshold decides nothing"
        estimate = np.clip((u * kept) @ v / share, -1, 1)
        np.testing.assert_allclose(found[i].numpy(), estimate, atol=1e-5)


def test_a_low_rank_image_is_recovered_from_half_of_its_pixels() -> None:
    generator = make_generator(0, "low rank")
    left, right = (2 * torch.rand(1, 1, 200, generator=generator) - 1 for _ in range(2))
    x = 0.5 + 0.5 * left.transpose(1, 2) @ right  # rank one in net range, and 200 x 200
    purified = MaskAndEstimate(0.5, 0.5, 2.01)(x[None], generator=generator)
    error = float((purified - x).square().mean() / x.var())
    assert error < 0.1


def test_nothing_is_lost_without_mask_and_threshold() -> None:
    x = torch.rand(4, 3, 7, 5, generator=make_generator(0, "images"))
    purified = MaskAndEstimate(1.0, 1.0, 0.0)(x, generator=make_generator(1))
    torch.testing.assert_close(purified, x)


def test_masks_are_shared_by_the_channels_and_not_by_images() -> None:
    x = torch.ones(200, 3, 6, 6)
    generator = make_generator(0, "masks")
    purified = MaskAndEstimate(0.3, 0.7, 0.0)(x, generator=generator)
    lost = purified < 0.9  # where nothing is known the estimate is the middle of the range
    assert torch.equal(lost[:, 0], lost[:, 1])
    assert torch.equal(lost[:, 0], lost[:, 2])
    kept = 1 - lost[:, 0].float().mean((1, 2))
    assert 0.45 < float(kept.mean()) < 0.55
    assert len(kept.unique()) > 10


def test_an_image_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    x = torch.rand(2, 1, 6, 6, generator=make_generator(0, "images"))
    seen = (torch.rand(2, 6, 6, generator=make_generator(1)) < 0.5).float()
    whole = usvt(2 * x[:, 0] - 1, seen, 0.5)
    torch.testing.assert_close(whole[:1], usvt(2 * x[:1, 0] - 1, seen[:1], 0.5))


def test_as_it_is_the_bare_classifier_judges() -> None:
    bare = nn.Flatten()
    system = MENet(None, 0.4, 0.6, 1.0)
    assert system.network((1, 8, 8), bare) is None
    assert system.training is None
    assert system.classifier(bare, None) is bare
