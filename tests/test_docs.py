"""What the pages promise: files, commands, flags and code that are there; imports one way; and
networks that sample what their classes are called."""

import ast
import re
import shlex
import sys

import pytest
import torch
from helpers import ROOT

import sample
import train
from data.drawn import draw_butterflies
from model import DiT

PAGES = ["README.md", "experiments/RESULTS.md", "experiments/notes.md"]
COMMAND = r"(?:python|torchrun)(?: --[\w=]+)* (-m experiments\.\w+|[\w/]+\.py)([^`\n]*)"


def read(page):
    return (ROOT / page).read_text("utf-8")


def pasted_lines(page):
    """The lines of a page's blocks of commands."""
    return "".join(re.findall(r"```bash\n(.*?)```", read(page), re.DOTALL)).splitlines()


def flags_of(script):
    """All flags that a script knows."""
    flags = {"--help", *re.findall(r'"(--[\w-]+)"', read(script))}
    if script == "train.py" or "train.parse_flags(" in read(script):
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
    known, used = flags_of("train.py") | flags_of("sample.py"), set()
    for script, rest in re.findall(COMMAND, read(page)):
        if script.startswith("-m "):
            script = script.removeprefix("-m ").replace(".", "/") + ".py"
        flags = set(re.findall(r"--[\w-]+", rest))
        assert flags <= flags_of(script), script
        known |= flags_of(script)
        used |= flags
    assert len(used) > 5
    assert set(re.findall(r"`(--[\w-]+)", read(page))) <= known  # those without a command


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_pasted_into_any_shell_and_are_understood(page):
    lines = pasted_lines(page)
    assert len(lines) > 5
    for line in lines:
        # The shells of macOS and Windows take a comment for arguments; older PowerShells know
        # neither && nor a backslash at the end.
        assert not re.search(r"[#\\'~$]", line), line
        assert "&&" not in line or line.endswith("&& pytest -n auto"), line
        words = shlex.split(line)
        for module in (train, sample):
            if words[1:2] == [f"{module.__name__}.py"]:
                module.parse_flags(words[2:])


def test_the_readme_quotes_code_that_is_there():
    code = read("model.py") + read("train.py") + read("sample.py")
    quoted = re.findall(r"^\| `([^`]* = [^`]*|return [^`]*)` \|", read("README.md"), re.MULTILINE)
    assert len(quoted) > 8
    for line in quoted:
        assert line in code, line


# experiments -> train -> sample -> model, and train -> data -> support <- sample
MAY_IMPORT = {
    "support/*.py": {"support"},
    "data/*.py": {"support", "data"},
    "model.py": set(),
    "sample.py": {"support", "model"},
    "train.py": {"support", "data", "model", "sample"},
}
OURS = {"support", "data", "model", "sample", "train", "experiments", "tests"}


def imports(file):
    """The first parts of the names of all modules that a file imports, in order."""
    names = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module.split(".")[0])
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
    return names


@pytest.mark.parametrize("pattern", MAY_IMPORT)
def test_imports_run_one_way(pattern):
    for file in ROOT.glob(pattern):
        names = imports(file)
        assert OURS & set(names) <= MAY_IMPORT[pattern], file
        if pattern in ("sample.py", "train.py"):
            # OpenMP reads how long its threads wait when torch is loaded.
            assert names.index("support") < names.index("torch")
    if pattern == "model.py":  # which people copy into their own projects
        assert set(names) - set(sys.stdlib_module_names) == {"torch", "huggingface_hub"}


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
    (sampled,) = sample.generate(model, classes, steps=10)
    distances = torch.cdist(mean_colours(sampled), mean_colours(drawn[classes]))
    assert distances.argmin(1).tolist() == [0, 1, 2, 3, 4]


def test_the_real_butterflies_that_come_along_are_of_their_species():
    model = DiT.from_pretrained(ROOT / "assets" / "butterflies")
    ids = [model.class_names.index(name) for name in ("MONARCH", "BLUE MORPHO")]
    (sampled,) = sample.generate(model, torch.tensor(ids).repeat_interleave(8), steps=10)
    monarch, morpho = mean_colours(sampled).unflatten(0, (2, 8)).mean(1)
    assert monarch[0] - monarch[2] > morpho[0] - morpho[2] + 20  # orange wings, and blue ones
