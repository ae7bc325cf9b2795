"""Which implementation of the chain runs."""

from functools import cache

from defense.compiled import CompiledLangevin
from defense.langevin import Chain, langevin
from stages.hardware import engine_name


@cache
def choose_chain() -> Chain:
    """The fast chain, one instance for the whole process, or the plain reference if asked for."""
    return CompiledLangevin() if engine_name() == "compiled" else langevin
