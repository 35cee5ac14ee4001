"""The suite ptq on random packs and weights: reading, draws, resumption, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import packs, ptq
from benchmarks.packs import read_net, read_pack
from benchmarks.ptq import VARIANTS, Split, Variant, rows_of, run
from benchmarks.tables import Result
from edgeft.config import QuantConfig
from edgeft.errors import ConfigError, DataError
from edgeft.progress import Progress
from tests.nets import bytes_of, depthwise_net, randomise

SILENT = Progress(False)


def write_pack(file: Path, n: int, seed: int, size: int = 16, **more: Any) -> Path:
    parts = []
    for image in bytes_of(n, size, seed):
        stream = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(stream, "JPEG")
        parts.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, parts)])
    np.savez(file, jpeg=np.frombuffer(b"".join(parts), np.uint8), offsets=offsets, labels=np.arange(n) % 5, **more)
    return file


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(packs.NETS, "small", depthwise_net)
    state = {name: value.numpy() for name, value in randomise(depthwise_net()).state_dict().items() if "num_batches" not in name}
    np.savez(tmp_path / "weights.npz", **state)
    return tmp_path / "weights.npz"


def test_suite_measures_resumes_and_writes_a_table(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, scored = write_pack(tmp_path / "a.npz", 30, 1), write_pack(tmp_path / "b.npz", 10, 2)
    options: dict[str, Any] = {
        "calibration": calibration, "scored": [scored], "quant": QuantConfig(format="grid", calibration_images=8), "draws": (0, 1),
        "n_scored": 9, "records": tmp_path / "records", "progress": SILENT,
    }  # fmt: skip
    file = run([("small", weights)], tmp_path, variants=VARIANTS, **options)
    result, tree = Result.read(file), json.loads(file.read_text())
    assert result.suite == "ptq"
    assert [row[1:3] for row in result.rows] == [(v.label, v.granularity) for v in VARIANTS]
    assert tree["n"] == {"scored": 18, "pool": 18, "calibration": 8, "draws": 2}
    ours = [record for record in tree["measurements"] if record["form"] != "ort"]
    assert all(record["agree"] >= 14 and record["verified"] == 2 for record in ours)
    assert all(record["divergence"] < 0.2 for record in tree["measurements"])
    assert ours[0]["divergence"] != ours[1]["divergence"]  # other images were drawn

    def fail(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(ptq, "measure", fail)
    again = run([("small", weights)], tmp_path / "again", variants=VARIANTS, **options)
    assert json.loads(again.read_text())["rows"] == tree["rows"]


def test_scored_images_are_never_drawn(tmp_path: Path) -> None:
    split = Split.of(write_pack(tmp_path / "a.npz", 20, 1), [], None)
    scored = {image.tobytes() for image in split.scored.images}
    assert len(scored) == 8
    for number in range(3):
        assert not scored & {image.tobytes() for image in split.draw(number, 12)}
    assert not np.array_equal(split.draw(0, 12), split.draw(1, 12))
    with pytest.raises(ConfigError, match="the pool has 12"):
        split.draw(0, 13)


def test_rows_state_mean_and_spread() -> None:
    records = [{"n": 10, "float_correct": 8, "correct": c, "agree": 9, "divergence": d} for c, d in ((7, 0.01), (9, 0.03))]
    row = rows_of("net", Variant("u8", "channel"), records)
    assert row == ["net", "edgeft u8", "channel", "80.0", "80.0 ± 14.1", "90.0 ± 0.0", "0.0200 ± 0.0141", "2", "10"]
    assert rows_of("net", Variant("ort", "tensor"), records[:1])[4:7] == ["70.0", "90.0", "0.0100"]


def test_packs_are_read_and_renumbered(tmp_path: Path) -> None:
    pack = read_pack(write_pack(tmp_path / "a.npz", 6, 1, imagenet_index=np.array([7, 8, 9, 10, 11])))
    assert pack.labels.tolist() == [7, 8, 9, 10, 11, 7]
    assert pack.images.shape == (6, 3, 16, 16)
    (tmp_path / "no.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="is not an image pack"):
        read_pack(tmp_path / "no.npz")
    np.savez(tmp_path / "other.npz", jpeg=np.zeros(3, np.uint8))
    with pytest.raises(DataError, match="offsets"):
        read_pack(tmp_path / "other.npz")


def test_weights_are_dequantized_and_checked(tmp_path: Path, weights: Path) -> None:
    with np.load(weights) as archive:
        state = dict(archive)
    name = next(key for key, value in state.items() if value.ndim == 4)
    codes = np.arange(state[name].size, dtype=np.uint8).reshape(state[name].shape)
    np.savez(tmp_path / "q.npz", **(state | {name: codes, f"{name}|q": np.array([0.5, 3.0])}))
    torch.testing.assert_close(read_net("small", tmp_path / "q.npz").state_dict()[name], (torch.from_numpy(codes).float() - 3) * 0.5)
    with pytest.raises(ConfigError, match="no net is called 'smal'"):
        read_net("smal", weights)
    np.savez(tmp_path / "less.npz", **{key: value for key, value in state.items() if key != name})
    with pytest.raises(DataError, match="does not fit 'small'"):
        read_net("small", tmp_path / "less.npz")
