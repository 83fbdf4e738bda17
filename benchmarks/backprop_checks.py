"""What a memory-saving method gets wrong, and whether it says so. Each check returns a few words."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import bottleneck, stack

Make = Callable[[], nn.Module]


def make(name: str, *, depth: int = 4, dropout: float = 0.0, clone: bool = True) -> nn.Module:
    """A small stack, with the same weights for everyone."""
    torch.manual_seed(1)
    return stack(name, [bottleneck(16, dropout=dropout) for _ in range(depth)], clone=clone)


def given(*, grad: bool = True) -> Tensor:
    """An input of it."""
    return torch.randn(8, 32, 12, 12, generator=torch.Generator().manual_seed(2), requires_grad=grad)


def gradients(net: nn.Module) -> Tensor:
    """All gradients of the parameters in one vector; zeros for those that are missing."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in net.parameters()])


def step(net: nn.Module, x: Tensor, context: Any = None) -> None:
    """A forward pass in a context and a backward pass outside it."""
    with context or nullcontext():
        y = net(x)
    y.float().square().mean().backward()


def off(net: nn.Module, reference: nn.Module) -> float:
    """How far the gradients are off, relatively."""
    a, b = gradients(net), gradients(reference)
    return float((a - b).norm() / b.norm())


def verdict(error: float, *, limit: float = 1e-4) -> str:
    """Right, or wrong by how much."""
    return "right" if error < limit else f"WRONG by {error:.2g}"


def said(error: float, *, warned: bool) -> str:
    """Right, or off by how much, and whether there was a warning."""
    return "right" if error < 1e-4 else f"off by {error:.0e}, {'warned' if warned else 'SILENT'}"


def statistics(name: str) -> str:
    """Batch-norm statistics after five steps, against those of plain autograd."""
    nets = make(name), make("store")
    for net in nets:
        for _ in range(5):
            step(net, given())
    (mine, theirs) = (dict(net.named_buffers()) for net in nets)
    tracked = {int(b) for k, b in mine.items() if k.endswith("tracked")}
    means = [[b for k, b in each.items() if k.endswith("mean")] for each in (mine, theirs)]
    error = float((torch.cat(means[0]) - torch.cat(means[1])).norm() / torch.cat(means[1]).norm())
    return "right" if tracked == {5} and error < 1e-4 else f"WRONG: {max(tracked)} batches counted for 5"


def dropout(name: str) -> str:
    """The gradient through dropout, and where the global random stream ends."""
    nets = make(name, dropout=0.3), make("store", dropout=0.3)
    ends: list[Tensor] = []
    for net in nets:
        torch.manual_seed(3)
        step(net, given())
        ends.append(torch.get_rng_state())
    words = verdict(off(*nets))
    return words if torch.equal(*ends) else f"{words}; the random stream is moved"


def autocast(name: str, depth: int = 4) -> str:
    """The gradient under bfloat16 autocast, with the backward pass outside the context."""
    nets = make(name, depth=depth), make("store", depth=depth)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for net in nets:
            step(net, given(), torch.autocast("cpu", torch.bfloat16))
    return said(off(*nets), warned=bool(caught))


def autocast_deep(name: str) -> str:
    """The same at a depth where rounding may turn into another bfloat16 number."""
    return autocast(name, depth=32)


def raw_input(name: str) -> str:
    """An input that requires no gradient, and a head after the network that is trained anyway."""
    net = make(name)
    step(nn.Sequential(net, nn.Conv2d(32, 2, 1)), given(grad=False))
    missing = sum(p.grad is None for p in net.parameters())
    return f"SILENT: {missing} parameters without gradient" if missing else "right"


def changed_output(name: str) -> str:
    """``relu_`` on the output before the backward pass."""
    net, reference = make(name), make("store")
    y = net(given())
    y.relu_()
    y.square().mean().backward()
    reference(given()).relu().square().mean().backward()
    return verdict(off(net, reference)).replace("WRONG", "SILENT")


def changed_weight(name: str) -> str:
    """A weight that is changed between forward and backward."""
    net = make(name)
    y = net(given())
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    y.square().mean().backward()
    return "SILENT"


def callers_tensor(name: str) -> str:
    """Whether the caller still has its input."""
    net, x = make(name, clone=False), given(grad=False) * 1
    before = x.clone()
    y = net(x.requires_grad_())
    if x.untyped_storage().nbytes() == 0:
        return "FREED by forward"
    y.square().mean().backward()
    return "kept" if torch.equal(x, before) else "CHANGED"


def two_backwards(name: str) -> str:
    """Two backward passes with ``retain_graph``."""
    net, reference = make(name), make("store")
    for each in (net, reference):
        loss = each(given()).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    return verdict(off(net, reference))


def autograd_grad(name: str) -> str:
    """``torch.autograd.grad`` for the parameters."""
    net = make(name)
    found = torch.autograd.grad(net(given()).square().mean(), list(net.parameters()), allow_unused=True)
    missing = sum(g is None for g in found)
    return f"SILENT: {missing} of {len(found)} are None" if missing else "right"


def unstable(name: str) -> str:
    """Weights times 30: the inverse loses precision."""
    nets = make(name, depth=16), make("store", depth=16)
    for net in nets:
        with torch.no_grad():
            for part in net.modules():
                if isinstance(part, nn.BatchNorm2d) or (isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1)):
                    part.weight.mul_(30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for net in nets:
            step(net, given())
    return said(off(*nets), warned=bool(caught))


def channels_last(name: str) -> str:
    """Whether the layout passes through, and the gradient with it."""
    nets = [make(n).to(memory_format=torch.channels_last) for n in (name, "store")]
    for net in nets:
        step(net, given().detach().contiguous(memory_format=torch.channels_last).requires_grad_())
    kept = nets[0](given().contiguous(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )
    return verdict(off(*nets)) + ("" if kept else ", layout LOST")


CHECKS: dict[str, Callable[[str], str]] = {
    "batch-norm statistics": statistics,
    "dropout": dropout,
    "bf16 autocast": autocast,
    "bf16 autocast, 32 blocks": autocast_deep,
    "input without grad": raw_input,
    "relu_ on the output": changed_output,
    "weight changed before backward": changed_weight,
    "caller's input": callers_tensor,
    "two backwards": two_backwards,
    "torch.autograd.grad": autograd_grad,
    "ill-conditioned weights": unstable,
    "channels_last": channels_last,
}


def run_all(name: str) -> dict[str, str]:
    """The words of every check; an error that is raised counts as said."""
    found: dict[str, str] = {}
    for title, check in CHECKS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[title] = check(name)
        except Exception as error:  # noqa: BLE001 (whatever a peer raises is its answer)
            found[title] = f"raises {type(error).__name__}"
    return found
