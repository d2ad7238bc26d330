"""Where the pictures come from: the drawn butterflies, a folder, or a data set on the Hub.

All three give the same: images uint8 (N,3,S,S), labels int64 (N,), and a list of class names.
Everything is decoded once and stays in memory.

A folder may hold one folder of pictures per class, or nothing but pictures, which are one class.
Around that, people's folders have splits (train beside test), one folder around it all, or a CSV
file with the labels: find_classes() knows these. It says which it took, and what it passed over.
"""

import contextlib
import csv
import io
import os
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm.contrib.concurrent import thread_map

from common import download, list_files
from data.drawn import draw_butterflies
from model import UserError

with contextlib.suppress(ImportError):  # a plug-in of Pillow's, which reads what iPhones write
    import pillow_heif

    pillow_heif.register_heif_opener()

Image.init()
PICTURE_ENDINGS = {
    ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN
}
PLUG_INS = {".heic": "pip install pillow-heif", ".heif": "pip install pillow-heif"}

HELD_OUT_SPLITS = ("test", "val", "valid", "validation")  # what lies beside "train"
SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information")
RUN_FILES = ("train_state.pt", "model.safetensors")  # in the folder of a run

# Columns of a CSV file, in the order of preference; spaces and underscores do not count.
FILE_COLUMNS = "filename file filepath filepaths path image imagename imageid imageindex id".split()
LABEL_COLUMNS = "label labels class classname category species name".split()

# Files that hold pictures, or tell where they are, for the `datasets` library.
PACKED = (".parquet", ".arrow", ".tar", ".zip", ".csv", ".jsonl")

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
    if is_packed(files_below(Path(name), Counter())):
        return load_with_datasets(name, image_size)
    return load_images(name, image_size)


def load_images(folder, image_size):
    """Read a folder of pictures: one folder per class, or another layout of find_classes().

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
    paths = [path for name in class_names for path in classes[name]]
    pictures = read_all(lambda path: read_picture(path, image_size), paths)
    picture_of = dict(zip(paths, pictures))

    images, labels, broken = [], [], []
    for label, name in enumerate(class_names):
        for path in classes[name]:
            if picture_of[path] is not None:
                images.append(picture_of[path])
                labels.append(label)
            elif ending(path) in PICTURE_ENDINGS:
                broken.append(path)
            else:
                passed_over[ending(path)] += 1

    if broken:
        listed = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        say(f"skipped {len(broken)} pictures that cannot be read: {listed}", file=sys.stderr)
    if passed_over:
        listed = [describe(kind, count) for kind, count in sorted(passed_over.items())]
        say(f"passed over: {', '.join(listed)}", file=sys.stderr)
    if not labels:
        raise UserError(f"no pictures in {folder}: it should hold one folder of pictures per class")
    for label in set(range(len(class_names))) - set(labels):
        name = class_names[label]
        raise UserError(f'no pictures of class "{name}" in {source}: add some, or remove the class')
    say(f"pictures from {source}")
    return torch.stack(images), torch.tensor(labels), class_names


def read_all(read, items):
    """[read(item)], by several threads: Pillow decodes outside of Python's global lock."""
    options = {"desc": "reading pictures", "leave": False}
    return thread_map(read, items, disable=None, **options)  # no bar if stderr is no terminal


def say(text, file=None):
    """Print, but only in the first of several processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=file or sys.stdout, flush=True)


def describe(kind, count):
    """One kind of files or folders that were passed over, in words."""
    hint = f" (readable after {PLUG_INS[kind]})" if kind in PLUG_INS else ""
    return f"{count} {kind}{hint}"


# Layouts of folders


def find_classes(folder, passed_over):
    """{class name: sorted paths of its files} of a folder, and where they are from, in words.

    passed_over: a Counter, to which kinds of things are added. Nothing hidden is looked at. In this
    order: a CSV file that labels the pictures; train, beside test or val; the only folder, if
    folders of pictures are inside of it; class folders; pictures that lie directly in the folder.
    """
    folders, files = visible(folder, passed_over)
    labelled = find_labels(folder, passed_over)
    if labelled:
        return labelled

    train = [entry for entry in folders if entry.name.casefold() == "train"]
    held_out = [entry for entry in folders if entry.name.casefold() in HELD_OUT_SPLITS]
    if len(train) == 1 and held_out:
        for entry in held_out:
            others = pictures_among(files_below(entry, Counter()))
            passed_over[f"pictures of the split {entry.name}"] += len(others)
        classes, source = find_classes(train[0], passed_over)
        return classes, f"{source}, the split for training"

    if len(folders) == 1 and not pictures_among(files) and wraps(folders[0]):
        return find_classes(folders[0], passed_over)

    if not folders:
        return {folder.resolve().name: files}, str(folder)
    for path in files:
        is_picture = ending(path) in PICTURE_ENDINGS
        passed_over["pictures beside the class folders" if is_picture else ending(path)] += 1
    classes = {entry.name: files_below(entry, passed_over) for entry in folders}
    return classes, str(folder)


def wraps(folder):
    """Whether a folder that is alone in another is no class: it holds labels, or several folders
    and no picture, or another such folder."""
    folders, files = visible(folder, Counter())
    if find_labels(folder, Counter()):
        return True
    if pictures_among(files) or not folders:
        return False
    return len(folders) > 1 or wraps(folders[0])


def pictures_among(files):
    """Those whose names end as pictures do."""
    return [path for path in files if ending(path) in PICTURE_ENDINGS]


def ending(path):
    """The suffix of a file name in lower case; a word if there is none."""
    return path.suffix.lower() or "files without an ending"


def visible(folder, passed_over):
    """The folders and the files in a folder, both sorted, without what is hidden or what a system
    or a training has made."""
    folders, files = [], []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            files.append(entry)
        elif entry.is_dir() and entry.name.casefold() in SYSTEM_FOLDERS:
            passed_over[f"folder of the system ({entry.name})"] += 1
        elif entry.is_dir() and is_of_a_run(entry):
            passed_over[f"folder of a run ({entry.name})"] += 1
        elif entry.is_dir():
            folders.append(entry)
    return folders, files


def is_of_a_run(folder):
    """Whether train.py or sample.py wrote the folder."""
    if any((folder / name).exists() for name in RUN_FILES):
        return True
    if [entry.name for entry in folder.iterdir()] == ["samples"]:  # a run that has just begun
        return True
    return folder.name == "samples" and any(folder.glob("class-*-seed-*.png"))


def files_below(folder, passed_over):
    """Sorted paths of all files in a folder and in the folders below it."""
    folders, files = visible(folder, passed_over)
    for entry in folders:
        if not entry.is_symlink():  # it may lead back here
            files += files_below(entry, passed_over)
    return sorted(files)


# Labels in a CSV file


def find_labels(folder, passed_over):
    """What find_classes returns, if a CSV file in the folder labels its pictures; else None.

    Raises UserError if there are two such files, if some of the pictures have no label, or if they
    also lie in folders that say otherwise.
    """
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        rows = read_table(path)
        if rows:
            tables[path] = rows
    if not tables:
        return None
    for path in tables:  # one for training, beside one for testing
        if "train" in path.stem.casefold():
            tables = {path: tables[path]}
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"{folder} has several CSV files with labels ({names}): keep one of them")
    ((table, rows),) = tables.items()

    pictures = pictures_among(files_below(folder, Counter()))
    places = {}  # every way in which a table may name a file
    for path in pictures:
        parts = path.relative_to(folder).parts
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            places.setdefault(name, []).append(path)
            places.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(path)

    classes, missing = {}, 0
    for name, label in rows.items():
        found = places.get(name, [])
        if len(found) > 1:  # the same name in several splits
            found = [path for path in found if "train" in map(str.casefold, path.parts)]
        if len(found) == 1:
            classes.setdefault(label, []).append(found[0])
        else:
            missing += 1
    if not classes:
        return None  # it is about something else
    labelled = {path: label for label, paths in classes.items() for path in paths}

    homes = {path.parent for path in labelled}
    if len(homes) > 1 and all(path.parent.name == label for path, label in labelled.items()):
        return None  # it says what the class folders say
    if len({home.name for home in homes} - {"train", *HELD_OUT_SPLITS}) > 1:
        raise UserError(
            f"{folder} has folders of pictures, and other labels in {table.name}: remove one"
        )
    bare = [path for path in pictures if path.parent in homes and path not in labelled]
    if bare:
        raise UserError(
            f"{table} labels {len(labelled)} pictures, and {len(bare)} beside them have no label, "
            f"such as {bare[0].name}: add rows for them, or move them away"
        )
    if missing:
        passed_over[f"rows of {table.name} that name no picture"] += missing
    others = len(pictures) - len(labelled)
    if others:
        passed_over[f"pictures elsewhere that {table.name} does not label"] += others
    return {label: sorted(paths) for label, paths in classes.items()}, f"{folder}, by {table.name}"


def read_table(path):
    """{file: label} of a CSV file, or {} if it has no such columns."""
    try:
        text = path.read_text("utf-8-sig")
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (OSError, ValueError, csv.Error):
        return {}
    columns = {}
    for column in (rows[0] if rows else {}).keys() - {None}:
        columns[column.casefold().replace("_", "").replace(" ", "")] = column
    files = [columns[name] for name in FILE_COLUMNS if name in columns]
    labels = [columns[name] for name in LABEL_COLUMNS if name in columns]
    if files and not labels and len(columns) == 2:
        (other,) = (column for column in columns.values() if column != files[0])
        labels = [other] if repeat([row[other] for row in rows]) else []
    if not files or not labels:
        return {}
    table = {}
    for row in rows:
        file, label = row[files[0]], row[labels[0]]
        if file and label:
            table[str(PurePosixPath(file.strip().replace("\\", "/")))] = label.strip()
    return table


# Pictures


def read_picture(file, image_size):
    """A picture file as uint8 (3,S,S): turned upright, transparency composited onto white, the
    short side resized, the long side cropped to its middle. None if the file cannot be read.

    file: a path, or a file object. Its content, not its name, says which format it is.
    """
    try:
        with Image.open(file) as image:
            # A JPEG can be decoded at a half, a quarter or an eighth of its size. Twice of what is
            # needed leaves the rest to a better filter.
            format = image.format
            image.draft(None, (2 * image_size, 2 * image_size))
            image = ImageOps.exif_transpose(image)  # decodes it, too
    except BROKEN_PICTURE:
        return None
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bits(image, format)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = ImageOps.fit(image.convert("RGB"), (image_size, image_size))
    return pil_to_tensor(image)


def to_8_bits(image, format):
    """A grey picture of 16 or 32 bits, or of floats, which convert("L") would clip: what it shows.

    Floats from 0 to 1, and whole numbers up to 255 or 65,535, are scaled as such; otherwise the
    darkest value becomes black and the brightest white.
    """
    is_float, full_range = image.mode == "F", None
    if image.mode.startswith("I;") or (image.mode == "I" and format in ("PNG", "PPM")):
        image, full_range = image.convert("I"), 65535  # of 16 bits
    values = pil_to_tensor(image).float()
    values = values.nan_to_num(posinf=0, neginf=0)
    low, high = (value.item() for value in values.aminmax())
    if full_range is None and low >= 0:
        limits = [1, 255, 65535] if is_float else [255, 65535]
        full_range = next((limit for limit in limits if high <= limit), None)
    if full_range is None:
        values, full_range = values - low, max(high - low, 1e-9)
    return to_pil_image((values / full_range * 255).round().to(torch.uint8))


# The Hub


def load_from_hub(name, image_size):
    """A data set on the Hub: pictures in folders, or files that the `datasets` library reads."""
    hint = f"no data set at {name}; try --preset laptop, or --dataset FOLDER"
    files = [PurePosixPath(file) for file in list_files(name)]
    if is_packed(files):
        return load_with_datasets(name, image_size)

    tops = {file.parts[0] for file in files if len(file.parts) > 1}
    skipped = []
    if "train" in map(str.casefold, tops):
        skipped = [f"{top}/*" for top in tops if top.casefold() in HELD_OUT_SPLITS]
    return load_images(
        download(name, hint, repo_type="dataset", ignore_patterns=skipped), image_size
    )


def is_packed(files):
    """Whether the pictures of a data set are inside of other files. A few pictures beside parquet
    files are documentation."""
    pictures = pictures_among(files)
    parquet = [file for file in files if ending(file) == ".parquet"]
    if parquet:
        return len(pictures) < 10 * len(parquet)
    return not pictures and any(ending(file) in PACKED for file in files)


def load_with_datasets(name, image_size):
    """The pictures of the split "train", by the `datasets` library: of the first column that holds
    images, labelled by the first that holds labels. Raises UserError if there is no such thing."""
    try:
        import datasets
        import fsspec  # comes with it
    except ImportError as error:
        message = f"{name} does not hold folders of pictures: to read it, pip install datasets"
        raise UserError(message) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    problems = (datasets.exceptions.DatasetsError, OSError, ValueError)
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
    encoded = dataset.cast_column(columns[0], datasets.Image(decode=False))

    label_column, labels = find_label_column(datasets, dataset)
    if label_column is None:
        labels = [name] * len(dataset)

    def read(row):
        image = encoded[row][columns[0]]
        if image is None:
            return None
        content = image["bytes"]
        if content is None:  # there is a path then, in a folder or in an archive
            with fsspec.open(image["path"]) as file:
                content = file.read()
        return read_picture(io.BytesIO(content), image_size)

    pictures = read_all(read, range(len(dataset)))
    kept = [row for row, picture in enumerate(pictures) if picture is not None and labels[row]]
    used = {labels[row] for row in kept}
    if len(kept) < len(pictures):
        skipped = len(pictures) - len(kept)
        say(f"skipped {skipped} rows without a picture or a label", file=sys.stderr)
    if not kept:
        raise UserError(f"no picture of {name} can be read")
    if isinstance(features.get(label_column), datasets.ClassLabel):
        class_names = [label for label in features[label_column].names if label in used]
    else:
        class_names = sorted(used)
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    order = sorted(kept, key=lambda row: label_of[labels[row]])  # by class, like load_images
    by_label = f"labels: {label_column}" if label_column else "no labels: one class"
    say(f"pictures from {name}, split train (pictures: {columns[0]}; {by_label})")
    images = torch.stack([pictures[row] for row in order])
    return images, torch.tensor([label_of[labels[row]] for row in order]), class_names


def find_label_column(datasets, dataset):
    """The first column of class labels, or else of strings that repeat, as captions do not; and
    the class names in it, row by row, where None is no label. (None, None) without such a column.
    """
    strings = []
    for column, kind in dataset.features.items():
        if isinstance(kind, datasets.ClassLabel):
            ids = dataset[column][:]
            return column, [kind.names[i] if i is not None and i >= 0 else None for i in ids]
        if isinstance(kind, datasets.Value) and kind.dtype == "string":
            strings.append(column)
    for column in strings:
        values = dataset[column][:]
        if repeat(values):
            return column, values
    return None, None


def repeat(values):
    """Whether values are few enough to be classes: captions and names of files are not."""
    return len(set(values)) <= 0.7 * len(values)


# Held-out pictures


def held_out(labels):
    """Which pictures are for validation: a mask (N,) of every twentieth, counted through all
    classes of at least four pictures. Smaller classes keep theirs for training."""
    counts = torch.bincount(labels)
    candidates = (counts[labels] >= 4).nonzero().flatten()
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[candidates[::20]] = True
    return mask
