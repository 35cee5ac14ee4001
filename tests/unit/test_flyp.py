"""FLYP with a tiny random CLIP: the loss by hand, the folded head, the whole path to integers, and what is refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeft.artifact import Artifact
from edgeft.config import build_config
from edgeft.errors import ConfigError, EdgeftError, UnsupportedError
from edgeft.methods import METHODS
from edgeft.models import Classifier, build_classifier
from edgeft.pipeline import train_quantize
from tests.conftest import draw_folder
from tests.tiny import DATA, context, same, tensors

open_clip: Any = pytest.importorskip("open_clip")

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWER = {"timm_model_name": "test_resnet", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
TOWERS = {
    "edgeft-tiny": TOWER,
    "edgeft-bare": {**TOWER, "timm_proj": "none"},
    "edgeft-mlp": {**TOWER, "timm_proj": "mlp"},
    "edgeft-max": {**TOWER, "timm_pool": "max"},
    "edgeft-vit": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the weights of every CLIP; open_clip knows their configurations while the tests of this file run."""
    folder = tmp_path_factory.mktemp("clips")
    for name, tower in TOWERS.items():
        dimensions = 96 if name == "edgeft-bare" else 16
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": dimensions, "vision_cfg": tower, "text_cfg": TEXT}))
    before = list(open_clip.factory._MODEL_CONFIG_PATHS)
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    for name in TOWERS:
        torch.save(open_clip.create_model(name).state_dict(), folder / f"{name}.pt")
    yield folder
    open_clip.factory._MODEL_CONFIG_PATHS[:] = before
    open_clip.factory._rescan_model_configs()


def flags(clips: Path, name: str = "edgeft-tiny", **more: Any) -> dict[str, Any]:
    return {
        "model.backbone": "test_resnet", "data.size": 32, "data.mean": MEAN, "data.std": STD, "train.method": "flyp", "train.clip": name,
        "train.clip_weights": str(clips / f"{name}.pt"), "train.epochs": 2, "train.lr": [0.01], **more,
    }  # fmt: skip


def tuned(clips: Path, work: Path, name: str = "edgeft-tiny", **more: Any) -> tuple[Any, Classifier]:
    config = build_config(flags=flags(clips, name, **more))
    (stage,) = METHODS.get("flyp").stages(config)
    net = build_classifier(config.model, config.data, 3, None, 0)
    return METHODS.get("flyp").tune(net, stage, DATA, replace(context(work), preprocessing=net.preprocessing)), net


def test_the_loss_is_clips_with_every_image_of_a_class_a_right_answer() -> None:
    from edgeft.methods.flyp import Contrast

    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor([2, 0, 1, 0])
    pairs = logits[:, labels]
    rows, columns = pairs.log_softmax(1), pairs.log_softmax(0)
    by_hand = -sum(rows[i, i] + columns[i, i] for i in (0, 2))
    for i in (1, 3):
        by_hand -= rows[i, [1, 3]].mean() + columns[[1, 3], i].mean()
    assert float(Contrast().loss(logits, logits, labels)) == pytest.approx(float(by_hand) / 2)
    own = torch.tensor([0, 1, 2])
    plain = (
        nn.functional.cross_entropy(logits[:3], own, reduction="sum") + nn.functional.cross_entropy(logits[:3].T, own, reduction="sum")
    ) / 2
    assert float(Contrast().loss(logits, logits[:3], own)) == pytest.approx(float(plain)), "without two of a class it is CLIP's own"


@pytest.mark.parametrize("name", ["edgeft-tiny", "edgeft-bare"])
def test_the_folded_head_gives_the_answers_of_both_towers(clips: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeft.methods import flyp

    seen: list[torch.Tensor] = []
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    fold = flyp._fold

    def watched(model: flyp.Prompted, images: torch.Tensor) -> None:
        with torch.inference_mode():
            seen.append(model(pixels))
        fold(model, images)

    monkeypatch.setattr(flyp, "_fold", watched)
    result, net = tuned(clips, tmp_path, name)
    with torch.inference_mode():
        scores = net(pixels)
    assert torch.equal(scores.argmax(1), seen[0].argmax(1))
    ratio = scores / seen[0]
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3), "one positive number for each image"
    assert 0.2 < float(ratio.mean()) < 5
    assert result.epoch in (1, 2)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_both_towers_are_trained_and_a_second_call_reads_it_back(clips: Path, tmp_path: Path) -> None:
    from edgeft.checkpoint import read_checkpoint

    first, net = tuned(clips, tmp_path)
    again, other = tuned(clips, tmp_path)
    assert first == again
    assert same(tensors(net), tensors(other))
    saved = read_checkpoint(tmp_path / "flyp" / "state.safetensors")
    assert saved is not None
    start = torch.load(clips / "edgeft-tiny.pt", weights_only=True)
    for name in ("logit_scale", "text_projection", "token_embedding.weight"):
        assert not torch.equal(saved[1][f"best.clip.{name}"], start[name])
    assert not torch.equal(saved[1]["best.projection.weight"], start["visual.head.proj.weight"])
    assert not torch.equal(tensors(net)["net.layer1.0.conv1.weight"], start["visual.trunk.layer1.0.conv1.weight"])


def test_a_run_becomes_integers(clips: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "photos", n=12, size=(40, 36))
    more: dict[str, Any] = {
        "data.source": str(data),
        "quant.recipe": "f8net-tiny",
        "quant.calibration_images": 8,
        "verify.samples": 4,
        "verify.golden": 4,
    }
    train_quantize(build_config(flags=flags(clips, **more, device="cpu", out=tmp_path / "run")))
    run = Artifact.load(tmp_path / "run")
    assert [model.model for model in run.report().models] == ["float", "fixed point"]
    assert set(run.arrays("float.safetensors")) >= {"fc.weight", "fc.bias"}
    assert not any("token" in name for name in run.arrays("float.safetensors"))
    record = run.document("training.json")["stages"][0]
    assert "head_moved" not in record
    assert np.isfinite(record["result"]["val_accuracy"])


@pytest.mark.parametrize(
    ("name", "more", "kind", "message"),
    [
        ("edgeft-vit", {}, UnsupportedError, "the image tower of CLIP 'edgeft-vit' is VisionTransformer; only timm nets with average"),
        ("edgeft-mlp", {}, UnsupportedError, "the image tower of CLIP 'edgeft-mlp' ends with Mlp, not Linear"),
        ("edgeft-max", {"data.size": 64}, UnsupportedError, "the image tower of CLIP 'edgeft-max' pools its features in another way"),
        ("edgeft-tiny", {"model.backbone": "resnet10t"}, UnsupportedError, "the image tower of CLIP 'edgeft-tiny' is not the backbone"),
        ("edgeft-tiny", {"data.mean": [0.5, 0.5, 0.5]}, ConfigError, "the CLIP 'edgeft-tiny' takes images of mean 0.481455, 0.457827"),
        ("edgeft-tiny", {"train.clip": "no-such"}, ConfigError, "the CLIP 'no-such' cannot be had: "),
        ("edgeft-tiny", {"train.clip_weights": None}, ConfigError, "method 'flyp' needs a CLIP whose image tower is the backbone"),
        ("edgeft-tiny", {"train.mixup": 0.2}, ConfigError, "method 'flyp' does not know train.mixup"),
        ("edgeft-tiny", {"train.prompts": ["a photo"]}, ConfigError, "the prompt 'a photo' has no place for the class"),
    ],
)
def test_what_is_refused(clips: Path, tmp_path: Path, name: str, more: dict[str, Any], kind: type[EdgeftError], message: str) -> None:
    with pytest.raises(kind) as caught:
        tuned(clips, tmp_path, name, **more)
    assert caught.value.message.startswith(message)


def test_other_methods_take_no_clip() -> None:
    with pytest.raises(ConfigError, match="clip and clip_weights are for method flyp, and it is lpft"):
        build_config(flags={"train.clip": "RN50"})
