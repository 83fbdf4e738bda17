"""The processes that read images."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["SIGNALS", "worker_options"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""For the main process alone, which saves and ends the others; but Ctrl-C and a scheduler send them to the group."""


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
        _start_server()
    return {
        "num_workers": count,
        "prefetch_factor": 4,
        "multiprocessing_context": context,
        "worker_init_fn": _start,
    }


def _start_server() -> None:
    """Starts the server, unless it is there, with the signals blocked that it will ignore once it can."""
    forkserver.set_forkserver_preload(["zoo.data._server", "zoo.training"])  # the latter: for the command's main module
    resource_tracker.ensure_running()  # or it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(_: int) -> None:
    """Prepares a worker process."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(main: Any) -> None:
    """Ends this process when the main one is gone: PyTorch looks at the one that it was forked from, the server."""
    main.join()
    os._exit(1)
