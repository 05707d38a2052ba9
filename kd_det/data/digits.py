"""Images of the built-in data set: real handwritten digits pasted onto real photographs.

Everything comes out of installed wheels, nothing is downloaded: the digits are scikit-learn's `load_digits` (1797
samples of 8×8, the test part of UCI's Optical Recognition of Handwritten Digits), the photographs are scikit-image's
and scikit-learn's. A split has digits and photographs of its own. An image is a pure function of (seed, split, index).
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
from PIL import Image

IMAGE_SIZE = 192  # pixels, square
NUM_DIGITS = (2, 6)  # labelled digits an image, both ends included
NUM_CLUTTER = (0, 2)  # digits cut in four and shuffled, an image: strokes of the same pen that are no digit
DIGIT_HEIGHT = (32.0, 112.0)  # pixels, log-uniform, before rotation
MAX_ROTATION = 15.0  # degrees either way
MAX_COVERED = 0.2  # of the smaller of two digits' boxes
INK_LUMINANCE = (190.0, 250.0)  # of 255: bright ink of any hue, as chalk
PHOTO_BRIGHTNESS = 0.55  # the photographs are dimmed: ink of either polarity is not learnt within a demo's minutes
OPACITY = (0.9, 1.0)  # of the ink
RIM = 0.1  # coverage of a pixel at which it is not the photograph's alone any more; from .5 on it is the digit's
CROP_SIZE = (120, 280)  # pixels of the photograph that fill an image
MAX_PHOTO_SIDE = 640  # the larger photographs are reduced to this
MAX_NOISE = 10.0  # standard deviation of the sensor noise, of 255
PLACING_TRIES = 20  # then a digit is left out

LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
CLASS_NAMES = tuple("0123456789")


@dataclass(frozen=True)
class Split:
    """What one split is made of."""

    name: str
    key: int  # its part of the random seed
    num_images: int
    digits: tuple[int, ...]  # numbers of its samples in load_digits
    photos: tuple[str, ...]  # file names


TRAIN = Split(
    name="digits_train",
    key=0,
    num_images=1000,
    digits=tuple(range(1437)),
    photos=(
        "astronaut.png", "brick.png", "camera.png", "grass.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
        "motorcycle_left.png", "retina.jpg", "rocket.jpg",
    ),
)  # fmt: skip
VAL = Split(
    name="digits_val",
    key=1,
    num_images=200,
    digits=tuple(range(1437, 1797)),
    photos=("chelsea.png", "coffee.png", "coins.png", "gravel.png"),
)
# Hyperparameters chosen on `VAL` are judged here. The other two own all of load_digits and must stay as they are.
# These are the 61 samples that, with the default seed 0, no image of theirs shows (with another seed, some may).
TEST = Split(
    name="digits_test",
    key=2,
    num_images=200,
    digits=(
        54, 90, 100, 103, 117, 142, 213, 310, 344, 378, 422, 443, 459, 495, 569, 603, 612, 614, 635, 641, 649, 711, 745,
        769, 793, 884, 931, 934, 957, 964, 1068, 1175, 1205, 1224, 1240, 1248, 1261, 1423, 1461, 1500, 1501,
        1505, 1521, 1530, 1538, 1548, 1579, 1610, 1622, 1631, 1632, 1637, 1640, 1688, 1695, 1714, 1739, 1752,
        1784, 1785, 1791,
    ),
    photos=("cell.png", "china.jpg", "clock_motion.png", "flower.jpg"),
)  # fmt: skip
SPLITS = (TRAIN, VAL, TEST)
PHOTO_FOLDERS = (("skimage", "data"), ("sklearn", "datasets/images"))


@dataclass(frozen=True)
class Box:
    """A labelled digit: its class and its tight box in whole pixels."""

    label: int
    x: int
    y: int
    width: int
    height: int

    def covered_by(self, other: "Box") -> float:
        """Area in common, as a share of the smaller of the two boxes."""
        overlap_x = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        overlap_y = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        smaller = min(self.width * self.height, other.width * other.height)
        return max(overlap_x, 0) * max(overlap_y, 0) / smaller


@lru_cache
def load_samples(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The split's digits: ink (n, 8, 8) uint8 in 0…16, and labels (n,)."""
    from sklearn.datasets import load_digits  # here, because registering the data set must stay quick

    digits = load_digits()
    chosen = list(split.digits)
    return digits.images[chosen].astype(np.uint8), digits.target[chosen]


@lru_cache
def load_photos(split: Split) -> tuple[Image.Image, ...]:
    """The split's photographs as RGB. FileNotFoundError where the installed packages lack one."""
    # Read directly: skimage.data would download what it does not find.
    folders = [files(package) / folder for package, folder in PHOTO_FOLDERS]
    photos = []
    for name in split.photos:
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{folders[0] / name} is missing: the digits data set needs scikit-image ≥ 0.22")
        with found.open("rb") as file:
            photo = Image.open(file).convert("RGB")
        photo.thumbnail((MAX_PHOTO_SIDE, MAX_PHOTO_SIDE), Image.Resampling.LANCZOS)
        photos.append(photo)
    return tuple(photos)


@dataclass(frozen=True)
class InkMap:
    """Whose ink every pixel of an image (H, W) shows."""

    owner: np.ndarray  # uint8: 1, 2, … for the digits in their order, 0 for the photograph
    rim: np.ndarray  # bool: some ink, but more of what lies under it

    def paste(self, ink: np.ndarray, x: int, y: int, number: int) -> None:
        """A digit's coverage, with its upper left corner at (x, y); it lies on top."""
        place = np.s_[y : y + ink.shape[0], x : x + ink.shape[1]]
        covered, some = ink >= 0.5, (ink > RIM) & (ink < 0.5)
        self.owner[place][covered] = number
        self.rim[place] = (self.rim[place] & ~covered) | some


def render(split: Split, index: int, seed: int) -> tuple[Image.Image, list[Box]]:
    """Image `index` of `split` and the digits on it, in the order in which they were pasted (later ones lie on top)."""
    image, boxes, _ = render_with_ink(split, index, seed)
    return image, boxes


def render_with_ink(split: Split, index: int, seed: int) -> tuple[Image.Image, list[Box], InkMap]:
    """`render`, and whose ink every pixel shows."""
    rng = np.random.default_rng([seed, split.key, index])
    samples, labels = load_samples(split)
    canvas = _photo_crop(load_photos(split), rng)
    for _ in range(rng.integers(*NUM_CLUTTER, endpoint=True)):
        ink = _ink(_shuffled(samples[rng.integers(len(samples))], rng), rng)
        _paste(canvas, ink, *_position(ink, rng), rng)

    boxes: list[Box] = []
    ink_map = InkMap(*(np.zeros(canvas.shape[:2], kind) for kind in (np.uint8, bool)))
    for _ in range(rng.integers(*NUM_DIGITS, endpoint=True)):
        choice = rng.integers(len(samples))
        ink = _ink(samples[choice], rng)
        box = _free_box(int(labels[choice]), ink, boxes, rng)
        if box is not None:
            _paste(canvas, ink, box.x, box.y, rng)
            boxes.append(box)
            ink_map.paste(ink, box.x, box.y, len(boxes))

    canvas += rng.normal(0.0, rng.uniform(0.0, MAX_NOISE), canvas.shape)
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8)), boxes, ink_map


def _photo_crop(photos: tuple[Image.Image, ...], rng: np.random.Generator) -> np.ndarray:
    """A random square of a random photograph, perhaps mirrored: (IMAGE_SIZE, IMAGE_SIZE, 3) float."""
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(CROP_SIZE[0], min(CROP_SIZE[1], *photo.size), endpoint=True))
    left, top = (int(rng.integers(length - side, endpoint=True)) for length in photo.size)
    crop = photo.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = np.asarray(crop, dtype=np.float64) * PHOTO_BRIGHTNESS
    return pixels[:, :: rng.choice([1, -1])].copy()


def _shuffled(sample: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The four quarters of a digit in another order, each turned: clutter of real strokes."""
    order = np.roll(np.arange(4), rng.integers(1, 4))
    quarters = [np.rot90(sample[i : i + 4, j : j + 4], rng.integers(4)) for i in (0, 4) for j in (0, 4)]
    a, b, c, d = (quarters[i] for i in order)
    return np.block([[a, b], [c, d]])


def _ink(sample: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An 8×8 sample, upsampled smoothly, turned and scaled: coverage (height, width) in [0, 1], cut to the strokes."""
    margin = np.pad(sample * 15, 1)  # 16 · 15 = 240; the margin gives the interpolation somewhere to fall to
    smooth = Image.fromarray(margin).resize((80, 80), Image.Resampling.BICUBIC)
    turned = smooth.rotate(rng.uniform(-MAX_ROTATION, MAX_ROTATION), Image.Resampling.BICUBIC, expand=True)
    stroke = turned.point(lambda value: (value - 75) * 3)  # a pen's edge, not eight pixels' blur; Pillow clips to 0…255
    stroke = stroke.crop(stroke.point(lambda value: 255 * (value > 127)).getbbox())
    height = np.exp(rng.uniform(*np.log(DIGIT_HEIGHT)))
    factor = height / stroke.height
    size = (max(round(stroke.width * factor), 3), round(height))
    if size[0] > IMAGE_SIZE // 2:  # a shuffled digit may be very flat
        size = (IMAGE_SIZE // 2, max(round(size[1] * IMAGE_SIZE / 2 / size[0]), 3))
    return np.asarray(stroke.resize(size, Image.Resampling.LANCZOS), dtype=np.float64) / 255


def _position(ink: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """x and y of the upper left corner, so that all of the ink is in the image."""
    height, width = ink.shape
    return int(rng.integers(IMAGE_SIZE - width, endpoint=True)), int(rng.integers(IMAGE_SIZE - height, endpoint=True))


def _free_box(label: int, ink: np.ndarray, taken: list[Box], rng: np.random.Generator) -> Box | None:
    """A random place where no digit hides more than MAX_COVERED of another; None when there seems to be none."""
    for _ in range(PLACING_TRIES):
        x, y = _position(ink, rng)
        box = Box(label, x, y, width=ink.shape[1], height=ink.shape[0])
        if all(box.covered_by(other) <= MAX_COVERED for other in taken):
            return box
    return None


def _paste(canvas: np.ndarray, ink: np.ndarray, x: int, y: int, rng: np.random.Generator) -> None:
    """Blend bright ink of a random hue into the canvas."""
    under = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
    coverage = ink[..., None] * rng.uniform(*OPACITY)
    colour = rng.uniform(0, 255, 3)
    colour += rng.uniform(*INK_LUMINANCE) - colour @ LUMINANCE
    under += coverage * (colour.clip(0, 255) - under)
