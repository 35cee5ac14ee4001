"""An export looks at images of any kind and size, exactly as evaluation does; what it cannot take is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import edgeft
from edgeft import predicting
from edgeft.artifact import Arrays, Artifact, write_artifact
from edgeft.cli import main
from edgeft.data import folders
from edgeft.data.preprocess import Preprocessing, prepare
from edgeft.errors import ArtifactError, DataError, EdgeftError, MissingExtraError
from edgeft.evaluate import evaluate
from edgeft.export import TARGETS
from edgeft.export.ort_runner import OnnxRunner
from edgeft.exporting import export
from edgeft.interpret import Interpreter
from edgeft.predicting import AnyImage, Prediction, Predictor, image_files, load
from edgeft.progress import Progress
from edgeft.registry import Entry, Registry
from edgeft.report import EvalReport
from tests.conftest import ImageFolder
from tests.graphs import random_images, residual_net

CLASSES = ("ant", "bee", "cat", "dog", "eel")
PREPROCESSING = Preprocessing(12, 0.875, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
QUIET = Progress(enabled=False)
ACCEPTED = (
    "accepted: a file name, a PIL image, an array uint8 [height, width, 3] or [height, width],\n"
    "a list of these, or an array uint8 [n, height, width, 3]"
)


def write_run(path: Path, config: dict[str, Any] | None = None) -> Artifact:
    """A quantized run of a random net, as far as exports need it."""
    graph = residual_net(0)
    images = random_images(graph, 4)
    samples: Arrays = {"images": images, f"layer:{graph.output}": Interpreter(graph).layers(images)[graph.output]}
    return write_artifact(
        path, kind="quantized", config=config or {}, seed=0, preprocessing=PREPROCESSING.to_json(), classes=CLASSES,
        arrays={"weights.safetensors": graph.constants, "samples.safetensors": samples},
        documents={"graph.json": graph.to_json(), "report.json": EvalReport(()).to_json()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def exported_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("predicting") / "run"
    write_run(run)
    export(run, ["onnx"], evaluate=False)
    return run


@pytest.fixture(scope="module")
def predictor(exported_run: Path) -> Predictor:
    return load(exported_run)


@pytest.fixture
def run(exported_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(exported_run, tmp_path / "run"))


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Random bytes with bright and dark sides, so that turning an image changes it at any size."""
    ramp = np.linspace(0, 180, width)[None, :, None] * np.linspace(1, 0.3, height)[:, None, None]
    pixels = ramp + np.random.default_rng(seed).integers(0, 76, (height, width, channels))
    return pixels.astype(np.uint8)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def error_of(call: Callable[[], object], kind: type[EdgeftError]) -> tuple[str, str]:
    with pytest.raises(kind) as caught:
        call()
    return caught.value.message, caught.value.hint


# What is predicted


def test_files_of_a_folder_get_the_classes_of_evaluation(
    predictor: Predictor, image_folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "_BATCH", 2)
    root = image_folder("photos", n=8, size=(50, 36))
    large = saved(Image.fromarray(noise(2100, 2300)), tmp_path / "large.jpg")
    for label in ("blue", "green", "red"):
        shutil.copy(large, root / label / "large.jpg")
    dataset = folders.load(root, seed=0, val_fraction=0.1, test_fraction=0.45)
    files = dataset.id_test.images
    assert isinstance(files, folders.FolderImages)
    assert any(path.name == "large.jpg" for path in files.paths), "a file that is decoded at a fraction is among them"
    runner = OnnxRunner(predictor.path / "model.onnx")
    _, found = evaluate(runner, dataset, PREPROCESSING, float_predictions=None, progress=QUIET)
    prediction = predictor.predict(files.paths)
    assert prediction.labels == [CLASSES[index] for index in found["id"]]
    assert len(set(prediction.labels)) > 1
    prepared = np.stack([prepare(files.image(index), PREPROCESSING) for index in range(len(files))])
    np.testing.assert_array_equal(prediction.logits, runner.logits(prepared))
    np.testing.assert_array_equal(prediction.logits, Interpreter(residual_net(0)).logits(prepared))


def test_files_are_decoded_as_large_as_in_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", {"data": {"size": 600}})
    export(tmp_path / "run", ["onnx"], evaluate=False)
    asked: list[int] = []

    def decode(path: Path, short_side: int) -> NDArray[np.uint8]:
        asked.append(short_side)
        return noise(20, 20)

    monkeypatch.setattr(predicting, "decode", decode)
    load(tmp_path / "run").predict("cat.png")
    assert asked == [1200], "twice the input size that was asked for, where that is more than 1024"


@pytest.mark.parametrize("size", [(1, 1), (12, 12), (13, 14), (40, 30), (3, 200), (300, 2), (2100, 2200)])
def test_a_file_a_pil_image_and_an_array_are_the_same(predictor: Predictor, tmp_path: Path, size: tuple[int, int]) -> None:
    array = noise(*size)
    path = saved(Image.fromarray(array), tmp_path / "x.png", compress_level=1)
    given: list[AnyImage] = [path, str(path), Image.open(path), Image.fromarray(array), array, array[::-1].copy()[::-1]]
    together = predictor.predict(given)
    assert together.logits.shape == (6, 5)
    assert (together.logits == together.logits[0]).all()
    for one in given:
        np.testing.assert_array_equal(predictor.predict(one).logits, together.logits[:1])


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", "png"), ("1", "png"), ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "tif"), ("CMYK", "jpg"), ("YCbCr", "jpg"),
        ("L", "jpg"), ("RGB", "jpg"), ("P", "gif"), ("I;16", "png"), ("I;16", "tif"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("orientation", [1, 6])
def test_pil_images_of_any_mode_are_as_their_files(predictor: Predictor, tmp_path: Path, mode: str, suffix: str, orientation: int) -> None:
    image = Image.fromarray(noise(30, 40, 1)[..., 0].astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(noise(30, 40))
    image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(noise(30, 40, 1, seed=1)[..., 0]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(image, tmp_path / f"x.{suffix}", **({} if suffix == "gif" else {"exif": exif}))
    with Image.open(path) as opened:
        prediction = predictor.predict([path, opened, opened])
    assert (prediction.logits == prediction.logits[0]).all()


def test_what_the_kinds_of_images_mean(predictor: Predictor, tmp_path: Path) -> None:
    array = noise(30, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(Image.fromarray(np.rot90(array)), tmp_path / "turned.png", exif=exif)
    grey, alpha = array[..., 0], np.where(np.arange(40) < 20, 255, 0).astype(np.uint8)
    page = np.where(alpha[None, :, None] == 255, array, 255).astype(np.uint8)
    cut_out = Image.fromarray(np.dstack([array, np.tile(alpha, (30, 1))]))
    same = predictor.predict([array, turned, grey, np.dstack([grey] * 3), Image.fromarray(grey.astype(np.uint16) * 257), cut_out, page])
    upright, from_exif, gray, gray_rgb, wide, transparent, white = same.logits
    np.testing.assert_array_equal(from_exif, upright)
    np.testing.assert_array_equal(gray, gray_rgb)
    np.testing.assert_array_equal(wide, gray)
    np.testing.assert_array_equal(transparent, white)
    distinct = {scores.tobytes() for scores in (upright, gray, white, *predictor.predict([np.rot90(array), array[:, ::-1]]).logits)}
    assert len(distinct) == 5, "the equalities above say something"


def test_an_array_of_images_is_a_batch(predictor: Predictor) -> None:
    stack = np.stack([noise(20, 24, seed=seed) for seed in range(70)])
    batch = predictor.predict(stack)
    np.testing.assert_array_equal(batch.logits, predictor.predict(tuple(stack)).logits)
    np.testing.assert_array_equal(batch.logits[[3, 64]], predictor.predict([stack[3], stack[64]]).logits)


def test_images_are_left_as_they_are(predictor: Predictor, tmp_path: Path) -> None:
    array = noise(30, 40)
    image = Image.open(saved(Image.fromarray(noise(2100, 2200)), tmp_path / "x.jpg"))
    before = image.size, image.mode, array.copy()
    predictor.predict([image, array])
    assert (image.size, image.mode) == before[:2]
    np.testing.assert_array_equal(array, before[2])


def test_no_images_are_no_predictions(predictor: Predictor) -> None:
    prediction = predictor.predict([])
    assert (prediction.labels, prediction.probabilities.shape, prediction.top(3)) == ([], (0, 5), [])


# Probabilities


def test_probabilities_are_the_softmax_of_the_scores() -> None:
    prediction = Prediction(("a", "b", "c"), np.array([[0, np.log(2), np.log(5)], [3e4, -3e4, 0]], np.float32))
    assert prediction.probabilities.dtype == np.float32
    np.testing.assert_allclose(prediction.probabilities, np.array([[1 / 8, 2 / 8, 5 / 8], [1, 0, 0]]), rtol=1e-6)
    assert prediction.labels == ["c", "a"]
    first, second = prediction.top(2)
    assert [label for label, _ in first] == ["c", "b"]
    assert [share for _, share in first] == pytest.approx([5 / 8, 2 / 8])
    assert second == [("a", 1.0), ("c", 0.0)]
    assert [label for label, _ in prediction.top(9)[0]] == ["c", "b", "a"]


def test_rows_sum_to_one(predictor: Predictor) -> None:
    shares = predictor.predict([noise(9, 9, seed=seed) for seed in range(5)]).probabilities
    np.testing.assert_allclose(shares.sum(axis=1), np.ones(5), rtol=1e-6)


def test_the_first_class_is_the_label_where_probabilities_are_equal() -> None:
    close = Prediction(("a", "b", "c"), np.array([[0, 2**-30, -1], [2, 2, 2]], np.float32))
    assert close.probabilities[0, 0] == close.probabilities[0, 1]
    assert close.labels == ["b", "a"]
    assert [[label for label, _ in best] for best in close.top(3)] == [["b", "a", "c"], ["a", "b", "c"]]


# Images that are refused


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "image 1 of 1 is an array float32 [8, 8, 3]"),
        (np.zeros((8, 8, 4), np.uint8), "image 1 of 1 is an array uint8 [8, 8, 4]"),
        (np.zeros((3, 8, 8), np.uint8), "image 1 of 1 is an array uint8 [3, 8, 8]"),
        (np.zeros((2, 3, 8, 8), np.uint8), "image 1 of 2 is an array uint8 [3, 8, 8]"),
        (np.zeros((2, 8, 8, 3), np.int64), "image 1 of 2 is an array int64 [8, 8, 3]"),
        (np.zeros(8, np.uint8), "image 1 of 1 is an array uint8 [8]"),
        (np.zeros((0, 8, 3), np.uint8), "image 1 of 1 is an array uint8 [0, 8, 3]"),
        ([noise(8, 8), np.zeros((2, 8, 8, 3), np.uint8)], "image 2 of 2 is an array uint8 [2, 8, 8, 3]"),
        ([noise(8, 8), None], "image 2 of 2 is of type 'NoneType'"),
        ([[noise(8, 8)]], "image 1 of 1 is of type 'list'"),
        (7, "image 1 of 1 is of type 'int'"),
        (
            [noise(8, 8), Image.fromarray(np.zeros((8, 8), np.float32))],
            "cannot read image 2 of 2, a PIL image of mode 'F': floating-point pixels have no defined range",
        ),
    ],
)
def test_what_is_no_image_says_what_is_accepted(predictor: Predictor, images: Any, message: str) -> None:
    assert error_of(lambda: predictor.predict(images), DataError) == (message, ACCEPTED)


def test_files_that_are_no_images_are_named(predictor: Predictor, tmp_path: Path) -> None:
    good, text, cut = tmp_path / "good.jpg", tmp_path / "text.jpg", tmp_path / "cut.jpg"
    saved(Image.fromarray(noise(200, 200)), good)
    text.write_text("no image")
    cut.write_bytes(good.read_bytes()[:3000])
    hint = "remove the file or restore it"
    assert error_of(lambda: predictor.predict([good, text]), DataError) == (f"cannot read the image '{text}': not an image", hint)
    absent = tmp_path / "absent.jpg"
    assert error_of(lambda: predictor.predict(str(absent)), DataError) == (f"cannot read the image '{absent}': no such file", hint)
    message, _ = error_of(lambda: predictor.predict(cut), DataError)
    assert re.fullmatch(rf"cannot read the image '{re.escape(str(cut))}': .*truncated.*", message)
    with Image.open(cut) as image:
        message, _ = error_of(lambda: predictor.predict([good, image]), DataError)
    assert re.fullmatch(r"cannot read image 2 of 2, a PIL image of mode 'RGB': .*truncated.*", message)


# What is loaded


def test_a_run_stands_for_its_export(exported_run: Path, predictor: Predictor) -> None:
    direct = edgeft.load(str(exported_run / "export" / "onnx"))
    for each in (direct, predictor):
        assert (each.path, each.target, each.name) == (exported_run / "export" / "onnx", "onnx", "onnx")
        assert (each.classes, each.preprocessing) == (CLASSES, PREPROCESSING)
    np.testing.assert_array_equal(direct.predict(noise(20, 20)).logits, predictor.predict(noise(20, 20)).logits)


def test_an_export_is_used_without_its_run(run: Path, predictor: Predictor, tmp_path: Path) -> None:
    shutil.move(run / "export" / "onnx", tmp_path / "device")
    shutil.rmtree(run)
    np.testing.assert_array_equal(load(tmp_path / "device").predict(noise(9, 9)).logits, predictor.predict(noise(9, 9)).logits)


def test_of_several_exports_onnx_is_taken_and_a_single_one_always(run: Path) -> None:
    shutil.copytree(run / "export" / "onnx", run / "export" / "chip")
    assert load(run).path == run / "export" / "onnx"
    shutil.rmtree(run / "export" / "onnx")
    assert load(run).path == run / "export" / "chip"
    shutil.copytree(run / "export" / "chip", run / "export" / "other")
    assert error_of(lambda: load(run), ArtifactError) == (
        f"the run '{run}' has no export 'onnx' but several others: 'chip', 'other'",
        f"edgeft export {run}\nor give one of them, for example '{run}/export/chip'",
    )


def test_a_run_without_an_export(run: Path) -> None:
    shutil.rmtree(run / "export")
    assert error_of(lambda: load(run), ArtifactError) == (f"the run '{run}' has no export yet", f"edgeft export {run}")


def test_no_run_at_all(tmp_path: Path) -> None:
    assert error_of(lambda: load(tmp_path / "absent"), ArtifactError) == (
        f"there is no run at '{tmp_path}/absent'",
        "edgeft train-quantize makes one",
    )


@pytest.mark.parametrize("name", ["model.onnx", "export.json", "weights.safetensors"])
def test_an_edited_export_is_refused(run: Path, name: str) -> None:
    file = run / "export" / "onnx" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert error_of(lambda: load(run), ArtifactError) == (
        f"'{file}' was changed after it was written: its hash is not the one in the manifest",
        "restore the file, or make the artifact again",
    )


def test_a_target_whose_runtime_is_not_installed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("onnx", "needs what is not there", "no_such_runtime.engine:TARGET", extra="chip")
    monkeypatch.setattr(predicting, "TARGETS", Registry(TARGETS.kind, entry))
    assert error_of(lambda: load(run), MissingExtraError) == (
        "export target 'onnx' needs the package 'no_such_runtime'",
        "pip install 'edgeft[chip]'",
    )


# Folders and the command


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as people have them, below the working directory."""
    monkeypatch.chdir(tmp_path)
    root = Path("photos")
    (root / "2024 50%").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.png", "2024 50%/ü.png", ".hidden.png")):
        Image.fromarray(noise(30, 40, seed=number)).save(root / name)
    (root / "notes.txt").write_text("not a picture")
    return root


def test_a_folder_is_every_image_in_it(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = Path("somewhere.jpg")
    found = image_files([given, photos], Progress())
    assert [str(path) for path in found] == ["somewhere.jpg", "photos/a.png", "photos/b.png", "photos/2024 50%/ü.png"]
    assert capsys.readouterr().err == "skipped 'photos/notes.txt': not an image\n"


def test_a_folder_without_images(photos: Path) -> None:
    for path in photos.rglob("*.png"):
        path.unlink()
    assert error_of(lambda: image_files([photos], QUIET), DataError) == (
        "the folder 'photos' holds no images",
        "give image files, or a folder with images in it or in its folders",
    )


def test_predict_as_typed(exported_run: Path, predictor: Predictor, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["photos/a.png", "photos/b.png", "photos/2024 50%/ü.png"]
    best = predictor.predict(files).top(2)
    shown = [[f"{label} {100 * share:.1f} %" for label, share in each] for each in best]
    assert main(["predict", str(exported_run), "photos"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{file:21}  {words[0]}\n" for file, words in zip(files, shown, strict=True))
    assert captured.err == "skipped 'photos/notes.txt': not an image\n"
    assert main(["predict", str(exported_run / "export" / "onnx"), files[1], files[0], "--top", "2"]) == 0
    assert capsys.readouterr() == (f"photos/b.png  {', '.join(shown[1])}\nphotos/a.png  {', '.join(shown[0])}\n", "")
    assert main(["predict", str(exported_run), files[0], "--top", "2", "--json"]) == 0
    classes = [{"label": label, "probability": share} for label, share in best[0]]
    assert json.loads(capsys.readouterr().out) == [{"path": files[0], "classes": classes}]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["predict"], "error: Missing argument 'EXPORT'.\n  edgeft predict --help\n"),
        (["predict", "RUN"], "error: Missing argument 'IMAGE'.\n  edgeft predict --help\n"),
        (["predict", "RUN", "a.png", "--top", "0"], "error: Invalid value for '--top'"),
        (["predict", "absent", "a.png"], "error: there is no run at 'absent'\n  edgeft train-quantize makes one\n"),
        (["predict", "RUN", "absent.png"], "error: cannot read the image 'absent.png': no such file\n  remove the file or restore it\n"),
    ],
)
def test_what_cannot_be_predicted_exits_with_2(
    exported_run: Path, photos: Path, arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(exported_run) if word == "RUN" else word for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(error)
