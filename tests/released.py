"""The network that was released in 2018, in plain torch: what the conversion is compared with."""

import torch
from torch import nn

from zoo.convert import main

THIN = {"blocks": (2, 1), "classes": 5}
B = {"blocks": (6, 16, 72, 6), "classes": 1000}
FLAG = "--execute-code-in-checkpoint"


def psi(x):
    """Channel (2i + j)·C + c is pixel (i, j) of channel c in each square of 2 by 2."""
    return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1)


def psi_inverse(y):
    batch, channels, height, width = y.shape
    x = y.new_empty(batch, channels // 4, 2 * height, 2 * width)
    for k, part in enumerate(y.chunk(4, dim=1)):
        x[:, :, k // 2 :: 2, k % 2 :: 2] = part
    return x


class Block(nn.Module):
    """(x1, x2) -> (psi x2, psi x1 + F x2), with psi where the stride is 2."""

    def __init__(self, reads, gives, stride, first):
        super().__init__()
        middle = gives // 4
        start = [] if first else [nn.BatchNorm2d(reads), nn.ReLU(inplace=True)]
        self.bottleneck_block = nn.Sequential(
            *start,
            nn.Conv2d(reads, middle, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False),
            nn.Dropout(0.0),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, gives, 3, padding=1, bias=False),
        )
        self.stride = stride

    def forward(self, x1, x2):
        f = self.bottleneck_block(x2.clone())  # ReLU is in place
        return (psi(x2), psi(x1) + f) if self.stride == 2 else (x2, x1 + f)

    def inverse(self, y1, y2):
        x2 = psi_inverse(y1) if self.stride == 2 else y1
        x1 = y2 - self.bottleneck_block(x2.clone())
        return psi_inverse(x1) if self.stride == 2 else x1, x2


class Oracle(nn.Module):
    def __init__(self, *, blocks, classes):
        super().__init__()
        self.stack, width = nn.ModuleList(), 6
        for count in blocks:
            for i in range(count):
                gives = width if i else 4 * width
                self.stack.append(Block(width, gives, 1 if i else 2, first=not self.stack))
                width = gives
        self.bn1 = nn.BatchNorm2d(2 * width, momentum=0.9)
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, image):
        x1, x2 = psi(image).chunk(2, dim=1)
        for block in self.stack:
            x1, x2 = block(x1, x2)
        features = torch.cat((x1, x2), dim=1)
        height, width = features.shape[2:]
        pooled = nn.functional.avg_pool2d(self.bn1(features).relu(), (height, width))  # 7 by 7 of 224 by 224 pixels
        return self.linear(pooled.flatten(1)), features

    def inverse(self, features):
        x1, x2 = features.chunk(2, dim=1)
        for block in reversed(self.stack):
            x1, x2 = block.inverse(x1, x2)
        return psi_inverse(torch.cat((x1, x2), dim=1))


def oracle(seed=0, dtype=torch.float32, **sizes):
    """With random statistics, scales and shifts."""
    torch.manual_seed(seed)
    net = Oracle(**sizes or THIN)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            module.num_batches_tracked.random_(1000)
    return net.to(dtype)


def run(capsys, *arguments):
    code = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, folder, *arguments):
    """One line, exit code 2, and nothing left behind."""
    before = sorted(folder.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert sorted(folder.rglob("*")) == before
    return err


def same(found, expected):
    assert list(found) == list(expected)
    assert all(t.dtype == expected[key].dtype and torch.equal(t, expected[key]) for key, t in found.items())
