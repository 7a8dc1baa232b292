"""An image processor that needs no torchvision, which transformers' own is written with: its way of cutting into tiles,
without its choice of a canvas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin


class Tiles(ImageProcessingMixin):
    """Rows and columns of tiles that hold the image, and the whole of it as one more tile where there are several."""

    model_input_names = ("pixel_values",)

    @classmethod
    def from_pretrained(cls, folder, **options):
        settings = json.loads((Path(folder) / "preprocessor_config.json").read_text())
        found = cls()
        found.size, found.max_patches = settings["size"], settings["max_patches"]
        return found

    def fetch_images(self, images):
        return images

    def __call__(self, images, **options):
        side, tiles, ratios = self.size["height"], [], []
        for image in images:
            down, across = (min(2, -(-length // side)) for length in (image.height, image.width))
            canvas = _numbers(image.resize((across * side, down * side)))
            parts = canvas.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
            whole = _numbers(image.resize((side, side)))[None]
            tiles.append(parts if down * across == 1 else torch.cat([parts, whole]))
            ratios.append((down, across))
        return BatchFeature({"pixel_values": torch.cat(tiles), "aspect_ratios": torch.tensor(ratios)})


def _numbers(image):
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1).to(torch.bfloat16)
