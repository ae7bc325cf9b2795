"""Natural training of the classifier: SGD with a step schedule, crops and flips. No adversary."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class ClassifierTrainConfig:
    """SGD with momentum; the learning rate is divided by ten at every milestone (epochs)."""

    epochs: int
    batch: int
    learning_rate: float
    milestones: tuple[int, ...]
    momentum: float
    weight_decay: float
    crop: int  # pixels of zero padding before a random crop; 0: none
    flip: bool  # mirror half of the images


def augment(images: Tensor, config: ClassifierTrainConfig, *, generator: Generator) -> Tensor:
    """A random crop and mirror for each image by itself; (B,C,S,S) pixels -> the same shape."""
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


class ClassifierTrainer:
    """Trains ``classifier`` in place on pixels (M,C,S,S) in [0, 1] and labels (M,) int64."""

    def __init__(
        self,
        classifier: nn.Module,
        images: Tensor,
        labels: Tensor,
        config: ClassifierTrainConfig,
        *,
        generator: Generator,
    ) -> None:
        self.classifier = classifier
        self.images = images
        self.labels = labels
        self.config = config
        self.generator = generator
        self.epochs_done = 0
        self.optimizer = torch.optim.SGD(
            classifier.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(
            self.optimizer, list(config.milestones), gamma=0.1
        )

    def epoch(self) -> float:
        """One pass over the images in random order; returns the mean training loss."""
        self.classifier.train()
        order = torch.randperm(
            len(self.images), generator=self.generator, device=self.generator.device
        )
        total = torch.zeros((), device=self.images.device)
        for slots in order.split(self.config.batch):
            batch = augment(self.images[slots], self.config, generator=self.generator)
            loss = F.cross_entropy(self.classifier(batch), self.labels[slots])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += loss.detach() * len(slots)
        self.schedule.step()
        self.epochs_done += 1
        return float(total / len(self.images))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on as if it had never stopped."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "epochs_done": self.epochs_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` saved, into a trainer made with the same arguments."""
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.epochs_done = state["epochs_done"]
