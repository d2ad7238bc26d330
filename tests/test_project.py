"""The small scripts in experiments/, and the promises that the whole project makes."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, call, refused
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import train
from data.drawn import draw_butterflies
from experiments.speed import activation_bytes
from model import DiT


def test_the_losses_of_a_run_are_drawn(trained, tmp_path):
    pytest.importorskip("matplotlib")
    flags = [trained / "out", "--output", tmp_path / "loss.png"]
    out, _ = call("experiments/plot_loss.py", *flags, cwd=tmp_path)
    assert out.strip() == str(tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20  # lines, not an empty sheet


def test_without_matplotlib_it_says_so(trained, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    script, extra = "experiments/plot_loss.py", {"PYTHONPATH": str(tmp_path)}
    line = refused(script, trained / "out", cwd=tmp_path, **extra)
    assert "pip install matplotlib" in line


def test_a_folder_without_a_log_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    assert "log.csv does not exist" in refused("experiments/plot_loss.py", tmp_path, cwd=tmp_path)


def test_a_row_that_was_cut_short_is_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from experiments.plot_loss import read_log

    (tmp_path / "log.csv").write_text("step,train_loss,val_loss\n10,0.5,0.6\n20,0.4")
    assert read_log(tmp_path / "log.csv") == ([10], {"train_loss": [0.5], "val_loss": [0.6]})
    (tmp_path / "log.csv").write_text("step,train_loss,val_loss\n")
    assert "no row yet" in refused("experiments/plot_loss.py", tmp_path, cwd=tmp_path)
    (tmp_path / "log.csv").write_text("time,loss\n1,2\n")
    assert "not the log of a run" in refused("experiments/plot_loss.py", tmp_path, cwd=tmp_path)


def test_the_judge_tells_drawings_from_mislabelled_ones():
    from experiments.judge_drawn import scaled, shares, train_judge

    judge = train_judge(images_per_class=14)
    images, labels, _ = draw_butterflies(2, 64, seed=9)
    right = shares(judge, scaled(images), labels)
    assert right["colour"] > 0.95 and right["shape"] > 0.8 and right["pattern"] > 0.7
    wrong = shares(judge, scaled(images), (labels + 19) % 75)  # another colour, pattern and shape
    assert wrong["class"] < 0.1 and wrong["colour"] < 0.3


def test_the_judge_refuses_a_model_of_other_classes(trained):
    for script in ("judge_drawn.py", "method_figure.py"):
        if script == "method_figure.py":
            pytest.importorskip("matplotlib")
        line = refused(f"experiments/{script}", trained / "out", cwd=trained)
        assert "drawn butterflies" in line
    line = refused("experiments/judge_drawn.py", "none", "--steps", 0, cwd=trained)
    assert "--steps" in line


def test_the_three_files_import_one_way():
    # model.py <- sample.py <- train.py, and importing runs nothing.
    names = ("model", "sample", "train")
    code = "import sys"
    for name in names:
        code += f"; import {name}; print(*(m for m in {names} if m in sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n") == ["model", "model sample", "model sample train", ""]


def test_the_environment_is_described_by_three_requirements():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {line.split(">")[0].split("=")[0] for line in lines}
    assert names == {"torch", "torchvision", "huggingface_hub[torch]"}
    assert torch.get_default_dtype() == torch.float32


def test_speed_says_what_a_step_costs(tmp_path):
    run = [*SMALL, "--batch-size", 4, "--compile", "off"]
    out, _ = call("experiments/speed.py", *run, cwd=tmp_path)
    for word in (
        "M parameters",
        "GFLOP per image",
        "images/s",
        "PFLOP",
        "times ours",
        "MiB per image",
        "bare",
    ):
        assert word in out
    shares = [float(share) for share in re.findall(r"^ +([\d.]+)% ", out, re.MULTILINE)]
    assert sum(shares) == pytest.approx(100, abs=0.5) and shares[0] > 0  # of matrix products
    assert "--resume" in refused("experiments/speed.py", "--resume", cwd=tmp_path)
    (parameters,) = re.findall(r"([\d.]+) M parameters", out)
    model = DiT(16, 4, 16, 1, 2, [str(i) for i in range(75)])
    assert float(parameters) == round(sum(w.numel() for w in model.parameters()) / 1e6, 2)


def test_memory_kept_for_the_way_back_is_counted_once():
    """A chain of two layers keeps its input and its middle: 4 bytes a number."""
    first, second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
    model = torch.nn.Module()
    model.first, model.second = first, second
    model.forward = lambda z, t, y: second(first(z))
    z, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    noise = torch.ones(2, 3, 8, 8)
    counted = activation_bytes(model, (z, None, t, noise))
    kept = [2 * 3 * 8 * 8, 2 * 3 * 8 * 16, 2 * 3 * 8 * 8, 2 * 3 * 8 * 8]  # z_t, middle, out, v
    assert counted == 4 * sum(kept)


def test_the_pictures_of_the_readme_come_from_a_script(trained, tmp_path):
    out, _ = call("experiments/pictures.py", trained / "out", "--output", tmp_path, cwd=tmp_path)
    assert out.split() == [str(tmp_path / "drawn.png"), str(tmp_path / "strip.png")]
    with Image.open(tmp_path / "strip.png") as image:  # 5 rows of 11, of 16 pixels and a margin
        assert image.size == (11 * 18 + 2, 5 * 18 + 2)
        noise, sample = (image.crop((x, 2, x + 16, 18)).convert("L") for x in (2, 10 * 18 + 2))
        assert roughness(noise) > 1.5 * roughness(sample)
    with Image.open(tmp_path / "drawn.png") as image:
        assert image.size == (15 * 66 + 2, 5 * 66 + 2)


def test_progress_shows_the_first_row_of_each_grid(tmp_path):
    samples = tmp_path / "out" / "samples"
    samples.mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text('{"image_size": 16}')
    for step, colour in ((5, "red"), (10, "blue")):
        grid = Image.new("RGB", (2 + 2 * 18, 2 + 2 * 18))  # two rows of two
        grid.paste(colour, (2, 2, 2 + 34, 2 + 16))
        grid.paste("green", (2, 20, 2 + 34, 20 + 16))
        grid.save(samples / f"step-{step:06}.png")
    command = ["experiments/progress.py", "out", "--steps"]
    out, _ = call(*command, 5, 10, cwd=tmp_path)
    with Image.open(tmp_path / out.strip()) as rows:
        assert rows.size == (38, 38)
        assert rows.getpixel((3, 3)) == (255, 0, 0) and rows.getpixel((30, 34)) == (0, 0, 255)
    assert "step-000007.png" in refused(*command, 7, cwd=tmp_path)
    assert "rows.jpg" in refused(*command, 5, "--output", "rows.jpg", cwd=tmp_path)
    call(*command, 5, "--output", "new/rows.png", cwd=tmp_path)
    assert (tmp_path / "new" / "rows.png").exists()
    assert "no run in samples" in refused(command[0], "samples", "--steps", 5, cwd=tmp_path)


def test_the_figure_of_the_method_is_of_the_method(tmp_path):
    pytest.importorskip("matplotlib")
    from experiments.method_figure import DATA, NOISE_CENTRE, STARTS, euler_path, mean_velocity

    # The mean of eps - x over many pairs whose line comes close to z, against the closed form.
    t, n, z = 0.6, 1_000_000, torch.tensor([0.2, -0.3])
    generator = torch.Generator().manual_seed(0)
    x = DATA[torch.randint(len(DATA), (n,), generator=generator)]
    eps = NOISE_CENTRE + torch.randn(n, 2, generator=generator)
    near = ((1 - t) * x + t * eps - z).norm(dim=1) < 0.05
    assert near.sum() > 300
    torch.testing.assert_close(mean_velocity(z, t), (eps - x)[near].mean(0), atol=0.15, rtol=0)

    for start in STARTS:  # the path bends, and ends at a point of the data
        states = euler_path(start, 200)
        assert (DATA - states[-1]).norm(dim=1).min() < 0.05
        along = torch.linspace(0, 1, 201)[:, None]
        assert (states - (start + along * (states[-1] - start))).norm(dim=1).max() > 0.1
    flags = [ROOT / "assets" / "laptop", "--output", tmp_path / "method.png"]
    call("experiments/method_figure.py", *flags, cwd=tmp_path)
    with Image.open(tmp_path / "method.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 1000


def roughness(image):
    """Mean difference of neighbouring pixels."""
    return pil_to_tensor(image).float().diff(dim=2).abs().mean().item()


def test_the_model_that_comes_along_paints_the_colour_that_its_class_says(tmp_path):
    folder = ROOT / "assets" / "laptop"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4_000_000
    classes = [15 * colour + 10 for colour in range(5)]  # plain and round, in each colour
    flags = ["--checkpoint", folder, "--class-id", *classes, "--num-images", 1, "--steps", 10]
    call("sample.py", *flags, "--output", tmp_path / "five.png", cwd=tmp_path)
    drawn, labels, names = draw_butterflies(1, 64, seed=5)
    assert DiT.from_pretrained(folder).class_names == names
    wings = slice(20, 44)
    palette = torch.stack([drawn[c, :, wings, wings].float().mean((1, 2)) for c in classes])
    with Image.open(tmp_path / "five.png") as image:
        rows = [image.crop((2, 2 + 66 * i, 66, 66 + 66 * i)).convert("RGB") for i in range(5)]
    for colour, row in enumerate(rows):
        pixels = pil_to_tensor(row).float()[:, wings, wings]
        nearest = (palette - pixels.mean((1, 2))).norm(dim=1).argmin()
        assert nearest == colour


def test_the_real_butterflies_that_come_along_are_of_their_species(tmp_path):
    folder = ROOT / "assets" / "butterflies"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12_000_000
    colours = {}
    for name in ("MONARCH", "BLUE MORPHO"):
        flags = ["--checkpoint", folder, "--class-name", name, "--num-images", 8, "--steps", 10]
        call("sample.py", *flags, "--output", tmp_path / "row.png", cwd=tmp_path)
        with Image.open(tmp_path / "row.png") as image:
            assert image.size == (8 * 66 + 2, 66 + 2)
            colours[name] = pil_to_tensor(image).float().mean((1, 2))
    (red, _, blue), (other_red, _, other_blue) = colours.values()
    assert red - blue > other_red - other_blue + 20  # orange wings, and blue ones


def test_a_network_in_half_precision_is_half_as_large_and_samples_the_same(trained, tmp_path):
    flags = [trained / "out", tmp_path / "half", "--cfg-scale", 2.5]
    call("experiments/shrink.py", *flags, cwd=tmp_path)
    sizes = [
        (folder / "model.safetensors").stat().st_size
        for folder in (tmp_path / "half", trained / "out")
    ]
    assert sizes[0] < 0.6 * sizes[1]
    assert DiT.from_pretrained(tmp_path / "half").cfg_scale == 2.5
    assert "![samples](grid.png)" in (tmp_path / "half" / "README.md").read_text()
    pictures = []
    for folder in (tmp_path / "half", trained / "out"):
        run = ["--checkpoint", folder, "--class-id", 1, "--cfg-scale", 2.5, "--steps", 5]
        output = tmp_path / f"{len(pictures)}.png"
        call("sample.py", *run, "--output", output, "--device", "cpu", cwd=tmp_path)
        with Image.open(output) as image:
            pictures.append(pil_to_tensor(image).float())
    assert (pictures[0] - pictures[1]).abs().mean() < 2
    assert "exists" in refused("experiments/shrink.py", *flags, cwd=tmp_path)
    line = refused("experiments/shrink.py", "you/butterflies", "new", cwd=tmp_path)
    assert "you/butterflies is not a folder" in line
    (tmp_path / "file").touch()
    line = refused("experiments/shrink.py", trained / "out", "file/new", cwd=tmp_path)
    assert "cannot write file/new" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "file", "half"]


@pytest.mark.parametrize("page", ["README.md", "experiments/RESULTS.md"])
def test_a_page_names_files_that_exist(page):
    text = (ROOT / page).read_text("utf-8")
    links = re.findall(r'(?:\]\(|src=")([^)"]+)[)"]', text)
    files = [link.split("#")[0] for link in links if not link.startswith("http")]
    assert len(files) > 5
    for file in files:
        assert ((ROOT / page).parent / file).exists(), file
    scripts = re.findall(r"python ((?:\w+/)?\w+\.py)", text)
    assert len(scripts) > 5
    for script in scripts:
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("page", ["README.md", "experiments/RESULTS.md"])
def test_commands_can_be_pasted_into_any_shell(page):
    # The shells of macOS and Windows take a comment for arguments, and older PowerShells refuse &&.
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) > 5
    for line in lines:
        assert "#" not in line and ("&&" not in line or line.endswith("&& pytest -n auto")), line


@pytest.mark.parametrize("page", ["README.md", "experiments/RESULTS.md"])
def test_a_page_names_flags_that_exist(page):
    def flags_of(script):
        return {"--help", *re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text("utf-8"))}

    of_training = flags_of("train.py")
    of_training |= {"--" + name.lower().replace("_", "-") for name in train.SETTINGS}
    text = (ROOT / page).read_text("utf-8")
    checked, flags = 0, of_training | flags_of("sample.py")
    for script, line in re.findall(r"python ((?:\w+/)?\w+\.py)([^`\n#]*)", text):
        own = flags_of(script)
        if script in ("train.py", "experiments/speed.py"):
            own |= of_training
        used = set(re.findall(r"--[\w-]+", line))
        assert used <= own, script
        flags |= own
        checked += len(used)
    assert checked > 5
    assert set(re.findall(r"`(--[\w-]+)", text)) <= flags  # those without a command


def test_the_readme_quotes_code_that_is_there():
    text = (ROOT / "README.md").read_text("utf-8")
    code = "".join(
        (ROOT / name).read_text("utf-8") for name in ("model.py", "train.py", "sample.py")
    )
    method = text.split("## The method")[1].split("\n## ")[0]
    rows = [line for line in method.splitlines() if line.startswith("| `")][1:]  # [0] is the header
    quoted = [row.split(" | ")[0].strip("| `") for row in rows]
    assert len(quoted) > 8
    for line in quoted:
        assert line in code, line
