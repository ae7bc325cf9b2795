"""Attack libraries as they are published, on an `EOTDefense` as it is, over nets that work.

Each is given what it asks of every model and no more. They come with the dev extras; what is not
installed is skipped.
"""

import copy
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import defense.eot
from defense.eot import EOTDefense
from defense.fast.langevin import FastLangevin
from defense.langevin import LangevinConfig, langevin
from tests.digits_model import DigitsModel

EPS, STEP = 48 / 255, 12 / 255

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Model, images and labels -> the images that the tool returns."""


def auto_attack(model: nn.Module, version: str, attacks: list[str] | None = None):
    """AutoAttack of few iterations: its own are 100, or 5000 queries, and 20 gradients in rand."""
    tool = pytest.importorskip("pyautoattack").AutoAttack(
        model, eps=EPS, version=version, attacks=attacks, seed=0
    )
    tool.apgd.n_iter, tool.apgd.n_restarts, tool.square.n_queries = 10, 1, 50
    tool.apgd.eot_iter = 4 if version == "rand" else 1
    return tool


def auto(version: str, *attacks: str) -> Attack:
    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        tool = auto_attack(model, version, list(attacks) or None)
        return tool.run_standard_evaluation(x, y)[0]

    return attack


def torchattacks(name: str, **options) -> Attack:
    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        tool = getattr(pytest.importorskip("torchattacks"), name)
        return tool(model, **options)(x, y)

    return attack


def foolbox_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    foolbox = pytest.importorskip("foolbox")
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(steps=10, abs_stepsize=STEP)
    _, clipped, _ = attack(wrapped, x, y, epsilons=EPS)
    return clipped


def art_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    evasion = pytest.importorskip("art.attacks.evasion")
    classification = pytest.importorskip("art.estimators.classification")
    wrapped = classification.PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = evasion.ProjectedGradientDescent(
        wrapped, eps=EPS, eps_step=STEP, max_iter=10, num_random_init=1, verbose=False
    )
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


ATTACKS: dict[str, Attack] = {
    "AutoAttack-rand": auto("rand"),
    "AutoAttack-custom": auto("custom", "apgd-ce", "square"),
    "torchattacks-PGD": torchattacks("PGD", eps=EPS, alpha=STEP, steps=10),
    "torchattacks-EOTPGD": torchattacks("EOTPGD", eps=EPS, alpha=STEP, steps=5, eot_iter=4),
    "torchattacks-Square": torchattacks("Square", eps=EPS, n_queries=100),
    "foolbox-LinfPGD": foolbox_pgd,
    "ART-PGD": art_pgd,
}


@pytest.fixture(autouse=True)
def the_same_starts() -> Iterator[None]:
    """The tools draw from the global streams: torch's, and ART from numpy's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)
        yield


@pytest.fixture
def defend(digits_model: DigitsModel):
    """``defend("attacked")``: a fresh defense of ten steps whose noise has this seed."""

    def make(seed: int | str, *, steps: int = 10, replicas: int = 4, chain=None) -> EOTDefense:
        return EOTDefense(
            digits_model.classifier,
            digits_model.energy,
            LangevinConfig(steps, digits_model.tau),
            replicas=replicas,
            seed=seed,
            chain=chain or FastLangevin(),
        )

    return make


@pytest.fixture
def x(digits_model: DigitsModel) -> Tensor:
    return digits_model.images[:16].clone()


@pytest.fixture
def y(digits_model: DigitsModel) -> Tensor:
    return digits_model.labels[:16].clone()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


@torch.no_grad()
def loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(F.cross_entropy(model(x), y))


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    return gradient


def test_the_nets_work_the_bare_one_falls_and_the_defense_is_as_good(digits_model, defend) -> None:
    x, y = digits_model.images[:100], digits_model.labels[:100]
    bare, x_adv = digits_model.classifier, x
    for _ in range(20):
        x_adv = x_adv + STEP * input_gradient(bare, x_adv, y).sign()
        x_adv = x_adv.clamp(x - EPS, x + EPS).clamp(0.0, 1.0)
    assert accuracy(bare, x, y) >= 0.95
    assert accuracy(bare, x_adv, y) <= 0.1
    defense = defend("judge", steps=30, replicas=50)
    assert accuracy(defense, x, y) >= 0.9
    assert accuracy(defense, x_adv, y) >= 0.4


@pytest.mark.parametrize("name", ATTACKS)
def test_a_published_attack_works_on_the_defense(defend, x: Tensor, y: Tensor, name: str) -> None:
    defense, clean = defend("attacked", replicas=8), x.clone()
    x_adv = ATTACKS[name](defense, x, y)
    assert torch.equal(x, clean)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() <= EPS + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert all(parameter.grad is None for parameter in defense.parameters())
    judge = defend("judge", replicas=50)
    # A search by queries keeps what a lucky draw of the noise made look best: it is slow here.
    gain = 0.01 if "Square" in name else 0.5
    assert loss(judge, x_adv, y) > loss(judge, x, y) + gain


@pytest.mark.parametrize("most", [10, 2], ids=["whole", "pieces"])
def test_an_attack_may_go_back_through_one_graph_for_every_class(
    defend, x: Tensor, y: Tensor, monkeypatch, most: int
) -> None:
    """DeepFool does so, image by image: ten replicas of one are classified at once."""
    monkeypatch.setattr(defense.eot, "CLASSIFIER_PIXELS", most * 8 * 8)
    judge, x, y = defend("judge", replicas=50), x[:8], y[:8]
    x_adv = torchattacks("DeepFool", steps=2)(defend("attacked", replicas=10), x, y)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert loss(judge, x_adv, y) > loss(judge, x, y) + 0.05
    assert all(parameter.grad is None for parameter in judge.parameters())


@pytest.mark.parametrize("name", ["AutoAttack-rand", "AutoAttack-custom"])
def test_an_attack_that_reseeds_repeats_its_own_noise_and_never_ours(
    defend, x: Tensor, y: Tensor, name: str
) -> None:
    attack, defense, twin = ATTACKS[name], defend("attacked"), defend("attacked")
    x, y = x[:8], y[:8]
    first = attack(defense, x, y)
    noise = defense.own_generator(x.device).get_state()
    second = attack(defense, x, y)
    assert not torch.equal(second, first)
    assert not torch.equal(defense.own_generator(x.device).get_state(), noise)
    torch.manual_seed(1)
    assert torch.equal(attack(twin, x, y), first)
    assert torch.equal(twin.own_generator(x.device).get_state(), noise)


def test_a_global_seed_does_not_repeat_the_logits(defend, x: Tensor) -> None:
    defense, logits = defend("attacked"), []
    for _ in range(2):
        torch.manual_seed(0)
        logits.append(defense(x))
    assert not torch.equal(*logits)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"]
)
def test_a_copy_predicts_and_is_attacked_like_the_original(
    defend, x: Tensor, y: Tensor, copied
) -> None:
    original = defend("attacked")
    original(x)
    twin = copied(original)
    assert torch.equal(twin(x), original(x))
    attack = ATTACKS["torchattacks-PGD"]
    torch.manual_seed(2)
    expected = attack(original, x, y)
    torch.manual_seed(2)
    assert torch.equal(attack(twin, x, y), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_gradient_may_follow_a_prediction_without_one(defend, x: Tensor, y: Tensor, mode) -> None:
    defense, twin = defend("attacked"), defend("attacked")
    with mode():
        logits = defense(x)
    assert not logits.requires_grad
    assert (logits.argmax(1) == y).float().mean() >= 0.9
    twin(x)
    gradient = input_gradient(defense, x, y)
    assert torch.equal(gradient, input_gradient(twin, x, y))
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize(("version", "warned"), [("standard", True), ("rand", False)])
def test_autoattack_asks_for_its_version_for_randomized_defenses(
    defend, x: Tensor, y: Tensor, caplog, version: str, warned: bool
) -> None:
    tool = auto_attack(defend("attacked"), version)
    tool.attacks_to_run = []  # its checks come first
    with caplog.at_level(logging.WARNING, "auto-attack"):
        tool.run_standard_evaluation(x, y)
    assert ('Please use version="rand"' in caplog.text) == warned


@pytest.fixture
def checks(monkeypatch):
    """AutoAttack's checks, with their count of calls to torch's gradients at zero."""
    module = pytest.importorskip("pyautoattack.checks")
    monkeypatch.setattr(module, "funcs", dict.fromkeys(module.funcs, 0))
    return module


def test_autoattack_sees_a_randomized_defense_of_logits_with_gradients(
    defend, checks, x: Tensor, y: Tensor
) -> None:
    defense = defend("attacked")
    with pytest.warns(Warning, match="randomized defense"):
        checks.check_randomized(defense, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checks.check_range_output(defense, x) == 10
        checks.check_zero_gradients(input_gradient(defense, x, y))
        checks.check_dynamic(defense, x)


def test_autoattack_calls_the_plain_chain_dynamic(defend, checks, x: Tensor) -> None:
    with pytest.warns(Warning, match="dynamic defense"):
        checks.check_dynamic(defend("attacked", steps=2, chain=langevin), x)
