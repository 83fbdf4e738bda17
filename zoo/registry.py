"""Models by name, and what they are after they were built: their name and options, and their classifier."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, get_args, overload

from torch import nn

from zoo._frozen import frozen
from zoo._options import check_number
from zoo.weights import Weights, fetch, load_weights, weights_of

__all__ = ["Config", "Kind", "config_of", "create", "kind_of", "names", "register", "replace_head"]

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

Kind = Literal["classifier", "flow"]
"""What a model is: a network that returns logits, of an image or of each pixel; or a density, an
:class:`invertible.Flow`."""

_builders: dict[str, Callable[..., nn.Module]] = {}
_flows: set[str] = set()  # the names of those that are no classifiers

_CONFIG = "zoo_config"  # an attribute of the network: it goes through deepcopy, pickling and FSDP


@dataclass(frozen=True)
class Config:
    """What a network was built from.

    Example:
        >>> net = create("irevnet_small", blocks=[1, 1, 1])
        >>> config_of(net).model, config_of(net).options["blocks"]
        ('irevnet_small', (1, 1, 1))
        >>> same = create(config_of(net).model, **config_of(net).options)
    """

    model: str
    """A name of :func:`zoo.names`."""
    options: Mapping[str, Any]
    """Those of the builder, with those that were not given; read-only, with tuples for lists."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", frozen(self.options))


@overload
def register(builder: Builder) -> Builder: ...
@overload
def register(*, kind: Kind) -> Callable[[Builder], Builder]: ...
def register(builder: Any = None, *, kind: Kind = "classifier") -> Any:
    """Makes a builder known by its function's name, and lets what it builds remember name and options.

    A decorator: ``@register``, or ``@register(kind="flow")`` for what returns an :class:`invertible.Flow`.

    Args:
        builder: all of whose options have defaults.
        kind: of the model.

    Raises:
        ValueError: if the name is taken.

    Example:
        >>> @register
        ... def one_layer(*, num_classes: int = 10) -> nn.Module:
        ...     return nn.Linear(4, num_classes)
        >>> config_of(create("one_layer", num_classes=3)).options
        {'num_classes': 3}
        >>> _ = _builders.pop("one_layer")  # names stay taken; this takes it back
    """
    if builder is None:
        return functools.partial(register, kind=kind)
    name = builder.__name__
    if name in _builders:
        raise ValueError(f"zoo.register: the name {name!r} is taken.")
    signature = inspect.signature(builder)

    @functools.wraps(builder)
    def build(*arguments: Any, **options: Any) -> nn.Module:
        net = builder(*arguments, **options)
        given = signature.bind(*arguments, **options)
        given.apply_defaults()
        net.__dict__[_CONFIG] = Config(name, given.arguments)
        return net

    _builders[name] = build
    if kind == "flow":
        _flows.add(name)
    return build


def names(pattern: str = "*", *, kind: Kind | None = None) -> list[str]:
    """Returns the names of all models that match a pattern, sorted.

    Args:
        pattern: as a shell's: ``*`` stands for any letters, ``?`` for one, ``[ab]`` for one of these.
        kind: ``"classifier"`` or ``"flow"``, for those alone.

    Raises:
        ValueError: if there is no such kind.

    Example:
        >>> names("irevnet_?")
        ['irevnet_a', 'irevnet_b']
        >>> "glow" in names(kind="flow"), "glow" in names(kind="classifier")
        (True, False)
    """
    if kind not in (None, *get_args(Kind)):
        raise ValueError(f"zoo.names: kind must be one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}.")
    found = sorted(name for name in _builders if fnmatchcase(name, pattern))
    return [name for name in found if kind in {None, kind_of(name)}]


def kind_of(name: str) -> Kind:
    """Returns what the model of a name is; of an unknown name ``"classifier"``, whose builders say that there is none.

    Example:
        >>> kind_of("glow")
        'flow'
    """
    return "flow" if name in _flows else "classifier"


def create(name: str, *, weights: str | Weights | None = None, **options: Any) -> nn.Module:
    """Builds a model by its name.

    With ``weights`` the options are, where not given, those that the weights were trained with. If ``num_classes`` is
    another number, the classifier is new, with random weights, and all the rest is loaded.

    Args:
        name: one of :func:`names`.
        weights: which weights to download and load, by their tag in :data:`zoo.weights.WEIGHTS`, or an entry of your
            own; ``None``: random ones.
        options: those of the builder, such as ``num_classes``.

    Raises:
        ValueError: if there is no such model, or it has no such option.
        WeightsError: if it has no such weights, they cannot be had, or they do not fit.

    Example:
        >>> net = create("irevnet_small", num_classes=7)
        >>> net.head[-1].out_features
        7
    """
    if name not in _builders:
        raise ValueError(f"zoo.create: unknown model {name!r}; there are {', '.join(names())}.")
    builder = _builders[name]
    known = inspect.signature(builder).parameters
    if unknown := options.keys() - known:
        raise ValueError(f"zoo.create: {name} has no option {sorted(unknown)[0]!r}; it has {', '.join(known)}.")
    if weights is None:
        return builder(**options)
    entry = weights_of(name, weights)
    # Of a flow it is an option like any other: its functions see the class.
    num_classes = options.pop("num_classes", None) if kind_of(name) == "classifier" else None
    net = builder(**{**entry.options, **options})
    load_weights(net, fetch(entry))
    if num_classes is not None and num_classes != config_of(net).options.get("num_classes"):
        replace_head(net, num_classes)
    return net


def config_of(net: nn.Module) -> Config:
    """Returns the name and the options that a network of the zoo was built from.

    Raises:
        ValueError: if it was not built by a model's builder, or is wrapped in another module.

    Example:
        >>> config = config_of(create("irevnet_small", num_classes=7))
        >>> config.model, config.options["num_classes"]
        ('irevnet_small', 7)
    """
    config = net.__dict__.get(_CONFIG)
    if config is None:
        rule = "a network built by zoo.create, or the one inside of a wrapper such as DDP"
        raise ValueError(f"zoo.config_of: expected {rule}, got a {type(net).__name__}.")
    return config


def replace_head(net: nn.Module, num_classes: int) -> nn.Module:
    """Puts a new classifier in the place of a network's own: linear, with random weights, on the same device.

    The classifier is the last layer of ``net.head`` or, in torchvision's networks, ``net.fc``; that of an
    :class:`~zoo.IUNet` is a convolution. All other weights stay,
    the batch norm of an i-RevNet's head among them.

    Args:
        net: a network of the zoo; it is changed.
        num_classes: with 0 there is no classifier, and the network returns pooled features.

    Returns:
        ``net``.

    Raises:
        TypeError: if the number is no integer.
        ValueError: if it is negative, or the network has no such layer.

    Example:
        >>> net = replace_head(create("irevnet_small", num_classes=10), 3)
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """
    check_number("zoo.replace_head", "num_classes", num_classes, least=0)
    head = getattr(net, "head", None)
    parent, key = (head, str(len(head) - 1)) if isinstance(head, nn.Sequential) else (net, "fc")
    old = getattr(parent, key, None)
    make: Callable[..., nn.Module] | None = getattr(net, "classifier", None)
    channels = old.in_features if isinstance(old, nn.Linear) else getattr(net, "feature_channels", None)
    known = isinstance(old, nn.Linear | nn.Identity) or (make is not None and isinstance(old, nn.Module))
    if not known or not isinstance(channels, int):
        rule = "a network with a linear classifier in head[-1] or fc"
        raise ValueError(f"zoo.replace_head: expected {rule}, got a {type(net).__name__}.")
    new: nn.Module = nn.Identity()
    if num_classes:
        like = next(net.parameters())
        new = (make or nn.Linear)(channels, num_classes, device=like.device, dtype=like.dtype)
    setattr(parent, key, new.train(parent.training))
    if hasattr(net, "num_classes"):
        net.__dict__["num_classes"] = num_classes
    config: Config | None = net.__dict__.get(_CONFIG)
    if config is not None:
        net.__dict__[_CONFIG] = Config(config.model, {**config.options, "num_classes": num_classes})
    return net
