"""Torch's layers and the words of messages, by the number of spatial dimensions."""

from torch import nn

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVERAGE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}

INPUT = {1: "signal", 2: "image", 3: "volume"}
SIZES = {1: "length", 2: "height, width", 3: "depth, height, width"}
SIZES_IN_PROSE = {1: "length", 2: "height and width", 3: "depth, height and width"}


def check_dimensions(who: str, dimensions: int) -> None:
    """Refuses other numbers of spatial dimensions than 1, 2 and 3."""
    if dimensions not in CONVOLUTION:
        raise ValueError(f"{who}: dimensions must be 1, 2 or 3, got {dimensions}.")
