"""ImageNet weights and images, where they are at hand: calibration alone keeps the classes, and every runtime gives the same integers."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from edgeft.config import DataConfig, ModelConfig, QuantConfig
from edgeft.data.preprocess import Preprocessing, prepare
from edgeft.export.onnx_qdq import build_model, check_fusion
from edgeft.export.ort_runner import fusion
from edgeft.export.verify import verify
from edgeft.interpret import Interpreter
from edgeft.models import build_classifier
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.stage import plan_of
from edgeft.quant.training_graph import TrainingGraph

HALF = (0.5, 0.5, 0.5)
SIZE = 128


def images(pack: Path, chosen: range, p: Preprocessing) -> np.ndarray:
    tree = np.load(pack)
    data, offsets = tree["jpeg"].tobytes(), tree["offsets"]
    decoded = (np.array(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]])).convert("RGB")) for i in chosen)
    return np.stack([prepare(image, p) for image in decoded])


@pytest.mark.slow
@pytest.mark.parametrize(("granularity", "least"), [("channel", 0.8), ("tensor", 0.6)])
def test_mobilenet_v2_by_calibration_alone(real_data: Path, tmp_path: Path, granularity: str, least: float) -> None:
    weights = np.load(real_data / "mobilenet_v2_100_imagenet.npz")
    save_file({key: weights[key].astype(np.float32) for key in weights.files}, tmp_path / "w.safetensors")
    model = ModelConfig(
        backbone="mobilenetv2_100", weights=tmp_path / "w.safetensors", pretrained=False, args={"pad_type": "same", "bn_eps": 1e-3}
    )
    classifier = build_classifier(model, DataConfig.model_validate({"size": SIZE, "mean": HALF, "std": HALF}), 1000, None, 0)
    seen = torch.from_numpy(images(real_data / "imagenet_sample.npz", range(0, 400, 8), classifier.preprocessing))
    held_back = images(real_data / "imagenette_val.npz", range(0, 250, 5), classifier.preprocessing)
    net, _ = calibrate(
        plan_of(classifier, "u8"), seen, QuantConfig.model_validate({"format": "grid", "granularity": granularity}), lambda: None
    )
    enforce_bounds(net)
    graph = lower(net)
    verify(Interpreter(graph), TrainingGraph(net), held_back[:16])
    check_fusion(graph, fusion(build_model(graph)))
    with torch.inference_mode():
        wanted = classifier(torch.from_numpy(held_back)).argmax(1).numpy()
    assert (TrainingGraph(net).logits(held_back).argmax(1) == wanted).mean() >= least
