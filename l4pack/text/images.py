"""Images of rows and prompts, through the model's own processor: transformers' `Llama4Processor`.

It cuts an image into tiles, and puts into the text, in the image's place, a token for every feature that the vision tower
will give of them. Only the number of tokens is kept; the pixels are read again when they are embedded.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4pack.checkpoint.companions import PROCESSORS
from l4pack.checkpoint.source import Checkpoint
from l4pack.errors import SourceError, UsageError
from l4pack.text.layouts import IMAGE, IMAGE_TOKENS
from l4pack.text.tokenizer import first_line, load_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MAX_FILE_BYTES = 256 << 20
MOST_TILES = 64  # of one image; Llama 4 has 16
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class ImageFile:
    """An image's file as it was when its text was read: hex SHA-256 of its bytes."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Pictures:
    """The images of one sequence: how many tiles they are, and pixels of the largest; see `stream.hidden.Images`."""

    files: tuple[ImageFile, ...]
    tiles: int
    pixels: int
    reader: ImageReader = field(repr=False, compare=False)

    def pixel_values(self) -> Tensor:
        """BF16 [tiles, channels, height, width]. Raises UsageError where a file is not what it was."""
        contents = [read_file(file.path, str(file.path)) for file in self.files]
        for file, content in zip(self.files, contents, strict=True):
            if hashlib.sha256(content).hexdigest() != file.sha256:
                raise UsageError(f"{file.path} changed while it was used", hint="run the same command again")
        found = [picture(content, str(file.path)) for file, content in zip(self.files, contents, strict=True)]
        values: Tensor = self.reader.process(IMAGE * len(found), found, str(self.files[0].path))["pixel_values"]
        return values


@dataclass(frozen=True)
class Seen:
    """A text with images in it as token ids."""

    tokens: tuple[int, ...]
    pictures: Pictures


class ImageReader:
    """Reads images as a checkpoint's processor does; the processor is loaded when the first image comes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __reduce__(self) -> tuple[type[ImageReader], tuple[Checkpoint]]:
        return ImageReader, (self._checkpoint,)

    @cached_property
    def tokens(self) -> frozenset[int]:
        """Ids of the tokens that stand for images and lie about them, which nobody is to predict."""
        ids = self._processor.tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))
        return frozenset(token for token in ids if token is not None)

    def see(self, text: str, files: Sequence[Path], where: str) -> Seen:
        """A text with the token of an image in the place of each file's.

        Raises UsageError: a file that is not there, that is no image or too large, a template that left one out, a model
        without vision, no torchvision; SourceError without a processor's files.
        """
        self._processor  # noqa: B018  what is wrong with the model is said before what is wrong with a text
        if text.count(IMAGE) != len(files) or any(token in text for token in IMAGE_TOKENS if token != IMAGE):
            raise UsageError(
                f"{where}: the chat template has no place for its {len(files)} images, or makes more of them",
                hint="put the model's own chat_template.jinja beside its tokenizer.json",
            )
        contents = [read_file(path, where) for path in files]
        found = [picture(content, f"{where}: {path.name}") for path, content in zip(files, contents, strict=True)]
        processed = self.process(text, found, where)
        known = tuple(
            ImageFile(path, hashlib.sha256(content).hexdigest()) for path, content in zip(files, contents, strict=True)
        )
        pixels = max(image.width * image.height for image in found)
        pictures = Pictures(known, len(processed["pixel_values"]), pixels, self)
        return Seen(tuple(processed["input_ids"][0].tolist()), pictures)

    def process(self, text: str, images: Sequence[Image], where: str) -> Any:
        """What the processor makes of them: `input_ids` and `pixel_values`."""
        try:
            made = self._processor(text=[text], images=[list(images)], add_special_tokens=False, return_tensors="pt")
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise UsageError(
                f"{where}: the model's processor refuses its images ({first_line(error)})",
                hint="compare preprocessor_config.json with the original's",
            ) from error
        return made

    @cached_property
    def _processor(self) -> Any:
        checkpoint = self._checkpoint
        vision = checkpoint.config.vision
        if vision is None:
            raise UsageError(f"{checkpoint.name} reads no images", hint="give it text alone")
        names = [name for name in checkpoint.companions if name in PROCESSORS]
        if checkpoint.store is None or not names:
            raise SourceError(
                f"{checkpoint.name} has no {PROCESSORS[0]}", hint="download the processor's files into the folder"
            )
        paths = [checkpoint.store.path(name) for name in names]
        kind, together = _classes()
        try:
            images = kind.from_pretrained(paths[0].parent, local_files_only=True)
            size, most = (images.size["height"], images.size["width"]), int(images.max_patches)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SourceError(
                f"{checkpoint.name}: {names[0]} can't be read ({first_line(error)})", hint="download it again"
            ) from error
        if size != (vision.image_size, vision.image_size) or not 0 < most <= MOST_TILES:
            raise SourceError(
                f"{checkpoint.name}: {names[0]} makes {most} tiles of {size[0]} x {size[1]}, the vision tower takes "
                f"{vision.image_size} x {vision.image_size}, and {MOST_TILES} tiles are the most",
                hint="download it again",
            )
        return together(
            image_processor=images,
            tokenizer=load_tokenizer(checkpoint),
            patch_size=vision.patch_size,
            pixel_shuffle_ratio=vision.pixel_shuffle_ratio,
        )


def _classes() -> tuple[Any, Any]:
    """transformers' classes. Raises UsageError without torchvision, or with one that is made for another torch."""
    try:
        from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor
        from transformers.models.llama4.processing_llama4 import Llama4Processor
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"images need torchvision, with which transformers' processor is written ({first_line(error)})",
            hint="pip install 'l4pack[images]', from where torch came: both must be of one build",
        ) from error
    return Llama4ImageProcessor, Llama4Processor


def inside(folder: Path, named: str, where: str) -> Path:
    """The file that rows in `folder` name, links followed. Raises UsageError for one outside of it."""
    path = None if "\0" in named else (folder / named).resolve()
    if path is None or not path.is_relative_to(folder.resolve()):
        raise UsageError(
            f"{where}: image {named[:120]!r} lies outside the rows' own folder",
            hint="put images into the folder of the file that names them",
        )
    return path


def read_file(path: Path, where: str) -> bytes:
    """An image's bytes. Raises UsageError."""
    try:
        if not path.is_file():
            raise UsageError(f"{where}: there is no image file {path}", hint="images are named from the rows' folder")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{where}: {path} is larger than any image", hint="make it smaller")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: image {path}: {first_line(error)}", hint="check the file") from error


def picture(content: bytes, where: str) -> Image:
    """The decoded image in RGB, upright. Raises UsageError for no image, and for more pixels than Pillow's limit."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UsageError("images need pillow", hint="pip install 'l4pack[images]'") from error
    bombs = (Image.DecompressionBombWarning, Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            found = Image.open(io.BytesIO(content), formats=FORMATS)
            found.load()
            return ImageOps.exif_transpose(found).convert("RGB")
    except bombs as error:
        raise UsageError(f"{where}: more than {Image.MAX_IMAGE_PIXELS:,} pixels", hint="make it smaller") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise UsageError(
            f"{where}: no image that is read ({first_line(error)})", hint=f"what is read: {', '.join(FORMATS)}"
        ) from error
