"""The built-in data set: butterflies drawn from a formula, so that nothing has to be downloaded.

Five wing colours x five wing patterns x three wing shapes make 75 classes. Class id = 15*colour +
3*pattern + shape, each list in alphabetical order, so that a folder of these pictures gets the same
ids. Pose, size, wing opening, tint and background differ from picture to picture. A wing is an
ellipse that may taper; a pattern is a condition on the position within the wing; edges are smoothed
by drawing four points a pixel and averaging.
"""

import itertools
import math

import torch

HUES = {"blue": 0.60, "green": 0.34, "red": 0.99, "violet": 0.79, "yellow": 0.13}  # of 0 to 1
PATTERNS = ["bands", "border", "eyes", "plain", "spots"]
# For each wing: its axis' angle to the horizontal in degrees, length, half width, taper to the tip.
SHAPES = {
    "pointed": {"fore": (30, 1.20, 0.30, 1.3), "hind": (-38, 0.74, 0.28, 1.3)},
    "round": {"fore": (38, 0.90, 0.44, 0.0), "hind": (-36, 0.76, 0.40, 0.0)},
    "tailed": {"fore": (42, 0.92, 0.38, -0.4), "hind": (-50, 0.66, 0.34, 0.0)},
}
CLASS_NAMES = ["-".join(parts) for parts in itertools.product(HUES, PATTERNS, SHAPES)]
DARK, CREAM = (0.10, 0.07, 0.06), (0.98, 0.94, 0.82)
SUPERSAMPLING = 2  # points along each side of a pixel
CHUNK = 8  # pictures drawn at a time, few enough to stay in a processor's cache


def draw_butterflies(images_per_class, image_size, seed):
    """Draw `images_per_class` butterflies of each of the 75 classes, class after class.

    Returns uint8 (N,3,S,S), int64 labels (N,) and the 75 class names, as load_images does for a
    folder; N = 75 * images_per_class, S = image_size. The same arguments give the same pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(CLASS_NAMES)).repeat_interleave(images_per_class)
    # One row of 16 uniform numbers a picture: everything that differs between pictures of a class.
    randoms = torch.rand(len(labels), 16, generator=generator)
    chunks = zip(labels.split(CHUNK), randoms.split(CHUNK))
    return torch.cat([_draw(y, r, image_size) for y, r in chunks]), labels, list(CLASS_NAMES)


def _draw(labels, randoms, image_size):
    """Draw one chunk: labels (B,), randoms (B, 16) in [0, 1) -> uint8 (B, 3, S, S)."""
    colour, pattern, shape = labels // 15, labels // 3 % 5, labels % 3

    def between(low, high, column):
        """A random number a picture, shaped to meet the pixels: (B, 1, 1)."""
        return (low + (high - low) * randoms[:, column])[:, None, None]

    # The points drawn, in the butterfly's own frame: root of the wings at 0, y towards the head.
    points = image_size * SUPERSAMPLING
    axis = (torch.arange(points) + 0.5) / points * 2 - 1
    angle, size = between(-0.3, 0.3, 0), between(0.84, 0.98, 1)
    px, py = axis - between(-0.05, 0.05, 2), -axis[:, None] - between(-0.05, 0.05, 3)
    x = (px * angle.cos() + py * angle.sin()) / size
    y = (py * angle.cos() - px * angle.sin()) / size
    side = x.abs() / between(0.8, 1.0, 4)  # both halves alike, the wings more or less open

    # A pale background: two tints, blended along a direction with a soft wave in it.
    direction = between(0, 2 * math.pi, 5)
    along = px * direction.cos() + py * direction.sin()
    blend = 0.5 + 0.5 * torch.sin(2.2 * along + between(0, 6.28, 6) + 0.5 * torch.sin(3 * px))
    tint = _hsv(between(0, 1, 7), between(0.05, 0.30, 8), between(0.72, 0.95, 9))
    other_tint = _hsv(between(0, 1, 10), between(0.05, 0.30, 11), between(0.72, 0.95, 12))
    picture = torch.lerp(tint, other_tint, blend[:, None])

    hue = torch.tensor(list(HUES.values()))[colour][:, None, None] + between(-0.02, 0.02, 13)
    saturation, value = between(0.75, 0.95, 14), between(0.78, 0.97, 15)
    # (B, 2, 4): angle, length, half width and taper of both wings.
    sizes = torch.tensor([[wings["fore"], wings["hind"]] for wings in SHAPES.values()])[shape]
    is_ = {name: (pattern == i)[:, None, None] for i, name in enumerate(PATTERNS)}
    tailed = (shape == list(SHAPES).index("tailed"))[:, None, None]

    # The tail first, as the hind wing lies over it: a thin ellipse from that wing's end downwards.
    along, across = _wing_coordinates(side - 0.33, y + 0.38, -74, 0.52, 0.085)
    tail = tailed & (_radius(along, across, -1.0) < 1)
    picture = _paint(picture, tail, _hsv(hue, saturation, value * 0.75))

    for wing in (1, 0):  # the hind wing first: the fore wing lies over it
        degrees, length, width, taper = sizes[:, wing].T[:, :, None, None]
        along, across = _wing_coordinates(side, y, degrees, length, width)
        radius = _radius(along, across, taper)
        inside = radius < 1
        shade = value * (0.80 + 0.20 * along.clamp(0, 1)) * (1.0 if wing == 0 else 0.90)
        picture = _paint(picture, inside, _hsv(hue, saturation, shade))

        # Distances from points on the wing's axis.
        eye = torch.hypot((along - 0.62) * length, across * width)
        spots = torch.hypot(((along - 0.60).abs() - 0.18) * length, across * width)
        bands = torch.sin(along * 14.0 - 1.6) > 0.0
        dark = is_["border"] & (radius > 0.72) | is_["bands"] & bands | is_["eyes"] & (eye < 0.21)
        light = is_["spots"] & (spots < 0.115) | is_["eyes"] & (eye < 0.10)
        picture = _paint(picture, inside & dark, torch.tensor(DARK)[:, None, None])
        picture = _paint(picture, inside & light, torch.tensor(CREAM)[:, None, None])

    feeler = (side - 0.28 * (y - 0.30)).abs() < 0.022
    body = (torch.hypot(side / 0.075, (y + 0.05) / 0.42) < 1) | feeler & (y > 0.30) & (y < 0.72)
    picture = _paint(picture, body, torch.tensor(DARK)[:, None, None])
    picture = torch.nn.functional.avg_pool2d(picture, SUPERSAMPLING)
    return (picture * 255).round().to(torch.uint8)


def _wing_coordinates(x, y, degrees, length, width):
    """Position along a wing's axis (0 root, 1 tip) and across it (-1 to 1 at its widest)."""
    angle = torch.as_tensor(degrees * math.pi / 180)
    return (x * angle.cos() + y * angle.sin()) / length, (y * angle.cos() - x * angle.sin()) / width


def _radius(along, across, taper):
    """0 in the middle of a wing, 1 at its edge: an ellipse, with taper narrower at the tip."""
    return torch.hypot(2 * along - 1, across / (1 + taper * (0.5 - along)).clamp_min(0.05))


def _paint(picture, where, colour):
    """Lay `colour` over `picture` (B, 3, P, P) where the mask (B, P, P) is true."""
    return torch.where(where[:, None], colour, picture)


def _hsv(hue, saturation, value):
    """Hue (which wraps), saturation, value, each (B, ...) in [0, 1] -> RGB (B, 3, ...)."""
    sixths = [(hue * 6 + offset) % 6 for offset in (0.0, 4.0, 2.0)]
    shares = [((sixth - 3).abs() - 1).clamp(0, 1) for sixth in sixths]  # of red, green and blue
    return torch.stack([value * (1 - saturation * (1 - share)) for share in shares], dim=1)
