"""Builds what a run needs: its device, its network, its optimiser."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo import checkpoints, registry
from zoo.errors import InputError, reason
from zoo.network import ReversibleNetwork
from zoo.recipes import Recipe
from zoo.run import GRIDS, Run
from zoo.unet import IUNet

__all__ = ["build", "configure", "find_device", "load_net", "make_deterministic", "optimizer_of"]


def build(recipe: Recipe, *, num_classes: int) -> nn.Module:
    """Builds the recipe's network.

    Raises:
        InputError: if there is no such network, or the recipe's sizes do not fit it.

    Example:
        >>> from zoo.recipes import RECIPES
        >>> build(RECIPES["digits"], num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if registry.kind_of(recipe.model) == "flow":
        raise InputError(f"{recipe.model} is a flow, a density; what is trained here classifies images")
    try:
        net = registry.create(recipe.model, num_classes=num_classes, **recipe.model_options)
    except ValueError as error:
        raise InputError(str(error)) from None
    if isinstance(net, IUNet):
        raise InputError(f"{recipe.model} has logits for each pixel; what is trained here classifies images")
    divisor = getattr(net, "size_divisor", 1)
    for size in (recipe.size, recipe.evaluation_size):
        if size % divisor or size < 1:
            raise InputError(f"{recipe.model} needs a size that {divisor} divides, got {size}")
    if recipe.head_norm_momentum is not None:
        norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
        norms[-1].momentum = recipe.head_norm_momentum
    return net


def configure(net: nn.Module, run: Run, device: torch.device) -> nn.Module:
    """Puts the network on its device, and sets what it keeps, rounds and compiles, and how its weights lie in memory.

    Channels last is for GPUs only: FSDP refuses such weights, and on a CPU PyTorch 2.15 dies in the backward pass of a
    strided convolution of few channels, such as the first of (b).

    Example:
        >>> from zoo.recipes import RECIPES
        >>> recipe = RECIPES["digits"]
        >>> net = configure(build(recipe, num_classes=10), Run(recipe), torch.device("cpu"))
        >>> type(net.backprop).__name__, net.grid == GRIDS["exact"]
        ('Reconstruct', True)
    """
    if isinstance(net, ReversibleNetwork):
        net.backprop, net.grid = run.strategy, GRIDS[run.recipe.grid]
        if run.compile:
            net.compile_functions()
    sharded = run.world_size > 1 and run.parallel == "fsdp"
    if run.recipe.channels_last and device.type == "cuda" and not sharded:
        net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return net.to(device)


def optimizer_of(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with the recipe's figures; without weight decay on biases and norms, if it says so.

    Example:
        >>> import dataclasses
        >>> from zoo.recipes import RECIPES
        >>> recipe = dataclasses.replace(RECIPES["digits"], decay_norms=False)
        >>> optimizer = optimizer_of(nn.Linear(2, 1), recipe)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.0005), (1, 0.0)]
    """
    parameters = list(net.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": recipe.weight_decay}]
    if not recipe.decay_norms:
        groups[0]["params"] = [p for p in parameters if p.ndim > 1]
        groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


def find_device(name: str) -> torch.device:
    """Returns a device that is there.

    Raises:
        InputError: if it is not.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
        >>> find_device("gpu")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        zoo.errors.InputError: no device 'gpu' here: ...
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"no device {name!r} here: {reason(error)}") from None
    return device


def make_deterministic() -> None:
    """Lets PyTorch use only algorithms that give the same bits each time; raises where there is none.

    Example:
        >>> make_deterministic()
        >>> torch.are_deterministic_algorithms_enabled()
        True
        >>> torch.use_deterministic_algorithms(False)  # as it was
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def load_net(folder: Path, device: torch.device) -> tuple[nn.Module, Run]:
    """Builds the network of a run with its newest weights, or their average; the data is not needed.

    Raises:
        InputError: if there is no run, or its checkpoints can't be read.

    Example:
        >>> import tempfile
        >>> from zoo.recipes import RECIPES
        >>> run = Run(RECIPES["digits"])
        >>> weights = build(run.recipe, num_classes=2).state_dict()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run.save(Path(folder) / "config.json")
        ...     state = {"classes": ["cat", "dog"]}
        ...     _ = checkpoints.save(Path(folder) / "checkpoints", checkpoints.Checkpoint(5, weights, None, state))
        ...     net, again = load_net(Path(folder), torch.device("cpu"))
        >>> net.head[-1].out_features, again.recipe.name
        (2, 'digits')
    """
    run = Run.load(folder / "config.json")
    checkpoint = checkpoints.load(folder / "checkpoints")
    net = build(run.recipe, num_classes=len(checkpoint.state["classes"]))
    try:
        net.load_state_dict(dict(checkpoint.average or checkpoint.weights))
    except RuntimeError as error:  # a StateError is one, too
        raise InputError(f"the weights in {folder} are not those of its configuration: {reason(error)}") from None
    return configure(net, run, device), run
