"""Training of the classifier: SGD on random crops and flips, natural or adversarial.

The defense secures a naturally trained classifier. It is compared with an adversarially trained one
(Madry et al. 2018). One loop does both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from defense.fast.precision import Precision, arithmetic, check_precision
from defense.rules.pgd import PGD
from defense.threat import ThreatModel


@dataclass(frozen=True)
class ClassifierTrainConfig:
    """SGD with momentum; the learning rate follows a schedule, see `rate`.

    `step` divides it by ten at every milestone (epochs), the authors' way. `one_cycle` raises it
    linearly over the first ``warm_up`` of the training and lowers it linearly to zero.
    """

    epochs: int
    batch: int
    learning_rate: float
    schedule: Literal["step", "one_cycle"]
    milestones: tuple[int, ...]
    warm_up: float  # in [0, 1)
    momentum: float
    weight_decay: float
    crop: int  # pixels of zero padding before a random crop; 0: none
    flip: bool  # mirror half of the images
    precision: Precision

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.schedule not in ("step", "one_cycle"):
            raise ValueError(f"schedule: expected step or one_cycle, got {self.schedule!r}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up: expected in [0, 1), got {self.warm_up}")

    def rate(self, epoch: float) -> float:
        """Factor on the learning rate after ``epoch`` (fractional) epochs, in [0, 1]."""
        if self.schedule == "step":
            return float(0.1 ** sum(epoch >= milestone for milestone in self.milestones))
        done = epoch / self.epochs
        if done < self.warm_up:
            return done / self.warm_up
        return max(0.0, 1.0 - done) / (1.0 - self.warm_up)


def augment(images: Tensor, config: ClassifierTrainConfig, *, generator: Generator) -> Tensor:
    """A random crop and mirror for each image by itself; (B,C,H,W) pixels -> the same shape."""
    n, _, height, width = images.shape
    device = images.device
    if config.crop:
        padded = F.pad(images, [config.crop] * 4)
        offsets = torch.randint(0, 2 * config.crop + 1, (2, n), generator=generator, device=device)
        rows = offsets[0, :, None] + torch.arange(height, device=device)
        columns = offsets[1, :, None] + torch.arange(width, device=device)
        index = torch.arange(n, device=device)[:, None, None]
        images = padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if config.flip:
        mirrored = torch.rand(n, generator=generator, device=device) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    return images


@dataclass(frozen=True)
class Adversary:
    """The inner maximization of adversarial training: PGD from a random point of the ball.

    ``steps`` updates of length ``step_255`` / 255; Madry et al. (2018), equation (2.1). Unlike
    theirs, it attacks the classifier in evaluation mode, so that intermediate iterates do not
    enter the batch-norm statistics.
    """

    threat: ThreatModel
    steps: int
    step_255: float

    def attack(
        self,
        classifier: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        *,
        generator: Generator,
    ) -> Tensor:
        """Pixels x (B,C,H,W) in [0, 1], labels y (B,) -> adversarial pixels, the same shape."""
        rule = PGD(self.threat, self.step_255, generator)
        x_adv = rule.start(x)
        for _ in range(self.steps):
            x_adv.requires_grad_(True)
            losses = F.cross_entropy(classifier(x_adv), y, reduction="none")
            (gradient,) = torch.autograd.grad(losses.sum(), x_adv)
            x_adv = rule.next(x_adv.detach(), losses.detach(), gradient)
        return x_adv


class ClassifierTrainer:
    """Trains ``classifier`` in place on pixels (M,C,H,W) in [0, 1] and labels (M,) int64.

    All batches have the same size, because a short one would weigh as much in the batch-norm
    statistics. The images left over, different ones in every epoch, are skipped. With an
    ``adversary`` every batch is attacked before its update. ``compiled`` runs the classifier
    through torch.compile, which pays off in long trainings on a GPU.
    """

    def __init__(
        self,
        classifier: nn.Module,
        images: Tensor,
        labels: Tensor,
        config: ClassifierTrainConfig,
        *,
        generator: Generator,
        adversary: Adversary | None = None,
        compiled: bool = False,
    ) -> None:
        if len(images) < 2:
            raise ValueError(f"images: expected >= 2, got {len(images)}")
        self.classifier = classifier
        self.images = images
        self.labels = labels
        self.config = config
        self.generator = generator
        self.adversary = adversary
        self.epochs_done, self.batches_done = 0, 0  # the latter in this epoch
        self.order = torch.arange(len(images), device=generator.device)
        self.total = torch.zeros((), device=images.device)  # of the losses in this epoch
        classifier.to(memory_format=torch.channels_last)
        self.forward = torch.compile(classifier) if compiled else classifier
        self.optimizer = torch.optim.SGD(
            classifier.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )

    @property
    def batch(self) -> int:
        """Images in every batch: config.batch, or all of them if there are fewer."""
        return min(self.config.batch, len(self.images))

    @property
    def batches(self) -> int:
        """Updates in an epoch."""
        return len(self.images) // self.batch

    def epoch(self, on_batch: Callable[[], None] = lambda: None) -> float:
        """One pass over the images in random order; returns the mean training loss.

        ``on_batch`` is called after every update. If it raises, the next call goes on from there,
        in this trainer or in one that has its state.
        """
        self.classifier.train()
        if self.batches_done == 0:
            self.order = torch.randperm(
                len(self.images), generator=self.generator, device=self.generator.device
            )
            self.total = torch.zeros((), device=self.images.device)
        for slots in self.order.split(self.batch)[self.batches_done : self.batches]:
            self.set_rate(self.epochs_done + self.batches_done / self.batches)
            self.total += self.step(slots)
            self.batches_done += 1
            on_batch()
        self.epochs_done, self.batches_done = self.epochs_done + 1, 0
        return float(self.total / self.batches)

    def set_rate(self, epoch: float) -> None:
        """Set the learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.config.rate(epoch)

    def step(self, slots: Tensor) -> Tensor:
        """One update with the images at ``slots`` (B,); returns their mean loss, on the device."""
        batch, labels = self.images[slots], self.labels[slots]
        batch = augment(batch, self.config, generator=self.generator)
        batch = batch.contiguous(memory_format=torch.channels_last)
        with arithmetic(self.config.precision, batch.device):
            if self.adversary is not None:
                self.classifier.eval()
                batch = self.adversary.attack(self.forward, batch, labels, generator=self.generator)
                self.classifier.train()
            loss = F.cross_entropy(self.forward(batch), labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume the same run exactly; on a GPU up to rounding."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "epochs_done": self.epochs_done,
            "batches_done": self.batches_done,
            "order": self.order,
            "total": self.total,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` saved, into a trainer made with the same arguments."""
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.epochs_done, self.batches_done = state["epochs_done"], state["batches_done"]
        self.order, self.total = state["order"].clone(), state["total"].clone()
