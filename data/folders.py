"""Which pictures of a folder are of which class: by its folders, or else by a table of labels.

Only names are looked at. There are three rules, in this order:

1. Of train beside test (Training_set, test_images, seg_val, ...), train counts. A folder that
   begins with a word for testing is never a class: among others, without train, it is refused.
2. A folder that holds all pictures, or most, is a wrapper: look inside it. Several folders are the
   classes.
3. Where there are no folders inside, a CSV file may label the pictures; without one they are one
   class, called as their folder is.

A folder that fits no rule is refused, and what is left out is counted.
"""

import csv
import re
from collections import Counter, defaultdict
from pathlib import Path

from support.settings import UserError, print_once

PICTURES = ".avif .bmp .gif .heic .heif .jfif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp"
# Columns of a table, the best first. Case, spaces and underscores do not count.
FILE_COLUMNS = "filename file filepath filepaths path image imagename imagepath imageid img id"
LABEL_COLUMNS = "label labels class classname category species breed target"

# Hidden, the system's, and the grids that train.py and sample.py draw.
SKIPPED = re.compile(r"/(\.|__MACOSX|@eaDir|\$RECYCLE|lost\+found)|^samples/(step|class-.*-seed)-")
TRAIN = re.compile(r"(?<![a-z])train(ing|val)?([\W_]*set)?(?![a-z])")
TEST = re.compile(r"(?<![a-z])(test(ing)?|val(id(at\w+)?)?|dev|eval|holdout)([\W_]*set)?(?![a-z])")


def find_pictures(folder):
    """The classes of a folder, {class name: sorted paths of its pictures}, and a Counter of what
    was passed over. Raises UserError if the folder can be read in two ways, or not at all."""
    root, passed_over = Path(folder), Counter()
    paths = list(walk(root, passed_over))
    pictures = [path for path in paths if is_picture(path)]
    others = [path for path in paths if not is_picture(path)]
    passed_over.update(path.suffix.lower() or "without an ending" for path in others)

    while True:
        folders = defaultdict(list)
        for path in pictures:
            if path.parent != root:
                folders[path.parts[len(root.parts)]].append(path)
        if not folders:
            break
        beside = len(pictures) - sum(map(len, folders.values()))
        if 2 * beside >= len(pictures):
            seen = f"{root} has {beside} pictures beside the folder {', '.join(folders)}"[:300]
            raise UserError(f"{seen}: put all into folders, one per class, or all into one folder")
        passed_over["beside the folders"] += beside
        if len(folders) > 1:
            tests = [name for name in folders if split_of(name) == "*test"]
            if tests:
                raise UserError(f"{root / tests[0]} is for testing, by its name: move it away")
            return folders, passed_over
        name, pictures = folders.popitem()
        root = root / name

    # A .jsonl has no columns, so it is refused; passing it over would lose the labels.
    tables = [path for path in others if path.suffix.lower() in (".csv", ".tsv", ".jsonl")]
    if tables and pictures:
        return by_table(tables, pictures, passed_over), passed_over
    return {root.resolve().name: pictures}, passed_over


def walk(folder, passed_over, parents=()):
    """All files below a folder, in the same order on every machine, except for what is hidden, made
    by a run, or beside a folder for training. parents: the folders around it, as a link may lead
    back to one of them."""
    parents = (*parents, folder.resolve())
    paths = [path for path in folder.iterdir() if not SKIPPED.search(f"{folder.name}/{path.name}")]
    # Of train beside train_masks, the shorter name counts; of seg_train beside train, the one that
    # has a partner such as seg_val.
    splits = {split_of(path.name): path for path in sorted(paths, reverse=True) if path.is_dir()}
    paired = {split.replace("*test", "*train") for split in splits if "*test" in split}
    paired = sorted(paired & splits.keys())
    train = splits[paired[0]] if paired else None
    for path in sorted(paths, key=lambda path: path.name):
        if not path.is_dir():
            yield path
        elif train and path != train:
            kind = f"in {path.name} ({train.name} is used, and a twentieth of it held out)"
            passed_over[kind] += sum(map(is_picture, walk(path, Counter(), parents)))
        elif path.resolve() not in parents and not (path / "train_state.pt").exists():
            yield from walk(path, passed_over, parents)


def is_picture(path):
    """Whether a file is a picture, by its ending."""
    return path.suffix.lower() in PICTURES.split()


def split_of(name):
    """A name with its split marked: *train for train_images, *test for test1, seg_*test for
    seg_val."""
    marked = TEST.sub("*test", TRAIN.sub("*train", name.lower()))
    return re.match(r"\*(train|test)|", marked)[0] or marked


def by_table(tables, pictures, passed_over):
    """{label: paths} of the pictures, from the one table that has labels for training."""
    known = {path: read_labels(path) for path in tables if "*test" not in split_of(path.stem)}
    usable = [path for path in known if known[path]]
    if len(usable) != 1:
        wanted = "a column filename (file, path, image, id) and a column label (class, species)"
        raise UserError(f"{', '.join(map(str, tables))}: one table is needed, with {wanted}")
    table, labels, classes = usable[0], known[usable[0]], defaultdict(list)
    for path in pictures:
        label = labels.get(path.name, labels.get(path.stem))
        if label is None:
            raise UserError(f"{table} has no label for {path}: add a row, or move the picture away")
        classes[label].append(path)
    passed_over[table.suffix.lower()] -= 1
    passed_over[f"in {table.name} without a picture"] += max(0, len(labels) - len(pictures))
    print_once(f"labels from {table}")
    return dict(sorted(classes.items()))


def read_labels(table):
    """{name of a picture: its label} of a table; {} if it has no such columns."""
    try:
        text = table.read_text("utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter, restkey="", restval=""))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{table} should be CSV in UTF-8 (in Excel: CSV UTF-8): {error}") from error
    columns = list(rows[0]) if rows else []
    file_column = find_column(FILE_COLUMNS, columns)
    label_column = find_column(LABEL_COLUMNS, columns)
    labels = {}
    for row in rows if file_column and label_column else []:
        file = row[file_column].replace("\\", "/").rpartition("/")[2].strip()
        label = row[label_column].strip()
        if label and labels.setdefault(file, label) != label:
            raise UserError(f"{table} gives {file} two labels")
    return labels


def find_column(wanted, columns):
    """The first of the wanted names among the columns, or None. Case and spaces do not count."""
    plain = {re.sub(r"[\W_]", "", column).lower(): column for column in columns}
    return next((plain[name] for name in wanted.split() if name in plain), None)
