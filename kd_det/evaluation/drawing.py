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
CROWDED = 15  # boxes
SMALL_SIDE = 400  # pixels: smaller images are drawn twice as large, for the labels to be read
LINE, FONT_SIZE, DASH, WIDTH = 2, 12, 6, 384  # pixels of an image of this width; larger in wider ones


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
        self.unit = max(size[0] / WIDTH, 1)
        self.drawing, self.font = ImageDraw.Draw(self.image), ImageFont.load_default(FONT_SIZE * self.unit)
        self.labels: list[tuple[float, float, float, float, str, Colour, Colour]] = []
        self.names = names
        self.places = {category: place for place, category in enumerate(categories or range(len(names)))}

    def draw_match(self, match: Match) -> Image.Image:
        """What is missed, right and wrong; where there is much, dashes alone say what is missed."""
        missed = " missed" if len(match.missed) + len(match.right) + len(match.wrong) <= CROWDED else ""
        for box in match.missed:
            self.draw(box, missed)
        for box in match.right:
            self.draw(box)
        for box in match.wrong:
            self.draw(box, wrong=True)
        return self.finish()

    def draw_truth(self, boxes: Sequence[Box]) -> Image.Image:
        for box in boxes:
            self.draw(box)
        return self.finish()

    def draw(self, box: Box, missed: str | None = None, wrong: bool = False) -> None:
        """One box; `finish` writes its class and its score.

        Args:
            missed: the object was, so the box is dashed; these words follow its class.
            wrong: the detection is, and its label says so.
        """
        place = self.places[box.category]
        colour = class_colour(place)
        left, top, width, height = (value * self.scale for value in box.bbox)
        edge, line = WRONG if wrong else colour, round(LINE * self.unit)
        if missed is not None:
            self.dashed(left, top, left + width, top + height, edge, line)
        else:
            self.drawing.rectangle((left, top, left + width, top + height), outline=edge, width=line)
        words = self.names[place] + (f" {box.score:.2f}" if box.score is not None else "")
        words = f"x {words}" if wrong else f"{words}{missed or ''}"
        self.labels.append((left, top, left + width, top + height, words, colour, edge))

    def dashed(self, left: float, top: float, right: float, bottom: float, colour: Colour, line: int) -> None:
        dash = DASH * self.unit
        for start in np.arange(left, right, 2 * dash):
            for y in (top, bottom):
                self.drawing.line((start, y, min(start + dash, right), y), fill=colour, width=line)
        for start in np.arange(top, bottom, 2 * dash):
            for x in (left, right):
                self.drawing.line((x, start, x, min(start + dash, bottom)), fill=colour, width=line)

    def finish(self) -> Image.Image:
        """The image with every label: above its box, or where it hides no other label, and always within the image."""
        taken: list[tuple[float, float, float, float]] = []
        high = (FONT_SIZE + 3) * self.unit
        for left, top, right, bottom, words, fill, edge in self.labels:
            wide = self.font.getlength(words) + 4 * self.unit
            places = [(x, y) for y in (top - high, top, bottom, bottom - high) for x in (left, right - wide)]
            frames = [self.frame(x, y, wide, high) for x, y in places]
            free = [frame for frame in frames if not any(overlap(frame, other) for other in taken)]
            frame = (free or frames)[0]
            taken.append(frame)
            self.drawing.rectangle(frame, fill=fill, outline=edge)
            dark = sum(fill) > 330  # dark words on a light ground
            corner = frame[0] + 2 * self.unit, frame[1] + self.unit
            self.drawing.text(corner, words, fill="black" if dark else "white", font=self.font)
        return self.image

    def frame(self, left: float, top: float, wide: float, high: float) -> tuple[float, float, float, float]:
        """A rectangle of this size, moved into the image."""
        left = min(max(left, 0), max(self.image.width - wide, 0))
        top = min(max(top, 0), max(self.image.height - high, 0))
        return left, top, left + wide, top + high


def overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
