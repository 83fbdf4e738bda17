"""The learning rate as a function of the step, and a recipe for another batch size."""

import dataclasses
import math

from zoo.recipes import Recipe

__all__ = ["learning_rate", "scaled", "steps", "warmup_steps"]


def steps(recipe: Recipe, *, per_epoch: int) -> int:
    """The length of a run, in steps; at least one.

    Example:
        >>> from zoo.recipes import RECIPES
        >>> steps(RECIPES["paper_irevnet_b"], per_epoch=5004), steps(RECIPES["released_irevnet_b"], per_epoch=5004)
        (600000, 640512)
    """
    return recipe.iterations or max(round((recipe.epochs or 1) * per_epoch), 1)


def warmup_steps(recipe: Recipe, *, per_epoch: int) -> int:
    """The length of the warm-up, in steps.

    Example:
        >>> from zoo.recipes import RECIPES
        >>> warmup_steps(RECIPES["digits"], per_epoch=22)
        44
    """
    return round(recipe.warmup_epochs * per_epoch)


def learning_rate(recipe: Recipe, step: int, *, total: int, per_epoch: int) -> float:
    r"""Returns the learning rate of a step, counted from 0: a pure function.

    In the first :math:`w` steps, the warm-up, it rises linearly, from ``warmup_start`` (at step 0 one part in :math:`w`
    above it, so never 0) to ``lr``. After it, at step :math:`t` of :math:`T`, it is
    :math:`\text{lr} \cdot (1 + \cos(\pi (t - w) / (T - w))) / 2`, or, where the recipe has drops,
    ``lr`` divided by 10 at each of them.

    Args:
        recipe: the figures.
        step: which step.
        total: steps of the run.
        per_epoch: steps of an epoch.

    Example:
        >>> from zoo.recipes import RECIPES
        >>> paper = RECIPES["paper_irevnet_b"]
        >>> [learning_rate(paper, s, total=600_000, per_epoch=5004) for s in (0, 159_999, 160_000)]
        [0.1, 0.1, 0.01]
    """
    warmup = warmup_steps(recipe, per_epoch=per_epoch)
    if step < warmup:
        share = (step + 1) / warmup
        return recipe.lr * (recipe.warmup_start + (1 - recipe.warmup_start) * share)
    if recipe.drops is not None:
        passed = sum(step >= round(drop * total) for drop in recipe.drops)
        return recipe.lr / 10**passed
    return recipe.lr * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2


def scaled(recipe: Recipe, batch_size: int) -> Recipe:
    """The recipe for another batch size, by the linear rule: the learning rate in proportion, the images seen the same.

    A larger batch than the recipe's gets a warm-up of five epochs, if it has none.

    Source: Goyal et al., 2017, section 2.1 and 2.2, https://arxiv.org/abs/1706.02677

    Example:
        >>> from zoo.recipes import RECIPES
        >>> large = scaled(RECIPES["paper_irevnet_b"], 1024)
        >>> large.lr, large.iterations, large.warmup_epochs
        (0.4, 150000, 5)
    """
    factor = batch_size / recipe.batch_size
    return dataclasses.replace(
        recipe,
        batch_size=batch_size,
        lr=recipe.lr * factor,
        iterations=None if recipe.iterations is None else max(round(recipe.iterations / factor), 1),
        warmup_epochs=recipe.warmup_epochs or (5 if factor > 1 else 0),
    )
