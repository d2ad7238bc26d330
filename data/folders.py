"""Which files of a folder are pictures of which class.

A folder may hold one folder of pictures per class, or nothing but pictures, which are one class.
Around that, people's folders have splits (train beside test), one folder wrapping everything, or a
table with the labels: find_classes() knows these, and counts what it passes over. It goes by the
names of files; data/images.py then tries to read them, whatever their endings say.
"""

import contextlib
import csv
import io
import json
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
# What data sets have beside their pictures. A folder of nothing else is no class.
DOCUMENT_SUFFIXES = ".csv .htm .html .json .jsonl .log .mat .md .npy .npz .pdf .pkl .py".split()
DOCUMENT_SUFFIXES += ".ipynb .tsv .txt .xml .yaml .yml".split()

TRAINING_SPLITS = ("train", "training")
# What lies beside "train". Names may end in "set", as in test_set.
HELD_OUT_SPLITS = ("test", "testing", "val", "valid", "validation", "dev", "eval")
SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
RUN_FILES = ("train_state.pt", "model.safetensors")  # in the folder of a run

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
# Columns of a table, in the order of preference; spaces and underscores do not count.
FILE_COLUMNS = "filename file filepath filepaths path image imagename imagepath imagefile".split()
FILE_COLUMNS += "imageid imageindex img imgname imgpath fname id".split()
LABEL_COLUMNS = "label labels class classname category species target".split()


# Layouts of folders


def find_classes(folder, passed_over):
    """{class name: sorted paths of its files} of a folder, and a description of their source.

    passed_over: a Counter, to which this function adds what it skips. Nothing hidden is looked at.
    In this order: a table that labels the pictures; train, beside test or val; the only folder, if
    it wraps everything; class folders; pictures that lie directly in the folder. Raises UserError
    if there are two readings.
    """
    labelled = classes_from_table(folder, passed_over)
    if labelled:
        return labelled
    folders, files = list_folder(folder, passed_over)
    pictures = pictures_among(files)
    for path in [path for path in files if suffix(path) in TABLE_SUFFIXES]:
        files.remove(path)
        needs = "" if read_table(path) else ", which lacks columns such as filename and label"
        passed_over[f"unused table ({path.name}{needs})"] += 1

    split = find_split(folders)
    if split:
        train, others = split
        pass_over_splits(train, others, passed_over)
        pass_over_files(files, "pictures beside the splits", passed_over)
        classes, source = find_classes(train, passed_over)
        return classes, f"{source}, the split for training"

    for entry in list(folders):
        if holds_documents(entry):
            folders.remove(entry)
            passed_over[f"folder of documents ({entry.name})"] += 1
    if len(folders) == 1 and is_wrapper(folders[0]):
        if not pictures or len(pictures) < len(pictures_among(files_below(folders[0], Counter()))):
            pass_over_files(files, f"pictures beside the folder {folders[0].name}", passed_over)
            return find_classes(folders[0], passed_over)

    classes = {entry.name: files_of_class(entry, passed_over) for entry in folders}
    in_folders = sum(len(pictures_among(paths)) for paths in classes.values())
    if not classes or (pictures and in_folders == 0):
        for paths in classes.values():
            pass_over_files(paths, "pictures", passed_over)
        return {folder.resolve().name: files}, str(folder)
    if len(pictures) >= max(1, in_folders):
        names = ", ".join(sorted(classes)[:3]) + (", ..." if len(classes) > 3 else "")
        raise UserError(
            f"{folder} has {len(pictures)} pictures beside the folder {names}: put all of them "
            "into folders, one per class, or all of them into one folder"
        )
    pass_over_files(files, "pictures beside the class folders", passed_over)
    return classes, str(folder)


def pass_over_files(files, kind, passed_over):
    """Count files that are not used: pictures as of that kind, others by their suffix."""
    for path in files:
        passed_over[kind if suffix(path) in PICTURE_SUFFIXES else suffix(path)] += 1


def words_of(name):
    """The words of a name such as Training_Set, in lower case."""
    return re.split(r"[\W_]+", name.casefold())


def split_of(name):
    """What the name of a folder says about a split: ("train", ()) for Training_Set or trainset,
    ("test", ("seg",)) for seg_val; the second part is the rest of it. None unless exactly one word
    is a split."""
    words = [word.removesuffix("set") for word in words_of(name)]
    splits = [word for word in words if word in (*TRAINING_SPLITS, *HELD_OUT_SPLITS)]
    if len(splits) != 1:
        return None
    rest = tuple(word for word in words if word and word not in splits)
    return ("train" if splits[0] in TRAINING_SPLITS else "test"), rest


def find_split(folders):
    """(the folder for training, the others), if some of the folders are called as splits are: train
    beside test, or seg_train beside seg_test. Otherwise None. Raises UserError if several could be
    the one for training."""
    splits = {entry: split_of(entry.name) for entry in folders}
    rests = [split[1] for split in splits.values() if split and split[0] == "test"]
    train = [entry for entry in folders if splits[entry] in [("train", rest) for rest in rests]]
    if not train:
        return None
    if len(train) > 1:
        names = ", ".join(entry.name for entry in train)
        train = [entry for entry in train if splits[entry] == ("train", ())]  # beside train_masks
        if len(train) != 1:
            raise UserError(f"which is for training, {names}? Keep one, or name it as --dataset")
    return train[0], [entry for entry in folders if entry != train[0]]


def pass_over_splits(train, others, passed_over):
    """Count the pictures in the folders beside that for training."""
    for entry in others:
        kind = f"pictures in {entry.name}, beside the split {train.name}"
        passed_over[kind] += len(pictures_among(files_below(entry, Counter())))


def files_of_class(folder, passed_over):
    """Sorted paths of all files of a class; of those for training, if the class has splits."""
    folders, files = list_folder(folder, Counter())
    split = find_split(folders)
    if not split:
        return files_below(folder, passed_over)
    train, others = split
    pass_over_splits(train, others, passed_over)
    return sorted_paths(files + files_below(train, passed_over))


def holds_documents(folder):
    """Whether a folder holds what data sets have beside their pictures, and nothing else."""
    paths = files_below(folder, Counter())
    return len(paths) > 0 and all(suffix(path) in DOCUMENT_SUFFIXES for path in paths)


def is_wrapper(folder):
    """Whether a folder that is alone in another is no class: it holds labels, or several folders
    and no picture, or another wrapper."""
    folders, files = list_folder(folder, Counter())
    if classes_from_table(folder, Counter()):
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
    for entry in sorted_paths(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            files.append(entry)
        elif not entry.is_dir():
            passed_over["broken links"] += 1
        elif entry.name.casefold() in SYSTEM_FOLDERS:
            passed_over[f"system folder ({entry.name})"] += 1
        elif is_run_folder(entry):
            passed_over[f"run folder ({entry.name})"] += 1
        else:
            folders.append(entry)
    return folders, files


def is_run_folder(folder):
    """Whether train.py or sample.py wrote the folder."""
    if any((folder / name).exists() for name in RUN_FILES):
        return True
    if folder.name == "samples":
        return any(folder.glob("class-*-seed-*.png")) or any(folder.glob("step-*.png"))
    # A run that has just begun has an empty folder for its samples.
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    only_samples = [entry.name for entry in entries] == ["samples"] and entries[0].is_dir()
    return only_samples and not any(entries[0].iterdir())


def files_below(folder, passed_over, parents=()):
    """Sorted paths of all files in a folder and in the folders below it. parents: the folders that
    it is in, as a link may lead back to one of them."""
    parents = (*parents, folder.resolve())
    folders, files = list_folder(folder, passed_over)
    for entry in folders:
        if entry.resolve() not in parents:
            files += files_below(entry, passed_over, parents)
    return sorted_paths(files)


def sorted_paths(paths):
    """Paths in the same order on every machine: on Windows, sorted() would ignore case."""
    return sorted(paths, key=lambda path: path.parts)


# Labels in a table


def classes_from_table(folder, passed_over):
    """What find_classes returns, if a table in the folder labels its pictures; else None.

    Raises UserError if there are two such tables, if some of the pictures have two labels or none,
    if they also lie in folders that say otherwise, or if they lie in one folder and the table names
    none of them.
    """
    table, labels = find_table(folder)
    if not labels:
        return None
    pictures = pictures_among(files_below(folder, Counter()))
    split = splits_by_path(pictures, folder)
    label_of, missing = match_labels(labels, pictures, split, folder)
    if not label_of and len({path.parent for path in pictures}) == 1:
        named = next(iter(labels))
        raise UserError(f"{table} labels {named} and others, but none of the pictures here")
    if not label_of or (missing > len(label_of) and len(class_folders(pictures)) > 1):
        return None  # a list of something else, such as of the classes
    if "train" in split.values() and all(split.get(path) == "test" for path in label_of):
        return None  # what is trained on has its labels elsewhere
    if len(class_folders(label_of)) > 1:
        pairs = [(path.parent.name, label) for path, label in label_of.items() if label]
        if all(plain(name) == plain(label) for name, label in pairs):
            return None  # it says what the class folders say
        raise UserError(
            f"{folder} has folders of pictures, and other labels in {table.name}: remove the "
            "table, or move all pictures into one folder"
        )
    passed_over[f"rows of {table.name} that name no picture"] += missing
    others = len(pictures) - len(label_of)
    passed_over[f"pictures elsewhere than those that {table.name} labels"] += others
    if any(split.get(path) == "train" for path in label_of):
        for path in [path for path in label_of if split.get(path) == "test"]:
            del label_of[path]
            passed_over[f"pictures that {table.name} labels, but not for training"] += 1
    doubtful = [path for path, label in label_of.items() if not label]
    if doubtful:
        named = doubtful[0].relative_to(folder)
        raise UserError(f"{table} gives {named} two labels: nanoDiT takes one per picture")
    labelled_folders = {path.parent for path in label_of}
    unlabelled = [p for p in pictures if p.parent in labelled_folders and p not in label_of]
    if unlabelled:
        raise UserError(
            f"{table} labels {len(label_of)} pictures, and {len(unlabelled)} beside them have no "
            f"label, such as {unlabelled[0].name}: add rows for them, or move them away"
        )

    classes = {}
    for path in sorted_paths(label_of):
        classes.setdefault(label_of[path], []).append(path)
    return classes, f"{folder}, labelled by {table.name}"


def class_folders(paths):
    """The names of the folders that paths lie in, other than splits."""
    return {path.parent.name for path in paths if split_of(path.parent.name) is None}


def find_table(folder):
    """The path and the {file: label} of the table in a folder; (None, {}) if there is none. Raises
    UserError if there are several, and not just one of them is for training."""
    tables = {}
    for path in list_folder(folder, Counter())[1]:
        labels = read_table(path) if suffix(path) in TABLE_SUFFIXES else {}
        if labels:
            tables[path] = labels
    if len(tables) > 1:  # perhaps one for training and one for testing
        chosen = [p for p in tables if any(word in TRAINING_SPLITS for word in words_of(p.stem))]
        if len(chosen) != 1:
            names = ", ".join(path.name for path in tables)
            raise UserError(f"{folder} has several tables of labels ({names}): keep one")
        tables = {chosen[0]: tables[chosen[0]]}
    return next(iter(tables.items()), (None, {}))


def match_labels(labels, pictures, split, folder):
    """{path: label} of those pictures that the {file: label} of a table name, where the label is
    None if rows contradict each other; and how many rows name none of them. split: as
    splits_by_path returns it."""
    # A table may name train/fish/1.jpg so, or fish/1.jpg, 1.jpg or 1; or by a path elsewhere that
    # ends like one of these.
    paths_by_name = {}
    for path in pictures:
        parts = path.relative_to(folder).parts
        for start in range(len(parts)):
            name = PurePosixPath(*parts[start:])
            paths_by_name.setdefault(str(name), []).append(path)
            paths_by_name.setdefault(str(name.with_suffix("")), []).append(path)

    # Rows may end alike, such as train/1.jpg and test/1.jpg, where only one of the pictures is
    # here: it belongs to the row of which it has the most.
    missing, matches = 0, {}  # {path: (how many parts of its name a row has, label)}
    for name, label in labels.items():
        parts, found, start = PurePosixPath(name).parts, [], 0
        for start in range(len(parts)):
            found = paths_by_name.get(str(PurePosixPath(*parts[start:])), [])
            if len(found) > 1:  # the same name in several splits
                found = [path for path in found if split.get(path) == "train"]
            if found:
                break
        if len(found) != 1:
            missing += 1
            continue
        length = len(parts) - start
        known_length, known_label = matches.get(found[0], (0, label))
        missing += known_length not in (0, length)  # the row that has less of the name
        if length > known_length:
            matches[found[0]] = length, label
        elif length == known_length and label != known_label:
            matches[found[0]] = length, None
    return {path: label for path, (_, label) in matches.items()}, missing


def plain(name):
    """A class name as it is compared: Golden Retriever and golden_retriever are the same."""
    return " ".join(words_of(name))


def splits_by_path(paths, folder):
    """{path: "train" or "test"} of the paths below the folder that lead through a split: through
    train or test, or through one of a pair such as train_images and test_images."""
    splits = {}  # of each path
    for path in paths:
        parts = path.relative_to(folder).parts[:-1]
        splits[path] = [split for split in map(split_of, parts) if split]
    seen = {split for found in splits.values() for split in found}
    paired = {rest for _, rest in seen if {("train", rest), ("test", rest)} <= seen}
    return {
        path: kind
        for path, found in splits.items()
        for kind, rest in found
        if rest == () or rest in paired
    }


def read_table(path):
    """{file: label} of a table, where the label is None if there are several; {} if it has no such
    columns, or cannot be read."""
    try:
        rows = read_rows(path)
    except (OSError, ValueError, RecursionError, csv.Error):
        return {}
    columns = {}
    for column in rows[0] if rows else []:
        if column is not None:  # which stands for cells beyond the last column
            columns[plain_column(column)] = column
    files = [columns[name] for name in FILE_COLUMNS if name in columns]
    labels = [columns[name] for name in LABEL_COLUMNS if name in columns]
    if files and not labels and len(columns) == 2:
        others = [column for column in columns.values() if column != files[0]]
        labels = others if look_like_classes([row.get(others[0]) for row in rows]) else []
    if not files or not labels:
        return {}
    table = {}
    for row in rows:
        file, label = row.get(files[0]), row.get(labels[0])
        if file is None or label is None or not str(file).strip() or not str(label).strip():
            continue
        file = str(PurePosixPath(str(file).strip().replace("\\", "/")))
        label = str(label).strip()
        if table.setdefault(file, label) != label:
            table[file] = None
    return table


def read_rows(path):
    """The rows of a table, as dictionaries: of text with commas, semicolons or tabs, below a line
    with their names, or of a JSON object in each line."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")  # from older spreadsheets
    if suffix(path) == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return rows if all(isinstance(row, dict) for row in rows) else []
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))


def plain_column(column):
    """The name of a column as it is compared: File Name and file_name are the same."""
    return column.casefold().replace("_", "").replace(" ", "")


def look_like_classes(values):
    """Whether values are few enough to be classes: captions and file names are not."""
    return len(set(map(str, values))) <= 0.7 * len(values)
