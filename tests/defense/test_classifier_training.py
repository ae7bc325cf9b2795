"""The Wide ResNet, its augmentations and its training."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense.attack import AttackConfig, run_attack
from defense.classifier_training import (
    Adversary,
    ClassifierTrainConfig,
    ClassifierTrainer,
    augment,
)
from defense.energy import count_parameters
from defense.inference import classify, freeze
from defense.nets.wide_resnet import WideResNet
from defense.rng import make_generator
from defense.threat import ThreatModel
from tests.digits_model import split, trained_classifier


def make_config(**changes) -> ClassifierTrainConfig:
    values = {
        "epochs": 4,
        "batch": 8,
        "learning_rate": 0.05,
        "schedule": "step",
        "milestones": (2,),
        "warm_up": 0.25,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "crop": 0,
        "flip": False,
        "precision": "float32",
    }
    return ClassifierTrainConfig(**{**values, **changes})


@pytest.mark.parametrize(("classes", "parameters"), [(10, 36_489_290), (100, 36_546_980)])
def test_the_papers_network_has_36_million_parameters(classes: int, parameters: int) -> None:
    with torch.device("meta"):
        network = WideResNet(depth=28, width=10, classes=classes)
    assert count_parameters(network) == parameters


@pytest.mark.parametrize("depth", [4, 9, 11, 27, 29])
def test_depths_between_the_blocks_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth: expected 6 n \+ 4 with n >= 1, got {depth}"):
        WideResNet(depth=depth, width=1, classes=10)


@pytest.mark.parametrize("size", [4, 8, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("depth", [10, 16])
def test_other_sizes_work(size: int, channels: int, depth: int) -> None:
    torch.manual_seed(0)
    network = freeze(WideResNet(depth=depth, width=2, classes=7, channels=channels))
    x = torch.rand(3, channels, size, size)
    logits = network(x)
    assert logits.shape == (3, 7)
    alone = torch.cat([network(one) for one in x.split(1)])
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-5)


def test_the_network_scales_pixels_to_net_range_by_itself(tiny_classifier, images) -> None:
    seen: list[Tensor] = []
    tiny_classifier.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tiny_classifier(images)
    torch.testing.assert_close(seen[0], 2 * images - 1)


def test_freezing_stops_gradients_and_statistics() -> None:
    torch.manual_seed(0)
    network = WideResNet(depth=10, width=1, classes=3, channels=1)
    assert freeze(network) is network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    network(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_classifying_in_pieces_changes_nothing(tiny_classifier, images, batch: int) -> None:
    logits = classify(tiny_classifier, images.requires_grad_(True), batch=batch)
    torch.testing.assert_close(logits, tiny_classifier(images).detach())
    assert not logits.requires_grad


def distinct_images(count: int, seeded) -> Tensor:
    return torch.rand(count, 2, 5, 6, generator=seeded(1)) + 0.1


def test_no_augmentation_is_the_identity(seeded) -> None:
    x, generator = distinct_images(4, seeded), seeded()
    assert torch.equal(augment(x, make_config(), generator=generator), x)
    assert torch.equal(generator.get_state(), seeded().get_state())


def shifts_of(image: Tensor, crop: int) -> dict[tuple[int, int], Tensor]:
    """Every crop of the zero-padded image, by its offset."""
    padded, (height, width) = F.pad(image, [crop] * 4), image.shape[1:]
    offsets = [(i, j) for i in range(2 * crop + 1) for j in range(2 * crop + 1)]
    return {(i, j): padded[:, i : i + height, j : j + width] for i, j in offsets}


@pytest.mark.parametrize("crop", [1, 2])
def test_crops_shift_each_image_by_itself_into_zeros(seeded, crop: int) -> None:
    x = distinct_images(1, seeded).expand(400, -1, -1, -1) * torch.linspace(1, 2, 400).view(
        -1, 1, 1, 1
    )
    cropped = augment(x, make_config(crop=crop), generator=seeded(2))
    found = []
    for image, result in zip(x, cropped, strict=True):
        found += [o for o, shift in shifts_of(image, crop).items() if torch.equal(shift, result)]
    assert len(found) == 400
    assert len(set(found)) == (2 * crop + 1) ** 2


def test_flips_mirror_about_half_of_the_images_left_to_right(seeded) -> None:
    x = distinct_images(400, seeded)
    flipped = augment(x, make_config(flip=True), generator=seeded(2))
    mirrored = torch.tensor([torch.equal(b, a.flip(-1)) for a, b in zip(x, flipped, strict=True)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(x, flipped, strict=True)])
    assert (mirrored ^ same).all()
    assert abs(int(mirrored.sum()) - 200) < 5 * 10


def test_augmentations_follow_the_generator_alone(seeded) -> None:
    x, config, before = (
        distinct_images(9, seeded),
        make_config(crop=2, flip=True),
        torch.get_rng_state(),
    )
    original = x.clone()
    a, b, c = (augment(x, config, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(x, original)
    assert torch.equal(torch.get_rng_state(), before)


def stripes(count: int, seeded) -> tuple[Tensor, Tensor]:
    """Noisy images of vertical (0) or horizontal (1) stripes, easily told apart."""
    y = torch.arange(count) % 2
    vertical = (torch.arange(8) % 4 < 2).float().expand(1, 8, 8)
    clean = torch.stack([vertical if label == 0 else vertical.mT for label in y.tolist()])
    noise = torch.rand(count, 1, 8, 8, generator=seeded(4))
    return 0.7 * clean + 0.3 * noise, y


@pytest.fixture
def make_trainer(seeded):
    """A trainer on 27 striped images, the same at every call but for the generator's seed."""

    def make(config: ClassifierTrainConfig, seed: int = 0) -> ClassifierTrainer:
        torch.manual_seed(1)
        network = WideResNet(depth=10, width=1, classes=2, channels=1)
        x, y = stripes(27, seeded)
        return ClassifierTrainer(network, x, y, config, generator=seeded(seed))

    return make


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_resuming_equals_never_stopping(make_trainer, stop_after: int) -> None:
    config = make_config(crop=1, flip=True)
    whole, first, resumed = (make_trainer(config, seed=s) for s in (0, 0, 99))
    losses = [whole.epoch() for _ in range(4)]
    for _ in range(stop_after):
        first.epoch()
    resumed.epoch()  # go astray first: everything that counts must be in the state
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [resumed.epoch() for _ in range(4 - stop_after)] == losses[stop_after:]
    expected = whole.classifier.state_dict()
    for name, value in resumed.classifier.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert resumed.epochs_done == 4


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_an_epoch_that_was_stopped_goes_on_at_its_next_batch(make_trainer, stop_at: int) -> None:
    config = make_config(crop=1, flip=True)
    whole, stopped, resumed = (make_trainer(config, seed=s) for s in (0, 0, 99))
    losses = [whole.epoch() for _ in range(3)]
    stopped.epoch()

    def stop() -> None:
        if stopped.batches_done == stop_at:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        stopped.epoch(stop)
    resumed.epoch()
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [resumed.epoch() for _ in range(2)] == losses[1:]
    expected = whole.classifier.state_dict()
    for name, value in resumed.classifier.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_it_learns_what_can_be_told_apart(make_trainer, seeded) -> None:
    trainer = make_trainer(make_config())
    losses = [trainer.epoch() for _ in range(4)]
    x, y = stripes(40, lambda seed: seeded(seed + 1))
    logits = classify(freeze(trainer.classifier), x, batch=10)
    assert losses[-1] < 0.3 * losses[0]
    assert (logits.argmax(1) == y).float().mean() > 0.9


def rates_of(trainer: ClassifierTrainer) -> list[float]:
    """The learning rate of every update of a whole training."""
    rates: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    for _ in range(trainer.config.epochs):
        trainer.epoch()
    return rates


def test_the_learning_rate_falls_tenfold_at_each_milestone(make_trainer) -> None:
    rates = rates_of(make_trainer(make_config(milestones=(1, 3))))
    assert rates == pytest.approx([0.05] * 3 + [0.005] * 6 + [0.0005] * 3)


def test_one_cycle_rises_and_falls_linearly(make_trainer) -> None:
    rates = rates_of(make_trainer(make_config(schedule="one_cycle", warm_up=0.25)))
    up, down = [0.05 * i / 3 for i in range(3)], [0.05 * i / 9 for i in range(9, 0, -1)]
    assert rates == pytest.approx(up + down)


def test_one_cycle_without_a_warm_up_only_falls() -> None:
    config = make_config(schedule="one_cycle", warm_up=0.0)
    assert [config.rate(epoch) for epoch in (0, 2, 4)] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosine"}, "schedule: expected step or one_cycle, got 'cosine'"),
        ({"warm_up": 1.0}, r"warm_up: expected in \[0, 1\), got 1.0"),
        ({"precision": "float16"}, r"precision: expected one of .*, got 'float16'"),
    ],
)
def test_what_is_unknown_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**change)


def test_it_learns_in_bfloat16_with_float32_weights(make_trainer, seeded) -> None:
    trainer = make_trainer(make_config(precision="bfloat16", schedule="one_cycle"))
    inside: list[torch.dtype] = []
    trainer.classifier.head.register_forward_hook(lambda _, x, y: inside.append(y.dtype))
    losses = [trainer.epoch() for _ in range(4)]
    assert set(inside) == {torch.bfloat16}
    assert {p.dtype for p in trainer.classifier.parameters()} == {torch.float32}
    assert losses[-1] < 0.5 * losses[0]


def test_compiling_is_asked_for(make_trainer, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    trainer = make_trainer(make_config())
    assert not compiled
    ClassifierTrainer(
        trainer.classifier,
        trainer.images,
        trainer.labels,
        trainer.config,
        generator=trainer.generator,
        compiled=True,
    )
    assert compiled == [trainer.classifier]


class Batches(nn.Module):
    """Remembers its batches; its logits are its two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.weight.expand(len(x), 2)


def test_batches_are_equal_and_other_images_sit_out_in_every_epoch(seeded) -> None:
    images, network = torch.arange(11.0).view(11, 1, 1, 1), Batches()
    config = make_config(batch=4, learning_rate=0.0)
    trainer = ClassifierTrainer(network, images, torch.zeros(11).long(), config, generator=seeded())
    losses = [trainer.epoch() for _ in range(20)]
    assert [len(batch) for batch in network.seen] == [4, 4] * 20
    orders = [torch.cat(network.seen[i : i + 2]).flatten().tolist() for i in range(0, 40, 2)]
    assert all(len(set(order)) == 8 for order in orders), "no image twice"
    assert len({tuple(order) for order in orders}) == 20
    assert {image for order in orders for image in order} == set(range(11)), "none is left out"
    assert losses == pytest.approx([0.6931472] * 20)


def test_fewer_images_than_a_batch_are_one_batch(seeded) -> None:
    network = Batches()
    images = torch.arange(3.0).view(3, 1, 1, 1)
    config = make_config(batch=4, learning_rate=0.0)
    trainer = ClassifierTrainer(network, images, torch.zeros(3).long(), config, generator=seeded())
    trainer.epoch()
    assert [len(batch) for batch in network.seen] == [3]
    with pytest.raises(ValueError, match="images: expected >= 2, got 1"):
        ClassifierTrainer(network, images[:1], torch.zeros(1).long(), config, generator=seeded())


def test_momentum_and_weight_decay_reach_the_optimizer(make_trainer) -> None:
    (group,) = make_trainer(make_config()).optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)


def test_an_epoch_updates_the_batch_statistics_of_a_network_at_rest(make_trainer) -> None:
    trainer = make_trainer(make_config())
    state = trainer.classifier.eval().state_dict()
    before = {name: v.clone() for name, v in state.items() if name.endswith("running_mean")}
    trainer.epoch()
    after = trainer.classifier.state_dict()
    assert not any(torch.equal(after[name], value) for name, value in before.items())


def make_adversary(norm: str = "linf", steps: int = 3) -> Adversary:
    return Adversary(ThreatModel(norm, 40.0), steps=steps, step_255=20.0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_adversary_raises_the_loss_within_the_ball(
    tiny_classifier, images, seeded, norm: str
) -> None:
    labels = torch.arange(5) % 3

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(tiny_classifier(x), labels, reduction="none")

    adversary = make_adversary(norm, steps=6)
    moved = adversary.attack(tiny_classifier, images, labels, generator=seeded())
    start = adversary.threat.random_point(images, generator=seeded())
    assert adversary.threat.distance(moved, images).max() <= 40 / 255 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert loss(moved).mean() > loss(start).mean()
    assert not moved.requires_grad


def test_the_adversary_is_the_pgd_of_the_attack(tiny_classifier, images, seeded) -> None:
    """That looks at every iterate, and keeps the one of the largest margin; here the last one."""
    labels, adversary = torch.arange(5) % 3, make_adversary()
    moved = adversary.attack(tiny_classifier, images, labels, generator=seeded())
    iterates: list[Tensor] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                iterates.append(x.detach().clone())
            return tiny_classifier(x)

    config = AttackConfig(adversary.threat, steps=3, step_255=20.0, stop_at_break=False)
    run_attack(Watched(), tiny_classifier, images, labels, config, generator=seeded())
    torch.testing.assert_close(moved, iterates[-1])


def test_the_adversary_steps_as_madry_et_al_write_it(tiny_classifier, images, seeded) -> None:
    """By hand: the sign of the gradient of each image's own loss, clamped to ball and box."""
    labels = torch.arange(5) % 3
    x_adv = (images + 40 / 255 * (2 * torch.rand(images.shape, generator=seeded()) - 1)).clamp(0, 1)
    for _ in range(3):
        x_adv.requires_grad_(True)
        loss = F.cross_entropy(tiny_classifier(x_adv), labels)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + 20 / 255 * gradient.sign()
        x_adv = x_adv.clamp(images - 40 / 255, images + 40 / 255).clamp(0, 1)
    moved = make_adversary().attack(tiny_classifier, images, labels, generator=seeded())
    torch.testing.assert_close(moved, x_adv)


class Seen(nn.Module):
    """Writes down what it is given, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.training_batches: list[Tensor] = []
        self.evaluated = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.training_batches.append(x.detach().clone())
        else:
            self.evaluated += 1
        return self.layer(x.flatten(1))


def test_only_what_the_adversary_made_is_learned(seeded) -> None:
    x = torch.rand(6, 1, 8, 8, generator=seeded(1))
    y = torch.arange(6) % 10
    torch.manual_seed(0)
    network = Seen()
    adversary = make_adversary(steps=4)
    trainer = ClassifierTrainer(
        network, x, y, make_config(batch=6), generator=seeded(2), adversary=adversary
    )
    trainer.step(torch.arange(6))
    (learned,) = network.training_batches
    distance = adversary.threat.distance(learned, x)
    assert network.evaluated == 4, "the steps of the attack, in evaluation mode"
    assert network.training
    assert (distance > 30 / 255).all()
    assert (distance <= 40 / 255 + 1e-6).all()


def test_an_adversarial_training_goes_on_as_if_never_stopped(seeded) -> None:
    x = torch.rand(20, 1, 8, 8, generator=seeded(1))
    y = torch.arange(20) % 10

    def trainer() -> ClassifierTrainer:
        torch.manual_seed(0)
        network = WideResNet(depth=10, width=1, classes=10, channels=1)
        config = make_config(epochs=2)
        return ClassifierTrainer(
            network, x, y, config, generator=seeded(3), adversary=make_adversary()
        )

    whole, first, second = trainer(), trainer(), trainer()
    for _ in range(2):
        whole.epoch()
    first.epoch()
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.load_state_dict(torch.load(saved))
    second.epoch()
    for name, value in whole.classifier.state_dict().items():
        assert torch.equal(value, second.classifier.state_dict()[name]), name


def test_adversarial_training_makes_digits_robust_that_natural_training_leaves_bare() -> None:
    images, labels = split("test")
    threat = ThreatModel("linf", 48)
    torch.manual_seed(0)
    hardened = WideResNet(depth=10, width=1, classes=10, channels=1)
    trainer = ClassifierTrainer(
        hardened,
        *split("train"),
        make_config(epochs=5, batch=64, learning_rate=0.2, schedule="one_cycle", warm_up=0.3),
        generator=make_generator(0, "hardened"),
        adversary=Adversary(threat, steps=5, step_255=16),
    )
    for _ in range(5):
        trainer.epoch()
    x, y = images[:150], labels[:150]
    robust = {}
    for name, network in (("bare", trained_classifier()), ("hardened", freeze(hardened))):
        record = run_attack(
            network,
            network,
            x,
            y,
            AttackConfig(threat, steps=10, step_255=12),
            generator=make_generator(0, "attack"),
        )
        robust[name] = float(record.robust(y).float().mean())
    assert robust["bare"] < 0.1
    assert robust["hardened"] > 0.4
