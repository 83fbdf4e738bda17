"""Lets ``torch.hub.load`` get the networks of the zoo: every model's name is an entry point.

net = torch.hub.load("OWNER/REPOSITORY", "irevnet_b", num_classes=10)
net = torch.hub.load("path/to/a/checkout", "irevnet_small", source="local")
"""

import functools
import typing

from torch import nn

import zoo

dependencies = ["torch", "torchvision", "einops", "safetensors", "rich"]


def _entry(name: str) -> "typing.Callable[..., nn.Module]":
    """What builds a model, with the documentation of its builder, and ``weights`` as :func:`zoo.create` has them."""

    @functools.wraps(getattr(zoo, name, zoo.create))
    def build(**options: typing.Any) -> nn.Module:
        return zoo.create(name, **options)

    return build


globals().update({_name: _entry(_name) for _name in zoo.names()})
