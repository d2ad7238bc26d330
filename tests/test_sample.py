"""sample.py as a user calls it: pictures, names, files, and refusals."""

import shutil
import sys
import types
from pathlib import Path

from support.settings import UserError

import pytest
import torch
from helpers import call, opened, refused
from PIL import Image

import sample
from model import DiT
from sample import find_class, folder_name, generate, generate_states, to_grid, to_uint8

NAMES = ["blue-plain-pointed", "red-eyes-pointed", "yellow-spots-tailed"]
FEW = ["--steps", 3, "--device", "cpu"]


# What is drawn


def test_a_class_id_gives_one_png_of_four_and_prints_its_path(trained):
    out, _ = call("sample", "--class-id", 2, *FEW, cwd=trained)
    path = out.strip()
    assert path.endswith(".png")
    assert opened(trained / path).size == (4 * 18 + 2, 18 + 2)  # 16 pixels and a margin each


def test_without_a_class_one_picture_of_each(trained, tmp_path):
    out, _ = call("sample", *FEW, "--output", tmp_path / "deep" / "all.png", cwd=trained)
    assert out.strip() == str(tmp_path / "deep" / "all.png")
    assert opened(out.strip()).size == (3 * 18 + 2, 18 + 2)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["all.png"]


def test_rows_are_classes_and_a_class_given_twice_has_one(trained, tmp_path):
    flags = ["--class-id", 2, 0, 2, "--num-images", 5, "--output", tmp_path / "rows.png"]
    call("sample", *flags, *FEW, cwd=trained)
    assert opened(tmp_path / "rows.png").size == (5 * 18 + 2, 2 * 18 + 2)
    # A single class of many is no row of many pictures, but a block.
    flags = ["--class-id", 2, "--num-images", 13, "--output", tmp_path / "block.png"]
    call("sample", *flags, *FEW, cwd=trained)
    assert opened(tmp_path / "block.png").size == (7 * 18 + 2, 2 * 18 + 2)


def drawn(trained, *flags):
    """The grid that sample.py makes with these flags, as bytes."""
    out, _ = call("sample", *FEW, *flags, cwd=trained)
    return opened(trained / out.strip()).tobytes()


def test_names_are_found_in_any_case_and_mean_their_id(trained):
    assert drawn(trained, "--class-name", "RED-Eyes-pointed") == drawn(trained, "--class-id", 1)


def test_the_seed_guidance_steps_and_fresh_noise_decide(trained):
    first = drawn(trained)
    assert drawn(trained, "--seed", 0) == drawn(trained, "--eta", 0) == first
    others = [["--seed", 1], ["--cfg-scale", 1], ["--steps", 4], ["--eta", 0.5], ["--eta", 1]]
    pictures = {drawn(trained, *flags) for flags in others}
    assert len(pictures | {first}) == 6
    assert drawn(trained, "--eta", 1) in pictures


def test_guidance_is_the_models_own_unless_given(trained, tmp_path):
    model = DiT.from_pretrained(trained / "out")
    model.cfg_scale = 6.0
    model.save_pretrained(tmp_path / "model")
    own = drawn(trained, "--checkpoint", tmp_path / "model")
    assert own == drawn(trained, "--cfg-scale", 6) != drawn(trained)


def test_list_classes(trained):
    out, _ = call("sample", "--list-classes", cwd=trained)
    assert [line.split() for line in out.splitlines()] == [[str(i), n] for i, n in enumerate(NAMES)]


@pytest.mark.parametrize("eta", [0, 1])
def test_a_picture_depends_on_its_seed_and_its_place_alone(trained, monkeypatch, eta):
    model = DiT.from_pretrained(trained / "out")
    ids = torch.arange(3).repeat(4)

    def drawn(ids):
        batches = list(generate(model, ids, seed=1, steps=4, eta=eta))
        return [len(batch) for batch in batches], torch.cat(batches).int()

    _, together = drawn(ids)
    _, fewer = drawn(ids[:5].tolist())
    monkeypatch.setattr("sample.MAX_BATCH", 4)
    sizes, apart = drawn(ids)
    assert sizes == [4, 4, 4]
    for other in (fewer, apart):
        assert (other - together[: len(other)]).abs().max() <= 1
    assert not torch.equal(together[0], together[3])  # the same class at another place
    states = [list(batch) for batch in generate_states(model, ids, seed=1, steps=2)]
    assert [len(batch) for batch in states] == [3, 3, 3]  # in whatever order they are used


def test_noises_of_places_and_of_neighbouring_seeds_are_independent():
    shape = torch.empty(60, 3, 8, 8)
    noise = [sample.randn_like_of_places(seed, range(60))(shape) for seed in (0, 1, 2)]
    noise = torch.cat(noise).flatten(1)
    correlations = torch.corrcoef(noise).fill_diagonal_(0)
    assert correlations.abs().max() < 0.4 and abs(noise.mean()) < 0.02  # 0.07 is usual
    assert noise.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_network_is_sampled_as_it_is(trained, wrapped):
    model = DiT.from_pretrained(trained / "out")
    (expected,) = generate(model, [0, 1], steps=2)
    model = torch.compile(model, backend="eager")
    if wrapped:  # as PEFT and others do, which pass on attributes that they lack

        class Wrapper(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = model

            def __getattr__(self, name):
                try:
                    return super().__getattr__(name)
                except AttributeError:
                    return getattr(self.inside, name)

            def forward(self, *arguments):
                return self.inside(*arguments)

        model = Wrapper()
    (pictures,) = generate(model, [0, 1], steps=2)
    assert (pictures.int() - expected.int()).abs().max() <= 1


def test_scaling_to_pixels_clamps():
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("n, columns, rows", [(4, 4, 1), (75, 15, 5)])
def test_grids_of_single_pictures_are_wide(n, columns, rows):
    image = to_grid(torch.zeros(n, 3, 2, 2, dtype=torch.uint8))
    assert image.size == (columns * 4 + 2, rows * 4 + 2)


# Files


def test_no_grid_overwrites_another(trained, tmp_path):
    command = ["sample", "--checkpoint", trained / "out", "--class-id", 2, "--steps", 1]
    paths = [call(*command, "--gif", cwd=tmp_path)[0].split()[0] for _ in range(3)]
    stems = [Path(path).stem for path in paths]
    assert stems == ["class-2-seed-0", "class-2-seed-0-2", "class-2-seed-0-3"]
    assert len(list((tmp_path / "samples").iterdir())) == 6
    (tmp_path / "samples/class-2-seed-0.png").unlink()  # moved away, but for its animation
    assert "class-2-seed-0-4.png" in call(*command, "--gif", cwd=tmp_path)[0]
    many = sample.free_path(range(500), seed=2**32 - 1)  # more than a file's name can list
    assert len(many.name) < 130


def test_all_pictures_are_saved_one_by_one_and_are_the_grids(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("sample.MAX_BATCH", 4)
    folder = tmp_path / "single files"
    flags = ["--num-images", 5, "--save-images", folder, *FEW, "--output", tmp_path / "grid.png"]
    call("sample", *flags, cwd=trained)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert files == {f"{name}/{n}.png" for name in NAMES for n in range(5)}
    grid = opened(tmp_path / "grid.png")
    assert grid.size == (5 * 18 + 2, 3 * 18 + 2)
    for row, name in enumerate(NAMES):
        last = grid.crop((4 * 18 + 2, row * 18 + 2, 5 * 18, row * 18 + 18))
        assert last.tobytes() == opened(folder / name / "4.png").tobytes()


def test_single_files_go_into_a_new_folder_or_an_empty_one(trained, tmp_path):
    flags = ["--save-images", tmp_path / "many", "--output", tmp_path / "grid.png", *FEW]
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "mine.txt").write_text("mine")
    line = refused("sample", *flags, cwd=trained)
    assert "many is not empty" in line and "--save-images" in line
    assert len(list(tmp_path.rglob("*"))) == 2  # neither a grid nor a picture
    (tmp_path / "many" / "mine.txt").unlink()
    call("sample", *flags, cwd=trained)
    assert len(list(tmp_path.rglob("*.png"))) == 4


def test_a_gif_has_a_frame_a_step_and_ends_with_the_picture(trained, tmp_path):
    flags = ["--class-id", 0, "--gif", "--output", tmp_path / "way.png", *FEW]
    out, _ = call("sample", *flags, cwd=trained)
    assert out.split() == [str(tmp_path / "way.png"), str(tmp_path / "way.gif")]
    with Image.open(tmp_path / "way.gif") as gif:
        assert gif.n_frames == 1 + 3 and gif.info["loop"] == 0
        gif.seek(3)
        assert gif.info["duration"] >= 1000  # the result stays for a while
        last = torch.tensor(list(gif.convert("RGB").tobytes())).float()
    picture = torch.tensor(list(opened(tmp_path / "way.png").tobytes())).float()
    assert (last - picture).abs().mean() < 12  # but for the GIF's palette


def test_an_animation_of_many_pictures_is_made_smaller(tmp_path):
    frames = [Image.effect_noise((900, 300), 100) for _ in range(4)]
    sample.save_gif(frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert max(film.size) == sample.GIF_SIZE and film.n_frames == 4
        assert film.width / film.height == pytest.approx(3, rel=0.02)
    assert (tmp_path / "film.gif").stat().st_size < 4 * 3e6 / 26  # 26 frames stay below 3 MB


# Class names, which may be anyone's

FOREIGN = ["Caf\u00e9", "E\u0301toile", "fish", "Fish", "STRASSE"]


def test_a_class_is_found_in_any_form_of_its_name():
    names = ["Caf\u00e9", "cafe\u0301", "\u00e9toile", "Stra\u00dfe"]
    assert [find_class(name, FOREIGN) for name in names] == [0, 0, 1, 4]


@pytest.mark.parametrize("name", ["ETOILE", "FISH", "fis", ""])
def test_a_name_of_no_class_or_of_several_is_refused(name):
    with pytest.raises(UserError, match=f'called "{name}": see --list-classes'):
        find_class(name, FOREIGN)


def test_classes_have_folders_of_their_own_on_every_system():
    names = ["fish", "Dr. Who, A&B (x)", "a_b", "زرقاء"]
    assert [folder_name(number, names) for number in range(4)] == names
    for more in (["Mr."], ["Fish"], ["a/b"], ["fish"], ["n" * 70, "n" * 71], ["class-0"]):
        folders = [folder_name(number, [*names, *more]) for number in range(4 + len(more))]
        assert folders[1:4] == names[1:] and folders[4] == "class-4"
        assert len({folder.casefold() for folder in folders}) == len(folders)


def test_class_names_cannot_write_outside_the_folder(tmp_path):
    names = ["../../up", "/etc/x", "..", "a/b", "a_b", "tab\tnew\nline", "n" * 300, "蝶" * 100, ""]
    names += ["زرقاء", "C:\\x", "nul\0", "cat", "cat"]
    deep = tmp_path / "deep" / "er"
    DiT(16, 4, 16, 1, 2, names).save_pretrained(deep / "model")
    flags = ["--checkpoint", "model", "--save-images", "many", "--steps", 1, "--output", "g.png"]
    call("sample", *flags, cwd=deep)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert {path.name for path in deep.iterdir()} == {"model", "many", "g.png"}
    folders = [path.name for path in (deep / "many").iterdir()]
    assert len(folders) == len(names) == len(list((deep / "many").rglob("0.png")))


# Refusals, and places to run in


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--class-id 3", ["--class-id 3", "from 0 to 2"]),
        ("--class-id -1", ["-1"]),
        ("--class-name Red-Eye-Pointed", ["--list-classes", "did you mean red-eyes-pointed?"]),
        ("--sed 3", ["--sed 3; did you mean --seed"]),
        ("--steps 0", ["--steps", "from 1"]),
        ("--cfg-scale nan", ["--cfg-scale", "no float"]),
        ("--eta 1.5", ["--eta", "0 to 1"]),
        ("--steps many", ["--steps", "invalid int value"]),
        ("--seed 4294967296", ["--seed", "from 0 to 4294967295"]),
        ("--device abacus", ["abacus", "cpu"]),
        ("--output picture.jpg", ["picture.jpg", ".png"]),
        ("--output out/config.json/x.png", ["out/config.json"]),
        ("--save-images out/log.csv", ["log.csv", "--save-images"]),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(trained, flags, words):
    before = sorted(trained.rglob("*"))
    line = refused("sample", *flags.split(), cwd=trained)
    assert all(word in line.replace("\\", "/") for word in words), line
    assert sorted(trained.rglob("*")) == before


def test_where_nothing_was_trained_the_networks_that_are_there_are_named(tmp_path):
    line = refused("sample", cwd=tmp_path)
    assert "assets/laptop" in line and "assets/butterflies" in line


def test_a_path_may_begin_at_the_home_folder(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    shutil.copytree(trained / "out", tmp_path / "out")
    paths = ["--checkpoint=~/out", "--output=~/grid.png", "--save-images=~/many"]
    call("sample", *paths, "--steps", 1, cwd=trained)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "grid.png", "many"}
    call("sample", "--output", "~no such user/g.png", "--steps", 1, cwd=tmp_path)
    assert (tmp_path / "~no such user" / "g.png").exists()


def test_main_runs_in_a_notebook(trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.chdir(trained)
    sample.main(["--list-classes"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    sample.main()
    assert "class-all-seed-0" in capsys.readouterr().out
