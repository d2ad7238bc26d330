"""sample.py as a user calls it: pictures, names, files, and refusals."""

import shutil
import sys
import unicodedata

import pytest
import torch
from conftest import call, refused
from PIL import Image

from common import find_class, folder_names, load_model, pick_device
from model import DiT, UserError
from sample import DEFAULT_STEPS, generate, to_grid, to_uint8

NAMES = ["blue-plain-pointed", "red-eyes-pointed", "yellow-spots-tailed"]
FEW = ["--steps", 3, "--device", "cpu"]


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image.convert("RGB")


def test_a_class_id_gives_one_png_of_four_and_prints_its_path(trained):
    out, _ = call("sample.py", "--class-id", 2, *FEW, cwd=trained)
    path = out.strip()
    assert path.endswith(".png")
    assert opened(trained / path).size == (4 * 18 + 2, 18 + 2)  # 16 pixels and a margin each


def test_without_a_class_one_picture_of_each(trained, tmp_path):
    out, _ = call("sample.py", *FEW, "--output", tmp_path / "deep" / "all.png", cwd=trained)
    assert out.strip() == str(tmp_path / "deep" / "all.png")
    assert opened(out.strip()).size == (3 * 18 + 2, 18 + 2)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["all.png"]


def test_rows_are_classes(trained, tmp_path):
    flags = ["--class-id", 2, 0, "--num-images", 5, *FEW, "--output", tmp_path / "rows.png"]
    call("sample.py", *flags, cwd=trained)
    assert opened(tmp_path / "rows.png").size == (5 * 18 + 2, 2 * 18 + 2)


def test_names_are_found_in_any_case_and_mean_their_id(trained, tmp_path):
    by_name = ["--class-name", "RED-Eyes-pointed", "--output", tmp_path / "name.png"]
    by_id = ["--class-id", 1, "--output", tmp_path / "id.png"]
    call("sample.py", *by_name, *FEW, cwd=trained)
    call("sample.py", *by_id, *FEW, cwd=trained)
    assert opened(tmp_path / "name.png").tobytes() == opened(tmp_path / "id.png").tobytes()


def test_the_seed_guidance_and_steps_decide(trained, tmp_path):
    def sample(name, *flags):
        path = tmp_path / f"{name}.png"
        call("sample.py", "--class-id", 0, *FEW, *flags, "--output", path, cwd=trained)
        return opened(path).tobytes()

    first = sample("first")
    assert sample("again", "--seed", 0) == first
    assert sample("seed", "--seed", 1) != first
    assert sample("guidance", "--cfg-scale", 1) != first
    assert sample("no-fresh-noise", "--eta", 0) == first
    assert sample("fresh-noise", "--eta", 0.5) not in (first, sample("more", "--eta", 1))
    assert sample("repeated", "--eta", 1) == sample("repeated-again", "--eta", 1)


def test_pictures_to_be_compared_have_names_of_their_own(trained, tmp_path):
    (tmp_path / "small").symlink_to(trained / "out")
    few = ["--checkpoint", "small", "--class-id", 2]
    more = ["--steps", 1, "--cfg-scale", 1.5, "--eta", 1]
    for flags in (["--steps", 2], ["--steps", 1], more[:4], more):
        call("sample.py", *few, *flags, cwd=tmp_path)
    names = ["steps-1-cfg-scale-1.5-eta-1", "steps-1-cfg-scale-1.5", "steps-1", "steps-2"]
    names = [f"class-2-seed-0-small-{name}.png" for name in names]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names


def test_list_classes(trained):
    out, _ = call("sample.py", "--list-classes", cwd=trained)
    assert [line.split() for line in out.splitlines()] == [[str(i), n] for i, n in enumerate(NAMES)]


def test_single_files_and_none_written_over(trained, tmp_path):
    folder = tmp_path / "single files"
    flags = ["--num-images", 2, "--save-images", folder, *FEW, "--output", tmp_path / "grid.png"]
    call("sample.py", *flags, cwd=trained)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert files == [f"{name}/{n}.png" for name in NAMES for n in (0, 1)]
    grid = opened(tmp_path / "grid.png")
    assert opened(folder / NAMES[1] / "1.png").tobytes() == grid.crop((20, 20, 36, 36)).tobytes()
    (tmp_path / "grid.png").unlink()
    shutil.rmtree(folder / NAMES[0])
    line = refused("sample.py", *flags, "--seed", 5, cwd=trained)
    assert "0.png" in line and "--save-images" in line
    assert not (tmp_path / "grid.png").exists() and not (folder / NAMES[0]).exists()


def test_a_gif_of_many_pictures_stays_below_three_megabytes(tmp_path):
    model = DiT(64, 16, 16, 1, 2, [str(i) for i in range(75)])
    model.save_pretrained(tmp_path / "model")  # untrained: its pictures are noise to the end
    flags = ["--checkpoint", tmp_path / "model", "--gif", "--device", "cpu"]
    out, _ = call("sample.py", *flags, cwd=tmp_path)
    png, gif = map(tmp_path.joinpath, out.split())
    assert 1e6 < gif.stat().st_size < 3e6
    with Image.open(gif) as film, Image.open(png) as picture:
        assert film.n_frames == 1 + DEFAULT_STEPS
        assert film.width / film.height == pytest.approx(picture.width / picture.height, rel=0.02)


def test_a_thousand_pictures_are_all_saved_and_are_the_grids(tmp_path):
    DiT(8, 4, 8, 1, 2, ["a", "b", "c"]).save_pretrained(tmp_path / "model")
    flags = ["--checkpoint", tmp_path / "model", "--steps", 1, "--device", "cpu"]
    flags += ["--class-id", 0, 1, 2, "--num-images", 500, "--save-images", tmp_path / "many"]
    out, err = call("sample.py", *flags, cwd=tmp_path)
    assert len(list((tmp_path / "many").rglob("*.png"))) == 1500
    assert "1500/1500" in err or "1.50k/1.50k" in err
    with Image.open(tmp_path / out.strip()) as grid:
        assert grid.size == (500 * 10 + 2, 3 * 10 + 2)
        for row, name in enumerate("abc"):
            box = (10 * 7 + 2, 10 * row + 2, 10 * 7 + 10, 10 * row + 10)
            with Image.open(tmp_path / "many" / name / "7.png") as picture:
                assert grid.crop(box).tobytes() == picture.tobytes()


def test_classes_have_folders_of_their_own_on_every_system():
    folders = folder_names(["Mr.", "Mr", "mr ", "con", "\u00e9", "e\u0301", "fish"])
    assert folders[-1] == "fish" and folders[1] == "Mr"
    assert not any(folder.endswith((".", " ")) or folder.upper() == "CON" for folder in folders)
    composed = {unicodedata.normalize("NFC", folder).casefold() for folder in folders}
    assert len(composed) == 7


def test_a_gif_has_a_frame_a_step_and_ends_with_the_picture(trained, tmp_path):
    flags = ["--class-id", 0, "--gif", "--output", tmp_path / "way.png", *FEW]
    out, _ = call("sample.py", *flags, cwd=trained)
    assert out.split() == [str(tmp_path / "way.png"), str(tmp_path / "way.gif")]
    with Image.open(tmp_path / "way.gif") as gif:
        assert gif.n_frames == 4 and gif.info["loop"] == 0
        gif.seek(3)
        assert gif.info["duration"] >= 1000  # the result stays for a while
        last = torch.tensor(list(gif.convert("RGB").tobytes())).float()
    picture = torch.tensor(list(opened(tmp_path / "way.png").tobytes())).float()
    assert (last - picture).abs().mean() < 12  # but for the GIF's palette


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--class-id", "3"], ["--class-id 3", "0 to 2"]),
        (["--class-id", "-1"], ["-1"]),
        (["--class-name", "yelow-spots-tailed"], ["yelow-spots-tailed", "--list-classes"]),
        (["--class-name", "0123456789"], ["0123456789", "--list-classes"]),
        (["--steps", "0"], ["--steps"]),
        (["--steps", "ten"], ["--steps", "ten is not a number"]),
        (["--num-images", "0"], ["--num-images"]),
        (["--cfg-scale", "nan"], ["--cfg-scale"]),
        (["--eta", "1.5"], ["--eta", "0 to 1"]),
        (["--seed", "-1"], ["--seed"]),
        (["--class-id", "1", "--class-name", "x"], ["--class-id", "--class-name"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--device", "cpu:3"], ["cpu:3"]),
        (["--device", "meta"], ["meta"]),
        (["--output", "picture.jpg"], ["picture.jpg", ".png"]),
        pytest.param(["--output", "/proc/nowhere/x.png"], ["/proc/nowhere"], marks=LINUX),
        (["--checkpoint", "nowhere"], ["nowhere", "python train.py"]),
        (["--checkpoint", "."], ["python train.py"]),
        (["--checkpoint", "./nowhere/out"], ["no model in ./nowhere/out", "python train.py"]),
        (["--checkpoint", __file__], [f"no model in {__file__}", "python train.py"]),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(trained, flags, words):
    before = sorted(trained.rglob("*"))
    line = (
        refused("sample.py", *flags, "--steps", 3, cwd=trained) if "--steps" not in flags else None
    )
    line = line or refused("sample.py", *flags, cwd=trained)
    assert all(word in line for word in words), line
    assert sorted(trained.rglob("*")) == before


def test_an_unreachable_hub_is_one_line(tmp_path):
    flags = ["--checkpoint", "someone/butterflies"]
    line = refused("sample.py", *flags, cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "someone/butterflies" in line


def test_a_damaged_checkpoint_is_one_line(trained, tmp_path):
    weights = (trained / "out" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "config.json").write_bytes((trained / "out" / "config.json").read_bytes())
    assert str(tmp_path) in refused("sample.py", "--checkpoint", tmp_path, cwd=tmp_path)


def test_pictures_do_not_depend_on_how_many_are_drawn_together(trained, monkeypatch):
    model = load_model(str(trained / "out"))
    ids = torch.arange(3).repeat(4)
    together = torch.cat(list(generate(model, ids, seed=1, steps=2)))
    monkeypatch.setattr("sample.MAX_BATCH", 4)
    batches = list(generate(model, ids, seed=1, steps=2))
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert (torch.cat(batches).int() - together.int()).abs().max() <= 1


def test_scaling_to_pixels_clamps():
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("n, size", [(1, (6, 6)), (4, (18, 6)), (75, (62, 22))])
def test_grids_of_single_pictures_are_wide(n, size):
    image = to_grid(torch.zeros(n, 3, 2, 2, dtype=torch.uint8))
    if n == 1:
        assert image.size in [(2, 2), (6, 6)]
    elif n == 75:
        assert image.size == (15 * 4 + 2, 5 * 4 + 2)
    else:
        assert image.size == (4 * 4 + 2, 6)


def test_auto_is_a_device_that_works():
    assert torch.ones(1, device=pick_device("auto")).item() == 1
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="tpu"):
        pick_device("tpu")


def test_the_model_is_ready_to_sample(trained):
    model = load_model(str(trained / "out"))
    assert isinstance(model, DiT) and not model.training


@pytest.fixture
def foreign_names(tmp_path):
    """A model whose class names need care: composed and decomposed letters, and case."""
    names = ["Caf\u00e9", "E\u0301toile", "fish", "Fish", "STRASSE"]
    DiT(16, 4, 16, 1, 2, names).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name, class_id",
    [
        ("Caf\u00e9", 0),
        ("cafe\u0301", 0),
        ("\u00e9toile", 1),
        ("ETOILE\u0301", None),
        ("fish", 2),
        ("Fish", 3),
        ("Stra\u00dfe", 4),
    ],
)
def test_a_class_is_found_in_any_form_of_its_name(name, class_id):
    names = ["Caf\u00e9", "E\u0301toile", "fish", "Fish", "STRASSE"]
    if class_id is None:
        with pytest.raises(UserError, match="--list-classes"):
            find_class(name, names)
    else:
        assert find_class(name, names) == class_id


def test_names_that_differ_by_case_alone_are_asked_about(foreign_names, tmp_path):
    flags = ["--checkpoint", foreign_names, "--steps", 1]
    line = refused("sample.py", *flags, "--class-name", "FISH", cwd=tmp_path)
    assert '"fish" (--class-id 2) or "Fish" (--class-id 3)' in line
    out, _ = call("sample.py", *flags, "--class-name", "Fish", cwd=tmp_path)
    assert "class-3-" in out


def test_guidance_is_the_models_own_unless_given(tmp_path):
    for scale in (1.0, 6.0):
        torch.manual_seed(0)
        model = DiT(16, 4, 16, 1, 2, ["a", "b"], cfg_scale=scale)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        model.save_pretrained(tmp_path / f"{scale:g}")
    few = ["--steps", 2, "--class-id", 0]
    pictures = {}
    for name, flags in {"1": [], "6": [], "given": ["--cfg-scale", 6]}.items():
        folder = "1" if name == "given" else name
        output = tmp_path / f"{name}.png"
        run = ["--checkpoint", tmp_path / folder, *few, *flags, "--output", output]
        call("sample.py", *run, cwd=tmp_path)
        pictures[name] = output.read_bytes()
    assert pictures["1"] != pictures["6"] == pictures["given"]


@pytest.mark.parametrize("scale", ["NaN", '"3"', "null", "[3]"])
def test_a_guidance_that_is_no_number_is_refused(tmp_path, scale):
    DiT(16, 4, 16, 1, 2, ["a", "b"], cfg_scale=2.5).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("2.5", scale))
    line = refused("sample.py", "--checkpoint", tmp_path / "model", cwd=tmp_path)
    assert "config.json" in line
