"""The classifier to be secured: a Wide ResNet (Zagoruyko & Komodakis 2016) on pixels in [0, 1]."""

import torch.nn.functional as F
from torch import Tensor, nn

from defense.pixels import to_net


class _Block(nn.Module):
    """Pre-activation residual block; as in the authors' code, the second convolution has stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=stride, padding=1)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        h = self.conv2(F.relu(self.norm2(h)))
        out: Tensor = h + self.shortcut(x)
        return out


class WideResNet(nn.Module):
    """Images (B,C,H,W) in [0, 1] -> logits (B, classes).

    ``depth`` = 6 n + 4 and ``width`` as in WRN-depth-width; WRN-28-10 is the paper's. It scales its
    input to [-1, 1]. This is the authors' variant: convolutions have biases, weights are
    initialized Xavier-uniform with gain sqrt(2), and the last normalization has momentum 0.9. It
    takes 13 % more arithmetic than the standard network, because the stride of a block is on its
    second convolution.
    """

    def __init__(self, *, depth: int, width: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth: expected 6 n + 4 with n >= 1, got {depth}")
        self.architecture = {
            "depth": depth,
            "width": width,
            "classes": classes,
            "channels": channels,
        }
        planes = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(channels, planes[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for group, stride in enumerate((1, 2, 2)):
            for i in range((depth - 4) // 6):
                inputs = planes[group] if i == 0 else planes[group + 1]
                blocks.append(_Block(inputs, planes[group + 1], stride if i == 0 else 1))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(planes[-1], momentum=0.9)
        self.head = nn.Linear(planes[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, gain=2.0**0.5)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.blocks(self.stem(to_net(x)))))
        logits: Tensor = self.head(h.mean(dim=(2, 3)))
        return logits
