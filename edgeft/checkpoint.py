"""Checkpoints of a training stage: tensors and a JSON note in one safetensors file that is replaced in one step."""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeft.errors import ArtifactError

NOTE = "edgeft"
"""Key of the JSON text in the safetensors metadata."""


def write_checkpoint(path: Path, note: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` and the JSON-able `note` to `path`; a kill at any moment leaves the old file or the new one.

    Raises ArtifactError when the disk is full or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # Cloned: safetensors wants row-major tensors that share no memory.
    plain = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    try:
        save_file(plain, temporary, metadata={NOTE: json.dumps(note)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "no space left on the device" if full else str(error)
        raise ArtifactError(f"cannot write the checkpoint '{path}': {reason}", "free some space, then run again with --resume") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The note and the tensors (on the CPU) of `path`, or None where there is no such file.

    Raises ArtifactError when the file is broken.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            note = json.loads(file.metadata()[NOTE])
            return note, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the checkpoint '{path}' is damaged: {error}", "delete it; this stage then starts again") from error


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of `model` by name: the live tensors, not copies."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copy_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies, on the same device and in the same memory layout."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@torch.no_grad()
def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the parameters and buffers of `model` in place.

    Not through `load_state_dict`: modules may rebuild themselves there, and optimizers hold on to the tensors.
    Raises ArtifactError when names or shapes differ.
    """
    own = state_of(model)
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in state.items()}:
        odd = sorted(own.keys() ^ state.keys()) or sorted(name for name in own if own[name].shape != state[name].shape)
        raise ArtifactError(f"the checkpoint is of another model: '{odd[0]}' differs", "use another --out for another model")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def with_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under '<prefix>.<name>'."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def under_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named '<prefix>.<name>', under '<name>'."""
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}


def digest(*parts: object) -> str:
    """Short hash of the parts: bytes as they are, tensors by their values, anything else by its JSON text."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            sha.update(part)
        elif isinstance(part, Tensor):
            # Viewed as bytes because numpy lacks bfloat16.
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            sha.update(json.dumps(part, sort_keys=True).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:32]
