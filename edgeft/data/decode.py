"""Image files of any kind to RGB bytes, the same way everywhere: depth, colour model, transparency, orientation, size.

- 16-bit grayscale is divided by 257 and rounded (Pillow's own conversion clips at 255); 16-bit colour keeps its high byte.
- Transparent pixels are composited over white, as pages and clip art are meant to be seen.
- CMYK is read as ink: JPEG files with Adobe's marker hold it inverted, files without the marker do not. Colour profiles
  are ignored.
- The EXIF orientation is applied; of an animation the first frame is taken.
- An image whose short side is at least twice `short_side` is averaged down by a whole factor that leaves `short_side` or
  more; JPEG files are decoded at a fraction of their size where that is enough, so that memory stays bounded.
- Files over 500 megapixels, floating-point pixels and 32-bit integers outside 0 ... 65535 are unreadable, with the reason.
"""

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeft.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 500_000_000
"""Larger images are refused: at 4 bytes a pixel their decoding would take more than 2 GB."""
SHORT_SIDE = 1024
"""Default bound of the decoded short side: four times the usual input of 256 pixels."""
_CHECK_SIDE = 64
_WHITE = (255, 255, 255)

_open_lock = threading.Lock()


def decode(path: Path, short_side: int = SHORT_SIDE) -> NDArray[np.uint8]:
    """RGB bytes of an image file, shape [h, w, 3]. Raises DataError that names the file and the reason."""
    try:
        return _read(path, short_side)
    except Exception as error:  # damaged files make Pillow's readers raise almost anything
        raise DataError(f"cannot read the image '{path}': {reason(error)}", "remove the file or restore it") from error


def problem(path: Path) -> str | None:
    """Why a file cannot be read as an image, or None. Decodes the whole file, JPEG at an eighth of its size."""
    try:
        _read(path, _CHECK_SIDE)
    except Exception as error:  # as in decode
        return reason(error)
    return None


def _read(path: Path, short_side: int) -> NDArray[np.uint8]:
    with _open(path) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} is more than {MAX_PIXELS // 1_000_000} megapixels")
        short = min(width, height)
        if short >= 2 * short_side:
            image.draft(None, (-(-width * short_side // short), -(-height * short_side // short)))
        return pixels(image, short_side)


def pixels(image: "Image", short_side: int = SHORT_SIDE) -> NDArray[np.uint8]:
    """RGB bytes of an opened image, shape [h, w, 3], by the same rules. Raises ValueError and whatever Pillow raises; see `reason`."""
    direct = _direct_colour(image)
    orientation = _orientation(image)
    factor = min(direct.size) // short_side
    if factor > 1:
        direct = direct.reduce(factor)
    return _oriented(np.array(_over_white(direct)), orientation)


def _open(path: Path) -> "Image":
    """Open without Pillow's own size check: it warns at 89 and fails at 179 megapixels, less than some phones take."""
    from PIL import Image

    with _open_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _direct_colour(image: "Image") -> "Image":
    """The image as L, RGB, RGBA or CMYK with 8 bits a channel."""
    from PIL import ImageChops

    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_wide(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode == "CMYK":
        plain = image.format == "JPEG" and "adobe" not in image.info  # Pillow inverts every CMYK JPEG on loading
        return ImageChops.invert(image) if plain else image.copy()
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _from_wide(image: "Image") -> "Image":
    """16-bit gray to 8-bit: round(value / 257). A transparent gray value (PNG) becomes white."""
    from PIL import Image

    wide = np.array(image).astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError(f"integer pixels {wide.min()} ... {wide.max()} are outside 0 ... 65535")
    gray = (wide + 128) // 257
    if "transparency" in image.info:
        gray[wide == image.info["transparency"]] = 255
    return Image.fromarray(gray.astype(np.uint8))


def _over_white(image: "Image") -> "Image":
    from PIL import Image

    if image.mode != "RGBA":
        return image.convert("RGB")
    page = Image.new("RGB", image.size, _WHITE)
    page.paste(image, mask=image.getchannel("A"))
    return page


def _orientation(image: "Image") -> int:
    """The EXIF orientation after loading; 1 (upright) where there is none or its block is damaged, as browsers do."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # the pixels are fine, and Pillow raises almost anything on a damaged block
        return 1


def _oriented(array: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo the EXIF orientation 2 ... 8; any other value means upright."""
    if orientation in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def reason(error: Exception) -> str:
    """Why an image could not be read, in a few words."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
