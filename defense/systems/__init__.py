"""Purification defenses of other papers, one in each file, behind the interface of `System`.

| file         | purifies by                                      | trains                   |
|--------------|--------------------------------------------------|--------------------------|
| hill         | Langevin steps with a convergent energy          | nothing here             |
| pixeldefend  | greedy decoding of a PixelCNN near the image     | the PixelCNN             |
| malade       | Langevin steps along the score of an autoencoder | the autoencoder          |
| menet        | random masks and matrix estimation               | the classifier           |
| smoothing    | noise; noise and one denoising                   | the classifier; denoiser |
| score        | noise, and denoising step by step                | the denoiser             |
| transforms   | JPEG; total variation                            | nothing                  |

A system of your own is a file with a subclass of `System`, and an entry in `SYSTEMS`.
"""

from defense.systems.hill import Hill
from defense.systems.malade import MALADE
from defense.systems.menet import MENet
from defense.systems.pixeldefend import PixelDefend
from defense.systems.score import ScorePurification
from defense.systems.smoothing import DenoisedSmoothing, RandomizedSmoothing
from defense.systems.system import Fit, RetrainedSystem, System, Trainer
from defense.systems.transforms import Jpeg, TotalVariation

SYSTEMS: dict[str, type[System]] = {
    "hill_convergent": Hill,
    "hill_smooth_convergent": Hill,
    "pixeldefend": PixelDefend,
    "malade": MALADE,
    "menet": MENet,
    "smoothing": RandomizedSmoothing,
    "denoised_smoothing": DenoisedSmoothing,
    "score": ScorePurification,
    "jpeg": Jpeg,
    "total_variation": TotalVariation,
}
"""By name; a name may stand for a system with other settings."""

__all__ = [
    "MALADE",
    "SYSTEMS",
    "DenoisedSmoothing",
    "Fit",
    "Hill",
    "Jpeg",
    "MENet",
    "PixelDefend",
    "RandomizedSmoothing",
    "RetrainedSystem",
    "ScorePurification",
    "System",
    "TotalVariation",
    "Trainer",
]
