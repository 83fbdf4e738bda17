"""A network and its optimiser: one step of training, the average of the weights, and all of it as tensors."""

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map

from invertible import StreamRangeError
from invertible.testing import measure_memory
from zoo.augment import Preparation, mixture
from zoo.building import build, configure, optimizer_of
from zoo.data import Batch
from zoo.distributed import World, like, parallel, unsynchronised, whole
from zoo.errors import DivergedError, InputError, diverging, reason
from zoo.network import ReversibleNetwork
from zoo.run import Run

__all__ = ["Learner", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a step of training did, in this process.

    Example:
        >>> outcome = Outcome(torch.tensor([5.0, 3.0, 4.0], dtype=torch.float64), finite=True, drift=None)
        >>> loss, hits, images = outcome.sums.tolist()
        >>> loss / images, hits / images
        (1.25, 0.75)
    """

    sums: Tensor
    """Of the loss, of the hits of the largest logit, and the number of images: float64, on the device."""
    finite: bool
    """Whether the loss was finite in all processes, and its gradient; otherwise nothing was learnt or has changed."""
    drift: float | None
    """How far off reconstructed values were."""
    trouble: str = ""
    """Why the loss was not finite in this process, if it was not."""


class Learner:
    """A network in training.

    Args:
        run: the configuration.
        num_classes: of the data.
        device: to train on.
        world: the processes.

    Example:
        >>> from zoo.recipes import RECIPES
        >>> recipe = dataclasses.replace(RECIPES["digits"], model_options={"blocks": (1, 1)})
        >>> learner = Learner(Run(recipe), 2, torch.device("cpu"), World())
        >>> images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
        >>> batch = Batch(images, torch.tensor([0, 1, 0, 1]), torch.rand(4, 5), [(0, i) for i in range(4)], [])
        >>> outcome = learner.step([batch], lr=0.1, number=1)
        >>> outcome.finite, outcome.drift, int(outcome.sums[2])
        (True, 0.0, 4)
    """

    def __init__(self, run: Run, num_classes: int, device: torch.device, world: World) -> None:
        self.run, self.device, self.world, self._num_classes = run, device, world, num_classes
        torch.manual_seed(run.seed)
        self.net = configure(build(run.recipe, num_classes=num_classes), run, device)
        self.prepare = Preparation(run.recipe)
        self._mix = mixture(run.recipe, num_classes)
        self.model = parallel(self.net, run.parallel, world, device)
        self.optimizer = optimizer_of(self.net, run.recipe)
        self._at = self._trouble = ""
        self.average: dict[str, Tensor] | None = None
        """The moving average of weights and statistics, from its first update on."""
        self.averaged_over = 0
        """Updates of it."""
        self.peak: int | None = None
        """The most bytes of activations in a training step of one process, once one was measured."""
        self._buffers = [b for b in self.net.buffers() if b.is_floating_point()]
        self._before = [b.clone() for b in self._buffers]

    def step(self, parts: Sequence[Batch], lr: float, number: int) -> Outcome:
        """Learns from a batch, given in parts whose gradients are added up; ``number`` is the step's, for messages.

        Raises:
            DivergedError: if reconstructed values are off.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._at, self._trouble = f"at step {number}", ""
        self.optimizer.zero_grad()
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)  # pyright: ignore[reportPrivateImportUsage]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        drifts: list[float] = []
        for i, part in enumerate(parts):
            with unsynchronised(self.model, last=i == len(parts) - 1):
                counted = self._learn(part, 1 / len(parts)) if self.peak is not None else self._measured(part, parts)
            if counted is None:
                return self._abandoned()
            sums += counted
            drifts += self._drift()
        if not self._finite_gradients():
            return self._abandoned()
        self.optimizer.step()
        return Outcome(sums, finite=True, drift=max(drifts, default=None))

    def _finite_gradients(self) -> bool:
        """Whether the gradients are finite, which all processes have the same of: a loss that is may have others."""
        norm = get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None], math.inf)
        finite = bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())
        if not finite:
            self._trouble = "it was, but not its gradient"
        return finite

    def _learn(self, part: Batch, share: float) -> Tensor | None:
        """Adds the gradients of a part, and returns what is counted; ``None`` if a process' loss is not finite."""
        found = self._forward(part)
        if self.world.largest(int(found is None), self.device) or found is None:
            return None
        loss, counted = found
        try:
            with diverging(self._at):
                (loss * share).backward()
        except DivergedError:
            self.optimizer.zero_grad()  # they are wrong
            raise
        return counted

    def _measured(self, part: Batch, parts: Sequence[Batch]) -> Tensor | None:
        """The same, with the bytes of activations that it needs."""
        for parameter in self.net.parameters():
            parameter.grad = torch.zeros_like(parameter)  # no activation: not to be counted
        counted, memory = measure_memory(lambda: self._learn(part, 1 / len(parts)), self.device)
        self.peak = memory.peak
        return counted

    def _forward(self, part: Batch) -> tuple[Tensor, Tensor] | None:
        """The loss, and what is counted; ``None`` if it is not finite."""
        images, labels = part.images.to(self.device, non_blocking=True), part.labels.to(self.device, non_blocking=True)
        x, target = self.prepare(images, part.draws), labels
        if self._mix is not None:
            x, target = self._mix(x, labels)
        try:
            with self.autocast():
                logits = self.model(x)
                loss = cross_entropy(logits, target, label_smoothing=self.run.recipe.label_smoothing)
        except StreamRangeError as error:
            self._trouble = f"the activations reach {error.peak:.0e}, and the grid ends at {error.limit:g}"
            if self.world.size > 1 and self.run.parallel == "fsdp":
                # Its parameters are gathered now, only the next layer would let them go, and the others wait for it.
                rule = f"{self._trouble} {self._at}, and FSDP can't skip a step"
                raise DivergedError(f"{rule}; try a lower --lr, --grid none or --parallel ddp") from None
            return None
        except ValueError as error:
            if self.run.budget is None:
                raise
            raise InputError(reason(error)) from None  # too small a budget
        if not bool(loss.isfinite()):
            self._trouble = f"it is {loss.item()}"
            return None
        with torch.no_grad():
            hits = (logits.argmax(1) == labels).sum()
            count = torch.tensor(len(labels), dtype=torch.float64, device=self.device)
            return loss, torch.stack([loss.detach().double() * len(labels), hits.double(), count])

    def _abandoned(self) -> Outcome:
        """Forgets a step: its gradients, and what it did to running statistics."""
        self.optimizer.zero_grad()
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)  # pyright: ignore[reportPrivateImportUsage]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        return Outcome(sums, finite=False, drift=None, trouble=self._trouble)

    def _drift(self) -> list[float]:
        """How far off reconstructed values were in the last backward pass, if any were.

        Raises:
            DivergedError: in all processes, if they were too far off in one.
        """
        drift = self.net.drift if isinstance(self.net, ReversibleNetwork) else None
        if drift is None:
            return []
        if self.world.size > 1 and self.world.largest(int(bool(self.net.drift_flag)), self.device):
            self.optimizer.zero_grad()
            off = f"the reconstruction is off by {drift:.0e} in process {self.world.rank}, or more in another"
            raise DivergedError(f"{off}, so that the gradients are wrong; go on with --backprop recompute")
        return [drift]

    def autocast(self) -> Any:
        """The arithmetic of the recipe, as a context."""
        if self.run.recipe.autocast == "none":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @torch.no_grad()
    def update_average(self) -> None:
        """Moves the average towards the weights as they are; the first time it takes them.

        At update :math:`n` the decay is the recipe's or, if that is less, :math:`n / (n + 9)`: then the average is over
        the last tenth of the run so far.
        """
        decay = self.run.recipe.ema_decay
        if decay is None:
            return
        now = self.net.state_dict()
        if self.average is None:
            self.average = {key: t.detach().clone() for key, t in now.items()}
            return
        self.averaged_over += 1
        decay = min(decay, self.averaged_over / (self.averaged_over + 9))  # or a short run is mostly its first weights
        for key, t in now.items():
            if t.is_floating_point():
                self.average[key].lerp_(t, 1 - decay)
            else:
                self.average[key].copy_(t)

    @contextmanager
    def examined(self, *, average: bool) -> Generator[nn.Module]:
        """A network to evaluate, which processes need not call equally often: this one, or of shards a whole copy.

        With ``average`` it has the average of the weights, if there is one.
        """
        own = self.net.state_dict()
        wanted = self.average if average and self.average is not None else own
        if any(isinstance(t, DTensor) for t in own.values()):
            run = dataclasses.replace(self.run, parallel="ddp")
            copy = configure(build(run.recipe, num_classes=self._num_classes), run, self.device)
            _copy(copy.state_dict(), whole(wanted))
            yield copy
        elif wanted is own:
            yield self.net
        else:
            before = {key: t.clone() for key, t in own.items()}
            try:
                _copy(own, wanted)
                yield self.net
            finally:
                _copy(own, before)

    def equalise(self) -> None:
        """Gives the networks of all processes, and their averages, the same statistics: those of the main one."""
        self.world.equalise(self.net.buffers())
        if self.average is not None:
            self.world.equalise(self.average[key] for key, _ in self.net.named_buffers())

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Any]]:
        """Weights, their average, and the optimiser's state, whole. A collective."""
        return whole(self.net.state_dict()), whole(self.average), whole(self.optimizer.state_dict())

    def restore(
        self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor] | None, state: Mapping[str, Any]
    ) -> None:
        """Takes up what :meth:`tensors` gave."""
        own = self.net.state_dict()
        self.net.load_state_dict({key: like(t, own[key]) if key in own else t for key, t in weights.items()})
        if average is not None:
            self.average = {key: like(t.to(own[key].device), own[key]) for key, t in average.items()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {i: tree_map(lambda t, p=parameters[i]: like(t, p), each) for i, each in dict(state["state"]).items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})


@torch.no_grad()
def _copy(to: Mapping[str, Tensor], of: Mapping[str, Tensor]) -> None:
    for key, t in to.items():
        t.copy_(of[key])
