"""Which implementation of the chain runs."""

import os
from functools import cache

from defense.compiled import CompiledLangevin
from defense.langevin import Chain, langevin
from stages import StageError

ENGINES = ("compiled", "plain")


@cache
def choose_chain() -> Chain:
    """The fast chain, one instance for the whole process; $STOCHSEC_ENGINE=plain: the reference."""
    engine = os.environ.get("STOCHSEC_ENGINE", "compiled")
    if engine not in ENGINES:
        raise StageError(f"STOCHSEC_ENGINE: expected one of {list(ENGINES)}, got {engine!r}")
    return CompiledLangevin() if engine == "compiled" else langevin
