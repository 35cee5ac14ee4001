"""Weight files: read one without running code from it, and fit it into a model or say which keys do not fit."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeft.errors import ConfigError

PICKLED = (".pth", ".pt")
SHOWN_KEYS = 10


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, on the CPU.

    `.safetensors`, or `.pth`/`.pt` through `torch.load(weights_only=True)`, where a 'state_dict' or 'model' key is unwrapped and
    the 'module.' of data-parallel training is dropped. Raises ConfigError when the file is missing, broken or holds code.
    """
    if not path.is_file():
        raise ConfigError(f"the weights file '{path}' does not exist or is not a file", "check --weights")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"'{path}' is not a readable safetensors file: {_first_line(error)}", "is it truncated? copy it again"
            ) from error
    if path.suffix in PICKLED:
        return _plain_tensors(_load_pickled(path), path)
    raise ConfigError(f"the weights file '{path}' has the suffix '{path.suffix}'; allowed: .safetensors, .pth, .pt")


def _load_pickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Remarks on pickle protocols; what matters is whether tensors come out.
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A broken file makes the reader raise anything.
        if "Unsupported " in str(error):
            reason = "it holds Python objects besides tensors, which could run code when read"
        else:
            reason = f"it cannot be read ({_first_line(error)}); is it truncated?"
        raise ConfigError(
            f"'{path}' is refused: {reason}", "save plain weights: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error


def _plain_tensors(tree: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise ConfigError(f"'{path}' does not hold a dictionary of tensors", "save model.state_dict(), alone or under 'state_dict'")
    return {str(key).removeprefix("module."): value for key, value in tree.items()}


def load_weights(net: nn.Module, head: str, path: Path) -> bool:
    """Load a checkpoint into `net` in place; `head` is the name of its classifier. True when the head was loaded too.

    A head for another number of classes, or none, leaves the head of `net` as it is. Batch-norm step counters may be missing.
    Raises ConfigError listing missing, unexpected and mis-shaped keys, and those with numbers that are not finite.
    """
    stored, wanted = read_weights(path), net.state_dict()
    head_keys = {key for key in wanted if key.startswith(f"{head}.")}
    with_head = all(key in stored and stored[key].shape == wanted[key].shape for key in head_keys)
    if not with_head:
        stored = {key: value for key, value in stored.items() if key not in head_keys or not _same_but_classes(value, wanted[key])}
        wanted = {key: value for key, value in wanted.items() if key not in head_keys}
    optional = {key for key in wanted if key.endswith("num_batches_tracked")}
    problems = [
        *_listing("missing", sorted(wanted.keys() - stored.keys() - optional)),
        *_listing("unexpected", sorted(stored.keys() - wanted.keys())),
        *_listing(
            "of another shape",
            [
                f"{key} {list(stored[key].shape)} instead of {list(wanted[key].shape)}"
                for key in sorted(stored.keys() & wanted.keys())
                if stored[key].shape != wanted[key].shape
            ],
        ),
    ]
    if problems:
        raise ConfigError(
            f"the weights in '{path}' do not fit the backbone:\n  " + "\n  ".join(problems),
            "give the backbone the weights were made for, with its arguments (--set model.args.KEY=VALUE)",
        )
    if broken := sorted(key for key, value in stored.items() if value.is_floating_point() and not value.isfinite().all()):
        raise ConfigError("\n  ".join([f"the weights in '{path}' are not finite:", *_listing("with NaN or infinity", broken)]))
    net.load_state_dict(stored, strict=False)
    return with_head


def _same_but_classes(stored: Tensor, wanted: Tensor) -> bool:
    """Whether a head tensor differs from the wanted one in its first dimension, the classes, at most."""
    return stored.ndim == wanted.ndim and stored.shape[1:] == wanted.shape[1:]


def _listing(what: str, keys: list[str]) -> Iterable[str]:
    if not keys:
        return []
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return [f"{len(keys)} {what}: {', '.join(keys[:SHOWN_KEYS])}{more}"]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
