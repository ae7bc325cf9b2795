"""Which implementation of the chain runs."""

from defense.langevin import Chain, langevin


def choose_chain() -> Chain:
    """The chain implementation of this machine."""
    return langevin
