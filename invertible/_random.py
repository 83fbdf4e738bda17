"""Which modules draw random numbers."""

from torch import nn

from ._check import name

__all__ = ["against_draws", "draws"]

_DROPOUT: type[nn.Module] = nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage]


def draws(part: nn.Module) -> bool:
    """Whether a module itself draws random numbers now: one of torch's own, or one that says ``stochastic = True``."""
    if _draws_always(part):
        return True
    if not part.training:
        return False
    if isinstance(part, nn.MultiheadAttention):
        return part.dropout > 0
    return isinstance(part, nn.RReLU) or (isinstance(part, _DROPOUT) and getattr(part, "p", 1) > 0)


def against_draws(net: nn.Module) -> str:
    """What to do, for an error message, where a network must not draw random numbers but does."""
    always = next((part for part in net.modules() if _draws_always(part)), None)
    if always is None:
        return " Call eval()."
    return f" {name(always)} draws in eval, too: leave it out, and hand what it returns to the layers after it."


def _draws_always(part: nn.Module) -> bool:
    """Whether a module draws in ``eval``, too."""
    if part.__dict__.get("stochastic") is True or getattr(type(part), "stochastic", None) is True:
        return True
    return isinstance(part, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d))
