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
    """Versions, the decoder of JPEG files, threads, and what the device is.

    Example:
        >>> list(environment(torch.device("cpu")))
        ['python', 'torch', 'torchvision', 'decoder', 'threads', 'device']
    """
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
    """What is other now than when a run's configuration was written: ``name: before, now ...``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = Path(folder) / "config.json"
        ...     _ = config.write_text('{"environment": {"threads": 2, "python": "3.12.0"}}')
        ...     changes(config, {"threads": 1, "python": "3.12.0"})
        ['threads: 2, now 1']
    """
    if not config.exists():
        return []
    before = json.loads(config.read_text(encoding="utf-8")).get("environment", {})
    return [f"{key}: {before[key]}, now {now[key]}" for key in now if key in before and before[key] != now[key]]


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free there; ``None`` if that can't be told.

    Example:
        >>> (free_memory(torch.device("cpu")) or 2**30) > 2**20
        True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
