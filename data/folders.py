"""Which files of a folder are pictures of which class.

A folder may hold one folder of pictures per class, or nothing but pictures, which are one class.
Around that, people's folders have splits (train beside test), one folder wrapping everything, or a
CSV file with the labels: find_classes() knows these, and counts what it passes over.
"""

import contextlib
import csv
import io
import re
from collections import Counter
from pathlib import PurePosixPath

from PIL import Image

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

TRAINING_SPLITS = ("train", "training")
# What lies beside "train". Names may end in "set", as in test_set.
HELD_OUT_SPLITS = ("test", "testing", "val", "valid", "validation", "dev", "eval")
SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information")
RUN_FILES = ("train_state.pt", "model.safetensors")  # in the folder of a run

# Columns of a CSV file, in the order of preference; spaces and underscores do not count.
FILE_COLUMNS = "filename file filepath filepaths path image imagename imageid imageindex id".split()
LABEL_COLUMNS = "label labels class classname category species".split()


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
    pictures = pictures_among(files_below(folder, Counter()))
    label_of, missing = match_labels(labels, pictures, folder)
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


def match_labels(labels, pictures, folder):
    """{path: label} of the pictures that the rows {file: label} of a table name, without those of a
    test split if there is one for training; and how many rows name none of them."""
    # A table may name train/fish/1.jpg so, or fish/1.jpg, 1.jpg or 1; or by a path elsewhere that
    # ends like one of these.
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
    return label_of, missing


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


def are_classes(values):
    """Whether values are few enough to be classes: captions and file names are not."""
    return len(set(values)) <= 0.7 * len(values)
