"""The reversible vision transformer of Mangalam et al., assembled from couplings."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from invertible import Coupling, Merge, Sequential
from zoo._options import check_number
from zoo.network import ReversibleNetwork, check_images
from zoo.registry import register

__all__ = ["MLP", "Attention", "RevViT", "revvit_s"]

EPSILON = 1e-6  # of all layer norms, as in the authors' code


class Attention(nn.Module):
    r"""Layer norm and multi-head self-attention among the places of a tensor: the first function of a block.

    .. math::
        F(x) = W_o \, \mathrm{softmax}\!\left(\frac{q k^\top}{\sqrt{d}}\right) v, \qquad
        (q, k, v) = W_{qkv} \, \mathrm{LN}(x)

    Source: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; Dosovitskiy et al., 2021,
    https://arxiv.org/abs/2010.11929

    Args:
        channels: of a token.
        heads: into which the channels are divided, d each.

    Shape:
        - Input: ``(batch, channels, height, width)``, where each place is a token
        - Output: the same

    Raises:
        ValueError: if ``channels`` is not divisible by ``heads``.

    Example:
        >>> Attention(8, heads=2)(torch.zeros(1, 8, 3, 3)).shape
        torch.Size([1, 8, 3, 3])
    """

    def __init__(self, channels: int, *, heads: int) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"Attention: channels must be divisible by heads, got {channels} and {heads}.")
        self.heads = heads
        self.norm = nn.LayerNorm(channels, eps=EPSILON)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what each token takes from the others."""
        qkv = self.qkv(self.norm(_tokens(x))).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(query, key, value)
        return _places(self.projection(mixed.transpose(1, 2).flatten(2)), x)


class MLP(nn.Module):
    r"""Layer norm and a perceptron of two layers, at each place alone: the second function of a block.

    .. math::
        G(x) = W_2 \, \mathrm{GELU}(W_1 \, \mathrm{LN}(x))

    Source: Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929

    Args:
        channels: of a token.
        hidden_channels: between the two layers.

    Shape:
        - Input: ``(batch, channels, height, width)``
        - Output: the same

    Example:
        >>> MLP(8, 32)(torch.zeros(1, 8, 3, 3)).shape
        torch.Size([1, 8, 3, 3])
    """

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=EPSILON)
        self.hidden = nn.Linear(channels, hidden_channels)
        self.activation = nn.GELU()
        self.projection = nn.Linear(hidden_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what is added to each token."""
        return _places(self.projection(self.activation(self.hidden(self.norm(_tokens(x))))), x)


class RevViT(ReversibleNetwork):
    r"""A vision transformer whose blocks are reversible: two couplings each, with attention and an MLP as functions.

    With F = :class:`Attention` and G = :class:`MLP`, layer norms included, a block is

    .. math::
        y_1 = x_1 + F(x_2), \qquad y_2 = x_2 + G(y_1).

    Both streams begin as the embedded patches, with learnt positions added; at the end they are joined, normalised,
    averaged over the tokens and classified. Streams are ``(batch, dim, height, width)``, a token at each place.

    ``net.blocks`` is the invertible part, a :class:`~invertible.Sequential`: ``net.blocks.inverse(net.features(x))``
    returns the two streams at its entry. The image itself does not come back, for the patch embedding keeps 384 numbers
    of a patch's 768; it is stored, not reconstructed. There is no class token, as in the authors' code.

    Deviations from the authors' code (``REV_VIT_S.yaml``): the three linear maps before attention are one; biases start
    at 0, not at 0.02; there is no stochastic depth, which it trains with, 0.1 at the last block; positions are learnt
    for one size of images, and none other is taken.

    Source: Reversible Vision Transformers (Mangalam et al., 2022),
    https://arxiv.org/abs/2302.04869; https://github.com/facebookresearch/SlowFast/tree/main/projects/rev

    Args:
        dim: channels of a stream.
        depth: the number of blocks.
        heads: of each attention.
        mlp_ratio: the MLP's hidden channels are so many times ``dim``.
        patch_size: in pixels.
        image_size: height and width of an image, in pixels.
        in_channels: of an image.
        num_classes: of the head; with 0 it has no classifier, and ``net(x)`` returns the averaged tokens that one would
            see, ``(batch, 2 * dim)``.

    Shape:
        - Input: ``(batch, in_channels, image_size, image_size)``, floating point
        - Output: logits ``(batch, num_classes)``, or averaged tokens

    Raises:
        TypeError: if the input is not a floating-point tensor, or not in the weights' dtype without autocast.
        ValueError: if the input has another shape, or an option is out of range.

    Example:
        >>> net = revvit_s(num_classes=10, dim=16, depth=2, heads=2, image_size=32).eval()
        >>> image = torch.rand(2, 3, 32, 32)
        >>> net(image).shape
        torch.Size([2, 10])
        >>> first, second = net.blocks.inverse(net.features(image))
        >>> torch.allclose(first, net.embedded(image), atol=1e-5)
        True
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: int = 4,
        patch_size: int = 16,
        image_size: int = 224,
        in_channels: int = 3,
        num_classes: int,
    ) -> None:
        super().__init__()
        least = {
            "dim": dim,
            "depth": depth,
            "mlp_ratio": mlp_ratio,
            "patch_size": patch_size,
            "in_channels": in_channels,
        }
        for option, value in least.items():
            check_number("RevViT", option, value, least=1)
        check_number("RevViT", "num_classes", num_classes, least=0)
        if image_size < 1 or image_size % patch_size:
            raise ValueError(f"RevViT: image_size must be divisible by patch_size, got {image_size} and {patch_size}.")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.image_size = self.size_divisor = image_size
        self.total_stride = patch_size
        self.patches = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        places = image_size // patch_size
        self.positions = nn.Parameter(torch.empty(1, dim, places, places))
        nn.init.trunc_normal_(self.positions, std=0.02)
        layers: list[Coupling] = []
        for _ in range(depth):
            layers += [Coupling(Attention(dim, heads=heads)), Coupling(MLP(dim, mlp_ratio * dim))]
        self.blocks = Sequential(*layers, Merge())
        self.feature_channels = 2 * dim
        self.norm = nn.LayerNorm(self.feature_channels, eps=EPSILON)
        self.head = nn.Sequential(nn.Linear(self.feature_channels, num_classes) if num_classes else nn.Identity())
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    @property
    def chains(self) -> list[Sequential]:
        """The blocks: they are one chain."""
        return [self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits; without a classifier, the averaged tokens."""
        features = self.features(x)
        return self.head(self.norm(_tokens(features.to(self.norm.weight.dtype))).mean(dim=1))

    def features(self, x: Tensor) -> Tensor:
        """Returns both streams after the last block, joined: ``(batch, 2 * dim, height, width)``, in patches."""
        embedded = self.embedded(x)
        return self.blocks((embedded, embedded))

    def embedded(self, x: Tensor) -> Tensor:
        """Returns what both streams begin as: the embedded patches and their positions."""
        self._check_image(x)
        return self.patches(x) + self.positions

    def _check_image(self, x: Tensor) -> None:
        stride = self.total_stride
        options = {"size_divisor": stride, "total_stride": stride, "in_channels": self.in_channels}
        check_images("RevViT", x, training=False, **options)
        if tuple(x.shape[2:]) != (self.image_size, self.image_size):
            rule = f"height and width must be {self.image_size}, the size that the positions are for"
            raise ValueError(f"RevViT: {rule}, got a tensor of shape {tuple(x.shape)}.")
        self._check_dtype(x, "images")

    def _inputs(self, x: Tensor) -> list[Any]:
        shape = (len(x), *self.positions.shape[1:])
        dtype = torch.promote_types(self.patches.weight.dtype, self.positions.dtype)
        embedded = torch.empty(shape, dtype=dtype, device=x.device)
        parts = (x, self.positions, *self.patches.parameters())
        embedded.requires_grad_(any(t.requires_grad for t in parts))
        return [(embedded, embedded)]


def _tokens(x: Tensor) -> Tensor:
    """From places to a list of tokens, channels last."""
    return x.flatten(2).transpose(1, 2)


def _places(tokens: Tensor, like: Tensor) -> Tensor:
    """Undoes :func:`_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


@register
def revvit_s(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    dim: int = 384,
    depth: int = 12,
    heads: int = 6,
    patch_size: int = 16,
    image_size: int = 224,
) -> RevViT:
    """The small reversible vision transformer: 12 blocks of 384 channels, 22,434,664 parameters with 1000 classes.

    Source: Rev-ViT-S of https://arxiv.org/abs/2302.04869, by ``configs/ImageNet/REV_VIT_S.yaml`` of
    https://github.com/facebookresearch/SlowFast

    Example:
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in revvit_s().parameters())
        22434664
    """
    return RevViT(
        dim=dim,
        depth=depth,
        heads=heads,
        patch_size=patch_size,
        image_size=image_size,
        in_channels=in_channels,
        num_classes=num_classes,
    )
