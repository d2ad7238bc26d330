"""What the pages promise: files, commands, flags and code that are there; imports one way; and
networks that sample what their classes are called."""

import ast
import re
import shlex

import pytest
import torch
from helpers import ROOT, call, opened
from torchvision.transforms.functional import pil_to_tensor

import train
from data.drawn import draw_butterflies
from model import DiT
from sample import generate

PAGES = ["README.md", "experiments/RESULTS.md"]
# python train.py, python -m experiments.NAME, torchrun ... train.py; then the rest of the command.
COMMAND = r"(?:python|torchrun)(?: --[\w=]+)* (-m experiments\.\w+|[\w/]+\.py)([^`\n]*)"


def read(page):
    return (ROOT / page).read_text("utf-8")


def commands(text):
    """The commands of a page, as (path of the script, the rest)."""
    for script, rest in re.findall(COMMAND, text.replace("\\\n", " ")):
        if script.startswith("-m "):
            script = script.removeprefix("-m ").replace(".", "/") + ".py"
        yield script, rest


def flags_of(script):
    """All flags that a script knows."""
    flags = {"--help", *re.findall(r'"(--[\w-]+)"', read(script))}
    if script in ("train.py", "experiments/speed.py"):
        flags |= set(re.findall(r'"(--[\w-]+)"', read("train.py")))
        flags |= {"--" + name.lower().replace("_", "-") for name in train.SETTINGS}
    return flags


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_files_that_exist(page):
    links = re.findall(r'(?:\]\(|src=")([^)"]+)', read(page))
    files = [link.split("#")[0] for link in links if not link.startswith("http")]
    assert len(files) > 5
    for file in files:
        assert ((ROOT / page).parent / file).exists(), file


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_scripts_and_flags_that_exist(page):
    known, count = flags_of("train.py") | flags_of("sample.py"), 0
    for script, rest in commands(read(page)):
        assert (ROOT / script).exists(), script
        flags = set(re.findall(r"--[\w-]+", rest))
        assert flags <= flags_of(script), script
        known |= flags_of(script)
        count += len(flags)
    assert count > 5
    assert set(re.findall(r"`(--[\w-]+)", read(page))) <= known  # those without a command


@pytest.mark.parametrize("page", [*PAGES, "train.py", "sample.py"])
def test_settings_in_commands_can_be_parsed(page):
    text = read(page)
    if page.endswith(".py"):
        text = ast.get_docstring(ast.parse(text))
    for script, rest in commands(text):
        words = shlex.split(rest.split("#")[0])
        if script == "train.py" and "N" not in words and "S" not in words and "|" not in words:
            train.parse_flags([word for word in words if word != "..."])


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_pasted_into_any_shell(page):
    # The shells of macOS and Windows take a comment for arguments, and older PowerShells refuse &&.
    blocks = re.findall(r"```bash\n(.*?)```", read(page), re.DOTALL)
    lines = "".join(blocks).splitlines()
    assert len(lines) > 5
    for line in lines:
        assert not re.search(r"[#\\'~$]", line), line
        assert "&&" not in line or line.endswith("&& pytest -n auto"), line


def test_the_readme_quotes_code_that_is_there():
    code = read("model.py") + read("train.py") + read("sample.py")
    quoted = re.findall(r"^\| `([^`]* = [^`]*|return [^`]*)` \|", read("README.md"), re.MULTILINE)
    assert len(quoted) > 8
    for line in quoted:
        assert line in code, line


# One way: experiments -> train -> sample -> model -> support, and train -> data -> support.
MAY_IMPORT = {
    "support": {"support"},
    "data": {"support", "data"},
    "model.py": {"support"},
    "sample.py": {"support", "model"},
    "train.py": {"support", "data", "model", "sample"},
}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_run_one_way(name):
    ours = {"support", "data", "model", "sample", "train", "experiments", "tests"}
    imported = set()
    for file in [ROOT / name, *(ROOT / name).glob("*.py")]:
        if file.is_dir():
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported & ours <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", ["model.py", "sample.py", "train.py"])
def test_support_is_imported_before_torch(name):
    # OpenMP reads how long its threads wait when torch is loaded.
    imports = re.findall(r"^(?:import|from) (\w+)", read(name), re.MULTILINE)
    assert imports.index("support") < imports.index("torch")


def test_the_environment_is_described_by_three_requirements():
    names = {re.split("[>=]", line)[0] for line in read("requirements.txt").split()}
    assert names == {"torch", "torchvision", "huggingface_hub[torch]"}


# The networks that come along


def mean_colours(pictures):
    """(B, 3): of the middle, where the wings are."""
    return pictures[:, :, 20:44, 20:44].float().mean((2, 3))


def test_the_drawn_butterflies_that_come_along_have_the_colour_of_their_class():
    model = DiT.from_pretrained(ROOT / "assets" / "laptop")
    drawn, _, names = draw_butterflies(1, 64, seed=5)
    assert model.class_names == names
    classes = torch.arange(5) * 15 + 10  # plain and round, in each colour
    (sampled,) = generate(model, classes, steps=10)
    distances = torch.cdist(mean_colours(sampled), mean_colours(drawn[classes]))
    assert distances.argmin(1).tolist() == [0, 1, 2, 3, 4]


def test_the_real_butterflies_that_come_along_are_of_their_species(tmp_path):
    folder, colours = ROOT / "assets" / "butterflies", {}
    for name in ("MONARCH", "BLUE MORPHO"):
        flags = ["--checkpoint", folder, "--class-name", name, "--num-images", 8, "--steps", 10]
        call("sample", *flags, "--output", tmp_path / "row.png", cwd=tmp_path)
        row = pil_to_tensor(opened(tmp_path / "row.png")).float()
        assert row.shape == (3, 66 + 2, 8 * 66 + 2)
        colours[name] = row.mean((1, 2))
    (red, _, blue), (other_red, _, other_blue) = colours.values()
    assert red - blue > other_red - other_blue + 20  # orange wings, and blue ones


@pytest.mark.parametrize("name, limit", [("laptop", 4e6), ("butterflies", 12e6)])
def test_what_comes_along_is_small(name, limit):
    assert sum(path.stat().st_size for path in (ROOT / "assets" / name).iterdir()) < limit
