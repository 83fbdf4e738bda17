"""Which modules draw random numbers."""

from torch import nn

__all__ = ["draws", "may_draw"]

_DROPOUT: type[nn.Module] = nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage]


_RANDOM = (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.MultiheadAttention, nn.RReLU, _DROPOUT)


def may_draw(kind: type[nn.Module]) -> bool:
    """Whether :func:`draws` can be true of a module of this class, apart from what the module says of itself."""
    return getattr(kind, "stochastic", None) is True or issubclass(kind, _RANDOM)


def draws(part: nn.Module) -> bool:
    """Whether a module itself draws random numbers now: one of torch's own, or one that says ``stochastic = True``."""
    if part.__dict__.get("stochastic") is True or getattr(type(part), "stochastic", None) is True:
        return True
    if isinstance(part, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return True  # in eval, too
    if not part.training:
        return False
    if isinstance(part, nn.MultiheadAttention):
        return part.dropout > 0
    return isinstance(part, nn.RReLU) or (isinstance(part, _DROPOUT) and getattr(part, "p", 1) > 0)
