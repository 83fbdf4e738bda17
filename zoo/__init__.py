"""Networks assembled from invertible layers, their recipes, data and analyses."""

from zoo.irevnet import Bottleneck, IRevNet, irevnet_a, irevnet_b, irevnet_cifar, irevnet_small
from zoo.network import ReversibleNetwork
from zoo.registry import create, names, register

__all__ = [
    "Bottleneck",
    "IRevNet",
    "ReversibleNetwork",
    "create",
    "irevnet_a",
    "irevnet_b",
    "irevnet_cifar",
    "irevnet_small",
    "names",
    "register",
]
