"""What the bits of a network's functions depend on, and whether it is still the same."""

import hashlib
import platform
import warnings
from typing import Any

import torch
from torch import Tensor

from ._buffers import buffers_stay
from ._checksum import digest
from ._random import against_draws
from ._value import Value, leaves
from .backprop._replay import Survey
from .backprop._torch import compiler_stance
from .latent import EnvironmentMismatch, Latent

__all__ = ["decoded", "encoded"]

_SETTINGS = (
    "mkldnn.enabled",
    "mkldnn.matmul.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "cudnn.conv.fp32_precision",
    "cuda.matmul.fp32_precision",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.flash_sdp_enabled",
    "cuda.mem_efficient_sdp_enabled",
    "cuda.math_sdp_enabled",
    "cuda.cudnn_sdp_enabled",
)
"""Of ``torch.backends``."""

_HASHED = {
    "structure": "what the network consists of",
    "compiled": "which functions are compiled",
    "trained": "which parameters are trained",
    "weights": "the weights, or their memory format,",
    "condition": "the condition",
    "value": "the latent's value",
}
"""What has no figures to show."""


def encoded(net: Any, x: Any, condition: Value | None) -> Latent:
    """Runs forward, without gradients and without moving buffers, and takes down what the way back depends on."""
    if net.grid is None:
        raise ValueError(f'{type(net).__name__}: encode needs a grid, for an exact way back. Set net.grid = "exact".')
    if Survey([net]).random:
        raise ValueError(
            f"{type(net).__name__}: encode needs a network that draws no random numbers, which the way back would draw "
            f"anew.{against_draws(net)}"
        )
    with torch.no_grad(), buffers_stay(net):
        value = net(x, condition=condition)
    return Latent(value, fingerprint(net, value, condition))


def decoded(net: Any, latent: Latent, condition: Value | None, *, strict: bool) -> tuple[Value, bool]:
    """The latent's value, and whether nothing that its way back depends on has changed."""
    now = fingerprint(net, latent.value, condition)
    then = latent.fingerprint
    differences: dict[str, tuple[object, object]] = {
        name: (then.get(name), now[name]) for name in now if then.get(name) != now[name]
    }
    if "mode" in differences:  # with it, other buffers count and samples may mix
        differences = {"mode": differences["mode"]}
    if "grid" in differences:
        differences.pop("structure", None)
    if differences:
        told = "; ".join(
            f"{_HASHED[name]} changed" if name in _HASHED else f"{name} was {before}, is {after}"
            for name, (before, after) in differences.items()
        )
        message = f"{type(net).__name__}: the latent may not come back bit for bit: {told}."
        if strict:
            error = EnvironmentMismatch(f"{message} Restore it, or take inverse(latent, strict=False).")
            error.differences = differences
            raise error
        warnings.warn(message, UserWarning, stacklevel=4)
    return latent.value, not differences


def fingerprint(net: Any, value: Value, condition: Value | None) -> dict[str, Any]:
    """What the bits of the way back depend on, in words and numbers."""
    survey = Survey([net])
    tensors = list(leaves(value))
    device = tensors[0].device if tensors else torch.device("cpu")
    modes = [training for _, training, _ in survey.modes]
    weights = [*survey.held, *(buffer for _, _, buffer in survey.others)]
    mode = "eval" if not any(modes) else "train" if all(modes) else f"mixed {_short(modes)}"
    return {
        "grid": f"Grid({net.grid.bits}, {net.grid.dtype})" if net.grid is not None else None,
        "torch": str(torch.__version__),
        "device": _name(device),
        "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None,
        "mode": mode,
        "batch": [len(t) if t.ndim else 1 for t in tensors],
        "threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        **{f"torch.backends.{name}": _setting(name) for name in _SETTINGS},
        "structure": hashlib.sha256(repr(net).encode()).hexdigest()[:8],
        "compiled": _compilation(survey),
        "trained": _short([p.requires_grad for p in survey.held]),
        "weights": digest(weights) + _short([t.is_contiguous() for t in weights]),
        "condition": None if condition is None else _condition(condition),
        "value": digest(tensors),
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _setting(path: str) -> Any:
    found: Any = torch.backends
    for name in path.split("."):
        found = getattr(found, name)
    return found() if callable(found) else found


def _condition(condition: Any) -> str:
    parts: list[Any] = list(leaves(condition))
    return digest(t for t in parts if isinstance(t, Tensor)) + repr([t for t in parts if not isinstance(t, Tensor)])


def _compilation(survey: Survey) -> str | None:
    if not survey.compiled:
        return None
    return _short([compiled is not None for _, _, compiled in survey.modes]) + f" {compiler_stance()}"


def _short(flags: list[bool]) -> str:
    return hashlib.sha256(bytes(flags)).hexdigest()[:8]
