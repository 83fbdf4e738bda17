"""Networks assembled from invertible layers, their recipes, data and analyses."""

from zoo.irevnet import Bottleneck, IRevNet, irevnet_a, irevnet_b, irevnet_small
from zoo.network import ReversibleNetwork
from zoo.registry import create, names, register
from zoo.unet import IUNet, iunet
from zoo.vit import MLP, Attention, RevViT, revvit_s

__all__ = [
    "MLP",
    "Attention",
    "Bottleneck",
    "IRevNet",
    "IUNet",
    "RevViT",
    "ReversibleNetwork",
    "create",
    "irevnet_a",
    "irevnet_b",
    "irevnet_small",
    "iunet",
    "names",
    "register",
    "revvit_s",
]
