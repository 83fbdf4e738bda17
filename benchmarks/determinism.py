"""Which settings change the bits of a function, and whether the way back and the gradients stay exact under each.

    python -m benchmarks.determinism [--device cuda] [--tiny]

Exactness on a grid rests on one thing: that a function returns the same bits in forward, in the replay and in the
inverse. So the function of an i-RevNet's block runs under every setting, in ``eval`` and in ``train``, and a stack of
such blocks on the grid ``"exact"`` goes there and back, and trains. Columns of the table:

* ``base``: whether the setting gives the bits of the first row, which has no setting;
* ``again`` and ``replay``: the same call once more, and with gradients instead of without;
* ``half``, ``odd``, ``one``: parts of the batch in ``eval``, of the same bits as in the whole;
* ``last``: the input in the memory format ``channels_last``;
* ``back``: the stack's inverse, in ``eval`` and in ``train``, bit for bit;
* ``gradients``: those of ``Reconstruct`` against those of ``Store``, bit for bit;
* ``switched``: forward without the setting and inverse under it, bit for bit.

A setting that a device does not have is left out.
"""

import argparse
import copy
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import bottleneck
from benchmarks.devices import fault, precision, switched
from benchmarks.report import markdown
from invertible import Coupling, Merge, Reconstruct, Sequential, Split, Store

__all__ = ["COLUMNS", "determinism_matrix", "matrix_table"]

COLUMNS = ("base", "again", "replay", "half", "odd", "one", "last", "back", "gradients", "switched")
Setting = Callable[[], AbstractContextManager[Any]]


def settings_of(device: torch.device) -> Iterator[tuple[str, Setting]]:
    """Names, and contexts to run in; the first changes nothing. On a CPU, cuDNN and TF32 are not there."""
    yield "as it is", nullcontext
    yield "bf16 autocast", lambda: torch.autocast(device.type, torch.bfloat16)
    yield "deterministic algorithms", lambda: switched(deterministic_algorithms=True)
    if device.type == "cuda":
        yield "cudnn.benchmark", lambda: switched(benchmark=True)
        yield "cudnn.deterministic", lambda: switched(deterministic=True)
        yield "TF32", lambda: precision("tf32")
        yield "TF32, cudnn.benchmark", lambda: _both(precision("tf32"), switched(benchmark=True))
        yield (
            "bf16 autocast, cudnn.benchmark",
            lambda: _both(torch.autocast("cuda", torch.bfloat16), switched(benchmark=True)),
        )
    yield "compiled", nullcontext
    yield "compiled, bf16 autocast", lambda: torch.autocast(device.type, torch.bfloat16)


def _both(*contexts: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for each in contexts:
        stack.enter_context(each)
    return stack


def determinism_matrix(
    device: torch.device,
    *,
    channels: int = 256,
    size: int = 28,
    batch: int = 8,
    depth: int = 6,
    compiled: bool = True,
    skip: int = 0,
) -> Generator[dict[str, Any]]:
    """Runs a block's function, and a stack of them on a grid, under every setting.

    Args:
        device: to run on.
        channels: of a stream.
        size: pixels per side.
        batch: images, 4 at least.
        depth: blocks of the stack.
        compiled: whether to compile, too.
        skip: so many rows, which are known.

    Yields:
        For each setting a row: ``setting``, and for each of ``COLUMNS`` ``True`` for the same bits, or the share of
        elements that differ, or what was raised.
    """
    with precision("fp32"), switched(benchmark=False, deterministic=False):
        torch.manual_seed(0)
        function = bottleneck(channels).to(device)
        net = Sequential(Split(), *(Coupling(bottleneck(channels)) for _ in range(depth)), Merge(), grid="exact")
        x = torch.randn(batch, 2 * channels, size, size, device=device)
        subject = _Subject(function, net.to(device), x)
        settings = [(name, setting) for name, setting in settings_of(device) if compiled or "compiled" not in name]
        for name, setting in settings[skip:]:
            yield {"setting": name, **subject.row(setting, compiled="compiled" in name)}


class _Subject:
    """What is run under every setting, and its bits under none."""

    def __init__(self, function: nn.Module, net: Sequential, x: Tensor) -> None:
        self.function, self.net, self.x = function, net, x
        self.stream = x[:, : x.shape[1] // 2].contiguous()
        self.base = self.bits(function)

    def row(self, setting: Setting, *, compiled: bool) -> dict[str, Any]:
        """The columns of one setting; what is raised is its answer."""
        function, net = copy.deepcopy(self.function), copy.deepcopy(self.net)
        if compiled:
            torch.compiler.reset()
            function.compile(dynamic=False)
            net.compile_functions()
        found: dict[str, Any] = {}
        trials: dict[str, Callable[[], Any]] = {
            "base": lambda: self.same(function, self.base),
            "again": lambda: self.same(function, self.bits(function)),
            "replay": lambda: self.same(function, self.bits(function, grad=True)),
            "half": lambda: self.part(function, len(self.x) // 2),
            "odd": lambda: self.part(function, 3),
            "one": lambda: self.part(function, 1),
            "last": lambda: self.layout(function),
            "back": lambda: self.back(net, nullcontext),
            "gradients": lambda: self.gradients(net),
        }
        for name, trial in trials.items():
            if compiled and name in ("half", "back"):
                torch.compiler.reset()  # torch keeps 8 graphs, and runs what else there is uncompiled
            with setting():
                found[name] = _answer(trial)
        found["switched"] = _answer(lambda: self.back(self.net, setting) if not compiled else self.swapped(net))
        return found

    def bits(
        self, function: nn.Module, x: Tensor | None = None, *, grad: bool = False, modes: Sequence[bool] = (False, True)
    ) -> list[Tensor]:
        """What the function returns, in ``eval`` and in ``train``; its statistics are left alone."""
        found: list[Tensor] = []
        for training in modes:
            function.train(training)
            state = {key: t.clone() for key, t in function.state_dict().items()}
            with torch.set_grad_enabled(grad):
                found.append(function(self.stream if x is None else x).detach())
            function.load_state_dict(state)
        return found

    def same(self, function: nn.Module, expected: list[Tensor]) -> Any:
        """Compared in both modes."""
        return _shares(self.bits(function), expected)

    def part(self, function: nn.Module, count: int) -> Any:
        """The first samples by themselves, in ``eval``."""
        whole, part = (self.bits(function, x, modes=(False,)) for x in (self.stream, self.stream[:count]))
        return _shares(part, [whole[0][:count]])

    def layout(self, function: nn.Module) -> Any:
        """The same values in another memory format."""
        return _shares(self.bits(function, self.stream.to(memory_format=torch.channels_last)), self.bits(function))

    def back(self, net: Sequential, setting: Setting) -> Any:
        """There, and back under a setting."""
        return _shares(*self.ways(net, net, setting))

    def swapped(self, net: Sequential) -> Any:
        """There without compiled functions, and back with them."""
        return _shares(*self.ways(self.net, net, nullcontext))

    def ways(self, net: Sequential, other: Sequential, setting: Setting) -> tuple[list[Tensor], list[Tensor]]:
        """What comes back, and what should."""
        found: list[Tensor] = []
        for training in (False, True):
            net.train(training)
            other.train(training)
            with torch.no_grad():
                y = net(self.x)
                with setting():
                    found.append(other.inverse(y))
        return found, [net.snap(self.x)] * 2

    def gradients(self, net: Sequential) -> Any:
        """Of all parameters, by both strategies."""
        found: list[list[Tensor]] = []
        net.train()
        for strategy in (Store(), Reconstruct()):
            net.backprop = strategy
            net.zero_grad()
            net(self.x).float().square().mean().backward()
            found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        return _shares(*found)


def _answer(trial: Callable[[], Any]) -> Any:
    try:
        return trial()
    except Exception as error:  # noqa: BLE001 (what is raised is the answer)
        return fault(error)


def _shares(found: list[Tensor], expected: list[Tensor]) -> bool | float:
    """``True`` for the same bits, or the largest share of elements that differ."""
    shares = [float((a != b).double().mean()) for a, b in zip(found, expected, strict=True)]
    return max(shares) or True


def matrix_table(rows: list[dict[str, Any]]) -> str:
    """The matrix as a table: "same", or the share of elements that differ, or that something was raised."""

    def told(value: Any) -> str:
        if isinstance(value, str):
            return value.partition(":")[0]
        return "same" if value is True else f"{100 * value:.0f} %" if value > 0.01 else "below 1 %"

    lines = [(row["setting"], *(told(row[column]) for column in COLUMNS)) for row in rows]
    return markdown(("setting", *COLUMNS), lines, title="bits that differ, or an error; on the grid from `back` on")


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small tensors, and nothing compiled")
    options = parser.parse_args()
    small: dict[str, Any] = {"channels": 16, "size": 8, "depth": 3, "compiled": False} if options.tiny else {}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic algorithms refuse to run
    print(matrix_table(list(determinism_matrix(torch.device(options.device), **small))))


if __name__ == "__main__":
    main()
