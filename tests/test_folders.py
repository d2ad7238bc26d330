"""Folders as people have them: which pictures are taken, as which class, and what is said of it."""

from support.settings import UserError

import pytest
import torch
from helpers import FEW, call, refused, save, solid, state

from data.folders import TEST, find_pictures, named
from data.images import load_dataset, load_images


def make(folder, *names):
    """A small picture of each name; an empty file for other endings than .png and .jpg."""
    for name in names:
        path = folder / name
        if path.suffix in (".png", ".jpg"):
            save(solid(size=(4, 4)), path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")


def tree(*folders, files=("0.png", "1.png")):
    """The names of two pictures in each of the folders."""
    return [f"{folder}/{file}" for folder in folders for file in files]


def counts(folder):
    """{class: number of its pictures} of a folder, and {what was passed over: number}."""
    classes, passed_over = find_pictures(folder)
    return {name: len(paths) for name, paths in classes.items()}, dict(+passed_over)


FISH_STAR = {"fish": 2, "star": 2}
PETS = tree("Pets/fish", "Pets/star")

# what the folder "root" holds -> its classes
LAYOUTS = {
    "a folder a class": (tree("fish", "star"), FISH_STAR),
    "one class folder": (tree("fish"), {"fish": 2}),
    "pictures in deeper folders": (tree("fish", "star/old/er"), FISH_STAR),
    "loose pictures": (["0.png", "1.jpg"], {"root": 2}),
    "one picture": (["0.png"], {"root": 1}),
    "classes whose names contain a split's": (
        tree("steam_train", "devon", "contest"),
        {"contest": 2, "devon": 2, "steam_train": 2},
    ),
    "train as a class": (tree("train", "boat"), {"boat": 2, "train": 2}),
    "train as a class of each split": (
        tree("train/train", "train/boat", "test/train", "test/boat"),
        {"boat": 2, "train": 2},
    ),
    "train alone": (tree("train/fish", "train/star"), FISH_STAR),
    "a wrapper": (PETS, FISH_STAR),
    "wrappers in a wrapper": (tree("a/images/all/fish", "a/images/all/star"), FISH_STAR),
    "a banner beside splits": (["banner.png", *tree("train/fish", "train/star", "val")], FISH_STAR),
    "documents beside class folders": (["meta/classes.txt", *tree("fish", "star")], FISH_STAR),
    "documents beside a wrapper": (["meta/classes.txt", "README.md", *PETS], FISH_STAR),
    "a wrapper of splits": (tree("a/train/fish", "a/train/star", "a/test/fish"), FISH_STAR),
    "splits of loose pictures": (tree("train", "val"), {"train": 2}),
    "splits inside of the classes": (
        tree("fish/train", "fish/test", "star/train", "star/test"),
        FISH_STAR,
    ),
    "hidden folders and what systems leave": (
        tree("fish", "star", ".cache", ".git/x", "__MACOSX", "fish/@eaDir", "$RECYCLE.BIN")
        + [
            "._banner.png",
            "fish/.0.png",
            "lost+found/0.png",
            "#recycle/cat/0.png",
            "@Recycle/0.png",
        ],
        FISH_STAR,
    ),
    "classes called like splits and masks among many": (
        tree("bullet_train", "gas_mask", "mask", "label", "zebra", "yak"),
        dict.fromkeys(("bullet_train", "gas_mask", "mask", "label", "zebra", "yak"), 2),
    ),
    "folders that Windows has looked into": (
        ["Thumbs.db", "empty/desktop.ini", "fish/Thumbs.db", *tree("fish", "star")],
        FISH_STAR,
    ),
    "the same folder in each class": (tree("fish/old", "star/old"), FISH_STAR),
    "a class inside of another, and one of its own name": (
        tree("fish/star", "star/star", "shell"),
        {"fish": 2, "shell": 2, "star": 2},
    ),
    "train beside masks": (tree("train", "train_masks"), {"train": 2}),
    "a run called like a split": (["out/test/model.safetensors", *tree("fish", "star")], FISH_STAR),
    "an animation": (["samples/class-3-seed-0.gif", *tree("fish", "star")], FISH_STAR),
    "a run": (["out/model.safetensors", "out/samples/a.png", *tree("fish", "star")], FISH_STAR),
    "a run that has just begun": (["out/.gitignore", *tree("fish", "star")], FISH_STAR),
    "grids": (
        ["samples/class-3-seed-0.png", "out/samples/step-000250.png", *tree("fish", "star")],
        FISH_STAR,
    ),
    "classes with a folder called samples": (tree("fish/samples", "star/samples"), FISH_STAR),
    "capital endings": (["fish/0.HEIC", "fish/1.PNG", "star/0.Jpeg"], {"fish": 2, "star": 1}),
    "rarer endings": (["fish/0.tga", "fish/1.psd", "star/0.dds", "star/1.qoi"], FISH_STAR),
    "an archive": (["old.tar", *tree("fish", "star")], FISH_STAR),
    "numbers beside pictures": (["features.h5", *tree("fish", "star")], FISH_STAR),
}
for train, test in (
    ("train", "test"),
    ("Train", "Valid"),
    ("training", "validation"),
    ("Train_Set", "test_set"),
    ("trainset", "valset"),
    ("train", "test_set"),
    ("train2017", "val2017"),
    ("seg_train", "seg_test"),
    ("train_images", "test_images"),
    ("TRAIN", "dev"),
    ("train", "test_images"),
    ("trainval", "test1"),
    ("train", "holdout"),
    ("train", "validate"),
    ("train", "test_stg1"),
    ("TrainImages", "TestImages"),
    ("trainingdata", "testdata"),
    ("Training", "PublicTest"),
):
    names = [f"{split}/{name}" for split in (train, test) for name in ("fish", "star")]
    LAYOUTS[f"{train} beside {test}"] = (tree(*names, f"{test}/only here", "extra/x"), FISH_STAR)
    nested = tree(f"{train}/{train}/fish", f"{train}/{train}/star", f"{test}/{test}/fish")
    LAYOUTS[f"{train} in {train}"] = (nested, FISH_STAR)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_as_its_owner_means_it(tmp_path, layout):
    files, classes = LAYOUTS[layout]
    make(tmp_path / "root", *files)
    found, passed_over = counts(tmp_path / "root")
    assert found == classes and list(found) == sorted(found)
    # Whatever is left out is counted, except for what is hidden or made by a run.
    seen = [
        name for name in files if not any(word in name for word in ("/.", "__", "@", "#", "$", "+"))
    ]
    seen = [name for name in seen if not name.startswith((".", "out/", "samples/"))]
    assert sum(found.values()) + sum(passed_over.values()) == len(seen)


# words of the error -> what the folder "root" holds
REFUSED = {
    "root has pictures beside edited/: put them": "0.png 1.png edited/0.png",
    "root has pictures beside a/: put them": "0.png 1.png a/0.png b/0.png",
    "root has pictures beside Pets": "banner.png Pets/fish/0.png Pets/star/0.png",
    "fish has pictures beside old": "fish/0.png fish/1.png fish/old/0.png",
    "Pets has the folders beside it a second time": (
        "fish/0.png star/0.png Pets/fish/0.png Pets/star/0.png"
    ),
    "test_images is no class": "fish/0.png star/0.png test_images/0.png",
    "holdout is no class": "fish/0.png star/0.png holdout/0.png",
    "test1 is no class": "test1/fish/0.png",
    "testA is no class": "trainA/0.png trainB/0.png testA/0.png testB/0.png",
    "val is no class": "fish/0.png fish/val/1.png",
    "masks is no class": "images/0.png masks/0.png",
    "GT is no class": "images/0.png GT/0.png",
    "test is no class": "test/0.png " + " ".join(f"{n}/0.png train/0.png" for n in "abcde"),
    "annotations is no class": "images/0.png annotations/trimaps/0.png",
    "cannot read 0.cr2 in .*fish": "fish/0.cr2 fish/1.cr2 star/0.png",
    "cannot read x in .*fish": "fish/x star/0.png shell/0.png",
    "cannot read a.npy in .*scans": "images/0.png scans/a.npy",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_folder_with_two_readings_is_refused(tmp_path, words):
    make(tmp_path / "root", *REFUSED[words].split())
    with pytest.raises(UserError, match=words):
        find_pictures(tmp_path / "root")


def test_what_is_left_out_is_counted_by_kind(tmp_path):
    make(tmp_path, *tree("train/fish", "train/star", "test/fish", "extra"), "banner.jpg")
    make(tmp_path, "train/a.TXT", "train/fish/b.txt", "c", "labels.csv")
    expected = {"in test": 2, "in extra": 2, ".jpg": 1, ".txt": 2, "without an ending": 1}
    assert counts(tmp_path)[1] == {**expected, ".csv": 1}


def test_links_are_followed_and_circles_are_not(tmp_path):
    make(tmp_path / "elsewhere", *tree("fish", "star/old"))
    (tmp_path / "d").mkdir()
    for name in ("fish", "star"):
        (tmp_path / "d" / name).symlink_to(tmp_path / "elsewhere" / name)
    for name in ("again", "and_again"):  # two of them: without an end, 2^40 paths
        (tmp_path / "elsewhere" / "star" / name).symlink_to(tmp_path / "elsewhere" / "star")
        (tmp_path / "elsewhere" / name).symlink_to(tmp_path / "elsewhere")
    assert counts(tmp_path / "d")[0] == FISH_STAR
    assert set(counts(tmp_path / "elsewhere")[0]) >= {"fish", "star"}


def test_the_order_is_that_of_the_names_whatever_the_disk_says(tmp_path, monkeypatch):
    names = ["b/10.png", "b/9.png", "a/B.png", "a/a.png", "a/b/c.png", "Ünï 蝶/0.png"]
    make(tmp_path, *names)
    listed = type(tmp_path).iterdir
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: reversed(list(listed(self))))
    classes, _ = find_pictures(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for paths in classes.values() for path in paths]
    assert found == ["a/B.png", "a/a.png", "a/b/c.png", "b/10.png", "b/9.png", "Ünï 蝶/0.png"]


def test_training_in_the_folder_of_the_pictures(tmp_path):
    make(tmp_path, *tree("fish", "star", files=[f"{n}.png" for n in range(4)]))
    few = [*FEW, "--steps", 2, "--sample-every", 1]
    call("train", *few, "--dataset", ".", cwd=tmp_path)
    call("sample", "--steps", 2, cwd=tmp_path)
    (tmp_path / "out" / "train_state.pt").unlink()  # as if it was killed before it was written
    out, _ = call("train", *few, "--dataset", ".", "--overwrite", cwd=tmp_path)
    assert "8 pictures" in out
    assert state(tmp_path / "out")["class_names"] == ["fish", "star"]


def test_classes_are_sorted_and_labels_follow(tmp_path):
    for name, value in (("b two", 20), ("A", 10), ("c", 30), ("Ünï 蝶", 40)):
        for n in (2, 1):
            save(solid("L", value + n), tmp_path / name / "deeper" / f"{n}.png")
    images, labels, names = load_images(tmp_path, 16)
    assert names == ["A", "b two", "c", "Ünï 蝶"]
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and labels.dtype == torch.int64
    assert images[:, 0, 0, 0].tolist() == [11, 12, 21, 22, 31, 32, 41, 42]


def test_a_class_of_which_no_picture_can_be_read_is_named(tmp_path):
    save(solid(), tmp_path / "full" / "1.png")
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match='no pictures of class "void"'):
        load_images(tmp_path, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        load_images(tmp_path / "empty", 16)


NOWHERE = ["no", "./no", "/no/no", "a/b/c", "a b/c", "ü/x", "~no/x"]


@pytest.mark.parametrize("name", NOWHERE)
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path, name):
    line = refused("train", *FEW, "--dataset", name, cwd=tmp_path)
    assert f'no such folder: "{name}"' in line


def test_a_folder_may_be_named_from_the_home_folder(tmp_path, monkeypatch):
    make(tmp_path, "fish/0.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load_dataset("~/fish", 16)[2] == ["fish"]


def test_an_archive_has_to_be_unpacked(tmp_path):
    for name in ("d.zip", "d.tar.gz", "d.rar"):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(UserError, match=f'{name}" .if it is an archive, unpack it'):
            load_dataset(str(tmp_path / name), 16)


# Labels in a table


def kaggle(folder, *labels):
    """train/ with a picture for each label, test/ with one, and a table for each."""
    make(folder, *(f"train/{n}.jpg" for n in range(len(labels))), *tree("test", files=["0.jpg"]))
    rows = "".join(f"{n}.jpg,{label}\n" for n, label in enumerate(labels))
    (folder / "Training_set.csv").write_text(f"filename,label\n{rows}")
    (folder / "Testing_set.csv").write_text("filename\n0.jpg\n1.jpg\n")


def test_the_table_of_a_kaggle_set_labels_the_pictures_in_train(tmp_path, capsys):
    kaggle(tmp_path, "RED ADMIRAL", "MONARCH", "MONARCH")
    classes, passed_over = find_pictures(tmp_path)
    names = {name: [path.name for path in paths] for name, paths in classes.items()}
    assert names == {"MONARCH": ["1.jpg", "2.jpg"], "RED ADMIRAL": ["0.jpg"]}
    assert list(names) == sorted(names)
    assert f"labels as in {tmp_path / 'Training_set.csv'}" in capsys.readouterr().out
    assert dict(+passed_over) == {"in test": 1, ".csv": 2}


READABLE = [
    "file_name,label\n0.jpg,a\n1.jpg,b\n2.jpg,a\n",  # Hugging Face's metadata.csv
    "\ufefffile_name;class\r\n0.jpg;a\r\n1.jpg;b\r\n2.jpg;a\r\n",  # a spreadsheet's
    "label,width,File Name\na,40,0.jpg\nb,40,1.jpg\na,40,2.jpg\n",
    "image_path\tlabel\n0.jpg\ta\n1.jpg\tb\n2.jpg\ta\n",
    "id,dx\n0,a\n1,b\n2,a\n",  # names without their ending, and a diagnosis
    '"path","category"\n"./0.jpg","a"\n"1.jpg","b, or c"\n"2.jpg","a"\n',
    "id,species,filepath\n7,a,.\\0.jpg\n8,b,images/1.JPG\n9,a,IMAGES\\2.jpg\n",
    "filename,label\n0.jpg,a\n1.jpg,b\n2.jpg,a\n0.jpg,a\n",  # a row twice
    "filename,label\n0.jpg,a\n\n1.jpg,b\n2.jpg,a,more\n3.jpg\n",  # short and long rows
    "id,species,photo\n2,a,0.jpg\n0,b,1.jpg\n1,a,2.jpg\n",  # ids that look like names
    ",fname,label\n0,0.jpg,a\n1,1.jpg,b\n2,2.jpg,a\n",  # pandas' index
    "file,label\nC:\\me\\0.jpg,a\n/home/me/1.png,b\n2,a\n",  # of other machines, and endings
]


@pytest.mark.parametrize("text", READABLE)
@pytest.mark.parametrize("place", ["metadata.csv", "../labels.tsv", "train.csv"])
def test_tables_in_other_words_and_places(tmp_path, text, place):
    make(tmp_path / "images", *(f"{n}.jpg" for n in range(3)))
    (tmp_path / "images" / place).write_text(text, "utf-8", newline="")
    (tmp_path / "test.csv").write_text("filename,label\n0.jpg,z\n1.jpg,z\n2.jpg,z\n")
    found, _ = counts(tmp_path)
    assert found in ({"a": 2, "b": 1}, {"a": 2, "b, or c": 1})


# What a file beside the folders fish and star, of the pictures 0, 1 and 2, 3, holds.
BESIDE = [
    ("labels.csv", "file,label\n0.png,a\n1.png,a\n2.png,b\n3.png,b\n"),  # in other words
    ("boxes.csv", "file,x,y\n0.png,5,6\n1.png,5,6\n"),  # no labels
    ("species.csv", "label,size\nfish,5\nstar,6\n"),  # no pictures
    ("broken.csv", "file,label\n\0\udcff"),
    ("quotes.csv", 'file,words\n0.png,"not closed\n' + "1.png,and so on\n" * 10_000),
    ("test_labels.csv", "file,label\n0.png,a\n2.png,a\n"),
    ("sampleSubmission.csv", "file,label\n0.png,a\n2.png,a\n"),
    ("classes.json", '{"fish": 0, "star": 1}'),
    ("ids.json", '{"0": "fish", "1": "star"}'),
]


@pytest.mark.parametrize("name, text", BESIDE)
def test_folders_win_over_a_file_beside_them(tmp_path, name, text):
    make(tmp_path, "fish/0.png", "fish/1.png", "star/2.png", "star/3.png")
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert counts(tmp_path)[0] == FISH_STAR


CONTRADICTING = [
    (
        "labels.csv",
        "file,label\n0.png,a\n1.png,b\n2.png,a\n3.png,b\n",
        "disagrees with the folders",
    ),
    (
        "labels.csv",
        "file,label\n0.png,a\n1.png,a\n2.png,a\n3.png,a\n",
        "disagrees with the folders",
    ),
    ("labels.csv", "file,label\n/x/0.jpg,a\n/x/2.jpg,a\n/x/1,b\n/x/3,b\n", "or their folders"),
    ("labels.csv", "file,label\n0.png,a\n1.png,b\n", "the label of .*2.png is missing"),
    ("labels.csv", "file,label,split\n0.png,a,train\n1.png,b,test\n", "marks tests"),
    ("dataset.json", '{"labels": [["fish/0.png", 6], ["star/3.png", 9]]}', "read from CSV"),
    ("metadata.jsonl", '{"file_name": "0.png"}\n{"file_name": "2.png"}\n', "read from CSV"),
]


@pytest.mark.parametrize("name, text, words", CONTRADICTING)
def test_a_file_that_contradicts_the_folders_is_refused(tmp_path, name, text, words):
    make(tmp_path, "fish/0.png", "fish/1.png", "star/2.png", "star/3.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        find_pictures(tmp_path)


ALL = ["train/fish/0.png", "train/fish/1.png", "train/star/0.png", "train/star/1.png"]
ALL += ["valid/fish/0.png", "valid/star/0.png"]


def test_names_that_repeat_count_with_their_folders(tmp_path):
    make(tmp_path, *ALL)
    rows = "".join(f"{name},{name.split('/')[1]},{name.split('/')[0]}\n" for name in ALL)
    (tmp_path / "all.csv").write_text(f"filepaths,labels,data set\n{rows}")
    assert counts(tmp_path)[0] == FISH_STAR
    (tmp_path / "all.csv").write_text(f"filepaths,labels\n{rows.replace('star,train', 'fish,x')}")
    with pytest.raises(UserError, match="disagrees with the folders"):
        find_pictures(tmp_path)
    (tmp_path / "all.csv").unlink()
    (tmp_path / "set.json").write_text('[["fish/0.png", 1], ["star/0.png", 2]]')
    with pytest.raises(
        UserError, match="set.json names the pictures, but labels are read from CSV"
    ):
        find_pictures(tmp_path)


SPLIT = "file,label,{}\n0.jpg,a,{}\n1.jpg,b,{}\n2.jpg,a,{}\n"
OF_TESTING = "filename,label\n0.jpg,a\n1.jpg,a\n2.jpg,a\n"
BOTH = "id,like,species\n0.jpg,1.jpg,a\n1.jpg,2.jpg,b\n2.jpg,0.jpg,a\n"
NEEDED = "it needs columns filename and label"
# tables beside three loose pictures, what they hold, words of the error
TABLES = [
    ("labels.csv", "photo,species\n0.jpg,a\n2.jpg,a\n", "labels.csv: the label of .*1.jpg is m"),
    ("m.csv", "file_name,text\n0.jpg,A fish.\n", f"no labels in m.csv: {NEEDED}"),
    ("labels.csv", "filename,label\n", f"no labels in labels.csv: {NEEDED}"),  # no rows
    ("labels.csv", "", f"no labels in labels.csv: {NEEDED}"),
    ("labels.csv", "id,label\n7,a\n8,b\n", f"no labels in labels.csv: {NEEDED}"),
    ("test.csv", OF_TESTING, f"no labels in test.csv: {NEEDED}"),
    ("x.csv y.csv", OF_TESTING.replace("1.jpg,a", "1.jpg,"), "x.csv, y.csv: .*1.jpg is missing"),
    ("metadata.jsonl", '{"file_name": "0.jpg"}\n{"file_name": "1.jpg"}\n', "read from CSV"),
    ("labels.csv", "file,label\n0.jpg,\xe9\n1.jpg,a\n", "labels.csv: the label .*UTF-8"),
    ("labels.csv", "file,label\n0.jpg,\0中\n1.jpg,a\n".encode("utf-16").decode("latin-1"), NEEDED),
    ("labels.csv", "file,label\nx.jpg,a\n", f"no labels in labels.csv: {NEEDED}"),
    ("labels.csv", "file,label\n0.jpg,a\n1.jpg,\n2.jpg,b\n", "label of .*1.jpg is missing"),
    ("labels.csv", "file,label\n0.jpg,a\n0.jpg,b\n", "label of .*0.jpg is a and b"),
    ("labels.csv", "file,label\na/0.jpg,a\nb/0.jpg,b\n", "label of .*0.jpg is a and b"),
    ("labels.csv", BOTH, "label of .* is a and b"),  # two columns that may have names
    ("labels.csv", "file,label,species\n0.jpg,a,b\n", NEEDED),  # two of labels
    ("labels.csv", SPLIT.format("split", "train", "test", "train"), "column split marks tests"),
    ("labels.csv", SPLIT.format("Usage", "Training", "PublicTest", ""), "column Usage marks tests"),
    ("labels.csv", "image,label,rank\n001,cat,2\n002,dog,1\n", NEEDED),  # ranks are no names
    ("labels.csv", "file,label,label\n0.jpg,a,0\n1.jpg,b,0\n2.jpg,b,0\n", NEEDED),
    ("labels.csv", SPLIT.format("is_valid", "True", "False", "True"), "column is_valid marks"),
    ("labels.csv", SPLIT.format("isTrain", "1", "0", "1"), "column isTrain marks"),
]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_does_not_say_what_is_what_is_refused(tmp_path, table):
    names, text, words = table
    make(tmp_path, *(f"{n}.jpg" for n in range(3)))
    for name in names.split():
        (tmp_path / name).write_text(text, "latin-1")
    with pytest.raises(UserError, match=words):
        find_pictures(tmp_path)


def test_names_without_ending_may_be_in_any_column(tmp_path):
    make(tmp_path, "part 1/isic_1.jpg", "part 1/isic_2.jpg", "part 2/isic_3.jpg")
    table = tmp_path / "labels.csv"
    table.write_text(",lesion,image,label\n0,9,ISIC_1,a\n1,8,ISIC_2,b\n2,7,ISIC_3,a\n")
    with pytest.raises(UserError, match="disagrees with the folders: remove it"):
        find_pictures(tmp_path)
    for path in sorted(tmp_path.rglob("*.jpg")):
        path.rename(tmp_path / path.name)
    for folder in ("part 1", "part 2"):
        (tmp_path / folder).rmdir()
    assert counts(tmp_path)[0] == {"a": 2, "b": 1}


def test_a_table_of_a_single_picture(tmp_path):
    make(tmp_path, "0.jpg")
    (tmp_path / "labels.csv").write_text("file,label\n0.jpg,a\n")
    assert counts(tmp_path)[0] == {"a": 1}


def test_a_sidecar_of_each_picture_is_no_table(tmp_path):
    make(tmp_path, *tree("fish", "star"))
    for path in sorted(tmp_path.rglob("*.png")):
        path.with_name(f"{path.name}.json").write_text(f'{{"title": "{path.name}"}}')
    assert counts(tmp_path) == (FISH_STAR, {".json": 4})


def test_a_heic_that_a_table_names_is_said_to_need_a_plug_in(tmp_path, capsys):
    make(tmp_path, "0.heic", "1.png")
    (tmp_path / "labels.csv").write_text("file,label\n0.heic,a\n1.png,a\n")
    assert counts(tmp_path)[0] == {"a": 2}
    assert len(load_images(tmp_path, 16)[0]) == 1
    err = capsys.readouterr().err
    assert "0.heic" in err and "pip install pillow-heif" in err


@pytest.mark.parametrize(
    "name", ["strain", "contest", "value", "Devon", "Testament", "birds", "hand-held computer"]
)
def test_words_that_contain_a_split_are_none(name):
    assert not named(TEST, name)
