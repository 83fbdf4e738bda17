"""The main command with a digits recipe that has more to lose: an average of the weights, and random mixing."""

import dataclasses
import os
import runpy
import time
from pathlib import Path

from zoo import stopping
from zoo.recipes import RECIPES

hears = stopping.stopping


def late():
    """As ``stopping``, where the machine is busy: the other process is ready long before."""
    time.sleep(3)
    return hears()


if __name__ == "__main__":
    RECIPES["digits"] = dataclasses.replace(RECIPES["digits"], ema_decay=0.9, ema_every=2, mixup=0.2, cutmix=1.0)
    if os.environ.get("LATE") == os.environ.get("RANK", "0"):
        stopping.stopping = late
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "imagenet_irevnet.py"), run_name="__main__")
