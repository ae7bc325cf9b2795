"""What belongs to the machine and not to the experiment."""

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from defense.fast.precision import runs_bfloat16
from stages import StageError
from stages.core.files import minutes

ENGINES = ("auto", "fast", "plain")


@dataclass(frozen=True)
class Hardware:
    """The device, how much runs at once and how long: options or environment, never params.yaml."""

    device: torch.device
    max_chains: int  # chains that advance together
    time_limit: float = math.inf  # minutes from now on
    checkpoint: Path | None = None  # the file in which unfinished work travels
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def choose(
        cls,
        device: str | None = None,
        max_chains: int | None = None,
        time_limit: float | None = None,
        checkpoint: Path | None = None,
    ) -> "Hardware":
        """Options first, then STOCHSEC_DEVICE, _MAX_CHAINS and _TIME_LIMIT, then what is here."""
        name = device or os.environ.get("STOCHSEC_DEVICE")
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            chosen = torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise StageError(f"device: {name!r} cannot be used ({error})") from None
        default = 200 if chosen.type == "cpu" else 4096  # sets the order in which noise is drawn
        chains = str(max_chains or os.environ.get("STOCHSEC_MAX_CHAINS") or default)
        if not chains.isdecimal() or int(chains) < 1:
            raise StageError(f"STOCHSEC_MAX_CHAINS: expected a number >= 1, got {chains!r}")
        return cls(chosen, int(chains), minutes(time_limit), checkpoint)

    def seconds_left(self) -> float:
        """Until the time limit."""
        return self.began + 60 * self.time_limit - time.monotonic()

    def classifier_precision(self) -> str:
        """Of a trained classifier's convolutions: torch's default."""
        tf32 = self.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return "tf32" if tf32 else "float32"

    def conditions(self) -> dict[str, object]:
        """What a record repeats on, bit for bit on a CPU; stated in every record."""
        return {
            "device": self.device.type,
            "max_chains": self.max_chains,
            "threads": torch.get_num_threads(),
            "engine": engine_name(),
            "bfloat16": "bfloat16" if runs_bfloat16(self.device) else "float32",
            "classifier": self.classifier_precision(),
            "torch": torch.__version__,
        }


def engine_name() -> str:
    """The implementation of the chain that $STOCHSEC_ENGINE asks for; auto by default."""
    name = os.environ.get("STOCHSEC_ENGINE", ENGINES[0])
    if name not in ENGINES:
        raise StageError(f"STOCHSEC_ENGINE: expected one of {list(ENGINES)}, got {name!r}")
    return name
