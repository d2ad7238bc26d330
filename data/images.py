"""Where the pictures come from: the drawn butterflies, a folder, or a data set on the Hub.

All three return the same thing: images uint8 (N,3,S,S), labels int64 (N,), and a list of class
names. Everything is decoded once and stays in memory.

A folder may hold one folder of pictures per class, or nothing but pictures, which are one class.
Around that, people's folders have splits (train beside test), one folder wrapping everything, or a
CSV file with the labels: find_classes() knows these. It reports what it used and what it skipped.
"""

import contextlib
import csv
import io
import re
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm.contrib.concurrent import thread_map

from common import download, list_files, print_once
from data.drawn import draw_butterflies
from model import UserError

with contextlib.suppress(ImportError):  # a Pillow plug-in for the pictures of iPhones
    import pillow_heif

    pillow_heif.register_heif_opener()

Image.init()
UNREADABLE_FORMATS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS")  # known to Pillow by name only
PICTURE_SUFFIXES = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in UNREADABLE_FORMATS
}
PLUG_INS = {".heic": "pip install pillow-heif", ".heif": "pip install pillow-heif"}

TRAINING_SPLITS = ("train", "training")
# What lies beside "train". Names may end in "set", as in test_set.
HELD_OUT_SPLITS = ("test", "testing", "val", "valid", "validation", "dev", "eval")
SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information")
RUN_FILES = ("train_state.pt", "model.safetensors")  # in the folder of a run

# Columns of a CSV file, in the order of preference; spaces and underscores do not count.
FILE_COLUMNS = "filename file filepath filepaths path image imagename imageid imageindex id".split()
LABEL_COLUMNS = "label labels class classname category species".split()

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
    labelled = [(path, label) for label, name in enumerate(class_names) for path in classes[name]]
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
    disable = None  # no progress bar unless stderr is a terminal
    return thread_map(read, items, desc="reading pictures", leave=False, disable=disable)


def describe(kind, count):
    """One kind of skipped files or folders, in words."""
    hint = f" (readable after {PLUG_INS[kind]})" if kind in PLUG_INS else ""
    return f"{count} {kind}{hint}"


# Layouts of folders


def find_classes(folder, passed_over):
    """{class name: sorted paths of its files} of a folder, and a description of their source.

    passed_over: a Counter, to which this function adds what it skips. Nothing hidden is looked at.
    In this order: a CSV file that labels the pictures; train, beside test or val; the only folder,
    if it wraps everything; class folders; pictures that lie directly in the folder. Raises
    UserError if there are two readings.
    """
    labelled = find_labels(folder, passed_over)
    if labelled:
        return labelled
    folders, files = list_folder(folder, passed_over)
    pictures = pictures_among(files)

    train = [entry for entry in folders if split_name(entry.name) in TRAINING_SPLITS]
    held_out = [entry for entry in folders if split_name(entry.name) in HELD_OUT_SPLITS]
    if len(train) == 1 and held_out:
        for entry in folders:
            if entry != train[0]:
                kind = f"pictures in {entry.name}, beside the split {train[0].name}"
                passed_over[kind] += len(pictures_among(files_below(entry, Counter())))
        classes, source = find_classes(train[0], passed_over)
        return classes, f"{source}, the split for training"

    if len(folders) == 1 and not pictures and is_wrapper(folders[0]):
        return find_classes(folders[0], passed_over)

    classes = {entry.name: files_below(entry, passed_over) for entry in folders}
    in_folders = sum(len(pictures_among(paths)) for paths in classes.values())
    if not folders or (pictures and in_folders == 0):
        return {folder.resolve().name: files}, str(folder)
    if len(folders) == 1 and len(pictures) > in_folders:
        raise UserError(
            f"{folder} has {len(pictures)} pictures beside the folder {folders[0].name}: put all "
            "of them into folders, one per class, or all of them into one folder"
        )
    for path in files:
        is_picture = suffix(path) in PICTURE_SUFFIXES
        passed_over["pictures beside the class folders" if is_picture else suffix(path)] += 1
    return classes, str(folder)


def split_name(name):
    """The name of a folder as the lists of splits have it: test for Test_Set or testset."""
    return re.sub(r"[\W_]*set$", "", name.casefold())


def is_wrapper(folder):
    """Whether a folder that is alone in another is no class: it holds labels, or several folders
    and no picture, or another wrapper."""
    folders, files = list_folder(folder, Counter())
    if find_labels(folder, Counter()):
        return True
    if pictures_among(files) or not folders:
        return False
    return len(folders) > 1 or is_wrapper(folders[0])


def pictures_among(files):
    """The files with the suffix of a picture."""
    return [path for path in files if suffix(path) in PICTURE_SUFFIXES]


def suffix(path):
    """The suffix of a file name, in lower case; words if there is none."""
    return path.suffix.lower() or "without a suffix"


def list_folder(folder, passed_over):
    """The folders and the files in a folder, both sorted, except for what is hidden or was made by
    the system or by a training run."""
    folders, files = [], []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            files.append(entry)
        elif not entry.is_dir():  # a broken link
            continue
        elif entry.name.casefold() in SYSTEM_FOLDERS:
            passed_over[f"system folder ({entry.name})"] += 1
        elif is_of_a_run(entry):
            passed_over[f"run folder ({entry.name})"] += 1
        else:
            folders.append(entry)
    return folders, files


def is_of_a_run(folder):
    """Whether train.py or sample.py wrote the folder."""
    if any((folder / name).exists() for name in RUN_FILES):
        return True
    if folder.name == "samples":
        return any(folder.glob("class-*-seed-*.png"))
    # A run that has just begun has an empty folder for its samples.
    entries = list(folder.iterdir())
    return [entry.name for entry in entries] == ["samples"] and not any(entries[0].iterdir())


def files_below(folder, passed_over, parents=()):
    """Sorted paths of all files in a folder and in the folders below it. parents: the folders that
    it is in, as a link may lead back to one of them."""
    parents = (*parents, folder.resolve())
    folders, files = list_folder(folder, passed_over)
    for entry in folders:
        if entry.resolve() not in parents:
            files += files_below(entry, passed_over, parents)
    return sorted(files)


# Labels in a CSV file


def find_labels(folder, passed_over):
    """What find_classes returns, if a CSV file in the folder labels its pictures; else None.

    Raises UserError if there are two such files, if some of the pictures have no label, if they
    also lie in folders that say otherwise, or if it names none of them and no folder does.
    """
    tables = {}
    for path in list_folder(folder, Counter())[1]:
        rows = read_table(path) if suffix(path) == ".csv" else {}
        if rows:
            tables[path] = rows
    if not tables:
        return None
    if len(tables) > 1:  # perhaps one for training and one for testing
        chosen = [path for path in tables if has_word(path.stem, TRAINING_SPLITS)]
        if len(chosen) != 1:
            names = ", ".join(path.name for path in tables)
            raise UserError(f"{folder} has several CSV files with labels ({names}): keep one")
        tables = {chosen[0]: tables[chosen[0]]}
    table = next(iter(tables))
    labels = tables[table]

    # A table may name train/fish/1.jpg so, or fish/1.jpg, 1.jpg or 1; or by a path elsewhere that
    # ends like one of these.
    pictures = pictures_among(files_below(folder, Counter()))
    paths_by_name = {}
    for path in pictures:
        parts = path.relative_to(folder).parts
        for start in range(len(parts)):
            name = PurePosixPath(*parts[start:])
            paths_by_name.setdefault(str(name), []).append(path)
            paths_by_name.setdefault(str(name.with_suffix("")), []).append(path)

    label_of, missing = {}, 0
    for name, label in labels.items():
        parts = PurePosixPath(name).parts
        ends = [str(PurePosixPath(*parts[start:])) for start in range(len(parts))]
        found = next((paths_by_name[end] for end in ends if end in paths_by_name), [])
        if len(found) > 1:  # the same name in several splits
            found = [path for path in found if is_in(path, folder, TRAINING_SPLITS)]
        if len(found) == 1:
            label_of[found[0]] = label
        else:
            missing += 1
    if any(is_in(path, folder, TRAINING_SPLITS) for path in label_of):
        for path in list(label_of):
            if is_in(path, folder, HELD_OUT_SPLITS):
                del label_of[path]
    if not label_of:
        if len({path.parent for path in pictures}) == 1:  # no class folders
            named = next(iter(labels))
            raise UserError(f"{table} labels {named} and others, but none of the pictures here")
        return None  # the CSV is about something else

    labelled_folders = {path.parent for path in label_of}
    if len(labelled_folders) > 1:
        if all(path.parent.name == label for path, label in label_of.items()):
            return None  # it says what the class folders say
        names = {split_name(entry.name) for entry in labelled_folders}
        if len(names - {*TRAINING_SPLITS, *HELD_OUT_SPLITS}) > 1:
            message = f"{folder} has folders of pictures, and other labels in {table.name}"
            raise UserError(f"{message}: remove the one or the other")
    unlabelled = [p for p in pictures if p.parent in labelled_folders and p not in label_of]
    if unlabelled:
        raise UserError(
            f"{table} labels {len(label_of)} pictures, and {len(unlabelled)} beside them have no "
            f"label, such as {unlabelled[0].name}: add rows for them, or move them away"
        )
    if missing:
        passed_over[f"rows of {table.name} that name no picture"] += missing
    if len(pictures) > len(label_of):
        others = len(pictures) - len(label_of)
        passed_over[f"pictures elsewhere than those that {table.name} labels"] += others
    classes = {}
    for path, label in sorted(label_of.items()):
        classes.setdefault(label, []).append(path)
    return classes, f"{folder}, labelled by {table.name}"


def has_word(text, words):
    """Whether one of the words is in a text such as Training_set."""
    return any(word in words for word in re.split(r"[\W_]+", text.casefold()))


def is_in(path, folder, names):
    """Whether a path below the folder leads through a folder of one of these names."""
    return any(split_name(part) in names for part in path.relative_to(folder).parts[:-1])


def read_table(path):
    """{file: label} of a CSV file, or {} if it has no such columns. Raises UserError if it gives a
    file two labels."""
    try:
        content = path.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("cp1252", errors="replace")  # from older spreadsheets
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (OSError, ValueError, csv.Error):
        return {}
    columns = {}
    for column in rows[0] if rows else []:
        if column is not None:  # which stands for cells beyond the last column
            columns[column.casefold().replace("_", "").replace(" ", "")] = column
    files = [columns[name] for name in FILE_COLUMNS if name in columns]
    labels = [columns[name] for name in LABEL_COLUMNS if name in columns]
    if files and not labels and len(columns) == 2:
        others = [column for column in columns.values() if column != files[0]]
        labels = others if are_classes([row[others[0]] for row in rows]) else []
    if not files or not labels:
        return {}
    table = {}
    for row in rows:
        file, label = row[files[0]], row[labels[0]]
        if not file or not label:
            continue
        file = str(PurePosixPath(file.strip().replace("\\", "/")))
        if table.setdefault(file, label.strip()) != label.strip():
            raise UserError(f"{path} gives {file} two labels: nanoDiT takes one per picture")
    return table


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
    image = ImageOps.fit(image, (image_size, image_size))  # what is transparent has no weight
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
    if image.mode == "F" and low >= -0.1 and high <= 1.1:  # filters overshoot
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

    tops = {file.parts[0] for file in files if len(file.parts) > 1}
    ignored = []
    if any(split_name(top) in TRAINING_SPLITS for top in tops):
        ignored = [f"{top}/*" for top in tops if split_name(top) in HELD_OUT_SPLITS]
    folder = download(name, hint, repo_type="dataset", ignore_patterns=ignored)
    return load_snapshot(folder, name, image_size)


def load_downloaded(name, image_size, error):
    """What an earlier run has downloaded, now that the Hub cannot be asked. Raises the error, which
    says why, if there is nothing."""
    # The Hub library insists on files that only an earlier listing could tell it to ignore.
    ends = [f"{split}{end}" for split in HELD_OUT_SPLITS for end in ("", "set", "_set")]
    held_out = [f"{form}/*" for end in ends for form in (end, end.capitalize(), end.upper())]
    options = {"repo_type": "dataset", "local_files_only": True, "ignore_patterns": held_out}
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
    """Whether the pictures of a data set are inside other files. A few pictures beside parquet
    files are documentation."""
    pictures = pictures_among(files)
    parquet = [file for file in files if suffix(file) == ".parquet"]
    if parquet:
        return len(pictures) < 10 * len(parquet)
    return not pictures and any(suffix(file) in PACKED for file in files)


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
    problems = (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError)
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
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read {image['path']} of {name}: {error}") from error
        return read_picture(io.BytesIO(content), image_size)

    pictures = read_all(read, range(len(dataset)))
    kept = [row for row, picture in enumerate(pictures) if picture is not None and labels[row]]
    used = {labels[row] for row in kept}
    if len(kept) < len(pictures):
        skipped = len(pictures) - len(kept)
        print_once(f"skipped {skipped} rows without a picture or a label", file=sys.stderr)
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
    named, strings = [], []
    for column, kind in dataset.features.items():
        if isinstance(kind, datasets.ClassLabel):
            ids = dataset[column][:]
            return column, [kind.names[i] if i is not None and i >= 0 else None for i in ids]
        dtype = kind.dtype if isinstance(kind, datasets.Value) else ""
        is_string = dtype in ("string", "large_string")
        is_whole = dtype.startswith(("int", "uint"))
        if column.casefold() in (*LABEL_COLUMNS, "cls") and (is_string or is_whole):
            named.append(column)
        elif is_string and not column.startswith("__"):  # a WebDataset's own, such as __url__
            strings.append(column)
    for column in named + strings:
        values = dataset[column][:]
        if are_classes(values):
            return column, [None if value is None else str(value) for value in values]
    return None, None


def are_classes(values):
    """Whether values are few enough to be classes: captions and file names are not."""
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
