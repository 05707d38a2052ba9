"""Boxes on an image: right ones solid, wrong ones in a colour of their own, missed ones dashed; the class at each."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kd_det.evaluation.matching import Box, Match

Colour = tuple[int, int, int]
# Okabe and Ito's colours but for the one of what is wrong; the further classes take lighter and darker ones.
PALETTE = ((86, 180, 233), (0, 158, 115), (230, 159, 0), (204, 121, 167), (0, 114, 178), (240, 228, 66))
SHADES = (0.0, 0.45, -0.35, 0.7)
WRONG = (213, 94, 0)
SMALL_SIDE = 400  # pixels: smaller images are drawn twice as large, for the labels to be read
LINE, FONT_SIZE, DASH = 2, 12, 6  # pixels


def class_colour(index: int) -> Colour:
    """The colour of a class: the same in every picture."""
    shade = SHADES[index // len(PALETTE) % len(SHADES)]
    target = 255 if shade > 0 else 0
    return tuple(round(value + (target - value) * abs(shade)) for value in PALETTE[index % len(PALETTE)])


class Canvas:
    """An image to draw boxes on.

    Args:
        rgb: (H, W, 3).
        names: of the classes; `Box.category` is `categories`' member at the class's place.
    """

    def __init__(self, rgb: np.ndarray, names: Sequence[str], categories: Sequence[int] | None = None) -> None:
        self.scale = 2 if max(rgb.shape[:2]) < SMALL_SIDE else 1
        size = (rgb.shape[1] * self.scale, rgb.shape[0] * self.scale)
        self.image = Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR)
        self.drawing, self.font = ImageDraw.Draw(self.image), ImageFont.load_default(FONT_SIZE)
        self.names = names
        self.places = {category: place for place, category in enumerate(categories or range(len(names)))}

    def draw_match(self, match: Match) -> Image.Image:
        """What is missed, right and wrong."""
        for box in match.missed:
            self.draw(box, dashed=True)
        for box in match.right:
            self.draw(box)
        for box in match.wrong:
            self.draw(box, wrong=True)
        return self.image

    def draw_truth(self, boxes: Sequence[Box]) -> Image.Image:
        for box in boxes:
            self.draw(box)
        return self.image

    def draw(self, box: Box, dashed: bool = False, wrong: bool = False) -> None:
        """One box with its class, and its score where it has one; a wrong one's label says so."""
        place = self.places[box.category]
        colour = class_colour(place)
        left, top, width, height = (value * self.scale for value in box.bbox)
        edge = WRONG if wrong else colour
        if dashed:
            self.dashed(left, top, left + width, top + height, edge)
        else:
            self.drawing.rectangle((left, top, left + width, top + height), outline=edge, width=LINE)
        words = self.names[place] + (f" {box.score:.2f}" if box.score is not None else "")
        self.label(left, top, f"x {words}" if wrong else f"{words} missed" if dashed else words, colour, edge)

    def dashed(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        for start in np.arange(left, right, 2 * DASH):
            for y in (top, bottom):
                self.drawing.line((start, y, min(start + DASH, right), y), fill=colour, width=LINE)
        for start in np.arange(top, bottom, 2 * DASH):
            for x in (left, right):
                self.drawing.line((x, start, x, min(start + DASH, bottom)), fill=colour, width=LINE)

    def label(self, left: float, top: float, words: str, fill: Colour, edge: Colour) -> None:
        """Words above the box, or inside it at the image's upper edge, and always within the image."""
        width, height = self.font.getlength(words) + 4, FONT_SIZE + 3
        left = min(max(left, 0), max(self.image.width - width, 0))
        top = top - height if top >= height else top
        self.drawing.rectangle((left, top, left + width, top + height), fill=fill, outline=edge)
        dark = sum(fill) > 330  # dark words on a light ground
        self.drawing.text((left + 2, top + 1), words, fill="black" if dark else "white", font=self.font)
