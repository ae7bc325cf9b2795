"""What `stochsec bench` times: each job in plain torch, and with this library.

Run as a module, this file times one plain torch job in its own process. The fast chain and large
tensors of other jobs change the memory allocator of their process; sharing it would make the
plain torch job faster than it is for a user.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from defense.attack import loss_gradient
from defense.bank import CompactBank, NoisyImages
from defense.classifier_training import ClassifierTrainConfig, ClassifierTrainer
from defense.ebm_training import EBMTrainConfig, EBMTrainer
from defense.energy import ConvEnergy
from defense.eot import EOTDefense
from defense.fast.langevin import FastLangevin
from defense.fast.precision import Precision
from defense.inference import flops, freeze
from defense.langevin import LangevinConfig
from defense.nets.wide_resnet import WideResNet
from defense.rng import make_generator
from defense.threat import ThreatModel
from stages.core.engine import plain_chain

Work = Callable[[], object]

TAU, RATE = 0.01, 1e-4
BANK = 1000  # images in the bank and the training set
REPLICAS = 15  # of the attacked images
LONG_MS = 100.0  # calls that take less are timed many at once


@dataclass(frozen=True)
class Job:
    """One thing to time. ``batch`` images (attack_step: chains) go through ``steps`` steps."""

    task: str  # langevin, ebm_update, attack_step, classifier_step
    device: str
    batch: int
    steps: int = 0
    side: int = 32
    channels: int = 3
    width: int = 32  # of the energy
    depth: int = 16  # of the classifier
    widening: int = 2

    def generator(self) -> torch.Generator:
        """Its own stream."""
        return make_generator(0, self.task, device=torch.device(self.device))

    def energy(self) -> ConvEnergy:
        """With its initial weights: speed does not depend on them."""
        net = ConvEnergy(image_size=self.side, channels=self.channels, width=self.width)
        return net.to(self.device)

    def classifier(self) -> WideResNet:
        """With its initial weights, in training mode."""
        net = WideResNet(depth=self.depth, width=self.widening, classes=10, channels=self.channels)
        return net.to(self.device)

    def pixels(self, count: int) -> Tensor:
        """Noise images (count,C,H,W) in [0, 1]."""
        shape = (count, self.channels, self.side, self.side)
        return torch.rand(shape, device=self.device)

    def labels(self, count: int) -> Tensor:
        """Classes (count,)."""
        return torch.randint(10, (count,), device=self.device)

    def image_steps(self) -> int:
        """Langevin steps of single images in one call; of the classifier's update, its images."""
        return self.batch * max(1, self.steps)

    def flops(self) -> int:
        """Multiplications and additions in the products of one call, counted on no device."""
        meta = Job(**{**asdict(self), "device": "meta"})
        chain = self.batch * self.steps * flops(meta.energy(), meta.pixels(1))
        if self.task == "classifier_step":
            return self.batch * flops(meta.classifier().eval(), meta.pixels(1), weights=True)
        if self.task == "attack_step":
            once = flops(meta.classifier().eval(), meta.pixels(1))
            return chain + self.batch * once
        if self.task == "ebm_update":
            return chain + 2 * self.batch * flops(meta.energy(), meta.pixels(1), weights=True)
        return chain


# As a user would write it: weights that require gradients, torch's defaults.


def usual_chain(energy: ConvEnergy, x: Tensor, steps: int) -> Tensor:
    """The authors' kind of loop."""
    for _ in range(steps):
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x).sum(), x)
        x = (x - gradient + TAU * torch.randn_like(x)).detach()
    return x


def backward_chain(energy: ConvEnergy, x: Tensor, steps: int) -> Tensor:
    """The same with ``backward()``, which computes the weights' gradients too."""
    for _ in range(steps):
        x.requires_grad_(True)
        energy(x).sum().backward()
        assert x.grad is not None
        x = (x - x.grad + TAU * torch.randn_like(x)).detach()
    return x


def usual(job: Job, *, backward: bool = False) -> Work:
    """The job in plain torch."""
    torch.manual_seed(0)
    energy, classifier = job.energy(), job.classifier()
    x, labels = job.pixels(max(job.batch, BANK)), job.labels(max(job.batch, BANK))
    chain = backward_chain if backward else usual_chain

    if job.task == "langevin":
        return lambda: chain(energy, x[: job.batch].clone(), job.steps)

    if job.task == "ebm_update":
        bank, adam = torch.rand_like(x), torch.optim.Adam(energy.parameters(), lr=RATE)

        def ebm_update() -> None:
            data = x[torch.randint(len(x), (job.batch,))]
            data = data + TAU * torch.randn_like(data)
            slots = torch.randperm(len(bank))[: job.batch]
            states = bank[slots] = chain(energy, bank[slots], job.steps)
            loss = (energy(data).mean() - energy(states).mean()) / (TAU**2 / 2)
            adam.zero_grad()
            loss.backward()
            adam.step()

        return ebm_update

    if job.task == "attack_step":
        classifier.eval()
        clean, y = x[: job.batch // REPLICAS], labels[: job.batch // REPLICAS]

        def attack_step() -> None:
            purified = chain(energy, clean.repeat(REPLICAS, 1, 1, 1), job.steps)
            loss = F.cross_entropy(classifier(purified.requires_grad_(True)), y.repeat(REPLICAS))
            (gradient,) = torch.autograd.grad(loss, purified)
            mean = gradient.unflatten(0, (REPLICAS, len(clean))).mean(0)
            stepped = clean + 2 / 255 * mean.sign()
            torch.clamp(torch.min(torch.max(stepped, clean - 8 / 255), clean + 8 / 255), 0, 1)

        return attack_step

    sgd = torch.optim.SGD(classifier.parameters(), lr=RATE, momentum=0.9, weight_decay=RATE)

    def classifier_step() -> None:
        loss = F.cross_entropy(classifier(x[: job.batch]), labels[: job.batch])
        sgd.zero_grad()
        loss.backward()
        sgd.step()

    return classifier_step


# As this library does it.


def ours(job: Job, engine: str, precision: Precision) -> Work:
    """The job with the plain or the fast chain, in a precision."""
    torch.manual_seed(0)
    chain = plain_chain(precision) if engine == "plain" else FastLangevin(precision=precision)
    config, generator = LangevinConfig(job.steps, TAU), job.generator()
    x, labels = job.pixels(max(job.batch, BANK)), job.labels(max(job.batch, BANK))

    if job.task == "langevin":
        energy = freeze(job.energy())
        return lambda: chain(energy, x[: job.batch], config, generator=generator)

    if job.task == "ebm_update":
        bank = CompactBank(torch.rand_like(x))
        about = EBMTrainConfig("adam", RATE, job.batch, config, precision)
        data = NoisyImages(x, TAU)
        return EBMTrainer(job.energy(), data, bank, about, generator=generator, chain=chain).update

    if job.task == "attack_step":
        classifier = freeze(job.classifier().to(memory_format=torch.channels_last))
        defense = EOTDefense(
            classifier, freeze(job.energy()), config, replicas=REPLICAS, chain=chain
        )
        ball = ThreatModel("linf", 8)
        clean, y = x[: job.batch // REPLICAS], labels[: job.batch // REPLICAS]

        def attack_step() -> None:
            gradient, _ = loss_gradient(defense, clean, y)
            ball.project(ball.ascend(clean, gradient, 2), clean)

        return attack_step

    schedule = ClassifierTrainConfig(
        epochs=1,
        batch=job.batch,
        learning_rate=RATE,
        schedule="one_cycle",
        milestones=(),
        warm_up=0.3,
        momentum=0.9,
        weight_decay=RATE,
        crop=0,
        flip=False,
        precision=precision,
    )
    trainer = ClassifierTrainer(job.classifier(), x, labels, schedule, generator=generator)
    slots = torch.arange(job.batch, device=job.device)
    return lambda: trainer.step(slots)


def milliseconds(work: Work, device: str) -> float:
    """Wall time of one call in ms; short calls are averaged over many, after one warm-up call."""
    once = _elapsed(work, device, 1)
    if once > LONG_MS:
        return once
    return _elapsed(work, device, 1 + int(LONG_MS / once))


def _elapsed(work: Work, device: str, calls: int) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start) / calls


def serve() -> None:
    """Time the job of the first argument (JSON) at every line of standard input."""
    job, backward = json.loads(sys.argv[1])
    work = usual(Job(**job), backward=backward)
    for _ in sys.stdin:
        print(milliseconds(work, job["device"]), flush=True)


if __name__ == "__main__":
    serve()
