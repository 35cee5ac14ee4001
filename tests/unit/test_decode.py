"""Every kind of image file becomes the RGB bytes that a viewer shows."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from edgeft.data import decode as module
from edgeft.data.decode import decode, problem
from edgeft.errors import DataError


def noise(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows * 255 // height, columns * 255 // width, (rows + columns) * 255 // (height + width)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def png(path: Path, width: int, height: int, depth: int, colour: int, rows: bytes, transparency: bytes = b"") -> Path:
    """A PNG written by hand, for depths that Pillow cannot write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    extra = chunk(b"tRNS", transparency) if transparency else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def test_rgb_and_the_file_name_does_not_matter(tmp_path: Path) -> None:
    image = noise(5, 7)
    path = saved(Image.fromarray(image), tmp_path / "x.png").rename(tmp_path / "Größe 大.txt")
    found = decode(path)
    assert found.dtype == np.uint8
    assert found.flags.writeable
    np.testing.assert_array_equal(found, image)


def test_grayscale_fills_three_channels(tmp_path: Path) -> None:
    gray = noise(4, 6, 1)[..., 0]
    np.testing.assert_array_equal(decode(saved(Image.fromarray(gray), tmp_path / "g.png")), np.stack([gray] * 3, axis=-1))


def test_one_bit(tmp_path: Path) -> None:
    bits = np.array([[0, 255, 0], [255, 255, 0]], dtype=np.uint8)
    found = decode(saved(Image.fromarray(bits).convert("1"), tmp_path / "b.png"))
    np.testing.assert_array_equal(found, np.stack([bits] * 3, axis=-1))


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (128, 0), (129, 1), (257, 1), (32896, 128), (65406, 254), (65407, 255), (65535, 255)]
)
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path: Path, suffix: str, value: int, expected: int) -> None:
    path = tmp_path / f"wide.{suffix}"
    wide = np.full((2, 3), value, dtype=np.uint16)
    if suffix == "pgm":
        path.write_bytes(b"P5 3 2 65535\n" + wide.astype(">u2").tobytes())
    else:
        Image.fromarray(wide).save(path)
    assert np.unique(decode(path)).tolist() == [expected]


def test_transparent_value_of_sixteen_bit_gray_is_white(tmp_path: Path) -> None:
    rows = b"\x00" + np.array([1000, 40000], dtype=">u2").tobytes()
    found = decode(png(tmp_path / "t.png", 2, 1, 16, 0, rows, transparency=struct.pack(">H", 1000)))
    assert found[0, :, 0].tolist() == [255, 156]


def test_sixteen_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    rows = b"\x00" + np.array([0, 0x80FF, 65535], dtype=">u2").tobytes()
    assert decode(png(tmp_path / "c.png", 1, 1, 16, 2, rows))[0, 0].tolist() == [0, 0x80, 255]


def test_transparency_is_composited_over_white(tmp_path: Path) -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 128]]], dtype=np.uint8)
    found = decode(saved(Image.fromarray(pixels), tmp_path / "a.png"))
    assert found[0].tolist() == [[10, 20, 30], [255, 255, 255], [127, 177, 227]]


def test_gray_with_alpha(tmp_path: Path) -> None:
    pixels = np.array([[[50, 255], [50, 0]]], dtype=np.uint8)
    found = decode(saved(Image.merge("LA", [Image.fromarray(pixels[..., i]) for i in (0, 1)]), tmp_path / "la.png"))
    assert found[0].tolist() == [[50] * 3, [255] * 3]


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_palette_with_transparency(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 10, 10, 200, 10])
    image.putpixel((1, 0), 1)
    found = decode(saved(image, tmp_path / "p.png", transparency=transparency))
    assert found[0].tolist() == [[200, 10, 10], [255, 255, 255]]


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    found = decode(saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:]))
    assert np.unique(found.reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def without_adobe_marker(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0] :]


def test_cmyk_with_and_without_adobes_inversion(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    for path in (saved(ink, tmp_path / "adobe.jpg", quality=95), saved(ink, tmp_path / "ink.tif")):
        assert np.abs(decode(path).astype(int) - [255, 0, 0]).max() <= 2
    stored_upright = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 255)), tmp_path / "x.jpg", quality=95)
    plain = tmp_path / "plain.jpg"
    plain.write_bytes(without_adobe_marker(stored_upright.read_bytes()))
    assert np.abs(decode(plain).astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    image = Image.fromarray(smooth(12, 20))
    exif = image.getexif()
    exif[0x0112] = orientation
    path = saved(image, tmp_path / f"o.{suffix}", exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    np.testing.assert_array_equal(decode(path), expected)
    assert expected.shape[:2] == ((20, 12) if orientation > 4 else (12, 20))


def test_damaged_exif_leaves_the_pixels(tmp_path: Path) -> None:
    path = saved(Image.fromarray(smooth(8, 8)), tmp_path / "e.png", exif=b"Exif\x00\x00garbage")
    np.testing.assert_array_equal(decode(path), smooth(8, 8))


def test_one_pixel(tmp_path: Path) -> None:
    assert decode(saved(Image.new("RGB", (1, 1), (1, 2, 3)), tmp_path / "1.png")).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize(("suffix", "largest_error"), [("png", 1), ("jpg", 6)])
def test_huge_images_are_averaged_down_to_a_bounded_side(tmp_path: Path, suffix: str, largest_error: int) -> None:
    path = saved(Image.fromarray(smooth(600, 900)), tmp_path / f"h.{suffix}")
    found = decode(path, short_side=150)
    assert found.shape == (150, 225, 3)
    blocks = smooth(600, 900).reshape(150, 4, 225, 4, 3).mean(axis=(1, 3))
    assert np.abs(found - blocks).max() <= largest_error
    assert decode(path, short_side=301).shape == (600, 900, 3)


def test_transparent_pixels_do_not_bleed_when_averaged(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:, ::2] = [0, 200, 0, 255]  # the other columns are transparent black
    assert decode(saved(Image.fromarray(pixels), tmp_path / "a.png"), short_side=2)[0, 0].tolist() == [127, 227, 127]


def test_over_pillows_own_limit_without_a_warning(tmp_path: Path) -> None:
    path = saved(Image.new("1", (20_000, 4_500), 1), tmp_path / "big.png")
    limit = Image.MAX_IMAGE_PIXELS
    assert decode(path, short_side=64).shape == (65, 286, 3)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_pixel_limit_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("1", (2000, 1001)), tmp_path / "big.png")
    monkeypatch.setattr(module, "MAX_PIXELS", 2_000_000)
    assert problem(path) == "2000 x 1001 is more than 2 megapixels"


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "JPEG")
    return buffer.getvalue()[:-400]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"label,name\n1,cat\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 40, "not an image"),
        (truncated_jpeg(), "image file is truncated"),
    ],
)
def test_files_that_are_no_images(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    found = problem(path)
    assert found is not None
    assert found.startswith(reason)
    with pytest.raises(DataError) as caught:
        decode(path)
    assert caught.value.message == f"cannot read the image '{path}': {found}"


def test_missing_file(tmp_path: Path) -> None:
    assert problem(tmp_path / "x.png") == "no such file"


def test_pixels_without_a_defined_range_are_refused(tmp_path: Path) -> None:
    real = saved(Image.fromarray(np.ones((2, 2), dtype=np.float32)), tmp_path / "f.tif")
    assert problem(real) == "floating-point pixels have no defined range"
    wide = saved(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)), tmp_path / "i.tif")
    assert problem(wide) == "integer pixels 0 ... 70000 are outside 0 ... 65535"
