"""The main command with a digits recipe that has more to lose: an average of the weights, and random mixing."""

import dataclasses
import runpy
from pathlib import Path

from zoo.recipes import RECIPES

if __name__ == "__main__":
    RECIPES["digits"] = dataclasses.replace(RECIPES["digits"], ema_decay=0.9, ema_every=2, mixup=0.2, cutmix=1.0)
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "imagenet_irevnet.py"), run_name="__main__")
