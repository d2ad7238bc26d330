"""Which pictures of a folder are of which class: by its folders, or else by a table of labels.

Only names and tables are looked at. There are four rules, in this order:

1. A folder whose name begins or ends with a word for testing is never a class; among up to five
   folders, nor is one for masks. Beside a single folder for training (valid beside train, seg_test
   beside seg_train, ...), all but that one is left out, tables aside; otherwise, and among more,
   the whole is refused.
2. Folders around all of the pictures are wrappers: look inside. Pictures beside folders of pictures
   are refused, and so are the classes' folders a second time, inside one beside them.
3. Several folders are the classes, with all that is below them. What would be lost is refused: a
   folder that has data, but no picture, and a table that sorts the pictures in another way.
4. Where there are no folders inside, a CSV file may label the pictures; without one they are one
   class, called as their folder is.

What is left out is counted, except for what is hidden or made by a run.
"""

import csv
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

from support.settings import UserError, print_once

from PIL import Image

csv.field_size_limit(2**31 - 1)  # a cell may hold more than Python's 131,072 characters
PICTURES = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
# Pillow cannot read the first six. The last two, of iPhones, need a plug-in.
PICTURES = PICTURES - set(".bufr .grib .h5 .hdf .mpeg .mpg".split()) | {".heic", ".heif"}
TABLES = ".csv .tsv .json .jsonl".split()
# Files that cannot be the pictures of a class: a folder that has no others is no class, either.
DOCUMENTS = [*TABLES, *".db .html .ini .log .md .mov .mp4 .py .txt .xml .yaml .yml".split()]

# Words that begin or end the names of folders for training, and of folders that are no classes.
TRAIN = set("train training trainval".split())
TEST = set("test testing val vali valid validate validation dev eval evaluation".split())
TEST |= set("hold holdout held heldout unseen unlabeled unlabelled query submission".split())
MASKS = set("mask segmentation annotation trimap gt groundtruth label".split())
LABEL_COLUMNS = "label labels cls class classes classname category species breed target dx".split()

# Hidden, of a system or a disk, and the grids that train.py and sample.py draw.
SKIPPED = r"(?i)/(\.|__MACOSX|@eaDir|[$#@]recycle|lost\+found)|^samples/(step|class-.*-seed)-"


def find_pictures(folder):
    """The classes of a folder, {class name: sorted paths of its pictures}, and a Counter of all
    other files. Raises UserError if the folder can be read in two ways, or not at all."""
    root, passed_over = Path(folder), Counter()
    paths = list(walk(root, passed_over))
    pictures = [path for path in paths if path.suffix.lower() in PICTURES]
    others = [path for path in paths if path.suffix.lower() not in PICTURES]
    passed_over.update(path.suffix.lower() or "without an ending" for path in others)

    parents = {path.parent for path in pictures}
    above = {folder for parent in parents for folder in (parent, *parent.parents)}
    for path in others:
        if pictures and path.parent not in above and path.suffix.lower() not in DOCUMENTS:
            raise UserError(f"cannot read {path.name} in {path.parent}: make it PNG, or move it")
    root = Path(os.path.commonpath(parents or [root]))  # inside all wrappers
    folders = defaultdict(list)
    for path in pictures:
        if path.parent != root:
            folders[path.parts[len(root.parts)]].append(path)
    if folders and root in parents:
        raise UserError(f"{root} has pictures beside {min(folders)}/: put them into a folder, too")
    for name, files in folders.items():
        if len({path.parts[len(root.parts) + 1] for path in files} & folders.keys()) > 1:
            raise UserError(f"{root / name} has the folders beside it a second time: move it away")

    classes, labels = {root.resolve().name: pictures}, defaultdict(set)
    tables = [path for path in others if path.suffix.lower() in TABLES]
    looked_up = pictures if tables else []  # as a million names take their time and memory
    # Names count with one or two folders; without any, or without ending, only if all differ.
    unique = len({path.name for path in looked_up}) == len(looked_up)
    depths = (1, 2, 3) if unique else (2, 3)
    by_name = {last_parts(path, depth): path for path in looked_up for depth in depths}
    by_stem = {path.stem.lower(): path for path in looked_up if unique}
    for table in tables:
        for path, label in read_table(table, by_name, by_stem, min(2, len(pictures))):
            labels[path].add(label)
    # Without folders, a CSV file that gives no labels is refused.
    if labels or (pictures and not folders and passed_over.keys() & {".csv", ".tsv"}):
        names = ", ".join(table.name for table in tables)[:100]
        classes = by_label(labels, pictures, names)
        if folders and set(map(tuple, folders.values())) != set(map(tuple, classes.values())):
            raise UserError(f"{names} disagrees with the folders: remove it, or their folders")
    return folders or classes, passed_over


def walk(folder, passed_over, parents=()):
    """All files below a folder, in the same order on every machine, except for what is hidden, made
    by a run, or left out by rule 1. parents: the folders around it, as a link may lead
    back to one of them."""
    parents = (*parents, folder.resolve())
    paths = [p for p in folder.iterdir() if not re.search(SKIPPED, f"{folder.name}/{p.name}")]
    paths.sort(key=lambda path: path.name)
    # No runs. Among six or more, as splits are few, gas_mask or bullet_train is a class.
    dirs = {p for p in paths if p.is_dir() and not (p / "model.safetensors").exists()}
    no_class = TEST | MASKS if len(dirs) < 6 else TEST
    trains = [p for p in dirs if named(TRAIN, p.name) and not named(MASKS, p.name)]
    tests = [p for p in paths if p in dirs and named(no_class, p.name) and p not in trains]
    if tests and (len(trains) != 1 or len(dirs) >= 6):
        raise UserError(f"{tests[0]} is no class, by its name: move it away, or rename it if it is")
    for path in paths:
        # Tables stay, as they are of all pictures.
        if tests and path != trains[0] and (path.suffix.lower() in PICTURES or path.is_dir()):
            left_out = [file for file in (path, *path.rglob("*")) if file.is_file()]
            passed_over[path.suffix.lower() or f"in {path.name}"] += len(left_out)
        elif not path.is_dir():
            yield path
        elif path in dirs and path.resolve() not in parents:
            yield from walk(path, passed_over, parents)


def named(words, name):
    """Whether a name begins or ends with one of the words: test_1, TestImages, seg_test."""
    text = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()
    text = re.sub("(data|image|img|photo|picture)?s?(sets?)?(?![a-z])", "", text)
    parts = re.findall("[a-z]{2,}", text)
    return bool(parts) and not words.isdisjoint((parts[0], parts[-1]))


# Tables of labels


def read_table(table, by_name, by_stem, least):
    """Yield (path, label) for each picture that a row of a CSV file names, in whichever column.

    by_name, by_stem: {name: path}, with ending and perhaps folders, or without both. A picture in
    several rows may get several labels. Nothing is yielded unless one column alone is of labels,
    nor if the table is for testing, by its name, or names fewer than `least` pictures: then it is
    not about them. Raises UserError if some of its rows are for testing, or if a JSON file names
    pictures: what else that says, only its owner knows.
    """
    text = table.read_text("utf-8-sig", errors="replace").replace("\0", "\ufffd")
    rows, columns = [{"": word} for word in set(text.split('"'))], [""]  # of JSON
    if table.suffix.lower() in (".csv", ".tsv"):
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.DictReader(text.splitlines(), delimiter=delimiter, restkey="+", restval="")
        rows, columns = list(reader), reader.fieldnames or []
    label_columns = find_labels(columns)
    other_columns = [column for column in columns if column not in label_columns]

    used = rows_of(by_name, rows, other_columns)
    if not used and columns != [""]:  # of a CSV, by stem; numbers only in its first column
        words = {stem: path for stem, path in by_stem.items() if not stem.isdigit()}
        used = rows_of(by_stem, rows, other_columns[:1]) or rows_of(words, rows, other_columns)
    if named(TEST, table.stem) or len(used) < least:
        return  # for testing, or not about these pictures
    if columns == [""]:
        raise UserError(f"{table} names the pictures, but labels are read from CSV: move it away")

    for column in other_columns:
        values = {row[column] for _, row in used if last_parts(row[column]) not in by_name}
        for_testing = [value for value in values if named(TEST, value)]
        if 1 < len(values) < 9 and (for_testing or named(TEST | TRAIN, column)):
            raise UserError(f"{table}: column {column} marks tests: delete those rows and files")
    if len(label_columns) == 1:
        print_once(f"labels as in {table}")
        for path, row in used:
            yield path, row[label_columns[0]].strip()


def rows_of(by_name, rows, columns):
    """The rows that name pictures in one of the columns: a list of (path, row)."""
    used = []
    for row in rows:
        names = {last_parts(row[column]) for column in columns}
        found = names & by_name.keys() or {Path(name).stem for name in names} & by_name.keys()
        used += [(by_name[name], row) for name in found]
    return used


def last_parts(path, depth=3):
    """The end of a path of any system, or of another text, for comparison."""
    text = str(path).strip().replace("\\", "/").removeprefix("./").lower()
    return "/".join(text.split("/")[-depth:])


def by_label(labels, pictures, names):
    """{label: paths} of the pictures, by {path: set of labels}. names: of the tables, for errors.
    Raises UserError if a picture has several labels, or none."""
    if not labels:
        raise UserError(f"no labels in {names}: it needs columns filename and label; or remove it")
    classes = defaultdict(list)
    for path in pictures:
        if len(labels[path]) != 1 or labels[path] & {""} or "\ufffd" in min(labels[path]):
            seen = " and ".join(sorted(labels[path] - {""})) or "missing"
            raise UserError(f"{names}: the label of {path} is {seen}: give it one label, in UTF-8")
        classes[min(labels[path])].append(path)
    return dict(sorted(classes.items()))


def find_labels(columns):
    """Those of the columns that may be labels, by their names. Case and spaces do not count."""
    return [text for text in columns if re.sub(r"[\W_]", "", text).lower() in LABEL_COLUMNS]
