"""Fine-tunes an i-RevNet of the zoo: a new classifier first, then all of it.

Without arguments it shows what that is good for: a small i-RevNet learns the digits 0 to 4, and then, from ten images
of each, the digits 5 to 9; beside it, one that begins with random weights learns these, too.

    python examples/fine_tune.py
    python examples/fine_tune.py --data DIR --weights DIR    # train/CLASS/ and val/CLASS/ in the first
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import zoo
from zoo.arguments import count, positive, rate
from zoo.augment import Preparation
from zoo.building import configure, find_device, load_net, optimizer_of
from zoo.cards import CARDS
from zoo.configuring import default_device
from zoo.data import Data, Samples, Source, StepSampler, batches_of, evaluation_transform, loader, open_data
from zoo.data import training_transform as crops
from zoo.data.order import steps_in_epoch
from zoo.errors import DivergedError, InputError, diverging
from zoo.evaluation import Evaluation, evaluate
from zoo.irevnet import IRevNet
from zoo.pretrained import from_pretrained, save_pretrained
from zoo.recipes import RECIPES, Recipe
from zoo.run import Run
from zoo.schedule import learning_rate, steps


class Part:
    """Images of some classes of a source, from each class so many."""

    def __init__(self, source: Source, classes: Sequence[str], each: int | None = None) -> None:
        self.source, self.classes = source, list(classes)
        found = [np.flatnonzero(source.labels == source.classes.index(name))[:each] for name in classes]
        self._indices, self.labels = np.concatenate(found), np.repeat(np.arange(len(found)), [len(f) for f in found])

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Where an image is, for messages."""
        return self.source.name(int(self._indices[index]))

    def read(self, index: int) -> bytes:
        """The content of its file."""
        return self.source.read(int(self._indices[index]))


def part(data: Data, classes: Sequence[str], each: int | None = None) -> Data:
    """Some classes of the data, and of the training images so many of each; of the others all."""
    return Data(Part(data.training, classes, each), Part(data.validation, classes))


def recipe_for(
    net: nn.Module, data: Data, options: argparse.Namespace, epochs: int, base: Recipe | None = None
) -> Recipe:
    """The recipe that it was trained by, or else that of its card, for a few epochs of what may be few images."""
    base = base or RECIPES[CARDS[zoo.config_of(net).model].recipe or "digits"]
    batch = min(options.batch_size, len(data.training))
    figures = {"batch_size": batch, "lr": options.lr, "epochs": epochs, "iterations": None, "drops": None}
    return dataclasses.replace(base, warmup_epochs=1, **figures)


def train(net: IRevNet, data: Data, recipe: Recipe, *, frozen: int = 0, seed: int = 0) -> Evaluation:
    """Trains, in the first ``frozen`` epochs the head alone, and evaluates."""
    device = next(net.parameters()).device
    per_epoch = steps_in_epoch(len(data.training), recipe.batch_size)
    total = steps(recipe, per_epoch=per_epoch)
    order = StepSampler(len(data.training), recipe.batch_size, seed=seed, start=0, stop=total)
    optimizer, prepare = optimizer_of(net, recipe), Preparation(recipe)
    images = loader(Samples(data.training, crops(recipe), seed=seed), order, workers=0)
    for step, batch in enumerate(images):
        learns = step >= frozen * per_epoch
        net.train()
        net.body.train(learns).requires_grad_(learns)  # frozen: neither weights nor statistics move
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, total=total, per_epoch=per_epoch)
        x, labels = prepare(batch.images.to(device), batch.draws), batch.labels.to(device)
        with diverging(f"at step {step}", otherwise=""):
            loss = cross_entropy(net(x), labels, label_smoothing=recipe.label_smoothing)
            if not loss.isfinite():
                raise DivergedError(f"the loss is {loss.item()} at step {step}; try a lower --lr")
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    shown = Samples(data.validation, evaluation_transform(recipe))
    batches = loader(shown, batches_of(range(len(shown)), recipe.batch_size), workers=0)
    return evaluate(net, ((prepare(b.images.to(device)), b.labels.to(device)) for b in batches))


def loaded(folder: Path, device: torch.device) -> tuple[nn.Module, Recipe | None]:
    """The network of a training run, with its recipe: images must be as it knows them; or of ``save_pretrained``."""
    if not (folder / "checkpoints").is_dir():
        return from_pretrained(folder), None
    net, run = load_net(folder, device)
    return net, run.recipe


def prepared(net: nn.Module, data: Data, device: torch.device) -> IRevNet:
    """The network on its device, with a new classifier for the classes of the data.

    Raises:
        InputError: if it is no i-RevNet.
    """
    if not isinstance(net, IRevNet):
        raise InputError(f"{type(net).__name__} has no body to freeze; take an i-RevNet")
    zoo.replace_head(net, len(data.classes))
    configure(net, Run(RECIPES["digits"]), device)  # reconstructs what it needs for gradients, on a grid
    return net


def tune(
    net: nn.Module, data: Data, options: argparse.Namespace, *, frozen: int, base: Recipe | None = None
) -> tuple[IRevNet, Evaluation]:
    """Fine-tunes a network to the classes of the data."""
    torch.manual_seed(options.seed)
    tuned = prepared(net, data, find_device(options.device))
    recipe = recipe_for(tuned, data, options, options.epochs, base)
    return tuned, train(tuned, data, recipe, frozen=frozen, seed=options.seed)


def demonstrate(options: argparse.Namespace) -> IRevNet:
    """Five digits, then the other five from a few images, with and without what was learnt of the first."""
    torch.set_num_threads(1)  # faster for a network this small
    data = open_data(None)
    first, others = part(data, data.classes[:5]), part(data, data.classes[5:], options.images)
    torch.manual_seed(options.seed)
    net = prepared(zoo.create("irevnet_small"), first, find_device(options.device))
    recipe = recipe_for(net, first, options, options.pretrain_epochs)
    result = train(net, first, dataclasses.replace(recipe, lr=0.1), seed=options.seed)
    print(f"digits 0 to 4, {len(first.training)} images to learn from: top-1 {result.top1:.1f} %")
    folder = save_pretrained(net, options.output / "pretrained")
    net, result = tune(from_pretrained(folder), others, options, frozen=options.frozen_epochs)
    print(f"digits 5 to 9, {len(others.training)} images to learn from:")
    print(f"  from these weights:  top-1 {result.top1:.1f} %")
    _, result = tune(zoo.create("irevnet_small"), others, options, frozen=0)
    print(f"  from random weights: top-1 {result.top1:.1f} %")
    return net


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, metavar="DIR", help="images (default: the demonstration on digits)")
    p.add_argument(
        "--weights",
        type=Path,
        metavar="DIR",
        help="i-RevNet of a training run, or of save_pretrained",
    )
    p.add_argument(
        "--model", default="irevnet_small", metavar="NAME", help="i-RevNet with random weights, if none are given"
    )
    p.add_argument("--epochs", type=positive, default=30, metavar="N", help="of fine-tuning (default: 30)")
    p.add_argument("--frozen-epochs", type=count, default=10, metavar="N", help="of these, head alone (default: 10)")
    p.add_argument("--pretrain-epochs", type=positive, default=8, metavar="N", help="of digits 0 to 4 (default: 8)")
    p.add_argument("--images", type=positive, default=10, metavar="N", help="of each digit 5 to 9 (default: 10)")
    p.add_argument("--batch-size", type=positive, default=64, metavar="N", help="at most all images (default: 64)")
    p.add_argument("--lr", type=rate, default=0.03, metavar="X", help="largest learning rate (default: 0.03)")
    p.add_argument("--device", default=default_device(), metavar="NAME", help="cpu, cuda, ... (default: cuda if there)")
    p.add_argument("--seed", type=count, default=0, metavar="N", help="of weights, order and crops (default: 0)")
    p.add_argument("--output", type=Path, default=Path("runs/fine_tune"), metavar="DIR", help="what is written, where")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 for wrong input, 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        if options.data is None:
            net = demonstrate(options)
        else:
            data = open_data(options.data)
            device = find_device(options.device)
            start, base = loaded(options.weights, device) if options.weights else (zoo.create(options.model), None)
            net, result = tune(start, data, options, frozen=options.frozen_epochs, base=base)
            print(f"top-1 {result.top1:.1f} % of {result.images} images")
        print(f"saved in {save_pretrained(net, options.output)}")
    except (InputError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the last network is not saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
