"""The processes that read images."""

import multiprocessing
import os
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["worker_options"]


def worker_options(count: int) -> dict[str, Any]:
    """What a ``DataLoader`` takes for so many worker processes, or for none.

    Where this process has threads of a GPU, of NCCL or of gloo, workers are not forked from it but from a server, a
    process that has nothing but the modules they need. Forked from this one a worker could wait for ever for a lock
    that one of these threads held in that moment, for the thread is not there to let it go. Elsewhere the fork is
    faster, as a server first imports PyTorch.
    """
    if not count:
        return {"num_workers": 0}
    threads = torch.cuda.is_initialized() or dist.is_initialized()
    context = multiprocessing.get_context("forkserver" if threads else "fork")
    if threads:
        context.set_forkserver_preload(["__main__", "zoo.data._server"])
    return {
        "num_workers": count,
        "prefetch_factor": 4,
        "multiprocessing_context": context,
        "worker_init_fn": _start,
    }


def _start(_: int) -> None:
    """Ctrl-C, and what a scheduler sends to the whole group, is for the main process, which saves and ends this one."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(main: Any) -> None:
    """Ends this process when the main one is gone: PyTorch looks at the one that it was forked from, the server."""
    main.join()
    os._exit(1)
