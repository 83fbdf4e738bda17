"""The processes of a run: one, or those that ``torchrun`` starts."""

import os
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from zoo.errors import InputError, reason

__all__ = ["PARALLEL", "World", "joined", "like", "parallel", "unsynchronised", "whole"]

PARALLEL = ("ddp", "fsdp")
"""How several processes share a network: each has all of it, or a part of each parameter."""


@dataclass(frozen=True)
class World:
    """Which process this is, and of how many. Its methods are collectives: all processes must call them.

    Example:
        >>> alone = World()
        >>> alone.main, alone.summed(torch.tensor(3)), alone.gathered("a")
        (True, tensor(3), ['a'])
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Which process of this machine."""
    store: Store | None = None
    """Where several processes leave word for each other, however long one takes."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def summed(self, t: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.size > 1:
            t = t.clone()
            dist.all_reduce(t)
        return t

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        t = torch.tensor(number, device=device)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return int(t)

    def gathered(self, thing: Any) -> list[Any]:
        """What each process has, in the order of their ranks."""
        if self.size == 1:
            return [thing]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing)
        return found

    def first(self, thing: Any) -> Any:
        """What the main process has."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box)
        return box[0]

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the main one's values."""
        if self.size > 1:
            for t in tensors:
                dist.broadcast(t, 0)

    @contextmanager
    def main_first(self) -> Generator[None]:
        """Lets the others do what is inside when the main process has done it, and finds the files it has written.

        It may take hours, after which a barrier would have given up.
        """
        if self.store is None:
            yield
            return
        done = f"first/{self.store.add(f'turns/{self.rank}', 1)}"
        while not self.main and not self.store.check([done]):
            time.sleep(0.1)
        try:
            yield
        finally:  # if it failed, the others find out why
            if self.main:
                self.store.set(done, "")

    def first_to_say(self, message: str) -> bool:
        """Whether no other process has said so. Not a collective: one may fail by itself."""
        try:
            return self.store is None or self.store.add(f"said/{message}", 1) == 1
        except RuntimeError:  # the store went with the process that kept it
            return True


@contextmanager
def joined(device: str) -> Generator[World]:
    """Joins the processes that ``torchrun`` has started; a process by itself stays so, without a process group.

    Args:
        device: that the run is on: a GPU takes NCCL, each process the GPU of its local rank; a CPU takes gloo.

    Raises:
        InputError: if a GPU is named by its number: each process needs another one; or if the environment lacks what
            ``torchrun`` puts there.

    Example:
        >>> with joined("cpu") as world:  # torchrun makes them several
        ...     world.rank, world.size
        (0, 1)
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if "RANK" not in os.environ:
        raise InputError("WORLD_SIZE is set and RANK is not; several processes are started by torchrun")
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"no device {device!r} here: {reason(error)}") from None
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    own: dict[str, Any] = {}
    if kind.type == "cuda":
        if kind.index is not None:
            raise InputError(
                f"{size} processes can't share the device {device!r}; take --device cuda, one GPU for each"
            )
        if world.local_rank >= torch.cuda.device_count():
            raise InputError(f"process {world.local_rank} of this machine finds {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(world.local_rank)
        own = {"device_id": torch.device("cuda", world.local_rank)}
    try:
        store, *_ = next(iter(rendezvous("env://", world.rank, size)))
    except ValueError as error:
        raise InputError(f"{reason(error)}; several processes are started by torchrun") from None
    backend = "nccl" if kind.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=world.rank, world_size=size, **own)
    try:
        yield replace(world, store=PrefixStore("zoo", store))
    finally:
        dist.destroy_process_group()


def parallel(net: nn.Module, kind: str, world: World, device: torch.device) -> nn.Module:
    """The module to call in training: DDP around the network, or the network sharded by FSDP2, layer by layer.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> parallel(net, "ddp", World(), torch.device("cpu")) is net  # one process has no need of it
        True
    """
    if world.size == 1:
        return net
    if kind == "ddp":
        return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
    layers = (layer for chain in getattr(net, "chains", ()) for layer in chain)
    for part in layers:  # not inside one: its replay needs whole parameters
        if any(True for _ in part.parameters()):
            sharded: Any = fully_shard(part)
            register_fsdp_forward_method(sharded, "inverse")
    model: Any = fully_shard(net)
    for method in ("features", "inverse"):
        if hasattr(net, method):
            register_fsdp_forward_method(model, method)
    return model


@contextmanager
def unsynchronised(model: nn.Module, *, last: bool) -> Generator[None]:
    """Lets DDP's gradients of a part of a batch add up in each process, until the last part.

    FSDP sums each part's: what adds up whole in between could not be taken back if the step is given up.

    Example:
        >>> net, parts = nn.Linear(2, 1), [torch.ones(4, 2), torch.ones(4, 2)]
        >>> for i, part in enumerate(parts):
        ...     with unsynchronised(net, last=i == len(parts) - 1):
        ...         net(part).sum().backward()
        >>> net.bias.grad
        tensor([8.])
    """
    apart = nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()
    with apart:
        yield


def whole(tree: Any) -> Any:
    """Tensors that are sharded over the processes, gathered on the CPU; others as they are. A collective.

    Example:
        >>> whole({"w": torch.ones(2), "step": 3})  # nothing is sharded here
        {'w': tensor([1., 1.]), 'step': 3}
    """
    return tree_map(lambda t: t.full_tensor().cpu() if isinstance(t, DTensor) else t, tree)


def like(t: Any, reference: Tensor) -> Any:
    """A whole tensor, sharded as another one of its shape is.

    Example:
        >>> like(torch.ones(2), torch.zeros(2))  # nothing is sharded here
        tensor([1., 1.])
    """
    if isinstance(reference, DTensor) and isinstance(t, Tensor) and t.shape == reference.shape:
        t = t.to(reference.device, copy=True)
        return cast("Tensor", distribute_tensor(t, reference.device_mesh, reference.placements))
    return t
