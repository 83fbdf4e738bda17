"""A process of a process group that reads images by a worker, while a thread of its own holds a lock for good."""

import multiprocessing
import os
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch.distributed as dist
from PIL import Image
from torchvision.transforms import v2

from zoo.data import Samples, batches_of, loader

LOCK = threading.Lock()


class Locked:
    """One image, read under the lock: by a process that was forked while it was held, never."""

    classes = ("a",)
    labels = np.zeros(6, dtype=np.int64)

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 6

    def name(self, index):
        return f"{self.path}:{index}"

    def read(self, index):
        with LOCK:
            return self.path.read_bytes()


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{os.path.abspath('store')}", rank=0, world_size=1)  # noqa: PTH100
    image = Path("image.png")
    Image.new("RGB", (8, 8)).save(image)
    threading.Thread(target=LOCK.acquire).start()
    batches = loader(Samples(Locked(image), v2.Compose([v2.Identity()])), batches_of(range(6), 2), workers=1)
    first = next(batches)
    server = forkserver._forkserver._forkserver_pid
    if "killed" in sys.argv:
        print(server, *(each.pid for each in multiprocessing.active_children()), "reading", flush=True)
        time.sleep(600)
    os.kill(server, 15)  # as a scheduler does, to all processes
    time.sleep(1)
    print("server", "ended" if os.waitpid(server, os.WNOHANG)[0] else "works")
    print(len(first.labels) + sum(len(each.labels) for each in batches), "images")
    dist.destroy_process_group()
