"""Networks with their weights in a folder, or on the hub of Hugging Face: ``config.json`` and ``model.safetensors``."""

import json
import tempfile
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

import invertible
from zoo._frozen import frozen
from zoo.checkpoints import write
from zoo.errors import WeightsError, reason
from zoo.registry import Config, config_of, create
from zoo.weights import FORMAT, check_fit, save_weights, stored_in

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_pretrained(net: nn.Module, folder: str | Path) -> Path:
    """Writes a network of the zoo: what it was built from, and its weights and statistics.

    What it keeps for gradients and its grid are no part of the map, and are not written.

    Args:
        net: built by :func:`zoo.create` or a model's builder.
        folder: where to; made if it is not there. Files in it are replaced, each of them whole or not at all.

    Returns:
        The folder.

    Raises:
        ValueError: if the zoo did not build the network, its options are not JSON, or it was changed since, so that it
            could not be loaded.
        WeightsError: if the files can't be written.

    Example:
        >>> import tempfile, zoo
        >>> net = zoo.create("irevnet_small", num_classes=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = from_pretrained(save_pretrained(net, folder))
        >>> torch.equal(net.head[-1].weight, again.head[-1].weight)
        True
    """
    config = config_of(net)
    content = _json_of(config)
    _check_unchanged(net, config)
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

    It is on the CPU and in ``train`` mode, as every new network, and its weights have the dtypes that they have in the
    file. Nothing in the files is executed, and nothing is allocated before the sizes in both are found to be the same.

    Args:
        source: the folder; or ``owner/name`` on the hub, if there is no such folder. What was downloaded from there is
            kept where its client keeps things, and found without a network.
        revision: of what is on the hub: a branch, tag or commit.

    Raises:
        WeightsError: if there is no such folder, its files can't be read, or the weights do not fit.

    Example:
        >>> import tempfile, zoo
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_pretrained(zoo.create("irevnet_small", num_classes=3, blocks=(1, 1, 1)), folder)
        ...     from_pretrained(path)(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 3])
    """
    folder = Path(source)
    try:
        there = folder.is_dir()
    except OSError as error:
        raise WeightsError(f"zoo.from_pretrained: cannot read {str(source)!r:.80}: {reason(error)}.") from None
    if not there:
        folder = _downloaded(str(source), revision)
    path, weights = folder / _CONFIG, folder / _WEIGHTS
    config = _config_from(path)
    stored = stored_in(weights)
    try:
        with _at_most(2 * len(stored) + 100):  # builders may make some twice
            sketch = _sketched(config)
    except Exception as error:  # noqa: BLE001  a wrong option fails in as many ways as the builders have lines
        raise WeightsError(f"zoo.from_pretrained: cannot build what {path} describes: {reason(error)}") from None
    check_fit(sketch, stored, weights)
    net = create(config.model, weights=None, **config.options)
    own = net.state_dict()
    found = {key: _copied(t, own[key]) for key, t in load_file(weights).items()}
    net.load_state_dict(found, assign=True)
    return net


def _copied(stored: Tensor, own: Tensor) -> Tensor:
    """A tensor of a file, in memory of its own, in its floating-point dtype or else the network's."""
    return stored.to(own.device, stored.dtype if stored.dtype in _FLOATS else own.dtype, copy=True)


def _sketched(config: Config) -> nn.Module:
    """The network without its values."""
    with torch.device("meta"):
        return create(config.model, weights=None, **config.options)


@contextmanager
def _at_most(parameters: int) -> Generator[None]:
    """Stops a builder in this thread that makes more parameters than that."""
    left, thread = parameters, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise ValueError("it has more parameters than there are tensors in the file of weights.")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_unchanged(net: nn.Module, config: Config) -> None:
    """Refuses a network whose tensors are not those that its options make.

    Raises:
        ValueError: if one has another name or shape; the message names the first.
    """
    expected, own = ({key: tuple(t.shape) for key, t in each.state_dict().items()} for each in (_sketched(config), net))
    wrong = [key for key in {**expected, **own} if expected.get(key) != own.get(key)]
    if wrong:
        was, got = (each.get(wrong[0], "no such tensor") for each in (expected, own))
        rule = f"the network must be as {config.model} builds it, with the options that zoo.config_of gives"
        fix = "A classifier is replaced by zoo.replace_head."
        raise ValueError(f"zoo.save_pretrained: {rule}, got {wrong[0]}: {got} in place of {was}. {fix}")


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
            same = frozen(json.loads(json.dumps(value, default=_plain))) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            rule = "options must be numbers, strings, lists and dictionaries"
            raise ValueError(f"zoo.save_pretrained: {rule}, got {key}={value!r}.")
    versions = {"invertible": invertible.__version__, "torch": str(torch.__version__)}
    fields = {"zoo_format": FORMAT, "model": config.model, "options": config.options, "versions": versions}
    return json.dumps(fields, indent=2, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """What JSON makes of a value that it does not know."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def _config_from(path: Path) -> Config:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"zoo.from_pretrained: cannot read {path}: {reason(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"zoo.from_pretrained: {path} is not JSON: {reason(error)}.") from None
    known = isinstance(fields, Mapping) and type(fields.get("zoo_format")) is int
    if not known or not isinstance(fields.get("model"), str) or not isinstance(fields.get("options"), Mapping):
        raise WeightsError(f"zoo.from_pretrained: {path} is not a file of zoo.save_pretrained.")
    if fields["zoo_format"] > FORMAT:
        newer = f"{path} has format {fields['zoo_format']}"
        raise WeightsError(f"zoo.from_pretrained: {newer}, and this version reads up to {FORMAT}.")
    try:
        return Config(fields["model"], fields["options"])
    except RecursionError as error:
        raise WeightsError(f"zoo.from_pretrained: cannot use {path}: {reason(error)}.") from None


def _downloaded(repo_id: str, revision: str | None) -> Path:
    """The folder of the hub's client with the two files of a repository."""
    parts = repo_id.split("/")
    if len(parts) != 2 or not all(parts) or repo_id.startswith((".", "~")):
        raise WeightsError(f"zoo.from_pretrained: no such folder: {repo_id:.80}.")
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
