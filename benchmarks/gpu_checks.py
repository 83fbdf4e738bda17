"""What must hold before anything is timed: gradients by every strategy, and the way back, under every setting."""

import copy
from collections.abc import Generator
from contextlib import AbstractContextManager
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import bottleneck, stack
from benchmarks.devices import PRECISIONS, fault, precision
from benchmarks.report import markdown
from invertible import Recompute, Reconstruct, Sequential, Store
from invertible.backprop import Strategy

__all__ = ["check_all", "check_table"]

LIMITS = {"fp32": 1e-3, "tf32": 5e-2, "bf16": 5e-2}
"""Relative errors of all gradients that are let pass without a grid, where the way back rounds."""
STRATEGIES: tuple[Strategy, ...] = (Store(), Recompute(), Reconstruct())
"""``Store`` once more says whether the kernels repeat their own gradients: where not, nobody's can be the same bits."""


def check_all(device: torch.device, *, compiled: bool, tiny: bool = False, skip: int = 0) -> Generator[dict[str, Any]]:
    """A row for each precision and grid, of a stack of blocks: errors against ``Store`` in the same setting.

    Args:
        device: to run on.
        compiled: whether the functions are compiled.
        tiny: on next to nothing.
        skip: so many rows, which are known.

    Yields:
        ``setting``, ``right``, and the relative errors of the gradients and of the inverse, or what was raised.
    """
    torch.manual_seed(0)
    channels, depth, size = (8, 2, 6) if tiny else (64, 8, 28)
    net: Any = stack("store", [bottleneck(channels) for _ in range(depth)]).to(device)
    x = torch.randn(4, 2 * channels, size, size, device=device)
    names = [name for name in PRECISIONS if not (compiled and name == "fp32")]  # the graph of TF32, by other products
    for name, grid in islice(product(names, (None, "exact", "exact32")), skip, None):
        row: dict[str, Any] = {"precision": name, "grid": grid, "compiled": compiled, "right": False}
        try:
            with precision(name):
                row |= _checked(copy.deepcopy(net), x, grid, _autocast(device, name), compiled=compiled)
        except Exception as error:  # noqa: BLE001 (what is raised is the answer)
            row["error"] = fault(error)
        else:
            limit = 0 if grid else LIMITS[name]
            repeats = row["gradients"]["Store"] == 0
            row["right"] = all(e <= (limit if repeats else LIMITS[name]) for e in row["gradients"].values())
            row["right"] &= row["inverse"] <= limit
        yield row


def _autocast(device: torch.device, name: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16")


def _checked(
    net: Sequential, x: Tensor, grid: Any, cast: AbstractContextManager[Any], *, compiled: bool
) -> dict[str, Any]:
    """The errors of one setting."""
    net.grid = grid
    if compiled:
        torch.compiler.reset()
        net.compile_functions()
    expected = _gradients(net, x, Store(), cast)
    errors = {type(each).__name__: _off(_gradients(net, x, each, cast), expected) for each in STRATEGIES}
    net.eval()
    with torch.no_grad(), cast:
        given = net.snap(x) if grid else x
        back = net.inverse(net(x))
    return {"gradients": errors, "inverse": float((back - given).norm() / given.norm())}


def _gradients(net: Sequential, x: Tensor, strategy: Strategy, cast: AbstractContextManager[Any]) -> list[Tensor]:
    net.backprop = strategy
    net.zero_grad()
    x = x.clone().requires_grad_()
    with cast:
        loss = net(x).float().square().mean()
    loss.backward()
    return [t.grad.clone() for t in (*net.parameters(), x) if t.grad is not None]


def _off(found: list[Tensor], expected: list[Tensor]) -> float:
    """The relative error of all gradients together; 0 is to the last bit."""
    off, norm = (torch.stack([t.double().norm() for t in ts]).norm() for ts in (_minus(found, expected), expected))
    return float(off / norm)


def _minus(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [one - other for one, other in zip(a, b, strict=True)]


def check_table(rows: list[dict[str, Any]]) -> str:
    """The checks as a table."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        setting = (row["precision"], row["grid"] or "none", "compiled" if row["compiled"] else "eager")
        if "error" in row:
            errors = (row["error"].partition(":")[0], "", "", "")
        else:
            errors = tuple(f"{e:.0e}" for e in (*row["gradients"].values(), row["inverse"]))
        lines.append((*setting, *errors, "right" if row["right"] else "WRONG"))
    head = ("precision", "grid", "functions", "Store again", "Recompute", "Reconstruct", "inverse", "")
    return markdown(head, lines, title="relative errors against `Store`, 0 is to the last bit")
