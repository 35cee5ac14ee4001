"""What a run is compared with: its own net in float32, and ONNX Runtime's static quantization of that, as ONNX files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeft.artifact import Artifact, atomic_write, json_bytes
from edgeft.bench.store import ABOUT, PEER_FILES, versions
from edgeft.checkpoint import restore
from edgeft.config import Config, ModelConfig
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import UnsupportedError, VerificationError
from edgeft.export.float_onnx import FloatNode, assemble_float, quantize_statically, session
from edgeft.models import Classifier, build_classifier
from edgeft.quant.plan import IMAGE, AddStep, ConvStep, FlattenStep, GlobalPoolStep, LinearStep, MaxPoolStep, Plan, Step
from edgeft.quant.tracing.trace import trace
from edgeft.runner import Images

TOLERANCE = 1e-4
"""Largest difference between peer and PyTorch, as a share of the largest score."""
N_VERIFIED = 16


@dataclass(frozen=True)
class Peers:
    """The files of a run's peers, their digests, and the largest difference of the float one to PyTorch."""

    folder: Path
    digests: dict[str, str]
    difference: float
    n_calibration: int


def float_classifier(artifact: Artifact, state: Mapping[str, NDArray[Any]] | None = None) -> Classifier:
    """The float net of a run, in eval mode, with its own weights or others. Raises ArtifactError when the artifact holds none."""
    config, p = Config.model_validate(artifact.manifest.config), Preprocessing.from_json(artifact.manifest.preprocessing)
    state = artifact.arrays("float.safetensors") if state is None else state
    # Without the weights that it was trained from, which need not be there any more.
    model = ModelConfig(backbone=config.model.backbone, args=config.model.args)
    built = build_classifier(model, config.data, len(artifact.manifest.classes), p.size, config.seed)
    restore(built.net, {name: torch.from_numpy(value) for name, value in state.items()})
    return Classifier(built.net, p).eval()


def peers_of(artifact: Artifact, folder: Path, calibration: Images) -> Peers:
    """Write both peers of a run, or find those that an earlier bench with the same versions wrote into `folder`.

    `calibration` are image bytes. Raises VerificationError when the float peer is not the run's net, UnsupportedError for a net
    without a plan.
    """
    wanted = {"run": artifact.digest, "versions": versions(), "calibration_images": len(calibration)}
    found = _found(folder, wanted)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    classifier = float_classifier(artifact)
    source, static = (folder / PEER_FILES[name] for name in PEER_FILES)
    float_peer(classifier, source)
    difference = check_float_peer(classifier, source, calibration[:N_VERIFIED])
    quantize_statically(source, static, normalised(classifier, calibration))
    digests = {name: hashlib.sha256((folder / file).read_bytes()).hexdigest() for name, file in PEER_FILES.items()}
    p = classifier.preprocessing
    about = {**wanted, "digests": digests, "difference": difference, "mean": list(p.mean), "std": list(p.std)}
    atomic_write(folder / ABOUT, json_bytes(about))
    return Peers(folder, digests, difference, len(calibration))


def _found(folder: Path, wanted: dict[str, Any]) -> Peers | None:
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        same = all(about[key] == value for key, value in wanted.items())
        found = {name: hashlib.sha256((folder / file).read_bytes()).hexdigest() for name, file in PEER_FILES.items()}
    except (OSError, ValueError, KeyError):  # not there, or half written: they are made again
        return None
    return Peers(folder, found, about["difference"], about["calibration_images"]) if same and found == about["digests"] else None


def float_peer(classifier: Classifier, file: Path) -> None:
    """Write the classifier's net as float32 ONNX: input "image" [batch, 3, size, size], *normalised*, batch norm folded.

    Normalisation is left to the caller, which favours this peer: the exported fixed-point model takes image bytes.
    Raises UnsupportedError for a net that has no plan.
    """
    size = classifier.preprocessing.size
    file.write_bytes(float_model(trace(classifier.net, (3, size, size))).SerializeToString())


def float_model(plan: Plan) -> Any:
    """The checked ONNX model of a traced plan (not yet prepared for bytes)."""
    nodes = [node for step in plan.steps for node in _nodes(step)]
    return assemble_float(nodes, IMAGE, plan.image_shape, plan.output, plan.steps[-1].shape[-1])


def _nodes(step: Step) -> list[FloatNode]:
    """A step's operator and, where it has one, its rectification; a step's tensor keeps its name."""
    result = f"{step.name}/result" if step.relu else step.name
    found = [_operator(step, result)]
    if step.relu and step.clip is None:
        found.append(FloatNode("Relu", step.name, (result,)))
    elif step.relu:
        bounds = {f"{step.name}/low": np.float32(0.0), f"{step.name}/high": np.float32(step.clip)}
        found.append(FloatNode("Clip", step.name, (result,), {name: np.asarray(value) for name, value in bounds.items()}))
    return found


def _operator(step: Step, result: str) -> FloatNode:
    match step:
        case ConvStep():
            window = {"kernel_shape": step.weight.shape[2:], "strides": step.stride, "pads": step.padding, "dilations": step.dilation}
            return FloatNode("Conv", result, step.inputs, _weights(step), {"group": step.groups, **window})
        case LinearStep():
            return FloatNode("Gemm", result, step.inputs, _weights(step), {"transB": 1})
        case AddStep():
            return FloatNode("Add", result, step.inputs)
        case MaxPoolStep():
            window = {"kernel_shape": step.kernel, "strides": step.stride, "pads": step.padding}
            return FloatNode("MaxPool", result, step.inputs, attributes=window)
        case GlobalPoolStep():
            return FloatNode("GlobalAveragePool", result, step.inputs)
        case FlattenStep():
            return FloatNode("Flatten", result, step.inputs, attributes={"axis": 1})
        case _:
            raise UnsupportedError(f"layer '{step.name}' ({type(step).__name__}) has no float32 ONNX form")


def _weights(step: ConvStep | LinearStep) -> dict[str, NDArray[np.float32]]:
    parts = {"weight": step.weight, "bias": step.bias}
    return {f"{step.name}/{part}": value.detach().float().numpy() for part, value in parts.items()}


def check_float_peer(classifier: Classifier, file: Path, images: NDArray[np.uint8]) -> float:
    """Largest difference to PyTorch on image bytes [n, 3, size, size], as a share of the largest score.

    Raises VerificationError when it is above TOLERANCE: a net that computes something else is no peer.
    """
    with torch.inference_mode():
        expected = classifier(torch.from_numpy(images)).numpy()
    found = session(file, 1).run(None, {IMAGE: normalised(classifier, images)})[0]
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:
        raise VerificationError(
            f"the float32 ONNX peer differs from PyTorch by {difference:.2g} of the largest score, more than {TOLERANCE:g}"
        )
    return difference


def normalised(classifier: Classifier, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the float32 net reads, [n, 3, size, size] in row-major layout."""
    with torch.inference_mode():
        values: NDArray[np.float32] = classifier.normalise(torch.from_numpy(images)).contiguous().numpy()
    return values
