"""Which modules draw random numbers."""

from torch import nn

__all__ = ["draws"]

_DROPOUT: type[nn.Module] = nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage]


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
