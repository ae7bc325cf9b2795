"""ME-Net (Yang et al. 2019): drop pixels at random, reconstruct the image by matrix estimation."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from defense.pixels import to_net, to_pixels
from defense.purifier import Purifier
from defense.systems.system import RetrainedSystem


def usvt(x: Tensor, seen: Tensor, threshold: float) -> Tensor:
    """Universal singular value thresholding (Chatterjee 2015, Section 1.2).

    Matrices x (...,H,W) in [-1, 1] and ``seen`` (...,H,W), 1 where an entry is known -> estimates
    of all entries. Unknown entries are set to 0. Singular values below ``threshold`` sqrt(n p) are
    dropped, n the longer side and p the share of known entries. The rest is divided by p and
    clipped to [-1, 1]. Chatterjee's theory has a threshold of 2 and a little, for large matrices.
    """
    p = seen.mean((-2, -1), keepdim=True).clamp_min(1.0 / seen[..., 0].numel())
    u, s, v = torch.linalg.svd(x * seen, full_matrices=False)
    least = threshold * torch.sqrt(max(x.shape[-2:]) * p[..., 0])
    kept = torch.where(s >= least, s, 0.0)
    estimate: Tensor = u @ (kept[..., None] * v) / p
    return estimate.clamp(-1.0, 1.0)


@dataclass(frozen=True)
class MaskAndEstimate:
    """Keep each pixel with probability p, for each image from [``low``, ``high``]; then `usvt`.

    The channels of an image lie side by side in one matrix (H, C W), and share the mask.
    """

    low: float
    high: float
    threshold: float

    @torch.no_grad()
    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor:
        """Pixels (N,C,H,W) -> the same shape."""
        count, _, height, width = x.shape
        uniform = torch.rand((count, 1, 1, 1), generator=generator, device=x.device, dtype=x.dtype)
        p = self.low + (self.high - self.low) * uniform
        draws = torch.rand((count, 1, height, width), generator=generator, device=x.device)
        seen = (draws < p).to(x.dtype).expand_as(x)
        known, mask = (images.transpose(1, 2).flatten(2) for images in (to_net(x), seen))
        estimate = usvt(known, mask, self.threshold)
        return to_pixels(estimate.unflatten(2, (-1, width)).transpose(1, 2))


@dataclass(frozen=True)
class MENet(RetrainedSystem):
    """`MaskAndEstimate`, and a classifier trained further on what comes out.

    Its attacks are BPDA and those without gradients, as in Tramer et al. (2020), Section 12.
    """

    title: ClassVar[str] = "ME-Net"
    source: ClassVar[str] = "Yang et al. 2019"
    own_attack: ClassVar[str] = "bpda_eot"

    low: float
    high: float
    threshold: float

    def purifier(self, network: Any) -> Purifier:
        return MaskAndEstimate(self.low, self.high, self.threshold)
