"""Runs a function on two processes that talk to each other over gloo."""

import functools
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
import warnings
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from zoo.distributed import World

IGNORED = ["FSDP2-wrapped module", "The .grad attribute", "Profiler record function"]
"""Of torch's own warnings: Split returns views, with Store too; the compiler looks at what it should not."""

PATIENCE = 120
"""Seconds until a process that waits for the other one counts as hanging."""


@functools.cache
def _server():
    """Its processes start from one that has imported torch, but has never run it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "tests.networks", "pytest"])
    return context


def on_two(function, *args):
    """Returns what ``function(rank, *args)`` returned in each of two processes; raises what one of them raised."""
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(2):
            mine, theirs = _server().Pipe(duplex=False)
            process = _server().Process(target=_serve, args=(theirs, folder, rank, function, args), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(mine)
        try:
            return _answers(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


_stores = []


def one_of_two(rank):
    """What the zoo has for one of two processes."""
    return World(rank, 2, rank, _stores[0])


def _answers(pipes):
    found = {}
    while len(found) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in found], timeout=PATIENCE)
        if not ready:
            raise AssertionError(f"processes {[i for i, p in enumerate(pipes) if p not in found]} hang")
        for pipe in ready:
            try:
                kind, answer = pickle.loads(pipe.recv_bytes())  # noqa: S301 (our own process)
            except EOFError:
                kind, answer = "error", "died without a word"
            if kind == "error":
                raise AssertionError(f"process {pipes.index(pipe)}:\n{answer}")
            found[pipe] = answer
    return [found[pipe] for pipe in pipes]


def _serve(pipe, folder, rank, function, args):
    try:
        torch.set_num_threads(1)
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        warnings.simplefilter("error")  # as everywhere in the tests
        for message in IGNORED:
            warnings.filterwarnings("ignore", message)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        _stores[:] = next(iter(rendezvous(f"file://{folder}/words", rank, 2)))[:1]
        torch.manual_seed(0)
        pipe.send_bytes(pickle.dumps(("result", function(rank, *args))))  # tensors by value, not shared
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 (the test shall see it, whatever it is)
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
