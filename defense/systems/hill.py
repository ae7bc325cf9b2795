"""The defense of Hill et al. (2021), as one system among the others."""

from dataclasses import dataclass
from typing import Any, ClassVar

from defense.fast.langevin import FastLangevin
from defense.gradient.hessian import written_product
from defense.langevin import LangevinConfig
from defense.purifier import LangevinPurifier, Purifier
from defense.systems.system import System


@dataclass(frozen=True)
class Hill(System):
    """K = ``steps`` Langevin steps with the convergent energy of a published file.

    ``smooth``: the file of the smooth energy. The leaky-ReLU energy has the identity as its exact
    gradient, so attacks through its chain smooth its kinks over sqrt(``softness``).
    """

    title: ClassVar[str] = "Langevin, convergent energy"
    source: ClassVar[str] = "Hill et al. 2021"
    own_attack: ClassVar[str] = "bpda_eot"

    steps: int
    tau: float
    denoise: bool
    softness: float | None

    def purifier(self, network: Any) -> Purifier:
        return LangevinPurifier(
            network,
            LangevinConfig(self.steps, self.tau, self.denoise),
            chain=FastLangevin(),
            softness=self.softness,
            product=written_product,
        )
