"""Networks with their weights in a folder, or on the hub of Hugging Face: ``config.json`` and ``model.safetensors``."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import invertible
from zoo.checkpoints import write
from zoo.errors import WeightsError, reason
from zoo.registry import Config, config_of, create
from zoo.weights import FORMAT, load_weights, save_weights

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(net: nn.Module, folder: str | Path) -> Path:
    """Writes a network of the zoo: what it was built from, and its weights and statistics.

    What it keeps for gradients and its grid are no part of the map, and are not written.

    Args:
        net: built by :func:`zoo.create` or a model's builder.
        folder: where to; made if it is not there. Files in it are replaced, each of them whole or not at all.

    Returns:
        The folder.

    Raises:
        ValueError: if the zoo did not build the network, or its options are not JSON.
        WeightsError: if the files can't be written.

    Example:
        >>> import tempfile, zoo
        >>> net = zoo.create("irevnet_small", num_classes=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = from_pretrained(save_pretrained(net, folder))
        >>> torch.equal(net.head[-1].weight, again.head[-1].weight)
        True
    """
    content = _json_of(config_of(net))
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(net, folder / _WEIGHTS)
        write(folder / _CONFIG, content.encode())
    except OSError as error:
        raise WeightsError(f"zoo.save_pretrained: cannot write {folder}: {reason(error)}.") from None
    return folder


def from_pretrained(source: str | Path, *, revision: str | None = None) -> nn.Module:
    """Builds the network of a folder that :func:`save_pretrained` wrote, with its weights.

    It is on the CPU and in ``train`` mode, as every new network. Nothing in the files is executed.

    Args:
        source: the folder; or ``owner/name`` on the hub, if there is no such folder. What was downloaded from there is
            kept where its client keeps things, and found without a network.
        revision: of what is on the hub: a branch, tag or commit.

    Raises:
        WeightsError: if there is no such folder, its files can't be read, or the weights do not fit.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _downloaded(str(source), revision)
    path = folder / _CONFIG
    config = _config_from(path)
    try:
        net = create(config.model, weights=None, **config.options)
    except (ValueError, TypeError, RuntimeError) as error:  # an unknown model or option, or one of a wrong kind or size
        raise WeightsError(f"zoo.from_pretrained: cannot build what {path} describes: {error}") from None
    load_weights(net, folder / _WEIGHTS)
    return net


def push_to_hub(
    net: nn.Module, repo_id: str, *, private: bool = False, message: str = "Upload weights", token: str | None = None
) -> str:
    """Uploads what :func:`save_pretrained` writes.

    Args:
        net: built by :func:`zoo.create` or a model's builder.
        repo_id: ``owner/name``; made if it is not there.
        private: whether only you see it, if it is made.
        message: of the commit.
        token: of your account; ``None`` takes the one that you are logged in with.

    Returns:
        The address of what was uploaded.

    Raises:
        WeightsError: if the hub's client is not installed.
    """
    client = _client("zoo.push_to_hub: cannot upload")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(net, folder)
        api: Any = client.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


def _json_of(config: Config) -> str:
    """The configuration as JSON: what builds the network, and, for the reader, what wrote it.

    Raises:
        ValueError: if an option would not come back as it is.
    """
    for key, value in config.options.items():
        try:
            same = _tuples(json.loads(json.dumps(value))) == _tuples(value)
        except (TypeError, ValueError):
            same = False
        if not same:
            rule = "options must be numbers, strings, lists and dictionaries"
            raise ValueError(f"zoo.save_pretrained: {rule}, got {key}={value!r}.")
    versions = {"invertible": invertible.__version__, "torch": str(torch.__version__)}
    fields = {"zoo_format": FORMAT, "model": config.model, "options": dict(config.options), "versions": versions}
    return json.dumps(fields, indent=2) + "\n"


def _config_from(path: Path) -> Config:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"zoo.from_pretrained: cannot read {path}: {reason(error)}.") from None
    except ValueError as error:
        raise WeightsError(f"zoo.from_pretrained: {path} is not JSON: {reason(error)}.") from None
    known = isinstance(fields, Mapping) and isinstance(fields.get("zoo_format"), int)
    if not known or not isinstance(fields.get("model"), str) or not isinstance(fields.get("options"), Mapping):
        raise WeightsError(f"zoo.from_pretrained: {path} is not a file of zoo.save_pretrained.")
    if fields["zoo_format"] > FORMAT:
        newer = f"{path} has format {fields['zoo_format']}"
        raise WeightsError(f"zoo.from_pretrained: {newer}, and this version reads up to {FORMAT}.")
    return Config(fields["model"], {key: _tuples(value) for key, value in fields["options"].items()})


def _tuples(value: Any) -> Any:
    """JSON has lists only, and the builders take tuples."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(each) for each in value)
    return {key: _tuples(each) for key, each in value.items()} if isinstance(value, Mapping) else value


def _downloaded(repo_id: str, revision: str | None) -> Path:
    """The folder of the hub's client with the two files of a repository."""
    parts = repo_id.split("/")
    if len(parts) != 2 or not all(parts) or repo_id.startswith((".", "~")):
        raise WeightsError(f"zoo.from_pretrained: no such folder: {repo_id}.")
    client: Any = _client(f"zoo.from_pretrained: there is no folder {repo_id}, and it cannot be downloaded")
    try:
        return Path(client.snapshot_download(repo_id, revision=revision, allow_patterns=[_CONFIG, _WEIGHTS]))
    except (OSError, ValueError) as error:  # those of the client are of these kinds
        raise WeightsError(f"zoo.from_pretrained: cannot download {repo_id}: {reason(error)}.") from None


def _client(what: str) -> ModuleType:
    """The hub's client, which nothing else here needs."""
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise WeightsError(f"{what}: the hub's client is not installed; pip install huggingface_hub.") from None
    return huggingface_hub
