"""Is a stochastic prediction right? Four metrics, and a sequential test that can stop early.

| metric        | score of an image with label y                                                 |
|---------------|--------------------------------------------------------------------------------|
| mean logits   | 1 if the mean logits over H replicas predict y (Hill et al. 2021, eq. 6)       |
| average-of-N  | the share of N single replicas that predict y                                  |
| majority-of-N | 1 if more of N replicas predict y than any other class                         |
| worst-of-N    | 1 if all N replicas predict y                                                  |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Generator, Tensor, nn

from defense.inference import check_labels, logits_of
from defense.losses import margin

METRICS = ("mean_logits", "average", "majority", "worst")

NO_CLASS = -1
"""Predicted class where logits are not finite."""


def is_right(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) bool: the prediction is y. Logits that are not finite are never right."""
    return (logits.argmax(1) == y) & torch.isfinite(logits).all(1)


def classes_of(replica_logits: Tensor) -> Tensor:
    """Predicted class of each replica: (R,B,classes) -> (B,R) int16; `NO_CLASS` if not finite."""
    finite = torch.isfinite(replica_logits).all(2)
    said = replica_logits.argmax(2)
    return torch.where(finite, said, NO_CLASS).T.to(torch.int16).contiguous()


def scores(logits: Tensor, classes: Tensor, y: Tensor, draws: int) -> dict[str, Tensor]:
    """Each of `METRICS` for each image, (B,) float in [0, 1].

    ``logits`` (B, classes) are the mean logits, ``classes`` (B,R) the predictions of single
    replicas. N is ``draws``, or R if there are fewer.
    """
    said = classes[:, :draws].long()
    votes = said == y[:, None]
    rivals = torch.where(votes | (said == NO_CLASS), logits.shape[1], said)
    counts = torch.zeros(len(y), logits.shape[1] + 1, dtype=torch.int64, device=y.device)
    counts.scatter_add_(1, rivals, torch.ones_like(rivals))
    return {
        "mean_logits": is_right(logits, y).double(),
        "average": votes.double().mean(1),
        "majority": (votes.sum(1) > counts[:, :-1].amax(1)).double(),
        "worst": votes.all(1).double(),
    }


def wealth_against_half(values: Tensor, total: int) -> Tensor:
    """Betting test of H0, "the mean of all ``total`` values is at most 1/2", from the first n.

    ``values`` (n,...) in [0, 1] are drawn in random order without replacement -> wealth (...), the
    evidence against H0 (Waudby-Smith & Ramdas 2024, Section 5). Under H0 no bet wins on average,
    since each faces the largest mean that the values left can have, so the wealth is a nonnegative
    supermartingale: it ever reaches 1 / error with probability at most ``error``, whatever the
    values are (Ville's inequality). Each bet depends only on values seen before.
    """
    wealth = torch.ones_like(values[0])
    total_seen, squares = torch.zeros_like(wealth), torch.zeros_like(wealth)
    mean, variance = torch.full_like(wealth, 0.5), torch.full_like(wealth, GUESS)
    for n, value in enumerate(values):
        left = (0.5 * total - total_seen) / (total - n)  # largest mean of the rest under H0
        edge = mean - left
        # The approximately growth-optimal bet (aGRAPA), capped so that it cannot lose everything.
        bet = (edge / (variance + edge**2)).clamp_min(0.0)
        bet = torch.minimum(bet, BOLDNESS / left.clamp_min(1e-9))
        # left < 0: the values seen so far sum to more than total / 2, so H0 is certainly false.
        wealth = torch.where(left < -1e-9, torch.inf, wealth * (1.0 + bet * (value - left)))
        total_seen = total_seen + value
        mean = (0.5 + total_seen) / (n + 2)
        squares = squares + (value - mean) ** 2
        variance = (GUESS + squares) / (n + 2)
    return wealth


GUESS = 0.02  # prior guess at the variance of a value in [0, 1]
BOLDNESS = 0.9  # largest share of the wealth that one bet may lose


def clear_verdict(
    replica_logits: Tensor, y: Tensor, total: int, error: float, clip: float
) -> tuple[Tensor, Tensor]:
    """Is the verdict of all ``total`` replicas clear after the first n? (wrong, right), (B,) bool.

    ``replica_logits`` (n,B,classes). The difference of each other logit to the right one, clipped
    at +-``clip``, is tested for the sign of its mean: right if every difference is significantly
    negative, wrong if one is significantly positive. The verdict stays open if a difference beyond
    ``clip`` was seen on the side that would change it, or if the mean of the first n disagrees.
    """
    count, _, classes = replica_logits.shape
    label = y.view(1, -1, 1).expand(count, -1, 1)
    differences = replica_logits - replica_logits.gather(2, label)
    others = torch.ones_like(differences[0], dtype=torch.bool).scatter(1, y[:, None], False)
    shares = (differences.clamp(-clip, clip) / (2.0 * clip) + 0.5).double()
    # "Right" needs every test, so each has level error. "Wrong" needs any of classes - 1 tests, so
    # each has level error / (classes - 1) (Bonferroni).
    clearly_below = wealth_against_half(1.0 - shares, total) >= 1.0 / error
    clearly_above = wealth_against_half(shares, total) >= (classes - 1) / error
    clearly_below &= (differences <= clip).all(0)
    clearly_above &= (differences >= -clip).all(0)
    wrong, right = (clearly_above & others).any(1), (clearly_below | ~others).all(1)
    so_far = is_right(replica_logits.mean(0), y)
    return wrong & ~so_far, right & so_far


@dataclass(frozen=True)
class Sequential:
    """Early stopping: a verdict before all H replicas are drawn, where it is clear already.

    It tests after ``first`` replicas, then each time their number has grown by half. An early
    verdict differs from that of all H replicas with probability at most ``error``, for any
    distribution of logit differences within +-``clip``. The guarantee needs only that the order of
    the replicas is random. It does need the bound: a rare, large difference among the replicas not
    drawn could reverse any mean. An image that stays in doubt, or that showed a larger difference,
    gets the verdict of all H.
    """

    error: float
    first: int = 10
    clip: float = 20.0

    def __post_init__(self) -> None:
        if not 0.0 < self.error < 1.0:
            raise ValueError(f"error: expected between 0 and 1, got {self.error}")
        if self.first < 2:
            raise ValueError(f"first: expected >= 2, got {self.first}")
        if not self.clip > 0.0:
            raise ValueError(f"clip: expected > 0, got {self.clip}")

    def looks(self, replicas: int) -> list[int]:
        """Numbers of replicas after which to test for an early verdict."""
        looks, count = [], self.first
        while count < replicas:
            looks.append(count)
            count += (count + 1) // 2
        return looks

    def answer(self, draw: Callable[[Tensor, int], Tensor], y: Tensor, replicas: int) -> "Answer":
        """Mean logits of as many replicas as a clear verdict needs, at most ``replicas``.

        ``draw`` (image indices (b,) int64, count) -> logits (count,b,classes) of fresh replicas.
        """
        looks, doubtful = self.looks(replicas), torch.arange(len(y), device=y.device)
        drawn = torch.zeros_like(y)
        seen = first = draw(doubtful, min(self.first, replicas))
        logits = seen.mean(0)
        for count in [*looks, replicas]:
            if count > len(seen):
                seen = torch.cat([seen, draw(doubtful, count - len(seen))])
                logits[doubtful] = seen.mean(0)
            drawn[doubtful] = count
            if count == replicas:
                break
            wrong, right = clear_verdict(seen, y[doubtful], replicas, self.error, self.clip)
            doubt = ~(wrong | right)
            doubtful, seen = doubtful[doubt], seen[:, doubt]
            if len(doubtful) == 0:
                break
        return Answer(logits, first, drawn)

    def replayed(self, replica_logits: Tensor, y: Tensor) -> "Answer":
        """`answer` from replicas (H,B,classes) that were drawn before."""
        done = torch.zeros_like(y)

        def draw(images: Tensor, count: int) -> Tensor:
            first = int(done[images[0]]) if len(images) else 0
            done[images] += count
            return replica_logits[first : first + count, images]

        return self.answer(draw, y, len(replica_logits))


SEQUENTIAL = Sequential(error=1e-3)


class Answer(NamedTuple):
    """A model's output for B images."""

    logits: Tensor  # (B, classes) mean over the replicas drawn
    replicas: Tensor  # (R,B,classes): all of them; of a `Sequential` those of its first draw
    drawn: Tensor  # (B,) int64: how many replicas each image took


class Replicated(Protocol):
    """The interface of a stochastic defense, as the judge uses it.

    ``replicas`` is H, the number of draws per verdict. ``replica_logits`` draws that many, or
    another number: images (B,C,H,W) in [0, 1] -> logits (replicas,B,classes). `EOTDefense` is one.
    """

    replicas: int

    def replica_logits(
        self, x: Tensor, *, replicas: int | None = None, generator: Generator | None = None
    ) -> Tensor: ...


class Repeated:
    """Any other module as a `Replicated`: each call is a replica; a deterministic one needs one.

    A module that draws from torch's global generator, as dropout does, is called ``replicas``
    times. To detect it, the first `TRIED` of the images ``x`` (B,C,H,W) are evaluated `CALLS`
    times and all of them twice. A module whose output changes more rarely goes undetected: give it
    a `replica_logits`. `ValueError` if the output for an image depends on the others in the batch.
    """

    def __init__(self, model: nn.Module, x: Tensor, replicas: int) -> None:
        self.model = model
        self.replicas = 1
        if replicas > 1 and len(x):
            some = x[:TRIED]
            first, *others = (self.ask(some) for _ in range(CALLS))
            random = any(differ(first, other) for other in others)
            if random or differ(self.ask(x), self.ask(x)):
                self.replicas = replicas
            elif len(x) > 1 and differ(first[:1], self.ask(x[:1])):
                raise ValueError(
                    "target: its answer to an image depends on the other images in the batch, as "
                    "with batch normalization by the batch's own statistics; judge it one by one"
                )

    def ask(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return logits_of(self.model(x), len(x))

    def replica_logits(
        self, x: Tensor, *, replicas: int | None = None, generator: Generator | None = None
    ) -> Tensor:
        count = self.replicas if replicas is None else replicas
        return torch.stack([self.ask(x) for _ in range(count)])


class Counted:
    """A defense with `replica_logits` that does not say how many replicas make a verdict."""

    def __init__(self, model: Any, replicas: int) -> None:
        self.model = model
        self.replicas = replicas

    def replica_logits(
        self, x: Tensor, *, replicas: int | None = None, generator: Generator | None = None
    ) -> Tensor:
        count = self.replicas if replicas is None else replicas
        found: Tensor = self.model.replica_logits(x, replicas=count, generator=generator)
        return found


TRIED, CALLS = 8, 20  # images and calls to detect a stochastic module
ROUNDING = 1e-3  # tolerance between two runs of one network, relative to the largest logit
FAR = 50.0  # a logit this far below an image's largest cannot win, as that of a masked class


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two answers (B, classes) to the same images differ by more than rounding.

    It compares how far logits lie below the largest of their image, up to `FAR`, so that neither a
    constant offset nor a masked class hides a change in the others.
    """
    one, other = ((x - x.amax(1, keepdim=True)).clamp_min(-FAR) for x in (first, second))
    finite = one[torch.isfinite(one)]
    scale = float(finite.abs().max()) if len(finite) else 0.0
    same = torch.isclose(one, other, rtol=0.0, atol=ROUNDING * max(scale, 1e-6), equal_nan=True)
    return not bool(same.all())


def replicated(model: nn.Module | Replicated, x: Tensor, replicas: int) -> Replicated:
    """The model, wrapped if it is not yet a `Replicated`; x (b,C,H,W) are images to test it on."""
    # Not isinstance: since Python 3.12 it misses attributes that a module, such as a compiled one,
    # forwards.
    if not hasattr(model, "replica_logits"):
        return Repeated(cast(nn.Module, model), x, replicas)
    return cast(Replicated, model) if hasattr(model, "replicas") else Counted(model, replicas)


def draw(model: Replicated, x: Tensor, y: Tensor, count: int | None = None) -> Tensor:
    """Logits (count,B,classes) of ``count`` replicas, or of all; `ValueError` for another shape."""
    logits = model.replica_logits(x, replicas=count)
    expected = model.replicas if count is None else count
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        got: object = type(logits).__name__ if not isinstance(logits, Tensor) else logits.shape
        raise ValueError(f"replica_logits: expected a tensor (replicas, B, classes), got {got}")
    if logits.shape[:2] != (expected, len(x)):
        raise ValueError(
            f"replica_logits: expected ({expected}, {len(x)}, classes) for {expected} replicas of "
            f"{len(x)} images, got {tuple(logits.shape)}"
        )
    check_labels(y, logits.shape[2])
    return logits


def answer(model: Replicated, x: Tensor, y: Tensor, sequential: Sequential | None = None) -> Answer:
    """The answer of all replicas of a defense, or of as many as a verdict on labels y needs.

    `ValueError` for logits of another shape than (replicas,B,classes), and for labels beyond them.
    """
    if sequential is None or model.replicas == 1:
        replicas = draw(model, x, y)
        return Answer(replicas.mean(0), replicas, torch.full_like(y, len(replicas)))

    def more(images: Tensor, count: int) -> Tensor:
        return draw(model, x[images], y[images], count)

    return sequential.answer(more, y, model.replicas)


def wrong(model: Replicated, x: Tensor, y: Tensor, sequential: Sequential | None = None) -> Tensor:
    """(B,) bool: the mean logits do not predict y."""
    return ~is_right(answer(model, x, y, sequential).logits, y)


def mean_logit_draws(replica_logits: Tensor, count: int) -> Tensor:
    """Independent draws of F_H for H = ``count``: (R, ...) -> (R // count, ...).

    Each draw is the mean over its own ``count`` replicas (Hill et al. 2021, Figure 3).
    """
    if not 1 <= count <= len(replica_logits):
        raise ValueError(f"count: expected 1 to {len(replica_logits)}, got {count}")
    draws = len(replica_logits) // count
    return replica_logits[: draws * count].view(draws, count, *replica_logits.shape[1:]).mean(1)


def safe_and_borderline(replica_logits: Tensor, labels: Tensor) -> Tensor:
    """Indices (2,) of the most and the least confident image that the mean logits get right.

    ``replica_logits`` (R,B,classes), ``labels`` (B,). Confidence is the mean margin of the right
    class divided by its standard deviation over replicas.
    """
    replicas = len(replica_logits)
    margins = -margin(replica_logits.flatten(0, 1), labels.repeat(replicas)).view(replicas, -1)
    sureness = margins.mean(0) / margins.std(0)
    right = is_right(replica_logits.mean(0), labels)
    safest = torch.where(right, sureness, -torch.inf).argmax()
    borderline = torch.where(right, sureness, torch.inf).argmin()
    return torch.stack([safest, borderline])
