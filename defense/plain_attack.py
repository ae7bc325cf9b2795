"""Algorithm 1 of Hill et al. (2021) as printed, for reading and for comparison.

The reference for `defense.attack.run_attack`. It attacks every image to the last step, even a
broken one, and verifies suspects one at a time. The verdicts are the same, at far higher cost.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from defense.attack import NEVER, loss_gradient
from defense.threat import ThreatModel
from defense.verdict import is_right


@torch.no_grad()
def algorithm_1(
    surrogate: nn.Module,
    target: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step_255: float,
    generator: Generator,
    on_step: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Images x (B,C,H,W) in [0, 1], labels y (B,) -> clean verdicts (B,) bool, ``broken_at`` (B,).

    ``surrogate`` has H_adv replicas, ``target`` H_def.
    """
    clean_correct = is_right(target(x), y)
    broken_at = torch.full_like(y, NEVER)
    x_adv = threat.random_point(x, generator=generator)
    # n is the number of updates behind x_adv: Algorithm 1 has X_{n-1} for n = 1 to N + 1.
    for n in range(steps + 1):
        gradient, logits = loss_gradient(surrogate, x_adv, y)
        for m in range(len(x)):
            suspect = not is_right(logits[m : m + 1], y[m : m + 1])
            if suspect and clean_correct[m]:
                broken = not is_right(target(x_adv[m : m + 1]), y[m : m + 1])
                if broken and broken_at[m] == NEVER:
                    broken_at[m] = n
        x_adv = threat.project(threat.ascend(x_adv, gradient, step_255), x)
        if on_step is not None:
            on_step(int((clean_correct & (broken_at == NEVER)).sum()))
    return clean_correct, broken_at
