"""What the iterations of a residual block take and how far off they are, at worst.

    python -m benchmarks.residual

The weight is orthogonal, so that every singular value of F is at the limit. Prints the tables of docs/residual.md.
"""

from typing import Any

import torch
from torch import nn

from invertible import Residual

BATCHES = 200


def block(**options: Any) -> Residual:
    """A linear F of 8 dimensions with every singular value at the limit."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 8)
    nn.init.orthogonal_(linear.weight, gain=2)
    return Residual(linear, **options)


@torch.no_grad()
def main() -> None:
    """Prints iterations and errors of the inverse, then errors of the log-determinants."""
    torch.set_num_threads(1)
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
    for lipschitz in (0.5, 0.9, 0.97):
        layer = block(lipschitz=lipschitz)
        off = (layer.inverse(layer(x)) - x).square().mean(1).sqrt().max()
        print(f"lipschitz {lipschitz}: {layer.solved}, true error {float(off):.1e}")
    for lipschitz in (0.5, 0.9):
        true = block(log_det="exact", lipschitz=lipschitz).forward_and_log_det(x)[1]
        kinds: list[dict[str, Any]] = [{"terms": terms} for terms in (2, 10, 30)]
        kinds += [{"log_det": "roulette", "probes": probes} for probes in (1, 8)]
        for options in kinds:
            layer = block(lipschitz=lipschitz, **options)
            torch.manual_seed(2)
            off = torch.stack([layer.forward_and_log_det(x)[1] for _ in range(BATCHES)]) - true
            error = off.mean(1).std() / BATCHES**0.5
            print(f"lipschitz {lipschitz}, {options}: mean {off.mean():+.3f} ± {error:.3f}, deviation {off.std():.2f}")


if __name__ == "__main__":
    main()
