"""Networks assembled from invertible layers, their recipes, data and analyses."""

from zoo.cards import card
from zoo.flows import glow, iresnet, nice, realnvp, spline_flow
from zoo.irevnet import Bottleneck, IRevNet, irevnet_a, irevnet_b, irevnet_cifar, irevnet_small
from zoo.network import InvertibleNetwork, ReversibleNetwork
from zoo.registry import Config, config_of, create, names, register, replace_head
from zoo.resnet import Residual, ResidualUnit, ResNet, Shortcut, resnet50, resnet101, resnet_small
from zoo.revnet import RevNet, Stage, Transition, revnet38, revnet56, revnet104, revnet110, revnet164
from zoo.unet import IUNet, iunet
from zoo.vit import MLP, Attention, RevViT, revvit_s

__all__ = [
    "MLP",
    "Attention",
    "Bottleneck",
    "Config",
    "IRevNet",
    "IUNet",
    "InvertibleNetwork",
    "ResNet",
    "Residual",
    "ResidualUnit",
    "RevNet",
    "RevViT",
    "ReversibleNetwork",
    "Shortcut",
    "Stage",
    "Transition",
    "card",
    "config_of",
    "create",
    "glow",
    "iresnet",
    "irevnet_a",
    "irevnet_b",
    "irevnet_cifar",
    "irevnet_small",
    "iunet",
    "names",
    "nice",
    "realnvp",
    "register",
    "replace_head",
    "resnet50",
    "resnet101",
    "resnet_small",
    "revnet38",
    "revnet56",
    "revnet104",
    "revnet110",
    "revnet164",
    "revvit_s",
    "spline_flow",
]
