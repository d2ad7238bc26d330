"""Where the pictures come from: the drawn butterflies, a folder, or a data set on the Hub.

All three give the same: images uint8 (N,3,S,S), labels int64 (N,), and a list of class names.
Everything is decoded once and stays in memory.
"""

import struct
import sys
import zlib
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor
from tqdm.contrib.concurrent import thread_map

from common import download
from data.drawn import draw_butterflies
from model import UserError

SUFFIXES = (*IMG_EXTENSIONS, ".gif")

# What Pillow raises when a file is broken, cut short, or crafted to exhaust memory.
BROKEN_PICTURE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def load_dataset(name, image_size):
    """The pictures of a data set: "drawn", a folder, or else a Hub id such as "you/pictures".

    Returns what load_images returns. The Hub's files go into the Hub's own cache. Raises UserError
    if there are no pictures of that name.
    """
    if name == "drawn":
        return draw_butterflies(images_per_class=54, image_size=image_size, seed=0)
    if Path(name).is_dir():
        return load_images(name, image_size)
    hint = f"no data set at {name}; try --preset laptop, or --dataset FOLDER"
    return load_images(download(name, hint, repo_type="dataset"), image_size)


def load_images(folder, image_size):
    """Read a folder that holds one folder of pictures per class.

    Returns uint8 (N,3,S,S), int64 labels (N,), and the class names, sorted; the pictures are
    ordered by class. Pictures directly in `folder` form a class named after it. Hidden files and
    folders are left out; files that cannot be read are named on stderr. Raises UserError if a class
    has no picture.
    """
    folder = Path(folder)
    try:
        classes = find_classes(folder)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error}") from error
    class_names = sorted(classes)
    paths = [path for name in class_names for path in classes[name]]

    # Pillow decodes outside of Python's global lock, so threads use all cores.
    pictures = thread_map(
        lambda path: read_picture(path, image_size),
        paths,
        desc="reading pictures",
        leave=False,
        disable=None,  # no progress bar where stderr is not a terminal
    )
    picture_of = dict(zip(paths, pictures))

    images, labels, broken = [], [], []
    for label, name in enumerate(class_names):
        for path in classes[name]:
            if picture_of[path] is None:
                broken.append(str(path))
            else:
                images.append(picture_of[path])
                labels.append(label)

    if broken:
        listed = ", ".join(broken[:10])
        if len(broken) > 10:
            listed += ", ..."
        print(f"skipped {len(broken)} pictures that cannot be read: {listed}", file=sys.stderr)
    if not class_names:
        raise UserError(f"no pictures in {folder}: it should hold one folder of pictures per class")
    for label in set(range(len(class_names))) - set(labels):
        where = folder / class_names[label]
        raise UserError(f"no pictures in {where}: put some there, or remove the folder")
    return torch.stack(images), torch.tensor(labels), class_names


def find_classes(folder):
    """{class name: sorted paths of its pictures} of a folder; nothing hidden."""
    classes = {}
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.startswith("."):
            classes[entry.name] = find_pictures(entry, "**/*")
    loose = find_pictures(folder, "*")
    if loose:
        classes[folder.resolve().name] = loose
    return classes


def find_pictures(folder, pattern):
    """Sorted paths of the pictures in a folder that match the pattern; nothing hidden."""
    pictures = []
    for path in folder.glob(pattern):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            pictures.append(path)
    return sorted(pictures)


def read_picture(path, image_size):
    """A picture file as uint8 (3,S,S): turned upright, transparency composited onto white, the
    short side resized, the long side cropped to its middle. None if the file cannot be read."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)  # decodes it, too
    except BROKEN_PICTURE:
        return None
    if image.mode.startswith("I;16"):  # 16-bit grey, which convert() would clip to white
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = ImageOps.fit(image.convert("RGB"), (image_size, image_size))
    return pil_to_tensor(image)


def held_out(labels):
    """Which pictures are for validation: a mask (N,) of every twentieth picture of each class.
    A class with a single picture keeps it for training."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) > 1:
            mask[members[::20]] = True
    return mask
