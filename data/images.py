"""Where the pictures come from: the drawn butterflies, a folder, or a data set on the Hub.

All three return the same thing: images uint8 (N,3,S,S), labels int64 (N,), and a list of class
names. Everything is decoded once and stays in memory.

data/folders.py finds out which files are pictures of which class. Here they are read; what was used
and what was skipped is reported.
"""

import io
import struct
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm.contrib.concurrent import thread_map

from common import download, list_files, print_once
from data.drawn import draw_butterflies
from data.folders import (
    HELD_OUT_SPLITS,
    LABEL_COLUMNS,
    PICTURE_SUFFIXES,
    files_below,
    find_classes,
    find_split,
    look_like_classes,
    pictures_among,
    plain_column,
    split_of,
    suffix,
)
from model import UserError

PLUG_INS = {".heic": "pip install pillow-heif", ".heif": "pip install pillow-heif"}

# Raw photographs, of which Pillow would open no more than a thumbnail.
RAW_SUFFIXES = ".arw .cr2 .cr3 .dng .nef .nrw .orf .pef .raf .rw2 .srw".split()

PACKED = (".parquet", ".arrow", ".tar", ".zip")  # files with pictures inside

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
    if not Path(name).is_dir():
        return load_from_hub(name, image_size)
    try:
        packed = is_packed(files_below(Path(name), Counter()))
    except OSError as error:
        raise UserError(f"cannot read {name}: {error}") from error
    return load_with_datasets(name, image_size) if packed else load_images(name, image_size)


def load_images(folder, image_size):
    """Read a folder of pictures: one folder per class, or another layout that find_classes() knows.

    Returns uint8 (N,3,S,S), int64 labels (N,), and the class names, sorted; the pictures are
    ordered by class. What is passed over is named once, on stderr. Raises UserError if a class has
    no picture, or if the folder can be read in two ways.
    """
    folder, passed_over = Path(folder), Counter()
    try:
        classes, source = find_classes(folder, passed_over)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error}") from error
    class_names = sorted(classes)
    labelled = []
    for label, name in enumerate(class_names):
        for path in classes[name]:
            if suffix(path) in RAW_SUFFIXES:
                passed_over[suffix(path)] += 1
            else:
                labelled.append((path, label))
    pictures = read_all(lambda item: read_picture(item[0], image_size), labelled)

    images, labels, broken = [], [], []
    for (path, label), picture in zip(labelled, pictures):
        if picture is not None:
            images.append(picture)
            labels.append(label)
        elif suffix(path) in PICTURE_SUFFIXES:
            broken.append(path)
        else:
            passed_over[suffix(path)] += 1

    if broken:
        listed = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        print_once(f"skipped {len(broken)} pictures that cannot be read: {listed}", file=sys.stderr)
    listed = [describe(kind, count) for kind, count in sorted(passed_over.items()) if count]
    if listed:
        print_once(f"passed over: {', '.join(listed)}", file=sys.stderr)
    if not labels:
        raise UserError(f"no pictures in {folder}: it should hold one folder of pictures per class")
    empty = set(range(len(class_names))) - set(labels)
    if empty:
        name = class_names[min(empty)]
        raise UserError(f'no pictures of class "{name}" in {source}: add some, or remove the class')
    print_once(f"pictures from {source}")
    return torch.stack(images), torch.tensor(labels), class_names


def read_all(read, items):
    """[read(item)], by several threads: Pillow decodes outside of Python's global lock."""
    # disable=None: no progress bar unless stderr is a terminal.
    return thread_map(read, items, desc="reading pictures", leave=False, disable=None)


def describe(kind, count):
    """One kind of skipped files or folders, in words."""
    hint = f" (readable after {PLUG_INS[kind]})" if kind in PLUG_INS else ""
    return f"{count} {kind}{hint}"


# Pictures


def read_picture(file, image_size):
    """A picture file as uint8 (3,S,S): turned upright, transparency composited onto white, the
    short side resized, the long side cropped to its middle. None if the file cannot be read.

    file: a path, or a file object. Its content, not its name, says which format it is.
    """
    try:
        with Image.open(file) as image:
            # A JPEG can be decoded at a half, a quarter or an eighth of its size. Decoding at twice
            # the needed size leaves the rest to a better filter.
            format_name = image.format
            image.draft(None, (2 * image_size, 2 * image_size))
            image = ImageOps.exif_transpose(image)  # decodes it, too
    except BROKEN_PICTURE:
        return None
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bits(image, format_name)
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    image = image.convert("RGBA" if transparent else "RGB")
    image = ImageOps.fit(image, (image_size, image_size))  # hidden colours do not bleed in
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return pil_to_tensor(image.convert("RGB"))


def to_8_bits(image, format_name):
    """A grey picture of 16 or 32 bits, or of floats, as it is meant to look: convert("L") would
    clip it to white.

    16-bit formats are scaled as such; likewise floats from about 0 to 1, and numbers up to 255 or
    65,535. Otherwise the darkest value becomes black and the brightest white.
    """
    if image.mode.startswith("I;") or (image.mode == "I" and format_name in ("PNG", "PPM")):
        return scaled(pil_to_tensor(image.convert("I")).float(), 0, 65535)
    values = pil_to_tensor(image).float().nan_to_num(posinf=0, neginf=0)
    low, high = values.min().item(), values.max().item()
    if image.mode == "F" and low >= -0.1 and high <= 1.1:  # resampling may overshoot
        return scaled(values, 0, 1)
    for limit in (255, 65535):
        if low >= 0 and high <= limit:
            return scaled(values, 0, limit)
    return scaled(values, low, high)


def scaled(values, black, white):
    """A grey picture of 8 bits from floats (1,H,W), where `black` becomes 0 and `white` 255."""
    values = (values - black) / max(white - black, 1e-9)
    return to_pil_image((values.clamp(0, 1) * 255).round().to(torch.uint8))


# The Hub


def load_from_hub(name, image_size):
    """A data set on the Hub: pictures in folders, or files that the `datasets` library reads."""
    hint = f"no data set at {name}; try --preset laptop, or --dataset FOLDER"
    try:
        files = [PurePosixPath(file) for file in list_files(name, hint)]
    except UserError as error:
        return load_downloaded(name, image_size, error)
    if is_packed(files) or (files and not pictures_among(files)):
        return load_with_datasets(name, image_size)

    folders = {PurePosixPath(file.parts[0]) for file in files if len(file.parts) > 1}
    train, others = find_split(folders) or (None, [])
    ignored = [f"{entry.name}/*" for entry in others]
    if any(split_of(entry.name) != ("test", ()) for entry in others):
        ignored = []  # load_downloaded() would not know what to do without
    folder = download(name, hint, repo_type="dataset", ignore_patterns=ignored)
    return load_snapshot(folder, name, image_size)


def load_downloaded(name, image_size, error):
    """What an earlier run has downloaded, now that the Hub cannot be asked. Raises the error, which
    says why, if there is nothing."""
    # Offline, the Hub library fails if a file is missing that it should not ignore: ignore the
    # folders that load_from_hub() leaves out, however they are spelled.
    ignored = []
    for split in HELD_OUT_SPLITS:
        for form in (split, f"{split}set", f"{split}_set", f"{split}-set"):
            forms = {form, form.capitalize(), form.title(), form.upper()}
            ignored += [f"{spelled}/*" for spelled in forms]
    options = {"repo_type": "dataset", "local_files_only": True, "ignore_patterns": ignored}
    try:
        folder = download(name, "", **options)
    except UserError:
        raise error from None
    if is_packed(files_below(folder, Counter())):
        return load_with_datasets(name, image_size)
    print_once(f"the Hub cannot be reached: {name} is what was downloaded before")
    return load_snapshot(folder, name, image_size)


def load_snapshot(folder, name, image_size):
    """The pictures in a folder of the Hub's cache."""
    images, labels, class_names = load_images(folder, image_size)
    if class_names == [folder.resolve().name]:  # which is a commit's hash
        class_names = [name.rpartition("/")[2]]
    return images, labels, class_names


def is_packed(files):
    """Whether the pictures of a data set are inside other files. A few pictures beside these are
    documentation."""
    pictures = pictures_among(files)
    parquet = [file for file in files if suffix(file) == ".parquet"]
    if parquet:
        return len(pictures) < 10 * len(parquet)
    if any(suffix(file) in PLUG_INS for file in files):
        return False
    archives = [file for file in files if suffix(file) in PACKED]
    return 0 < len(archives) >= len(pictures)


def load_with_datasets(name, image_size):
    """The pictures of the split "train", by the `datasets` library: of the first column that holds
    images, labelled by the first that holds labels. Raises UserError if it cannot be read."""
    try:
        import datasets
        import fsspec  # comes with it
    except ImportError as error:
        message = f"{name} does not hold folders of pictures: to read it, pip install datasets"
        raise UserError(message) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    broken_file = (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile)
    problems = (datasets.exceptions.DatasetsError, RuntimeError, *broken_file)
    try:
        builder = datasets.load_dataset_builder(name)
        files = (builder.config.data_files or {}).get("train", [])
        options = {}
        if files and all(file.startswith("hf://") for file in files):
            # Of several splits the library would download all, unless told which files are wanted.
            # They are named hf://datasets/<name>@<commit>/<path>.
            wanted = [file.partition("@")[2].partition("/")[2] for file in files]
            options = {"data_files": {"train": wanted}, "verification_mode": "no_checks"}
        dataset = datasets.load_dataset(name, split="train", **options)
    except problems as error:
        message = f"the datasets library cannot read {name}: {str(error.__cause__ or error)[:300]}"
        raise UserError(message) from error

    features = dataset.features
    columns = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise UserError(f"{name} has no column of pictures, only {', '.join(features)}")
    encoded = dataset.select_columns(columns[:1])
    encoded = encoded.cast_column(columns[0], datasets.Image(decode=False))

    label_column, labels = find_label_column(datasets, dataset)
    if label_column is None:
        labels = [Path(name).resolve().name] * len(dataset)

    def read(row):
        image = encoded[row][columns[0]]
        if image is None:
            return None
        content = image["bytes"]
        if content is None:  # there is a path then, in a folder or in an archive
            try:
                with fsspec.open(image["path"]) as file:
                    content = file.read()
            except broken_file as error:
                raise UserError(f"cannot read {image['path']} of {name}: {error}") from error
        return read_picture(io.BytesIO(content), image_size)

    pictures = read_all(read, range(len(dataset)))
    kept = [row for row, picture in enumerate(pictures) if picture is not None and labels[row]]
    used = {labels[row] for row in kept}
    if len(kept) < len(pictures):
        skipped = len(pictures) - len(kept)
        print_once(f"skipped {skipped} rows without a readable picture or a label", file=sys.stderr)
    if not kept:
        raise UserError(f"no picture of {name} can be read")
    if isinstance(features.get(label_column), datasets.ClassLabel):
        class_names = [label for label in features[label_column].names if label in used]
    else:
        class_names = sorted(used)
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    order = sorted(kept, key=lambda row: label_of[labels[row]])  # by class, like load_images
    by_label = f"labels: {label_column}" if label_column else "no labels: one class"
    print_once(f"pictures from {name}, split train (pictures: {columns[0]}; {by_label})")
    images = torch.stack([pictures[row] for row in order])
    return images, torch.tensor([label_of[labels[row]] for row in order]), class_names


def find_label_column(datasets, dataset):
    """The first column of class labels; or else one that is called so, or of strings that repeat,
    as captions do not. And the class names in it, row by row, where None is no label. (None, None)
    without such a column.
    """
    known = (*LABEL_COLUMNS, "cls")
    named, strings = [], []
    for column, kind in dataset.features.items():
        if isinstance(kind, datasets.ClassLabel):
            ids = dataset[column][:]
            return column, [kind.names[i] if i is not None and i >= 0 else None for i in ids]
        dtype = kind.dtype if isinstance(kind, datasets.Value) else ""
        is_string = dtype in ("string", "large_string")
        is_whole = dtype.startswith(("int", "uint"))
        if plain_column(column) in known and (is_string or is_whole):
            named.append(column)
        elif is_string and not column.startswith("__"):  # a WebDataset's own, such as __url__
            strings.append(column)
    named.sort(key=lambda column: known.index(plain_column(column)))
    for column in named + strings:
        values = dataset[column][:]
        if look_like_classes(values):
            return column, [None if value is None else str(value) for value in values]
    return None, None


# Held-out pictures


def held_out(labels):
    """Which pictures are for validation: a mask (N,) of every twentieth, counted through all
    classes of at least four pictures. Smaller classes keep theirs for training."""
    counts = torch.bincount(labels)
    candidates = (counts[labels] >= 4).nonzero().flatten()
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[candidates[::20]] = True
    return mask
