"""Networks assembled from invertible layers, their recipes, data and analyses."""

from zoo.cards import card
from zoo.irevnet import Bottleneck, IRevNet, irevnet_a, irevnet_b, irevnet_small
from zoo.registry import Config, config_of, create, names, register, replace_head

__all__ = [
    "Bottleneck",
    "Config",
    "IRevNet",
    "card",
    "config_of",
    "create",
    "irevnet_a",
    "irevnet_b",
    "irevnet_small",
    "names",
    "register",
    "replace_head",
]
