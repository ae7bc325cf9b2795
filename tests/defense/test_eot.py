"""The defended classifier: replicas, the straight-through gradient, its own noise, its users."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import defense.eot
from defense.attack import loss_gradient
from defense.eot import EOTDefense
from defense.langevin import LangevinConfig
from defense.pixels import from_bytes, to_net, to_pixels
from defense.through import straight_through

TWO_STEPS = LangevinConfig(steps=2, tau=0.1)


class FirstPixels(nn.Module):
    """Logits are the first three pixels of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3]


class NumberingChain:
    """Writes into the first pixel which of all copies so far this one is."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, energy, x, config, *, generator, log=None) -> Tensor:
        x, first = x.clone(), sum(self.sizes)
        x[:, 0, 0, 0] = to_net(torch.arange(first, first + len(x)).float())
        self.sizes.append(len(x))
        return x


@pytest.fixture
def make_defense(tiny_classifier, tiny_energy):
    """``make_defense(replicas=3, seed=1)``: the tiny nets and chains of two steps."""

    def make(config: LangevinConfig = TWO_STEPS, **options) -> EOTDefense:
        return EOTDefense(tiny_classifier, tiny_energy, config, **{"seed": 0, **options})

    return make


def test_pixels_and_net_range_are_inverse_and_meet_at_the_ends() -> None:
    ends = torch.tensor([0.0, 0.5, 1.0])
    assert to_net(ends).tolist() == [-1.0, 0.0, 1.0]
    assert to_pixels(to_net(ends)).tolist() == ends.tolist()
    assert from_bytes(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == [
        0.0,
        pytest.approx(0.2),
        1.0,
    ]


def test_without_steps_one_replica_is_the_classifier(make_defense, tiny_classifier, images) -> None:
    defense = make_defense(LangevinConfig(0, 0.1), replicas=1)
    y = torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(defense(images), tiny_classifier(images))
    expected = loss_gradient(tiny_classifier, images, y)[0]
    assert torch.equal(loss_gradient(defense, images, y)[0], expected)


@pytest.mark.parametrize("max_chains", [1, 2, 5, 1000])
@pytest.mark.parametrize("count", [1, 3])
def test_replica_r_of_image_b_comes_from_image_b(max_chains: int, count: int) -> None:
    chain, replicas = NumberingChain(), 4
    defense = EOTDefense(
        FirstPixels(),
        nn.Identity(),
        TWO_STEPS,
        replicas=replicas,
        max_chains=max_chains,
        chain=chain,
    )
    x = torch.zeros(count, 1, 2, 2)
    x[:, 0, 0, 1] = torch.arange(count) / 4
    logits = defense.replica_logits(x)
    assert logits.shape == (replicas, count, 3)
    assert torch.equal(
        logits[:, :, 0], torch.arange(replicas * count).float().view(replicas, count)
    )
    assert torch.equal(logits[:, :, 1], x[:, 0, 0, 1].expand(replicas, count))
    assert max(chain.sizes) == min(max_chains, replicas * count)
    assert sum(chain.sizes) == replicas * count


def test_chains_start_at_the_image_in_net_range_and_end_in_pixels(quadratic) -> None:
    config = LangevinConfig(steps=3, tau=0.0)
    defense = EOTDefense(FirstPixels(), quadratic(0.1), config, replicas=2)
    x = torch.tensor([0.0, 0.25, 1.0, 0.5]).view(1, 1, 2, 2)
    expected = (0.9**3 * (2 * x - 1) + 1) / 2
    torch.testing.assert_close(defense.purify(x), expected)
    torch.testing.assert_close(defense(x), expected.flatten(1)[:, :3])


def test_purified_pixels_are_not_clamped(quadratic) -> None:
    config = LangevinConfig(steps=1, tau=1.0)
    defense = EOTDefense(FirstPixels(), quadratic(0.0), config, replicas=1)
    purified = defense.purify(torch.full((1, 1, 20, 20), 0.5))
    assert purified.min() < -0.2
    assert purified.max() > 1.2


def test_straight_through_has_the_second_value_and_the_first_gradient(seeded) -> None:
    x, purified = torch.rand(2, 3, 1, 4, 4, generator=seeded())
    x, purified = x.clone().requires_grad_(True), purified.clone().requires_grad_(True)
    out = straight_through(x, purified)
    weights = torch.randn(out.shape, generator=seeded(1))
    (weights * out).sum().backward()
    assert torch.equal(out, purified)
    assert out.data_ptr() != purified.data_ptr()
    assert torch.equal(x.grad, weights)
    assert purified.grad is None


def test_the_classifier_is_given_the_purified_images_exactly(tiny_energy, images) -> None:
    """Dark pixels have digits that x + (purified - x) would round away."""
    images, replicas = images**4, 3
    defense, twin, third = (
        EOTDefense(nn.Flatten(), tiny_energy, TWO_STEPS, replicas=replicas, seed=0)
        for _ in range(3)
    )
    copies = images.repeat(replicas, 1, 1, 1)
    purified = defense.purify(copies)
    assert (purified - copies).abs().max() > 0.05
    assert not torch.equal(copies + (purified - copies), purified)
    assert torch.equal(twin.replica_logits(images), purified.view(replicas, 5, 64))
    differentiable = third.replica_logits(images.clone().requires_grad_(True))
    assert torch.equal(differentiable, purified.view(replicas, 5, 64))


def test_the_gradient_is_equation_10_times_the_number_of_replicas(make_defense, images) -> None:
    replicas, y = 4, torch.tensor([0, 1, 2, 0, 1])
    purified = make_defense(replicas=replicas).purify(images.repeat(replicas, 1, 1, 1))
    purified.requires_grad_(True)
    defense = make_defense(replicas=replicas)
    mean_logits = defense.classifier(purified).view(replicas, 5, 3).mean(0)
    F.cross_entropy(mean_logits, y, reduction="sum").backward()
    equation_10 = purified.grad.view(replicas, *images.shape).mean(0)
    gradient, logits = loss_gradient(defense, images, y)
    torch.testing.assert_close(gradient, replicas * equation_10)
    torch.testing.assert_close(logits, mean_logits)


def test_the_gradient_through_linear_logits_is_known(tiny_energy, images) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    defense, twin = (
        EOTDefense(linear, tiny_energy, TWO_STEPS, replicas=6, seed=0) for _ in range(2)
    )
    y = torch.tensor([0, 1, 2, 0, 1])
    gradient, _ = loss_gradient(defense, images, y)
    error = twin(images).softmax(1) - F.one_hot(y, 3)
    torch.testing.assert_close(gradient.flatten(1), (error @ linear[1].weight).detach())


def test_forward_is_the_mean_of_the_replicas(make_defense, images) -> None:
    logits = make_defense(replicas=4).replica_logits(images)
    assert torch.equal(make_defense(replicas=4)(images), logits.mean(0))
    assert not torch.equal(logits[0], logits[1])


def test_noise_is_the_modules_own_and_goes_on(make_defense, images) -> None:
    defense = make_defense(replicas=2, seed="target")
    calls = []
    for _ in range(3):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        calls.append(defense(images))
        assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(calls[0], calls[1])
    assert not torch.equal(calls[1], calls[2])
    twin = make_defense(replicas=2, seed="target")
    assert all(torch.equal(twin(images), call) for call in calls)
    assert not torch.equal(make_defense(replicas=2, seed="surrogate")(images), calls[0])


def test_a_given_generator_replaces_the_modules_own(make_defense, images, seeded) -> None:
    defense, untouched = make_defense(replicas=2), make_defense(replicas=2)
    first = defense(images, generator=seeded(1))
    assert torch.equal(first, defense(images, generator=seeded(1)))
    assert not torch.equal(first, defense(images, generator=seeded(2)))
    assert torch.equal(defense(images), untouched(images))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_go_on_with_their_own_noise_from_where_they_are(
    make_defense, images, copied
) -> None:
    fresh, defense = make_defense(replicas=2), make_defense(replicas=2)
    assert torch.equal(copied(fresh)(images), defense(images))
    twin = copied(defense)
    expected = [twin(images) for _ in range(2)]
    assert all(torch.equal(defense(images), logits) for logits in expected)


def test_max_chains_changes_only_the_order_of_the_noise(make_defense, images) -> None:
    still = LangevinConfig(steps=2, tau=0.0)
    whole = make_defense(still, replicas=3)(images)
    for max_chains in (1, 4, 15):
        parts = make_defense(still, replicas=3, max_chains=max_chains)(images)
        torch.testing.assert_close(parts, whole)


def test_max_chains_does_not_change_the_gradient(make_defense, images) -> None:
    still, y = LangevinConfig(steps=2, tau=0.0), torch.tensor([0, 1, 2, 0, 1])
    whole, _ = loss_gradient(make_defense(still, replicas=3), images, y)
    parts, _ = loss_gradient(make_defense(still, replicas=3, max_chains=4), images, y)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("pieces", [1, 4, 15])
def test_the_classifiers_pieces_change_nothing(make_defense, images, monkeypatch, pieces) -> None:
    y = torch.tensor([0, 1, 2, 0, 1])
    whole = make_defense(replicas=3).replica_logits(images)
    gradient, _ = loss_gradient(make_defense(replicas=3), images, y)
    monkeypatch.setattr(defense.eot, "CLASSIFIER_PIXELS", pieces * 8 * 8)
    in_pieces = make_defense(replicas=3)
    sizes: list[int] = []
    in_pieces.classifier.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    torch.testing.assert_close(in_pieces.replica_logits(images), whole)
    assert max(sizes) == pieces
    again, _ = loss_gradient(make_defense(replicas=3), images, y)
    torch.testing.assert_close(again, gradient)


@pytest.mark.parametrize(("most", "calls"), [(15, 1), (4, 8)])
def test_only_several_pieces_are_classified_again_on_the_way_back(
    make_defense, images, monkeypatch, most: int, calls: int
) -> None:
    monkeypatch.setattr(defense.eot, "CLASSIFIER_PIXELS", most * 8 * 8)
    defended, made = make_defense(replicas=3), []
    defended.classifier.register_forward_pre_hook(lambda *_: made.append(1))
    loss_gradient(defended, images, torch.tensor([0, 1, 2, 0, 1]))
    assert len(made) == calls


@pytest.mark.parametrize(("pixels", "sizes"), [(4 * 64, [4, 2]), (1, [1] * 6)])
def test_a_piece_is_measured_in_pixels(brightness, quadratic, monkeypatch, pixels, sizes) -> None:
    monkeypatch.setattr(defense.eot, "CLASSIFIER_PIXELS", pixels)
    defended = EOTDefense(brightness(0.5), quadratic(0.1), TWO_STEPS, replicas=2)
    defended(torch.rand(3, 3, 8, 8))
    assert defended.classifier.batch_sizes == sizes


def test_a_batch_of_one_works(make_defense, images) -> None:
    defense = make_defense(replicas=3)
    one = images[:1]
    assert defense.replica_logits(one).shape == (3, 1, 3)
    gradient, logits = loss_gradient(defense, one, torch.tensor([0]))
    assert gradient.shape == one.shape
    assert logits.shape == (1, 3)


def test_an_empty_batch_has_no_logits(make_defense, images) -> None:
    assert make_defense(replicas=3)(images[:0]).shape == (0, 3)


class Modes(nn.Module):
    """Logits are the first three pixels; notes in which mode it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Dropout(0.9)
        self.asked_in_training: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked_in_training.append(self.training or self.part.training)
        return self.part(x).flatten(1)[:, :3]


@pytest.mark.parametrize("pieces", [False, True])
def test_networks_are_asked_in_evaluation_mode_and_left_as_they_were(
    quadratic, images, monkeypatch, pieces: bool
) -> None:
    """On the way back, too, where the activations of many pieces are made again."""
    if pieces:
        monkeypatch.setattr(defense.eot, "CLASSIFIER_PIXELS", 2 * 8 * 8)
    classifier = Modes().train()
    defended = EOTDefense(classifier, quadratic(0.1), TWO_STEPS, replicas=2)
    x = images.clone().requires_grad_(True)
    logits = defended(x)
    assert classifier.training
    assert classifier.part.training
    logits.sum().backward()
    assert len(classifier.asked_in_training) >= (2 if pieces else 1)
    assert not any(classifier.asked_in_training)
    assert classifier.training
    defended.eval()
    defended.train()
    assert not defended.training
    assert classifier.training, "the mode of the parts is their owner's"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_predictions_need_no_graph(make_defense, images, mode) -> None:
    expected = make_defense(replicas=2)(images)
    with mode():
        logits = make_defense(replicas=2)(images.clone())
    assert torch.equal(logits, expected)
    assert not logits.requires_grad


def test_bad_arguments_are_said(make_defense, images) -> None:
    with pytest.raises(ValueError, match="replicas: expected a whole number >= 1, got 0"):
        make_defense(replicas=0)
    with pytest.raises(ValueError, match="max_chains: expected >= 1, got 0"):
        make_defense(replicas=1, max_chains=0)
    with pytest.raises(
        ValueError, match=r"x: expected images \(B,C,H,W\), floating.* got \(1, 8, 8\)"
    ):
        make_defense(replicas=1)(images[0])


def third_party_apgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> list[Tensor]:
    """Sign steps as AutoAttack's APGD makes them: global seed, gradients averaged over calls."""
    torch.random.manual_seed(0)
    x_adv = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    iterates = []
    for _ in range(3):
        x_adv.requires_grad_()
        gradient = torch.zeros_like(x)
        for _ in range(2):
            with torch.enable_grad():
                loss = F.cross_entropy(model(x_adv), y, reduction="none").sum()
            gradient += torch.autograd.grad(loss, [x_adv])[0].detach()
        x_adv = x_adv.detach() + 0.5 * eps * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
        iterates.append(x_adv.clone())
    return iterates


def test_a_third_party_attack_runs_and_cannot_repeat_the_noise(make_defense, images) -> None:
    defense = make_defense(replicas=2)
    with torch.no_grad():
        y = defense(images).argmax(1)
    runs = [third_party_apgd(defense, images, y, eps=0.1) for _ in range(2)]
    with torch.no_grad():
        before, after = (
            F.cross_entropy(make_defense(replicas=32)(x), y) for x in (images, runs[0][-1])
        )
    assert after > before
    assert not torch.equal(runs[0][-1], runs[1][-1])
    assert all(parameter.grad is None for parameter in defense.parameters())


@pytest.mark.parametrize("factor", [255.0, -1.0])
def test_pixels_of_another_range_are_refused(make_defense, images, factor: float) -> None:
    with pytest.raises(ValueError, match=r"x: expected pixels in \[0, 1\]"):
        make_defense(replicas=2)(factor * images)
    with pytest.raises(ValueError, match="floating"):
        make_defense(replicas=2)((255 * images).to(torch.uint8))


def test_without_a_seed_every_defense_has_noise_of_its_own(tiny_classifier, tiny_energy, images):
    first, second = (
        EOTDefense(tiny_classifier, tiny_energy, TWO_STEPS, replicas=2) for _ in range(2)
    )
    logits = first(images)
    assert not torch.equal(logits, second(images))
    again = EOTDefense(tiny_classifier, tiny_energy, TWO_STEPS, replicas=2, seed=first.seed)
    assert torch.equal(again(images), logits), "the seed that it drew repeats it"


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda z: (z, z), "classifier: expected logits .* got a tuple of 2"),
        (lambda z: {"scores": z}, r"classifier: .* got a dict with \['scores'\]"),
        (lambda z: z[:, :, None], r"classifier: expected logits \(10, classes\)"),
        (lambda z: z[0], r"classifier: expected logits \(10, classes\)"),
        (lambda z: z.long(), "classifier: .* torch.int64"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(quadratic, images, wrap, message: str) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor):
            return wrap(x.flatten(1)[:, :3])

    with pytest.raises(ValueError, match=message):
        EOTDefense(Wrapped(), quadratic(0.1), TWO_STEPS, replicas=2)(images)


@pytest.mark.parametrize(
    "wrap",
    [lambda z: (z,), lambda z: {"logits": z}, lambda z: SimpleNamespace(logits=z, loss=None)],
)
def test_logits_are_found_where_there_is_no_doubt(quadratic, images, wrap) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor):
            return wrap(x.flatten(1)[:, :3])

    logits = EOTDefense(Wrapped(), quadratic(0.1), TWO_STEPS, replicas=2, seed=1)(images)
    plain = EOTDefense(FirstPixels(), quadratic(0.1), TWO_STEPS, replicas=2, seed=1)(images)
    assert torch.equal(logits, plain)


@pytest.mark.parametrize("shift", [-1.0, -0.5, 0.2])
def test_images_in_another_range_are_refused(make_defense, images, shift: float) -> None:
    with pytest.raises(ValueError, match=r"x: expected pixels in \[0, 1\]"):
        make_defense(replicas=1)(images + shift)
    make_defense(replicas=1)((images + shift / 20).clone())  # an attack looks ahead
