"""What the gallery of tutorials needs of its own: their order, and the same random numbers in each build."""

from pathlib import Path

import torch

ORDER = [
    "build_and_invert",
    "deeper_than_memory",
    "own_layer",
    "exact_in_bf16",
    "conditional_flow",
    "interpolate_photographs",
    "resnet_to_reversible",
    "volumes",
    "where_inverses_blow_up",
]


class TutorialOrder:
    """Sorts the tutorials as a reader takes them; one that is not in ``ORDER`` comes first, and a test names it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, filename: str) -> int:
        name = Path(filename).stem
        return ORDER.index(name) if name in ORDER else -1


def seed(conf: dict, script: str) -> None:
    """Starts each tutorial with the same generators, whatever ran before it."""
    torch.manual_seed(0)
