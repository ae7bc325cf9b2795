"""What one looks at to judge a defense: states along chains, the spread of mean logits."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from defense.langevin import Chain, EnergyFn, LangevinConfig
from defense.losses import margin
from defense.verdict import is_right


def states_at(
    energy: EnergyFn,
    x: Tensor,
    grid: Sequence[int],
    *,
    tau: float,
    chain: Chain,
    generator: Generator,
    max_chains: int,
) -> Tensor:
    """States of chains after each number of steps in ``grid``: x (N,C,H,W) -> (len(grid),N,C,H,W).

    One chain per image passes through the whole grid (ascending), all in net range.
    """
    if not grid or list(grid) != sorted(set(grid)) or grid[0] < 0:
        raise ValueError(f"grid: expected ascending steps >= 0, got {list(grid)}")
    parts = []
    for state in x.split(max_chains):
        reached, states = 0, []
        for steps in grid:
            config = LangevinConfig(steps - reached, tau)
            state = chain(energy, state, config, generator=generator)
            states.append(state)
            reached = steps
        parts.append(torch.stack(states))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def energies(energy: EnergyFn, x: Tensor, *, tau: float, batch: int) -> Tensor:
    """U(x) in nats, (N,C,H,W) in net range -> (N,); the network itself returns (tau^2 / 2) U."""
    return torch.cat([energy(part) for part in x.split(batch)]) / (0.5 * tau**2)


def mean_logit_draws(replica_logits: Tensor, count: int) -> Tensor:
    """Independent draws of F_H for H = ``count``: (R, ...) -> (R // count, ...).

    Each draw is the mean over its own ``count`` replicas (Hill et al. 2021, Figure 3).
    """
    if not 1 <= count <= len(replica_logits):
        raise ValueError(f"count: expected 1 to {len(replica_logits)}, got {count}")
    draws = len(replica_logits) // count
    return replica_logits[: draws * count].view(draws, count, *replica_logits.shape[1:]).mean(1)


def safe_and_borderline(replica_logits: Tensor, labels: Tensor) -> Tensor:
    """Two images that the mean logits get right: the surest and the least sure, as places (2,).

    ``replica_logits`` (R,B,classes), ``labels`` (B,). Sureness is the mean margin of the right
    class in units of its spread over replicas.
    """
    replicas = len(replica_logits)
    margins = -margin(replica_logits.flatten(0, 1), labels.repeat(replicas)).view(replicas, -1)
    sureness = margins.mean(0) / margins.std(0)
    right = is_right(replica_logits.mean(0), labels)
    safest = torch.where(right, sureness, -torch.inf).argmax()
    borderline = torch.where(right, sureness, torch.inf).argmin()
    return torch.stack([safest, borderline])
