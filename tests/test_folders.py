"""Folders as people have them: which pictures are taken, as which class, and what is said of it."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, call, refused
from PIL import Image

from data.images import held_out, load_dataset, load_images
from model import UserError


def save(*paths, colour=(120, 40, 200)):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), colour).save(path)


def tree(folder, names, files=("0.png", "1.png")):
    """A picture of each name in each of the folders."""
    save(*(folder / name / file for name in names for file in files))


def classes(folder):
    """{class: number of its pictures} of a folder."""
    _, labels, names = load_images(folder, 16)
    return {name: int((labels == n).sum()) for n, name in enumerate(names)}


# Layouts


@pytest.mark.parametrize(
    "others", [["test"], ["Valid", "TEST"], ["validation"], ["testing"], ["dev", "eval"]]
)
@pytest.mark.parametrize("ending", ["", "_set", "set"])
def test_of_splits_train_is_taken(tmp_path, capsys, others, ending):
    train, others = f"Train{ending}", [f"{other}{ending}" for other in others]
    tree(tmp_path / train, ["fish", "star"])
    for other in others:
        tree(tmp_path / other, ["fish", "star", "only here"], files=["0.png"])
    assert classes(tmp_path) == {"fish": 2, "star": 2}
    out, err = capsys.readouterr()
    assert f"pictures from {tmp_path / train}" in out
    assert all(f"3 pictures in {other}, beside the split {train}" in err for other in others)


@pytest.mark.parametrize(
    "train, others",
    [
        ("seg_train", ["seg_test", "seg_pred"]),
        ("asl_alphabet_train", ["asl_alphabet_test"]),
        ("train_images", ["test_images"]),
        ("train", ["test", "train_masks", "test_masks"]),
    ],
)
def test_splits_may_have_longer_names(tmp_path, capsys, train, others):
    tree(tmp_path / train / train, ["fish", "star"])
    for other in others:
        tree(tmp_path / other / other, ["fish", "star"])
    assert classes(tmp_path) == {"fish": 2, "star": 2}
    err = capsys.readouterr().err
    assert all(f"4 pictures in {other}, beside the split {train}" in err for other in others)


def test_classes_that_are_called_like_splits_are_classes(tmp_path):
    tree(tmp_path, ["steam_train", "dev_board", "test_tube"])
    assert classes(tmp_path) == {"dev_board": 2, "steam_train": 2, "test_tube": 2}


def test_pictures_and_masks_for_training_are_two_readings(tmp_path):
    for name in ("train_images", "train_masks", "test_images", "test_masks"):
        save(tmp_path / name / "0.png")
    with pytest.raises(UserError, match="train_images, train_masks"):
        load_images(tmp_path, 16)


def test_splits_inside_of_the_classes(tmp_path, capsys):
    tree(tmp_path, ["fish/train", "fish/test", "star/train", "star/test"])
    save(tmp_path / "star" / "loose.png")
    assert classes(tmp_path) == {"fish": 2, "star": 3}
    assert "4 pictures in test, beside the split train" in capsys.readouterr().err


@pytest.mark.parametrize("around", [".", "food"])
def test_folders_of_documents_are_no_classes(tmp_path, capsys, around):
    tree(tmp_path / around / "images", ["pie", "soup"])
    (tmp_path / around / "meta").mkdir()
    (tmp_path / around / "meta" / "classes.txt").write_text("pie\nsoup\n")
    assert classes(tmp_path) == {"pie": 2, "soup": 2}
    assert "1 folder of documents (meta)" in capsys.readouterr().err


def test_raw_photographs_beside_their_pictures_are_passed_over(tmp_path, capsys):
    save(tmp_path / "fish" / "0.jpg", tmp_path / "fish" / "raw.tif")
    (tmp_path / "fish" / "raw.tif").rename(tmp_path / "fish" / "0.NEF")  # as it holds a thumbnail
    assert classes(tmp_path) == {"fish": 1}
    assert "1 .nef" in capsys.readouterr().err


def test_train_alone_is_a_wrapper_and_without_splits_a_class(tmp_path):
    tree(tmp_path / "a" / "train", ["fish", "star"])
    assert classes(tmp_path / "a") == {"fish": 2, "star": 2}
    tree(tmp_path / "b", ["train", "boat"])
    assert classes(tmp_path / "b") == {"train": 2, "boat": 2}


def test_splits_of_loose_pictures_are_one_class(tmp_path):
    save(*(tmp_path / split / f"{n}.png" for split in ("train", "val") for n in range(3)))
    assert classes(tmp_path) == {"train": 3}


@pytest.mark.parametrize("wrapper", ["archive", "archive/images", "archive/images/all"])
def test_a_folder_around_it_all_is_no_class(tmp_path, wrapper):
    tree(tmp_path / wrapper, ["fish", "star"])
    (tmp_path / "README.md").write_text("pictures")
    assert classes(tmp_path) == {"fish": 2, "star": 2}


@pytest.mark.parametrize("folders", [["Pets"], ["data/train", "data/test"], ["train", "test"]])
def test_a_banner_beside_the_folder_around_it_all_is_passed_over(tmp_path, capsys, folders):
    for folder in folders:
        tree(tmp_path / folder, ["fish", "star"])
    save(tmp_path / "banner.png")
    (tmp_path / "another.HEIC").write_bytes(b"\x00\x00\x00 ftypnothing")
    assert classes(tmp_path) == {"fish": 2, "star": 2}
    err = capsys.readouterr().err
    assert "1 pictures beside the " in err and "1 .heic (readable after" in err


def test_a_wrapper_may_hold_splits_or_labels(tmp_path):
    tree(tmp_path / "a" / "archive" / "train", ["fish", "star"])
    tree(tmp_path / "a" / "archive" / "test", ["fish", "star"])
    assert classes(tmp_path / "a") == {"fish": 2, "star": 2}
    save(tmp_path / "b" / "archive" / "0.png", tmp_path / "b" / "archive" / "1.png")
    (tmp_path / "b" / "archive" / "labels.csv").write_text("file,label\n0.png,fish\n1.png,star\n")
    assert classes(tmp_path / "b") == {"fish": 1, "star": 1}


def test_one_class_folder_is_a_class(tmp_path):
    save(tmp_path / "fish" / "0.png", tmp_path / "fish" / "old" / "1.png")
    assert classes(tmp_path) == {"fish": 2}


def test_loose_pictures_beside_class_folders_are_named_and_passed_over(tmp_path, capsys):
    folder = tmp_path / "fish"  # named as one of its classes
    tree(folder, ["fish", "star"])
    save(folder / "loose.png", folder / "another.jpg")
    assert classes(folder) == {"fish": 2, "star": 2}
    assert "2 pictures beside the class folders" in capsys.readouterr().err


def test_what_systems_and_runs_leave_is_no_class(trained, tmp_path, capsys):
    tree(tmp_path, ["fish", "star", "__MACOSX", "fish/@eaDir", "$RECYCLE.BIN"])
    (tmp_path / "out").symlink_to(trained / "out")
    save(tmp_path / "samples" / "class-3-seed-0.png")
    save(tmp_path / "star" / ".Trashes" / "0.png", tmp_path / "star/samples/step-000250.png")
    (tmp_path / "fish" / "2.png").symlink_to("unmounted/2.png")
    assert classes(tmp_path) == {"fish": 2, "star": 2}
    err = capsys.readouterr().err
    assert "1 broken links" in err and "2 run folder (samples)" in err
    for name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN"):
        assert f"1 system folder ({name})" in err
    assert "1 run folder (out)" in err


def test_numbered_classes_are_printed_with_their_ids(tmp_path):
    tree(tmp_path / "d", map(str, range(12)), files=["0.png"])
    few = [*SMALL, "--steps", 1, "--batch-size", 4]
    out, _ = call("train.py", *few, "--dataset", "d", cwd=tmp_path)
    assert "classes: 0 0, 1 1, 2 10, ..., 9 7, 10 8, 11 9" in out  # sorted as text


def test_training_in_the_folder_of_the_pictures(tmp_path):
    tree(tmp_path, ["fish", "star"], files=[f"{n}.png" for n in range(4)])
    few = [*SMALL, "--steps", 2, "--batch-size", 4]
    call("train.py", *few, "--dataset", ".", cwd=tmp_path)
    call("sample.py", "--steps", 2, cwd=tmp_path)
    out, err = call("train.py", *few, "--dataset", ".", "--overwrite", cwd=tmp_path)
    assert "2 classes, 8 pictures, 1 of them held out" in out
    assert "classes: 0 fish, 1 star" in out and "pictures from ." in out
    assert "1 run folder (out)" in err


def test_pictures_that_need_a_plug_in_are_named_beside_an_archive(tmp_path, capsys):
    (tmp_path / "0.HEIC").write_bytes(b"\x00\x00\x00 ftypnothing")
    (tmp_path / "all.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="no pictures in"):
        load_dataset(str(tmp_path), 16)
    assert "1 .heic (readable after pip install pillow-heif)" in capsys.readouterr().err


def test_linked_folders_are_followed_and_circles_are_not(tmp_path):
    tree(tmp_path / "elsewhere", ["fish", "star/old"])
    (tmp_path / "d").mkdir()
    for name in ("fish", "star"):
        (tmp_path / "d" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "star" / "again").symlink_to(tmp_path / "elsewhere" / "star")
    assert classes(tmp_path / "d") == {"fish": 2, "star": 2}


def test_classes_may_keep_their_pictures_in_a_folder_called_samples(tmp_path):
    tree(tmp_path, ["fish/samples", "star/samples"])
    save(tmp_path / "ray" / "0.png")
    (tmp_path / "ray" / "0.png").rename(tmp_path / "ray" / "samples")  # a file
    assert classes(tmp_path) == {"fish": 2, "ray": 1, "star": 2}


def test_many_pictures_beside_one_folder_are_two_readings(tmp_path):
    save(*(tmp_path / f"{n}.png" for n in range(3)), tmp_path / "edited" / "0.png")
    with pytest.raises(UserError, match="3 pictures beside the folder edited"):
        load_images(tmp_path, 16)
    save(tmp_path / "screens" / "0.png", tmp_path / "wall" / "0.png")  # as many in folders
    with pytest.raises(UserError, match="3 pictures beside the folder edited, screens, wall"):
        load_images(tmp_path, 16)


def test_a_folder_without_pictures_beside_loose_ones_is_no_class(tmp_path, capsys):
    save(*(tmp_path / "photos" / f"{n}.png" for n in range(3)))
    (tmp_path / "photos" / "notes").mkdir()
    (tmp_path / "photos" / "notes" / "todo.txt").write_text("sort them")
    assert classes(tmp_path / "photos") == {"photos": 3}
    (tmp_path / "photos" / "phone").mkdir()
    (tmp_path / "photos" / "phone" / "0.heic").write_bytes(b"\x00\x00\x00 ftypnothing")
    assert classes(tmp_path / "photos") == {"photos": 3}
    assert "1 .heic (readable after pip install pillow-heif)" in capsys.readouterr().err


# Labels in a CSV file


def kaggle(folder, labels, test=2):
    """train/ with a picture for each label, test/ without labels, and the two tables."""
    save(*(folder / "train" / f"{n}.jpg" for n in range(len(labels))))
    save(*(folder / "test" / f"{n}.jpg" for n in range(test)))
    rows = "".join(f"{n}.jpg,{label}\n" for n, label in enumerate(labels))
    (folder / "Training_set.csv").write_text(f"filename,label\n{rows}")
    (folder / "Testing_set.csv").write_text("filename\n0.jpg\n1.jpg\n")


def test_the_labels_of_kaggle_butterflies(tmp_path, capsys):
    kaggle(tmp_path, ["MONARCH", "RED ADMIRAL", "MONARCH", "MONARCH", "RED ADMIRAL"])
    assert classes(tmp_path) == {"MONARCH": 3, "RED ADMIRAL": 2}
    out, err = capsys.readouterr()
    assert f"pictures from {tmp_path}, labelled by Training_set.csv" in out
    assert "2 pictures elsewhere than those that Training_set.csv labels" in err


@pytest.mark.parametrize(
    "text",
    [
        "file_name,label\n0.jpg,a\n1.jpg,b\n2.jpg,a\n",  # Hugging Face's metadata.csv
        "\ufefffile_name;class\r\n0.jpg;a\r\n1.jpg;b\r\n2.jpg;a\r\n",  # a spreadsheet's
        "label,width,File Name\na,40,0.jpg\nb,40,1.jpg\na,40,2.jpg\n",
        "image_path\tlabel\n0.jpg\ta\n1.jpg\tb\n2.jpg\ta\n",
        "id,breed\n0,a\n1,b\n2,a\n",  # names without their ending; a column that is no known word
        '"path","category"\n"./0.jpg","a"\n"1.jpg","b"\n"2.jpg","a"\n',
    ],
)
def test_tables_in_other_words(tmp_path, text):
    save(*(tmp_path / f"{n}.jpg" for n in range(3)))
    (tmp_path / "metadata.csv").write_text(text, "utf-8", newline="")
    assert classes(tmp_path) == {"a": 2, "b": 1}


def test_labels_in_lines_of_json(tmp_path):
    save(*(tmp_path / f"{n}.jpg" for n in range(3)))
    rows = "".join(f'{{"file_name": "{n}.jpg", "label": {n % 2}}}\n' for n in range(3))
    (tmp_path / "metadata.jsonl").write_text(rows)
    assert classes(tmp_path) == {"0": 2, "1": 1}
    (tmp_path / "metadata.jsonl").write_text("not JSON\n")
    assert classes(tmp_path) == {tmp_path.name: 3}


def test_a_table_of_pictures_for_testing_is_not_trained_on(tmp_path, capsys):
    tree(tmp_path / "train", ["fish", "star"])
    save(*(tmp_path / "test" / f"{n}.jpg" for n in range(3)))
    (tmp_path / "test.csv").write_text("filename,label\n0.jpg,fish\n1.jpg,star\n2.jpg,ray\n")
    assert classes(tmp_path) == {"fish": 2, "star": 2}
    err = capsys.readouterr().err
    assert "1 unused table (test.csv)" in err and "3 pictures in test, beside the split" in err


@pytest.mark.parametrize("folder", ["", "{}_images/"])
def test_a_table_of_pictures_that_are_called_the_same_in_two_splits(tmp_path, folder):
    for split in ("train", "test"):
        save(*(tmp_path / f"{split}_images" / f"{n}.jpg" for n in range(4)))
    splits = ("train", "test") if folder else ("train",)
    rows = [f"{folder.format(s)}{n}.jpg,{'ab'[n % 2]}\n" for s in splits for n in range(4)]
    (tmp_path / "labels.csv").write_text("filename,label\n" + "".join(rows))
    assert classes(tmp_path) == {"a": 2, "b": 2}


def test_a_table_inside_of_a_split(tmp_path):
    for split in ("train", "test"):
        save(*(tmp_path / split / f"{n}.jpg" for n in range(4)))
        rows = "".join(f"{n}.jpg,{'ab'[n % 2]}\n" for n in range(4))
        (tmp_path / split / "metadata.csv").write_text(f"file_name,label\n{rows}")
    assert classes(tmp_path) == {"a": 2, "b": 2}


def test_a_table_that_says_what_the_folders_say(tmp_path):
    tree(tmp_path / "train", ["fish", "star"])
    tree(tmp_path / "test", ["fish", "star"])
    names = [(split, name) for split in ("train", "test") for name in ("fish", "star")]
    rows = "".join(f"{split}/{name}/{n}.png,{name}\n" for split, name in names for n in range(2))
    (tmp_path / "all.csv").write_text(f"filepaths,labels\n{rows}")
    assert classes(tmp_path) == {"fish": 2, "star": 2}


def test_tables_about_something_else_are_no_labels(tmp_path):
    tree(tmp_path, ["fish", "star"])
    (tmp_path / "prices.csv").write_text("label,price\nfish,3\n")
    (tmp_path / "people.csv").write_text("file,label\nletter.doc,Ada\nother.doc,Ada\n")
    (tmp_path / "broken.csv").write_bytes(b"\xff\xfe\x00\x01 file,label\n\x00")
    (tmp_path / "empty.csv").write_text("")
    assert classes(tmp_path) == {"fish": 2, "star": 2}
    save(*(tmp_path / "few" / f"{n}.png" for n in range(3)))
    captions = "file_name,text\n0.png,A fish.\n1.png,A star.\n2.png,Another star.\n"
    (tmp_path / "few" / "metadata.csv").write_text(captions)
    assert classes(tmp_path / "few") == {"few": 3}


def test_of_a_table_of_all_pictures_the_rows_of_those_here_count(tmp_path, capsys):
    save(*(tmp_path / "train" / f"{n}.jpg" for n in range(3)))
    rows = "".join(f"{split}/{n}.jpg,{split} me\n" for n in range(3) for split in ("train", "test"))
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    assert classes(tmp_path) == {"train me": 3}  # not "test me", by the last parts of the names
    assert "3 rows of labels.csv that name no picture" in capsys.readouterr().err
    save(tmp_path / "test" / "0.jpg")
    assert classes(tmp_path) == {"train me": 3}
    assert "1 pictures that labels.csv labels, but not for training" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "labels.csv").write_text("file,label\na/0.jpg,x\nb/0.jpg,y\n1.jpg,x\n2.jpg,x\n")
    with pytest.raises(UserError, match="gives train.0.jpg two labels"):
        load_images(tmp_path, 16)


def test_a_table_of_unknown_columns_is_named(tmp_path, capsys):
    save(*(tmp_path / "train" / f"{n}.jpg" for n in range(3)), tmp_path / "test" / "0.jpg")
    (tmp_path / "train.csv").write_text("picture,animal,age\n0.jpg,fish,3\n")
    assert classes(tmp_path) == {"train": 3}
    line = capsys.readouterr().err
    assert "table (train.csv, which lacks columns such as filename and label)" in line
    (tmp_path / "train.csv").write_text("id,species\n100,fish\n")
    assert classes(tmp_path) == {"train": 3}
    assert "1 unused table (train.csv)" in capsys.readouterr().err


def test_what_a_table_says_of_pictures_that_are_not_here(tmp_path, capsys):
    kaggle(tmp_path, ["a", "b", "a"], test=3)
    (tmp_path / "train" / "2.jpg").unlink()  # but test/2.jpg is there
    (tmp_path / "test.csv").write_text("filename,label\n0.jpg,x\n")
    rows = (tmp_path / "Training_set.csv").read_text().partition("\n")[2]
    (tmp_path / "Training_set.csv").unlink()
    (tmp_path / "train_val.csv").write_text(f"filename,label\n.,a\n{rows}")  # SAS's missing value
    assert classes(tmp_path) == {"a": 1, "b": 1}
    assert "1 rows of train_val.csv that name no picture" in capsys.readouterr().err


def test_a_table_of_pictures_in_a_folder_of_each_split(tmp_path):
    save(
        *(tmp_path / split / "images" / f"{n}.jpg" for split in ("train", "test") for n in range(2))
    )
    rows = "".join(f"{s}/images/{n}.jpg,{'ab'[n]}\n" for s in ("train", "test") for n in range(2))
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    assert classes(tmp_path) == {"a": 1, "b": 1}


def test_a_table_beside_pictures_without_endings_changes_nothing(tmp_path):
    tree(tmp_path, ["fish", "star"])
    for path in list(tmp_path.rglob("*.png")):
        path.rename(path.with_suffix(""))
    (tmp_path / "labels.csv").write_text("file,label\nx,fish\n")
    assert classes(tmp_path) == {"fish": 2, "star": 2}


def test_class_folders_outweigh_tables_about_other_things(tmp_path):
    tree(tmp_path, ["Golden_Retriever", "wren"], files=["1.png", "2.png"])
    save(tmp_path / "wren" / "3.png")
    for name, text in {
        "classes.csv": "id,species\n1,robin\n2,wren\n3,finch\n",
        "boxes.csv": "file,label,left\nwren/1.png,eye,3\nwren/1.png,tail,3\n"
        "Golden_Retriever/2.png,Golden Retriever,3\n",
        "names.csv": "file,label\nGolden_Retriever/1.png,golden retriever\nwren/1.png,Wren\n",
    }.items():
        (tmp_path / name).write_text(text)
        assert classes(tmp_path) == {"Golden_Retriever": 2, "wren": 3}, name
        (tmp_path / name).unlink()


@pytest.mark.parametrize("before", ["/home/me/fish/", "C:\\fish\\", "my_pictures/train/"])
def test_a_table_may_name_pictures_by_where_they_once_were(tmp_path, before):
    save(*(tmp_path / f"{n}.png" for n in range(3)))
    rows = "".join(f"{before}{n}.png,{'ab'[n % 2]}\n" for n in range(3))
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    assert classes(tmp_path) == {"a": 2, "b": 1}


def test_a_table_that_names_none_of_the_loose_pictures_is_refused(tmp_path):
    save(*(tmp_path / f"{n}.png" for n in range(3)))
    (tmp_path / "labels.csv").write_text("file,label\nx.png,a\ny.png,b\n")
    with pytest.raises(UserError, match="labels.csv labels x.png and others, but none"):
        load_images(tmp_path, 16)


def test_labels_that_do_not_cover_the_pictures_are_refused(tmp_path):
    kaggle(tmp_path, ["a", "b", "a"])
    save(tmp_path / "train" / "new.jpg")
    with pytest.raises(UserError, match="labels 3 pictures, and 1 .* no label, such as new.jpg"):
        load_images(tmp_path, 16)


def test_two_readings_are_refused_with_both_named(tmp_path):
    tree(tmp_path, ["one", "two"])
    rows = "one/0.png,a\none/1.png,b\ntwo/0.png,a\ntwo/1.png,b\n"
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    line = refused("train.py", *SMALL, "--dataset", tmp_path, "--out-dir", "o", cwd=tmp_path)
    assert "folders of pictures" in line and "labels.csv" in line
    (tmp_path / "more.csv").write_text(f"file,label\n{rows}")
    with pytest.raises(UserError, match="several tables of labels .labels.csv, more.csv."):
        load_images(tmp_path, 16)


def test_rows_without_a_picture_are_counted(tmp_path, capsys):
    kaggle(tmp_path, ["a", "b", "a"])
    with open(tmp_path / "Training_set.csv", "a") as table:
        table.write("gone.jpg,a\n")
    assert classes(tmp_path) == {"a": 2, "b": 1}
    assert "1 rows of Training_set.csv that name no picture" in capsys.readouterr().err


def test_a_table_of_all_splits_is_taken_for_train(tmp_path):
    save(*(tmp_path / split / f"{split}{n}.jpg" for split in ("Train", "Test") for n in range(2)))
    rows = "".join(f"{s}/{s}{n}.jpg,{'ab'[n]}\n" for s in ("Train", "Test") for n in range(2))
    (tmp_path / "labels.csv").write_text(f"path,label\n{rows}")
    assert classes(tmp_path) == {"a": 1, "b": 1}


def test_the_same_names_in_two_splits(tmp_path):
    folder = tmp_path / "train" / "birds"  # whose own path has a "train" in it
    kaggle(folder, ["a", "b", "a"], test=3)
    assert classes(folder) == {"a": 2, "b": 1}


def test_tables_that_a_spreadsheet_wrote_or_that_are_hidden(tmp_path):
    save(*(tmp_path / f"{n}.jpg" for n in range(3)))
    (tmp_path / "Labels.CSV").write_bytes(
        "file;label\n0.jpg;é\n1.jpg;b\n2.jpg;é\n".encode("cp1252")
    )
    (tmp_path / "._labels.csv").write_text("file,label\n0.jpg,x\n")
    assert classes(tmp_path) == {"b": 1, "é": 2}


def test_two_labels_for_one_picture_are_refused(tmp_path):
    save(tmp_path / "0.jpg", tmp_path / "1.jpg")
    (tmp_path / "labels.csv").write_text("file,label\n0.jpg,a\n1.jpg,b\n0.jpg,b\n")
    with pytest.raises(UserError, match="gives 0.jpg two labels"):
        load_images(tmp_path, 16)


def test_two_tables_for_training_are_refused(tmp_path):
    save(tmp_path / "0.jpg", tmp_path / "1.jpg")
    for name in ("train.csv", "train_labels.csv"):
        (tmp_path / name).write_text("file,label\n0.jpg,a\n1.jpg,b\n")
    with pytest.raises(UserError, match="several tables"):
        load_images(tmp_path, 16)


# Formats


@pytest.mark.parametrize("name", "jfif jpe avif jp2 j2k tga ppm bmp dib ico pcx qoi sgi".split())
def test_whatever_pillow_opens_is_read(tmp_path, name):
    if f".{name}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow has no {name}")
    (tmp_path / "class").mkdir()
    try:
        Image.new("RGB", (40, 40), (120, 40, 200)).save(tmp_path / "class" / f"0.{name}")
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {name}")
    images, _, _ = load_images(tmp_path, 16)
    assert (images[0].float().mean((1, 2)) - torch.tensor([120.0, 40, 200])).abs().max() < 6


def test_the_content_counts_and_not_the_ending(tmp_path):
    save(tmp_path / "class" / "0.png", tmp_path / "class" / "1.jpg")
    (tmp_path / "class" / "0.png").rename(tmp_path / "class" / "0.jpg")
    (tmp_path / "class" / "1.jpg").rename(tmp_path / "class" / "download")
    assert classes(tmp_path) == {"class": 2}


def test_endings_that_are_no_pictures_are_counted(tmp_path, capsys):
    save(tmp_path / "class" / "0.png")
    for name in ("a.txt", "b.txt", "c.HEIC", "d.svg", "e"):
        (tmp_path / "class" / name).write_bytes(b"\x00\x00\x00 ftypnothing")
    assert classes(tmp_path) == {"class": 1}
    line = capsys.readouterr().err
    for text in ("2 .txt", "1 .heic (readable after pip install pillow-heif)", "1 .svg"):
        assert text in line
    assert "1 without a suffix" in line and line.count("passed over") == 1


def grey(tmp_path, name, values, mode):
    """The grey levels, from 0 to 255, at which a picture of two halves is read."""
    halves = np.repeat(np.array([values]), 40, axis=0).repeat(20, axis=1)
    (tmp_path / "class").mkdir(exist_ok=True)
    if mode == "pgm":
        content = b"P5 40 40 65535\n" + halves.astype(">u2").tobytes()
        (tmp_path / "class" / name).write_bytes(content)
    elif mode == "I;16B":
        Image.frombytes(mode, (40, 40), halves.astype(">u2").tobytes()).save(
            tmp_path / "class" / name
        )
    else:
        Image.fromarray(halves.astype(mode)).save(tmp_path / "class" / name)
    picture = load_images(tmp_path, 16)[0][0].float()
    assert (picture[0] - picture[1]).abs().max() == 0
    return round(picture[0, 8, 2].item()), round(picture[0, 8, 13].item())


@pytest.mark.parametrize(
    "name, values, mode, expected",
    [
        ("deep.png", (0, 65535), "uint16", (0, 255)),
        ("dark.png", (0, 200), "uint16", (0, 1)),  # of 65,535: nearly black, as it is shown
        ("deep.tif", (16448, 49344), "uint16", (64, 192)),
        ("big-endian.tif", (16448, 49344), "I;16B", (64, 192)),
        ("deep.pgm", (16448, 49344), "pgm", (64, 192)),
        ("dark.pgm", (0, 200), "pgm", (0, 1)),
        ("bytes.tif", (64, 192), "int32", (64, 192)),
        ("words.tif", (16448, 49344), "int32", (64, 192)),
        ("wide.tif", (-100000, 300000), "int32", (0, 255)),
        ("unit.tif", (0.25, 0.75), "float32", (64, 191)),
        ("overshoot.tif", (-0.02, 1.03), "float32", (0, 255)),
        ("float.tif", (64, 192), "float32", (64, 192)),
        ("heights.tif", (-12.5, 8848.5), "float32", (0, 255)),
        ("flat.tif", (-3, -3), "float32", (0, 0)),
    ],
)
def test_grey_of_16_and_32_bits_is_what_it_shows(tmp_path, name, values, mode, expected):
    assert grey(tmp_path, name, values, mode) == pytest.approx(expected, abs=1)


def test_not_a_number_in_a_float_picture_is_black(tmp_path):
    values = np.full((40, 40), 0.5, "float32")
    values[:, :20] = np.nan
    (tmp_path / "class").mkdir()
    Image.fromarray(values).save(tmp_path / "class" / "0.tif")
    picture = load_images(tmp_path, 16)[0][0]
    assert picture[0, 8, 2] == 0 and picture[0, 8, 13] == 128


def test_a_reduced_jpeg_looks_as_the_whole_one_does(tmp_path):
    waves = 128 + 100 * np.sin(np.arange(160) / 6)[None].repeat(120, axis=0)
    image = Image.fromarray(np.stack([waves, waves[:, ::-1], waves * 0 + 90], -1).astype("uint8"))
    for name in ("class/0.jpg", "whole/0.png"):
        (tmp_path / name).parent.mkdir()
        exif = Image.Exif()
        exif[0x0112] = 6  # turned, which must hold for the reduced picture as well
        image.save(tmp_path / name, exif=exif, quality=95)
    images, _, _ = load_images(tmp_path, 16)
    assert (images[0].float() - images[1].float()).abs().max() < 4


MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from data.images import load_images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_images(sys.argv[2], 64)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does, in kilobytes")
def test_a_photograph_of_80_megapixels_does_not_fill_the_memory(tmp_path):
    (tmp_path / "class").mkdir()
    Image.new("RGB", (10000, 8000), (120, 40, 200)).save(tmp_path / "class" / "0.jpg")
    command = [sys.executable, "-c", MEMORY, ROOT, tmp_path]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(out.split()[-1]) < 100  # megabytes; decoded as a whole it would be 229


# Held-out pictures


def test_a_twentieth_in_all_is_held_out():
    labels = torch.arange(20).repeat_interleave(5)
    assert held_out(labels).sum() == 5  # and not one of each class
    labels = torch.arange(75).repeat_interleave(55)
    mask = held_out(labels)
    assert 0.045 < mask.float().mean() < 0.055
    assert all(mask[labels == label].any() for label in range(75))


@pytest.mark.parametrize("each", [1, 2, 3])
def test_classes_of_up_to_three_keep_theirs(each):
    assert not held_out(torch.arange(20).repeat_interleave(each)).any()


def test_four_pictures_have_one_held_out():
    assert held_out(torch.zeros(4, dtype=torch.int64)).tolist() == [True, False, False, False]


def test_resume_says_that_pictures_were_added(pictures, trained, tmp_path):
    shutil.copytree(pictures, tmp_path / "pictures")
    shutil.copytree(trained / "out", tmp_path / "out")
    resume = ["--resume", "--dataset", "pictures", "--steps"]
    _, err = call("train.py", *resume, 31, cwd=tmp_path)
    assert "warning" not in err
    name = sorted(path.name for path in pictures.iterdir())[0]
    save(tmp_path / "pictures" / name / "new.png")
    _, err = call("train.py", *resume, 32, cwd=tmp_path)
    assert "21 pictures have become 22 since the run began" in err
    _, err = call("train.py", *resume, 33, cwd=tmp_path)
    assert "warning" not in err  # it was said once
