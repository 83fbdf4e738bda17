"""What computes a run: its numbers may differ in the last bits where this differs."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from zoo.data.images import DECODER

__all__ = ["changes", "environment", "free_memory"]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, the decoder of JPEG files, threads, and what the device is."""
    gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "decoder": f"{DECODER} {version(DECODER)}",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if gpu else torch.backends.cpu.get_cpu_capability(),
    }


def changes(config: Path, now: dict[str, Any]) -> list[str]:
    """What is other now than when a run's configuration was written: ``name: before, now ...``."""
    if not config.exists():
        return []
    before = json.loads(config.read_text(encoding="utf-8")).get("environment", {})
    return [f"{key}: {before[key]}, now {now[key]}" for key in now if key in before and before[key] != now[key]]


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free there; ``None`` if that can't be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
