"""Which pictures of a folder are of which class: by its folders, or else by a table of labels.

Only names are looked at, and tables. There are four rules, in this order:

1. A folder whose name begins or ends with a word for testing is never a class. Beside one folder
   for training (Train beside Valid, seg_train beside seg_test, ...), it is left out, as is all else
   there; otherwise it is refused.
2. A folder that holds all pictures, or most, is a wrapper: look inside it.
3. Several folders are the classes. What would be lost is refused: a folder beside them that has
   files, but no picture, and a table that sorts the pictures in another way.
4. Where there are no folders inside, a CSV file may label the pictures; without one they are one
   class, called as their folder is.

What fits no rule is refused, and what is left out is counted.
"""

import csv
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

from support.settings import UserError, print_once

from PIL import Image

PICTURES = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
PICTURES |= {".heic", ".heif"}  # of iPhones, which need a plug-in of Pillow
TABLES = ".csv .tsv .json .jsonl".split()
DOCUMENTS = [
    *TABLES,
    *".html .log .md .py .txt .xml .yaml .yml".split(),
]  # never a class's pictures

TRAIN = set("train training trainval".split())
TEST = set("test testing val vali valid validate validation dev eval evaluation".split())
TEST |= set("hold holdout held heldout unseen".split())
LABEL_COLUMNS = "label labels cls class classes classname category species breed target".split()

csv.field_size_limit(10**9)

# Hidden, the system's, and the grids that train.py and sample.py draw.
SKIPPED = re.compile(r"/(\.|__MACOSX|@eaDir|\$RECYCLE|lost\+found)|^samples/(step|class-.*-seed)-")


def find_pictures(folder):
    """The classes of a folder, {class name: sorted paths of its pictures}, and a Counter of what
    was passed over. Raises UserError if the folder can be read in two ways, or not at all."""
    root, passed_over = Path(folder), Counter()
    paths = list(walk(root, passed_over))
    pictures = [path for path in paths if is_picture(path)]
    others = [path for path in paths if not is_picture(path)]
    passed_over.update(path.suffix.lower() or "without an ending" for path in others)

    parents = {path.parent for path in pictures}
    above = {above for parent in parents for above in (parent, *parent.parents)}
    for path in others:
        if pictures and path.parent not in above and path.suffix.lower() not in DOCUMENTS:
            seen = f"{path.parent} has no picture, but {path.name}"
            raise UserError(f"{seen}: convert it to PNG, or move the folder away")
    root = Path(os.path.commonpath(parents or [root]))
    folders = defaultdict(list)
    for path in pictures:
        if path.parent != root:
            folders[path.parts[len(root.parts)]].append(path)
    if folders and root in parents:
        raise UserError(
            f"{root} has pictures beside {min(folders)}: put all into folders, or in one"
        )

    classes, labels = {root.resolve().name: pictures}, defaultdict(set)
    tables = [path for path in others if path.suffix.lower() in TABLES]
    for table in tables:
        for path, label in read_table(table, pictures):
            labels[path].add(label)
    if labels or (not folders and passed_over.keys() & {".csv", ".tsv"}):
        classes = by_label(labels, pictures, ", ".join(table.name for table in tables))
        passed_over.subtract(table.suffix.lower() for table in tables)
        if folders and set(map(tuple, folders.values())) != set(map(tuple, classes.values())):
            raise UserError(f"{tables[0]} and the folders sort the pictures differently: remove it")
    return folders or classes, passed_over


def walk(folder, passed_over, parents=()):
    """All files below a folder, in the same order on every machine, except for what is hidden, made
    by a run, or beside a folder for training. parents: the folders around it, as a link may lead
    back to one of them."""
    parents = (*parents, folder.resolve())
    paths = [path for path in folder.iterdir() if not SKIPPED.search(f"{folder.name}/{path.name}")]
    paths.sort(key=lambda path: path.name)
    tests = [path for path in paths if named(TEST, path.name) and path.is_dir()]
    trains = [path for path in paths if named(TRAIN, path.name) and path.is_dir()]
    if tests and len(trains) != 1:
        hint = "name the folder to train on, or rename it"
        raise UserError(f"{tests[0]} is for testing, by its name: {hint}")
    for path in paths:
        if tests and path != trains[0] and (is_picture(path) or path.is_dir()):
            passed_over[f"in {path.name}"] += sum(map(is_picture, (path, *path.rglob("*"))))
        elif not path.is_dir():
            yield path
        elif path.resolve() not in parents and not (path / "model.safetensors").exists():
            yield from walk(path, passed_over, parents)


def is_picture(path):
    """Whether a file is a picture, by its ending."""
    return path.suffix.lower() in PICTURES


def named(words, name):
    """Whether a name begins or ends with one of the words: test_1, TestImages, seg_test."""
    text = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()
    text = re.sub("(data|image|img|photo|picture)?s?(sets?)?(?![a-z])", "", text)
    parts = re.findall("[a-z]+", text)
    return bool(parts) and not words.isdisjoint((parts[0], parts[-1]))


# Tables of labels


def read_table(table, pictures):
    """Yield (path, label) for each of the pictures that a row of a CSV file names, in whichever
    column: if several have names, one picture gets several labels. Raises UserError if rows are for
    testing. Of a JSON file, which only its owner can read, the label is empty."""
    text = table.read_text("utf-8-sig", errors="replace").replace("\0", "")
    by_name = {path.name: path for path in pictures}
    if named(TEST, table.stem) or len(by_name) < len(pictures):
        return  # for testing, or it could not tell pictures of the same name apart
    if table.suffix.lower() in (".json", ".jsonl"):
        for name in by_name.keys() & set(re.split(r'["/\\]', text)):
            yield by_name[name], ""
        return
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    lines = csv.DictReader(text.splitlines(), delimiter=delimiter, restkey="", restval="")
    rows = [{column: row[column].strip() for column in row if column} for row in lines]
    label_columns = find_labels(rows[0]) if rows else []
    if len(label_columns) != 1:
        return

    for column in rows[0]:
        values = {row[column] for row in rows} - by_name.keys()
        of_testing = [text for text in values if named(TEST, text)] or named(TEST | TRAIN, column)
        if of_testing and len(values) < 9:
            raise UserError(f"{table}: rows are for testing, by the column {column}: delete them")
    if by_name.keys().isdisjoint(last_part(cell) for row in rows for cell in row.values()):
        by_name = {path.stem: path for path in pictures}  # names without their ending
    for row in rows:
        label = row.pop(label_columns[0])
        for name in by_name.keys() & map(last_part, row.values()):
            yield by_name[name], label
    print_once(f"labels as in {table}")


def by_label(labels, pictures, tables):
    """{label: paths} of the pictures, by {path: set of labels}, which is of the tables. Raises
    UserError if a picture has several labels, or none."""
    classes = defaultdict(list)
    for path in pictures:
        if len(labels[path]) != 1 or labels[path] & {""} or "\ufffd" in min(labels[path]):
            seen = " and ".join(sorted(labels[path] - {""})) or "missing"
            hint = "a CSV table in UTF-8, with the columns filename and label, should give it one"
            raise UserError(f"{tables}: the label of {path} is {seen}; {hint}")
        classes[min(labels[path])].append(path)
    return dict(sorted(classes.items()))


def last_part(text):
    """Of a path, of any system, its last part."""
    return re.split(r"[\\/]", text)[-1]


def find_labels(columns):
    """Those of the columns that may be labels, by their names. Case and spaces do not count."""
    return [text for text in columns if re.sub(r"[\W_]", "", text).lower() in LABEL_COLUMNS]
