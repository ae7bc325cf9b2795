"""The method on one page: a classifier, its defense, and the attack that measures the defense.

Hill, Mitchell and Zhu, "Stochastic Security: Adversarial Defense Using Long-Run Dynamics of
Energy-Based Models" (ICLR 2021), on real 8x8 digits, in a minute: `python example.py`. Equation
numbers are the paper's.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from defense import (
    AttackConfig,
    ConvEnergy,
    EOTDefense,
    FastLangevin,
    LangevinConfig,
    LangevinPurifier,
    ThreatModel,
    freeze,
    run_attack,
)
from defense.bank import ImageBank, NoisyImages
from defense.ebm_training import EBMTrainConfig, EBMTrainer
from defense.pixels import to_net

TAU = 0.08  # step size of the Langevin chains, in units where an image spans [-1, 1]
K = 50  # steps of a purifying chain
H_ADV, H_DEF = 7, 50  # purified copies per attack gradient, and per verdict

torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)

# 1. Data: pixels in [0, 1].
digits = load_digits()
pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=generator)
train, test = order[:1500], order[1500:1600]

# 2. A naturally trained classifier: no adversarial training.
classifier = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
    *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 10)),
)
optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
for _ in range(15):
    for batch in train[torch.randperm(len(train), generator=generator)].split(50):
        loss = nn.functional.cross_entropy(classifier(pixels[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
freeze(classifier)

# 3. An energy U, trained without labels (Algorithm 2). Each update compares data with short chains
#    from a persistent bank. Adam makes short-run samples realistic; SGD then makes long-run samples
#    look like them.
energy = ConvEnergy(image_size=8, channels=1, width=16)
images = to_net(pixels[train])
bank = ImageBank.uniform(images.shape, generator=generator)
chain = FastLangevin()
for name in ("adam", "sgd"):
    config = EBMTrainConfig(name, 2e-3, 100, LangevinConfig(steps=4, tau=TAU), "float32")
    trainer = EBMTrainer(
        energy, NoisyImages(images, 0.12), bank, config, generator=generator, chain=chain
    )
    for _ in range(700):
        trainer.update()
freeze(energy)

# 4. The defense: T(x) is the end of a long Langevin chain that starts at x (3); a prediction is the
#    mean of the logits of H purified copies (5).
purifier = LangevinPurifier(energy, LangevinConfig(steps=K, tau=TAU), chain=chain)
attackers_view = EOTDefense(classifier, purifier, replicas=H_ADV, seed="attacker")
defended = EOTDefense(classifier, purifier, replicas=H_DEF, seed="judge")

# 5. The attacks, in the l_inf ball |x_adv - x| <= 48/255 (7). PGD attacks the bare classifier, and
#    its images are transferred to the defense. BPDA+EOT (9, 10) averages the gradients at purified
#    copies; what it finds is judged again with fresh noise (Algorithm 1).
ball = ThreatModel("linf", 48)
x, y = pixels[test], labels[test]
pgd = AttackConfig(ball, steps=15, step_255=12, stop_at_break=False)
bpda_eot = AttackConfig(ball, steps=15, step_255=12)
bare = run_attack(classifier, classifier, x, y, pgd, generator=generator)
attacked = run_attack(attackers_view, defended, x, y, bpda_eot, generator=generator)
with torch.no_grad():
    transferred = defended(bare.adversarial).argmax(1) == y

print(f"accuracy on {len(y)} test images      natural  PGD on the bare classifier  BPDA+EOT")
print(
    f"bare classifier            {bare.clean_correct(y).float().mean():10.2f}  "
    f"{bare.robust(y).float().mean():26.2f}         -"
)
print(
    f"with {K} Langevin steps      {attacked.clean_correct(y).float().mean():10.2f}  "
    f"{transferred.float().mean():26.2f}  {attacked.robust(y).float().mean():8.2f}"
)
