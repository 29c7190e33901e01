"""Images of characters: drawn from the fonts inside matplotlib's package, then distorted."""

import io
import zipfile

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

SIZE = 28
DRAWN = 40  # pixels a side of a drawing, of which the middle is kept
FONT_SIZE = 24
FOLDER = "matplotlib/mpl-data/fonts/ttf"

TYPEFACES = {
    "sans": "DejaVuSans",
    "sans bold": "DejaVuSans-Bold",
    "serif": "DejaVuSerif",
    "mono": "DejaVuSansMono",
    "mono bold oblique": "DejaVuSansMono-BoldOblique",
    "times italic": "STIXGeneralItalic",
    "roman": "cmr10",
    "typewriter": "cmtt10",
}
"""What a typeface is called, and its font."""

SYMBOL_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique")
SYMBOLS = {
    "Greek": range(0x3B1, 0x3CA),
    "Cyrillic": range(0x431, 0x450),
    "Armenian": range(0x531, 0x557),
    "Hebrew": range(0x5D0, 0x5EB),
    "Georgian": range(0x10D0, 0x10F1),
}
"""What the base learns: neither digits nor Latin letters, which are left to the tasks."""


def draw(wheel: zipfile.ZipFile, font: str, characters: str) -> Tensor:
    """Return a drawing of each character, ``(n, 40, 40)`` float32 in [0, 1]."""
    file = io.BytesIO(wheel.read(f"{FOLDER}/{font}.ttf"))
    face = ImageFont.truetype(file, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    drawn = np.stack([_drawing(face, character) for character in characters])
    return torch.from_numpy(drawn).float() / 255


def _drawing(face: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """Return a character in the middle of a drawing, ``(40, 40)`` uint8."""
    image = Image.new("L", (DRAWN, DRAWN))
    left, top, right, bottom = face.getbbox(character)
    corner = ((DRAWN - left - right) / 2, (DRAWN - top - bottom) / 2)
    ImageDraw.Draw(image).text(corner, character, fill=255, font=face)
    return np.asarray(image)


def distort(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Return images of drawings: turned, sheared, bent, moved, uneven in contrast, with noise.

    Args:
        drawings: ``(n, 40, 40)`` float32 in [0, 1].
        generator: Where the random numbers come from.

    Returns:
        ``(n, 28, 28)`` uint8.
    """
    n = len(drawings)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * 2 - 1

    angle, scale = 0.25 * uniform(), 1 + 0.2 * uniform()
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    shear = torch.eye(2) + torch.tensor([[0.0, 0.3], [0.0, 0.0]]) * uniform(1, 1)
    linear = turn @ shear * (scale * SIZE / DRAWN)[:, None, None]
    affine = torch.cat([linear, 0.12 * uniform(2, 1)], 2)
    grid = functional.affine_grid(affine, [n, 1, SIZE, SIZE], align_corners=False)
    bend = functional.interpolate(
        0.12 * uniform(2, 4, 4), size=(SIZE, SIZE), mode="bicubic", align_corners=True
    )
    bent = grid + bend.permute(0, 2, 3, 1)
    images = functional.grid_sample(drawings[:, None], bent, align_corners=False)[:, 0]
    images = images * (0.8 + 0.2 * uniform(1, 1)) + 0.15 * uniform(SIZE, SIZE)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
