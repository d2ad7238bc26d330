"""Where the pictures come from: drawn butterflies, a packed file, a folder, a data set on the Hub.

All of them give the same: images uint8 (N,3,S,S), labels int64 (N,), and a list of class names.
data/folders.py finds out which files are pictures of which class; here they are read, and what was
left out is reported. data/pack.py writes what is read into one file, from which a run starts at
once.
"""

import contextlib
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.settings import UserError, print_once

import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from safetensors import safe_open
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

from data.drawn import draw_butterflies
from data.folders import PICTURES, find_labels, find_pictures

with contextlib.suppress(ImportError):  # a Pillow plug-in for the pictures of iPhones
    import pillow_heif.HeifImagePlugin  # noqa: F401

# Files on the Hub that are not downloaded with the pictures. Always the same ones: offline, a copy
# counts as complete if nothing but these is missing.
IGNORED = "[Tt]est/* [Tt]esting/* [Vv]al/* [Vv]alid/* [Vv]alidation/*".split()
IGNORED += ["*.arrow", "*.parquet", "*.tar", "*.zip"]
Image.MAX_IMAGE_PIXELS = 250_000_000  # Pillow refuses over twice this; phones take 200 million


def load_dataset(name, image_size, empty=torch.empty):
    """The pictures of a data set: "drawn", a packed file such as "pictures.safetensors", a folder,
    or else a Hub id such as "you/pictures". Returns what load_images returns. The Hub's files go
    into the Hub's own cache. empty: makes the tensor of pictures, of a shape and a dtype. Raises
    UserError if there are no pictures of that name."""
    if name == "drawn":
        return draw_butterflies(54, image_size, seed=0)
    if name.endswith(".safetensors"):
        return load_packed(name, image_size)
    classes, passed_over, open_picture = find_dataset(name)
    items = [(file, label) for label, files in enumerate(classes.values()) for file in files]
    if not items:
        raise UserError(f"no pictures in {name}, only {[*passed_over]} (unpack archives)")
    images, labels = empty((len(items), 3, image_size, image_size), dtype=torch.uint8), []
    for picture, label in read_all(items, open_picture, image_size, list(classes), passed_over):
        images[len(labels)] = picture
        labels.append(label)
    return images[: len(labels)], torch.tensor(labels), list(classes)


def load_images(folder, image_size):
    """Read a folder of pictures: one folder per class, or another layout in data/folders.py.

    Returns uint8 (N,3,S,S), int64 labels (N,), and the class names, sorted; the pictures are
    ordered by class. What is passed over is reported on stderr. Raises UserError if a class has
    no picture, or if the folder can be read in two ways.
    """
    return load_dataset(str(Path(folder).expanduser().absolute()), image_size)


def load_packed(path, image_size):
    """The pictures in a file by data/pack.py. They stay on the disk until they are used, and
    several processes share one copy, in the system's cache."""
    try:
        with safe_open(os.path.expanduser(path), "pt") as file:
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
            class_names = json.loads(file.metadata()["class_names"])
    except Exception as error:  # a foreign or damaged file may raise anything
        raise UserError(f"{path} is missing, cut short, or not by data/pack.py: {error}") from error
    if images.shape[-1] != image_size:
        raise UserError(f"{path} is not of this size: set --image-size {images.shape[-1]}")
    return images, labels, class_names


def find_dataset(name):
    """The pictures of a folder, or of a data set on the Hub: {class name: its files}, a Counter of
    what is passed over, and a function that opens a file."""
    folder = Path(os.path.expanduser(name))
    on_the_hub = re.fullmatch(r"(?a)[\w-][\w.-]*/[\w.-]+", name) and not folder.exists()
    if on_the_hub:
        try:
            folder = Path(snapshot_download(name, repo_type="dataset", ignore_patterns=IGNORED))
        except Exception as error:  # of whichever library makes the requests, its proxies and so on
            hint = "no folder of this name is here; --preset laptop needs neither"
            raise UserError(f"cannot download {name} from the Hub ({hint}): {error}") from error
    elif not folder.is_dir() or not name.strip():  # "", of an unset variable, would be "."
        raise UserError(f'no such folder: "{name}" (if it is an archive, unpack it)')

    # Archives and parquet are not downloaded; a few pictures beside them illustrate the page.
    if on_the_hub and sum(path.suffix.lower() in PICTURES for path in folder.rglob("*")) < 10:
        return open_with_datasets(name)
    classes, passed_over = find_pictures(folder)
    if list(classes) == [folder.resolve().name]:  # a single class, without a folder of its own
        pictures = classes.popitem()[1]
        if len(pictures) < 10 and passed_over.keys() & {".parquet", ".arrow"}:
            return open_with_datasets(str(folder))
        classes = {Path(name).resolve().name: pictures}  # the Hub's folders have hashes as names
    return classes, passed_over, Image.open


def read_all(items, open_picture, image_size, class_names, passed_over):
    """Yield (picture, label) for those of the items (file, label) that can be read; then say what
    was passed over. Several threads read: Pillow decodes outside of Python's global lock."""
    broken, used = [], set()
    with ThreadPoolExecutor() as pool:
        # A few at a time, as they may not fit into memory. disable=None: no progress bar unless
        # stderr is a terminal.
        for start in tqdm(range(0, len(items), 256), "reading", leave=False, disable=None):
            files, labels = zip(*items[start : start + 256])
            pictures = pool.map(lambda file: read_picture(file, image_size, open_picture), files)
            for file, label, picture in zip(files, labels, pictures):
                if isinstance(picture, Exception):
                    broken.append(f"{file}: {picture}")
                else:
                    used.add(label)
                    yield picture, label

    if broken:
        first = "; ".join(broken[:5])
        hint = " (for HEIC: pip install pillow-heif)" if ".heic" in first.lower() else ""
        print_once(f"skipped as unreadable{hint}: {len(broken)}, such as {first}", sys.stderr)
    kinds = [f"{number} {kind}" for kind, number in sorted(passed_over.items()) if number]
    if kinds:
        print_once(f"passed over: {', '.join(kinds)}", sys.stderr)
    for label, class_name in enumerate(class_names):
        if label not in used:
            raise UserError(f'no pictures of class "{class_name}" that can be read: see why above')


def open_with_datasets(name):
    """The split "train" of a data set, as the `datasets` library reads it: {class name: its rows},
    what is passed over, and a function that opens the picture of a row (plain bytes will do)."""
    try:
        import datasets

        rows = datasets.load_dataset(name, split="train")
        kinds = {column: str(kind) for column, kind in rows.features.items()}
        pictures = [column for column in kinds if re.match("Image|.*binary", kinds[column])]
        if not pictures:
            raise UserError(f"no column of pictures, only {', '.join(kinds)}")
        rows = rows.cast_column(pictures[0], datasets.Image())
        labels = [column for column in kinds if kinds[column].startswith("ClassLabel")]
        label = labels[0] if labels else next(iter(find_labels(kinds)), None)
        name_of = rows.features[label].int2str if labels else str
        rows_of = {}
        for row, value in enumerate(rows[label] if label else len(rows) * [Path(name).name]):
            rows_of.setdefault(value, []).append(row)
        classes = {name_of(value): rows_of[value] for value in sorted(rows_of)}
    except Exception as error:  # there is no such library, or it cannot read this
        error = error.__cause__ or error
        raise UserError(f"cannot read {name} (needs pip install datasets): {error}") from error
    print_once(f"{name}: pictures from {pictures[0]}, labels from {label}, of {', '.join(kinds)}")
    return classes, {}, lambda row: rows[row][pictures[0]]


# Pictures


def read_picture(file, image_size, open_picture=Image.open):
    """A picture file as uint8 (3,S,S): turned upright, transparency composited onto white, the
    short side resized, the long side cropped to its middle. If the file cannot be read, returns the
    exception. Its content, not its name, says which format it is. Colour profiles are ignored.
    """
    try:
        with open_picture(file) as image:
            if image.mode in ("F", "I") and image.format not in ("PNG", "PPM"):
                return ValueError("its white level is unknown: convert it to an 8-bit PNG")
            tags = getattr(image, "tag_v2", {})  # of a TIFF
            # A JPEG can be decoded at a half, a quarter or an eighth of its size. Decoding at twice
            # the needed size leaves the rest to a better filter.
            image.draft(None, (2 * image_size, 2 * image_size))
            image = ImageOps.exif_transpose(image)  # decodes it, too
        if image.mode.startswith("I"):  # 16 bits, which convert("L") would clip
            values = pil_to_tensor(image.convert("I")) / (2 ** tags.get(258, [16])[0] - 1)
            values = 1 - values if tags.get(262) == 0 else values  # white is zero
            image = to_pil_image((values * 255).clamp(0, 255).round().to(torch.uint8))
        # RGB and grey are resized as they are, which is faster; all else (palettes, CMYK) as RGBA.
        if image.mode not in ("RGB", "L") or "transparency" in image.info:
            image = image.convert("RGBA")
    except Exception as error:  # broken, cut short, or huge: Pillow may raise anything
        return error
    image = ImageOps.fit(image, (image_size, image_size))  # of RGBA, hidden colours do not bleed in
    white = Image.new("RGBA", image.size, "white")
    return pil_to_tensor(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
