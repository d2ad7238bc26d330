"""What people do first: they edit a constant, add one of their own, break something, and look at
the traceback. Here copies of the files are edited, and imported in place of the project's own."""

import argparse
import errno
import importlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from unittest.mock import Mock

from support.settings import UserError

import helpers
import pytest
import torch
from fuzz import fuzz
from helpers import (
    FEW,
    POSIX,
    SMALL,
    call,
    edit,
    edited,
    files,
    finish,
    refused,
    rows,
    save,
    solid,
    state,
)

import train

OURS = ("model", "sample", "train", "data", "support")


@pytest.fixture
def use(monkeypatch):
    """A function that puts an edited copy in the place of the project, until the test ends. Its
    modules are imported again, and the libraries, which take longest, are not."""

    def use(copy):
        for name in list(sys.modules):
            if name.split(".")[0] in OURS:
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(copy)
        command = importlib.import_module("support.settings").run_command
        monkeypatch.setattr(helpers, "run_command", command)

    return use


def saved_settings(folder):
    return state(folder / "out")["settings"]


def flag_of(name):
    return "--" + name.lower().replace("_", "-")


def constant(line):
    """The change of train.py that adds a line to its constants."""
    seed = "SEED = 0  # seeds all random numbers\n"
    return seed, f"{seed}{line}\n"


# Constants and flags

OWN = """
ONE_SPACE = 1.0 # my idea
NO_COMMENT = -2
STRANGE = "a # b"  # 100% of "it" {x} %s %(prog)s \\d # é 蝶
SWITCH = True  # on or off
ZERO: float = 0  # nothing, with a type
CHAINED = TWICE = 7
LARGE = (
    2**40  # computed
)
import numpy
NUMPY = numpy.float64(0.5)  # which torch.load would refuse
A_TUPLE = (1, 2)  # no flag
NOTHING = None
A_PATH = Path("somewhere")
"""
OWN_SETTINGS = {"ONE_SPACE": 1.0, "NO_COMMENT": -2, "STRANGE": "a # b", "SWITCH": True, "ZERO": 0}
OWN_SETTINGS |= {"CHAINED": 7, "TWICE": 7, "LARGE": 2**40, "NUMPY": 0.5}


def test_constants_of_ones_own_are_flags_and_come_back(use, pictures, tmp_path):
    an_import = ("import copy\n", "import copy\nfrom argparse import SUPPRESS\n")  # a str
    use(edited(tmp_path, "train.py", constant(OWN), an_import))
    out, _ = call("train", "--help", cwd=tmp_path)
    flags = set(re.findall(r"--[\w-]+", out))
    names = OWN_SETTINGS.keys() | train.SETTINGS.keys() | {"NO_SWITCH"}
    assert flags >= {flag_of(name) for name in names}
    assert "my idea" in out and "100% of" in out and "{x} %s %(prog)s" in out
    data = out.split("\ndata:\n")[1].split("\nmodel:\n")[0]  # a section, with its comments
    assert "share of pictures that are mirrored" in data and "(default: 0.5)" in data
    for name in ("A_TUPLE", "NOTHING", "A_PATH", "SUPPRESS", "MIN_T"):
        assert flag_of(name) not in flags

    run = [*FEW, "--dataset", pictures, "--overwrite", "--steps"]
    call("train", *run, 1, cwd=tmp_path)
    assert OWN_SETTINGS.items() <= saved_settings(tmp_path).items()
    changed = ["--one-space", 2.5, "--no-comment", -1, "--strange", "x", "--no-switch"]
    changed += ["--zero", 0.25, "--large", "1e3"]
    expected = {**OWN_SETTINGS, "ONE_SPACE": 2.5, "NO_COMMENT": -1, "STRANGE": "x"}
    expected |= {"SWITCH": False, "ZERO": 0.25, "LARGE": 1000}
    call("train", *run, 2, *changed, cwd=tmp_path)
    assert expected.items() <= saved_settings(tmp_path).items()
    assert isinstance(saved_settings(tmp_path)["LARGE"], int)  # 1e3 is whole
    call("train", "--resume", "--steps", 3, cwd=tmp_path)
    assert expected.items() <= saved_settings(tmp_path).items()


def test_a_constant_whose_flag_is_taken_is_named(use, tmp_path):
    use(edited(tmp_path, "train.py", constant("PRESET = 1")))
    with pytest.raises(argparse.ArgumentError, match="--preset"):
        finish("train", cwd=tmp_path)


def test_whole_numbers_and_floats_mean_the_same(use, pictures, tmp_path):
    new = {"FLIP_SHARE = 0.5": "FLIP_SHARE = 0", "GRAD_CLIP = 1.0": "GRAD_CLIP = 1"}
    new |= {"STEPS = 25000": "STEPS = 2e0", "BATCH_SIZE = 32": "BATCH_SIZE = 4.0"}
    use(edited(tmp_path, "train.py", *new.items()))
    call("train", *SMALL, "--dataset", pictures, cwd=tmp_path)
    saved = saved_settings(tmp_path)
    assert saved["STEPS"] == 2 and saved["BATCH_SIZE"] == 4 and saved["FLIP_SHARE"] == 0
    more = ["--steps", "3e0", "--flip-share", 0.25, "--grad-clip", 0.5]
    call("train", "--resume", *more, cwd=tmp_path)
    saved = saved_settings(tmp_path)
    assert saved["STEPS"] == 3 and saved["FLIP_SHARE"] == 0.25 and saved["GRAD_CLIP"] == 0.5


def test_a_constant_edited_into_something_else_hurts_nobody(use, pictures, tmp_path):
    new = {"T_STD = 1.0": "T_STD = (0.5, 1.5)", "T_STD * n)": "T_STD[1] * n)"}
    new |= {"WARMUP_STEPS = 200": "WARMUP_STEPS = None"}
    new |= {"max(1, min(WARMUP_STEPS, STEPS // 10))": "1"}
    use(edited(tmp_path, "train.py", *new.items()))
    call("train", *FEW, "--dataset", pictures, "--steps", 2, cwd=tmp_path)
    call("train", "--resume", "--steps", 3, cwd=tmp_path)
    out, _ = call("train", "--help", cwd=tmp_path)
    assert "--t-std" not in out and "--t-mean" in out


# Limits. Pictures are of 16x16, and DIM is 16.

BAD = "FLIP_SHARE=1.5 LABEL_DROP=-0.1 DECAY_SHARE=7 EMA_DECAY=5 EVAL_EVERY=0 SAMPLE_EVERY=-1 "
BAD += "CHECKPOINT_EVERY=0 LOG_EVERY=2.5 STEPS=10.5 BATCH_SIZE=0 ACCUMULATE=0 WARMUP_STEPS=-1 "
BAD += "LEARNING_RATE=-1 LEARNING_RATE=nan T_STD=-1 T_MEAN=inf GRAD_CLIP=nan CFG_SCALE=nan "
BAD += f"SEED={2**32} STEPS=inf COMPILE=maybe PRECISION=fp8 DIM=16.5 DEPTH=three PATCH_SIZE=5 "
BAD += "HEADS=3 CONV_DIM=-2"


@pytest.mark.parametrize("setting", BAD.split())
def test_a_flag_out_of_range_is_refused_by_name(tmp_path, setting):
    name, value = setting.split("=")
    line = refused("train", *FEW, "--dataset", "drawn", f"{flag_of(name)}={value}", cwd=tmp_path)
    assert flag_of(name)[2:].replace("-", "_") in line.lower().replace("-", "_") and value in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, value", [("EMA_DECAY", 5), ("STEPS", "many"), ("SEED", 0.5)])
def test_a_constant_out_of_range_is_refused_by_name(monkeypatch, tmp_path, name, value):
    monkeypatch.setattr(train, name, value)  # as an edit of the file would
    assert f"{name} is {value!r}" in refused("train", "--dataset", "drawn", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_state_with_a_value_out_of_range_is_refused_by_name(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    changed = state(tmp_path / "out")
    changed["settings"]["EMA_DECAY"] = 5
    torch.save(changed, tmp_path / "out" / "train_state.pt")
    assert "EMA_DECAY is 5" in refused("train", "--resume", "--steps", 40, cwd=tmp_path)
    call("train", "--resume", "--steps", 31, "--ema-decay", 0.9, cwd=tmp_path)


# Presets


@pytest.mark.parametrize("name", train.PRESETS)
def test_a_preset_is_a_line_of_flags_that_others_override(name):
    _, preset = train.parse_flags(["--preset", name])
    assert preset == train.parse_flags(train.PRESETS[name].split())[1] and len(preset) > 1
    for order in (["--steps", "7", "--preset", name], ["--preset", name, "--steps", "7"]):
        assert train.parse_flags(order) == ({"preset": name}, {**preset, "STEPS": 7})


def test_a_mistake_in_a_preset_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(train.PRESETS, "mine", "--dataset drawn --conv-width 64")
    assert "--conv-width" in refused("train", "--preset", "mine", cwd=tmp_path)
    monkeypatch.setitem(train.PRESETS, "mine", "--dataset drawn --label-drop 2")
    assert "LABEL_DROP is 2" in refused("train", "--preset", "mine", cwd=tmp_path)


# Notebooks


def words(pictures, *more):
    return list(map(str, [*FEW, "--dataset", pictures, *more]))


def test_main_runs_in_a_notebook_and_puts_the_constants_back(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    before = dict(train.SETTINGS)
    train.main(words(pictures, "--steps", 2, "--ema-decay", 0.5))
    assert {name: getattr(train, name) for name in before} == before
    monkeypatch.setattr(train, "LABEL_DROP", 0.75)  # as a cell would
    train.main(words(pictures, "--steps", 1, "--out-dir", "second"))
    second = state(tmp_path / "second")["settings"]
    assert second["EMA_DECAY"] == before["EMA_DECAY"] and second["STEPS"] == 1
    assert second["LABEL_DROP"] == 0.75 and train.LABEL_DROP == 0.75
    monkeypatch.setattr(train, "OUT_DIR", "second")
    with pytest.raises(UserError, match="second holds a run"):  # not: unrecognized arguments
        train.main()


def test_main_runs_in_a_thread(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train.main, words(pictures, "--steps", 2)).result()
    assert state(tmp_path / "out")["step"] == 2


def assert_all_settings_are_saved(main, pictures, folder, expected):
    """Two runs, of which the second continues the first."""
    main(words(pictures, "--steps", 1, "--ema-decay", 0.5))
    main(["--resume", "--steps", "2"])
    assert saved_settings(folder).keys() == expected
    assert saved_settings(folder)["EMA_DECAY"] == 0.5


def test_a_module_that_is_reloaded_has_the_same_settings(use, pictures, tmp_path, monkeypatch):
    copy = edited(tmp_path, "train.py")
    use(copy)
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("train")
    edit(copy / "train.py", constant("MINE = 5  # my idea"))
    importlib.reload(module)
    importlib.reload(module)
    expected = train.SETTINGS.keys() | {"MINE"}
    assert_all_settings_are_saved(module.main, pictures, tmp_path, expected)


def test_a_file_that_is_run_twice_has_the_same_settings(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(inspect.getsource(train), "train.py", "exec")
    namespace = {"__name__": "a notebook", "MINE": 5}  # a name of the notebook, and no setting
    exec(code, namespace)
    exec(code, namespace)
    main = namespace["main"]
    assert_all_settings_are_saved(main, pictures, tmp_path, train.SETTINGS.keys())


# Bugs, each planted where a reader might: (file, line before, the bug, what the traceback says).

INIT = "        self.image_size = image_size\n"
FORWARD = "        c = F.silu(c)  # (B, dim)\n"
LOOP = "            bar.update()\n"
EULER = "        z = z - (t - t_next) * v\n"
CARD = '    path = folder / "README.md"\n'
STAGING = '    staging = out / ".writing"\n'
BUGS = [
    ("model.py", INIT, "self.planted = foo", NameError),
    ("model.py", INIT, "planted = torch.zeros(3).view(2)", RuntimeError),
    ("model.py", FORWARD, "planted = z + torch.zeros(7)", RuntimeError),
    ("train.py", LOOP, "planted = {}['step']", KeyError),
    ("train.py", LOOP, "planted = open('notes.txt')", FileNotFoundError),
    ("sample.py", EULER, "planted = z + torch.zeros(7)", RuntimeError),
    ("support/hub.py", CARD, "planted = int('many')", ValueError),
    ("support/checkpoint.py", STAGING, "planted = {}['more']", KeyError),
]


def planted(bug, folder):
    """A copy of the project in which one of BUGS is planted."""
    name, line, statement, _ = bug
    indent = " " * (len(line) - len(line.lstrip()))
    return edited(folder, name, (line, f"{line}{indent}{statement}\n"))


def assert_raised(error, statement, *command, cwd):
    """The command ends with this very error, and a traceback that shows the line."""
    with pytest.raises(error) as raised:
        finish(*command, cwd=cwd)
    assert raised.type is error
    assert statement in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_of_ones_own_shows_its_line(use, pictures, tmp_path, bug):
    use(planted(bug, tmp_path))
    run = [*FEW, "--dataset", pictures, "--steps", 2, "--sample-every", 1]
    assert_raised(bug[3], bug[2], "train", *run, cwd=tmp_path)


@pytest.mark.parametrize("bug", BUGS[:3])
def test_a_bug_in_the_network_shows_its_line_when_it_is_sampled(use, trained, tmp_path, bug):
    use(planted(bug, tmp_path))
    command = ["sample", "--checkpoint", trained / "out", "--class-id", 0, "--device", "cpu"]
    assert_raised(bug[3], bug[2], *command, cwd=tmp_path)


def test_a_bug_in_a_compiled_block_shows_its_line(use, pictures, tmp_path):
    line = "        x = x + gate2[:, None] * self.mlp(modulate(norm(x), shift2, scale2))\n"
    use(edited(tmp_path, "model.py", (line, f"{line}        x = x + torch.zeros(7)\n")))
    run = [*FEW, "--dataset", pictures, "--steps", 2, "--compile", "on"]
    assert_raised(RuntimeError, "\n    x = x + torch.zeros(7)\n", "train", *run, cwd=tmp_path)


# Edits of the network and of the training

OWN_LAYERS = {  # weights that blocks share, dropout, a batch norm
    "Block(dim, heads) for _ in range(depth)": "[Block(dim, heads)] * depth",
    "nn.Linear(4 * dim, dim))": "nn.Linear(4 * dim, dim), nn.Dropout(0.3))",
    "        self.initialize()\n": "        self.own = nn.BatchNorm1d(dim); self.initialize()\n",
    FORWARD: "        c = F.silu(self.own(c))\n",
}
OWN_COLUMN = ("                    row = {\n", '                    row = {\n"now": 1,\n')


def test_layers_of_ones_own_resume_bit_for_bit_and_can_be_sampled(use, pictures, tmp_path):
    use(edited(tmp_path, "model.py", *OWN_LAYERS.items()))
    run = [*FEW, "--depth", 2, "--dataset", pictures, "--warmup-steps", 1, "--decay-share", 0]
    call("train", *run, "--steps", 12, "--out-dir", "whole", cwd=tmp_path)
    call("train", *run, "--steps", 5, cwd=tmp_path)
    call("train", "--resume", "--steps", 12, cwd=tmp_path)
    helpers.assert_same_weights(tmp_path / "whole", tmp_path / "out")
    whole = state(tmp_path / "whole")
    assert torch.equal(whole["ema"]["own.running_mean"], whole["model"]["own.running_mean"])
    assert whole["ema"]["own.running_mean"].abs().max() > 0
    out, _ = call("sample", "--class-id", 0, "--steps", 2, cwd=tmp_path)
    assert (tmp_path / out.strip()).exists()


def test_a_resumed_run_takes_optimizer_and_columns_of_the_file(use, trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    betas = ('"betas": (0.9, 0.95)', '"betas": (0.8, 0.95)')
    use(edited(tmp_path, "train.py", betas, OWN_COLUMN))
    call("train", "--resume", "--steps", 31, cwd=tmp_path)
    assert saved_settings(tmp_path)["BATCH_SIZE"] == 8  # the run's, not the file's
    assert state(tmp_path / "out")["optimizer"]["param_groups"][0]["betas"] == (0.8, 0.95)
    table = [(row["step"], row["now"]) for row in rows(tmp_path / "out")]
    assert table == [("10", ""), ("20", ""), ("30", ""), ("31", "1")]


EDITS = {"LEARNING_RATE = 2e-3": "LEARNING_RATE = 1e-3", "LABEL_DROP = 0.1": "LABEL_DROP = 0.2"}


def test_a_constant_edited_since_the_run_began_counts_once_and_is_named(use, trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    more = ["BATCH_SIZE = 32 ", "BATCH_SIZE = 16 "]  # the run had 8, by a flag
    use(edited(tmp_path, "train.py", *EDITS.items(), more))
    out, _ = call("train", "--resume", "--steps", 31, "--label-drop", 0.3, cwd=tmp_path)
    assert "from here on, LEARNING_RATE is 0.001, not 0.002" in out
    assert "from here on, BATCH_SIZE is 16, not 8" in out
    assert "from here on, LABEL_DROP is 0.3, not 0.1" in out  # a flag wins
    assert out.count("from here on") == 4  # with STEPS
    saved = saved_settings(tmp_path)
    assert [saved[name] for name in ("LEARNING_RATE", "LABEL_DROP", "BATCH_SIZE")] == [
        1e-3,
        0.3,
        16,
    ]
    out, _ = call("train", "--resume", "--steps", 32, "--learning-rate", 5e-4, cwd=tmp_path)
    assert out.count("from here on") == 2  # the edit counted once; STEPS and the rate are flags
    assert saved_settings(tmp_path)["LEARNING_RATE"] == 5e-4
    call("train", "--resume", "--steps", 33, cwd=tmp_path)
    assert saved_settings(tmp_path)["LEARNING_RATE"] == 5e-4


def test_a_constant_that_came_since_the_run_began_is_named(use, trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    renamed = [
        ("T_MEAN = 0.4", "T_MIDDLE = 0.5"),
        ("torch.sigmoid(T_MEAN +", "torch.sigmoid(T_MIDDLE +"),
    ]
    use(edited(tmp_path, "train.py", *renamed))
    out, _ = call("train", "--resume", "--steps", 31, cwd=tmp_path)
    assert "from here on, T_MIDDLE is 0.5, not None" in out


@pytest.mark.parametrize("name, line", [("DIM", "DIM = 192"), ("SEED", "SEED = 0")])
def test_an_edited_size_or_seed_is_refused_as_a_flag_would_be(use, trained, tmp_path, name, line):
    shutil.copytree(trained / "out", tmp_path / "out")
    use(edited(tmp_path, "train.py", (line, f"{name} = 32")))
    before = files(tmp_path / "out")
    was = {"DIM": 16, "SEED": 0}[name]
    line = refused("train", "--resume", "--steps", 40, cwd=tmp_path)
    assert f"{name} is {was} in out, not 32" in line
    assert files(tmp_path / "out") == before


# A constant of the same name is all that a new argument of the network takes.
ARGUMENT = {"        conv_dim=0,\n": "        conv_dim=0,\n        dropout=0.0,\n"}
ARGUMENT["        self.initialize()\n"] = (
    "        self.blocks.append(nn.Dropout(dropout)); self.initialize()\n"
)
ARGUMENT["        for block in self.blocks:\n"] = "        for block in self.blocks[:-1]:\n"
ARGUMENT["block.modulation for block in self.blocks]"] = (
    "block.modulation for block in self.blocks[:-1]]"
)


def test_a_new_argument_of_the_network_is_a_constant_and_an_argument(use, pictures, tmp_path):
    copy = edited(tmp_path, "model.py", *ARGUMENT.items())
    edit(copy / "train.py", constant("DROPOUT = 0.25  # of the tokens"))
    use(copy)
    call("train", *FEW, "--dataset", pictures, "--steps", 1, "--dropout", 0.5, cwd=tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dropout"] == saved_settings(tmp_path)["DROPOUT"] == 0.5
    call("train", "--resume", "--steps", 2, cwd=tmp_path)
    line = refused("train", "--resume", "--steps", 3, "--dropout", 0.1, cwd=tmp_path)
    assert "DROPOUT is 0.5 in out, not 0.1" in line
    call("sample", "--class-id", 0, "--steps", 1, cwd=tmp_path)


ANOTHER_NETWORK = """
class DiT(nn.Module, PyTorchModelHubMixin):
    def __init__(self, image_size, width, class_names, dataset="", cfg_scale=3.0):
        super().__init__()
        self.image_size, self.class_names, self.cfg_scale = image_size, class_names, cfg_scale
        self.num_classes, self.dataset = len(class_names), dataset
        self.convs = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 1))

    def forward(self, z, t, y):
        return self.convs(z)

    from_pretrained = classmethod(OldDiT.from_pretrained.__func__)
"""


def test_another_network_in_the_place_of_dit_trains_and_is_sampled(use, pictures, tmp_path):
    copy = edited(tmp_path, "model.py", ("class DiT(", "class OldDiT("))
    with open(copy / "model.py", "a") as file:
        file.write(ANOTHER_NETWORK)
    edit(copy / "train.py", constant("WIDTH = 8"))
    use(copy)
    run = ["--image-size", 16, "--device", "cpu", "--batch-size", 4, "--dataset", pictures]
    call("train", *run, "--steps", 2, cwd=tmp_path)
    out, _ = call("sample", "--class-id", 0, "--steps", 2, cwd=tmp_path)
    assert (tmp_path / out.strip()).exists()


def test_a_module_of_ones_own_is_named_when_the_checkpoint_lacks_it(use, trained, tmp_path):
    line = "        self.final_modulation = nn.Linear(dim, 2 * dim)\n"
    use(edited(tmp_path, "model.py", (line, f"{line}        self.extra = nn.Linear(dim, dim)\n")))
    shutil.copytree(trained / "out", tmp_path / "out")
    line = refused("train", "--resume", "--steps", 40, cwd=tmp_path)
    assert "extra.weight" in line and "train_state.pt" in line
    line = refused("sample", cwd=tmp_path)
    assert "extra.weight" in line and "model.safetensors" in line


OWN_STATE = {  # a table that is made on first use, and a list that remembers each call
    "MIN_T = 0.05\n": "MIN_T = 0.05\nTABLES, CALLS = {}, []\n",
    FORWARD: "        c = F.silu(c) + TABLES.setdefault(0, torch.zeros(1, device=z.device))\n"
    "        CALLS.append(self.training)\n",
}


def test_the_network_is_run_once_a_step_and_on_its_own_device_alone(use, pictures, tmp_path):
    use(edited(tmp_path, "model.py", *OWN_STATE.items()))
    call("train", *FEW, "--dataset", pictures, "--steps", 3, cwd=tmp_path)
    model = sys.modules["model"]
    assert model.TABLES[0].device.type == "cpu" and model.CALLS.count(True) == 3


# The edits in the README


def hunks(block):
    """(file, old lines, new lines) of each part of a diff."""
    for of_file in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
        name, _, rest = of_file.partition("\n")
        for part in re.split(r"^@@\n", rest, flags=re.MULTILINE):
            lines = part.splitlines(keepends=True)
            yield (
                name,
                "".join(line[1:] for line in lines if line[0] != "+"),
                "".join(line[1:] for line in lines if line[0] != "-"),
            )


BLOCKS = re.findall(
    r"```diff\n(.*?)```", (helpers.ROOT / "README.md").read_text("utf-8"), re.DOTALL
)


@pytest.mark.parametrize("block", BLOCKS)
def test_an_edit_of_the_readme_works_on_a_copy(use, tmp_path, monkeypatch, block):
    copy = edited(tmp_path, "model.py")
    for name, old, new in hunks(block):
        edit(copy / name, (old, new))
    assert (
        sum(line[0] in "+-" for line in re.sub("^--- .*\n", "", block, flags=re.M).splitlines())
        <= 5
    )
    logged = []  # by a tracker that isn't installed here
    tracker = ModuleType("wandb")
    tracker.run, tracker.init = None, lambda **options: tracker
    tracker.log = lambda row, step: logged.append(json.loads(json.dumps(row)))
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    use(copy)
    run = [*FEW, "--dataset", "drawn", "--steps", 2, "--overwrite"]
    call("train", *run, cwd=tmp_path)
    out, _ = call("sample", "--class-id", 0, "--steps", 3, cwd=tmp_path)
    assert (tmp_path / out.strip()).exists()
    if "wandb" in block:
        assert [row["step"] for row in logged] == [2]
        assert all(isinstance(value, (int, float)) for value in logged[0].values())
    if "load_dataset" in block:
        assert "2 classes, such as blue, red" in call("train", *run, cwd=tmp_path)[0]


@pytest.mark.parametrize("names", ['("blue", "red")', 'list(numpy.array(["blue", "red"]))'])
def test_a_run_with_values_of_numpy_can_be_resumed(use, tmp_path, names):
    (block,) = [block for block in BLOCKS if "def load_dataset" in block]
    copy = edited(tmp_path, "train.py", ("import copy\n", "import copy\nimport numpy\n"))
    for name, old, new in hunks(block):
        edit(copy / name, (old, new.replace('["blue", "red"]', names)))
    row = '                    row |= {f"seen_{t}"'
    edit(copy / "train.py", (row, f'                    row["fid"] = numpy.float32(1.5)\n{row}'))
    use(copy)
    call("train", *FEW, "--steps", 2, cwd=tmp_path)
    call("train", "--resume", "--steps", 3, cwd=tmp_path)
    saved = state(tmp_path / "out")
    assert saved["class_names"] == ["blue", "red"] and saved["step"] == 3
    assert [row["fid"] for row in saved["log"]] == [1.5, 1.5]


def test_a_loss_may_be_negative(use, tmp_path):
    loss = "return F.mse_loss(model(z_t, t, y), v)"
    use(edited(tmp_path, "train.py", (loss, f"{loss} - 100")))
    run = [*FEW, "--dataset", "drawn", "--steps", 2, "--eval-every", 1]
    out, _ = call("train", *run, cwd=tmp_path)
    assert "held out -9" in out and "trained for" in out


def test_the_readme_has_the_six_edits_that_people_make_first():
    assert len(BLOCKS) == 6


# What is printed


def test_names_that_a_terminal_cannot_show_are_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    helpers.run_command(lambda: print("蝶"))
    assert terminal.buffer.getvalue().strip() == b"\\u8776"


def pasted(command, folder):
    """The arguments of `python train.py` in a printed command, as a shell reads it."""
    (folder / "train.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
    shell = ["bash", "-c", python + command]
    out = subprocess.run(shell, cwd=folder, capture_output=True, text=True, check=True).stdout
    return json.loads(out)


@POSIX
@pytest.mark.parametrize("name", ["out", "my run", "l'été 蝶"])
def test_what_a_run_tells_one_to_type_can_be_pasted(monkeypatch, pictures, tmp_path, name):
    run = [*FEW, "--dataset", pictures, "--steps", 3, "--out-dir", name]
    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", lambda *_: signal.raise_signal(signal.SIGTERM))
        _, err = call("train", *run, cwd=tmp_path, status=143)
    (command,) = re.findall(r"python train\.py --resume.*", err)
    call("train", *pasted(command, tmp_path), cwd=tmp_path)
    assert state(tmp_path / name)["step"] == 3

    # The other command that a run prints: of a loss that is not finite.
    run = ["--resume", "--steps", 5, "--learning-rate", 1e38, "--out-dir", name]
    _, err = call("train", *run, "--log-every", 1, cwd=tmp_path, status=2)
    (command,) = re.findall(r"python train\.py --resume.*", err)
    _, settings = train.parse_flags(pasted(command, tmp_path))
    assert settings == {"OUT_DIR": name, "LEARNING_RATE": 5e37}


# Memory and disk

FAULTS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    RuntimeError("DefaultCPUAllocator: not enough memory"),  # on Windows
    lambda *arguments: torch.empty(2**60),  # what this machine says
]
for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "ENOTDIR", "EISDIR", "EPIPE"):
    FAULTS.append(OSError(getattr(errno, name), name, "out/grid.png"))


@pytest.mark.parametrize("error", FAULTS)
def test_too_little_memory_or_disk_is_one_line(monkeypatch, pictures, tmp_path, error):
    monkeypatch.setattr(train, "random_batch", Mock(side_effect=error))  # in the first step
    _, err = call("train", *FEW, "--dataset", pictures, cwd=tmp_path, status=2)
    expected = str(error) if isinstance(error, OSError) else "out of memory: "
    line = err.splitlines()[-1]
    assert line.startswith(f"train.py: error: {expected}")


@pytest.mark.parametrize("flag, near", [("--bath-size=4", "--batch-size"), ("--stesp", "--steps")])
def test_a_mistyped_flag_names_the_nearest(tmp_path, flag, near):
    line = refused("train", flag, "--dataset", "drawn", cwd=tmp_path)
    assert re.search(f"unrecognized arguments: {flag}; did you mean {near}\\?", line)
    assert "laptop" in refused("train", "--preset", "labtop", cwd=tmp_path)


# Long


@pytest.mark.slow
def test_mutated_files_are_read_or_refused():
    assert fuzz(int(os.environ.get("NANODIT_FUZZ", 16)), first_seed=100) == []


@pytest.mark.slow
def test_ten_thousand_classes_train_resume_and_are_sampled(tmp_path):
    for n in range(10_000):
        picture = solid(colour=(n % 256, n // 256, 90), size=(4, 4))
        save(picture, tmp_path / "many" / f"c{n:05}" / "0.png")
    call("train", *FEW, "--dataset", "many", "--steps", 2, cwd=tmp_path)
    out, _ = call("train", "--resume", "--steps", 3, cwd=tmp_path)
    assert "10000 classes" in out and len(out) < 1000
    call("sample", "--class-name", "C09999", "--steps", 1, "--output", "one.png", cwd=tmp_path)
    assert (tmp_path / "one.png").exists()
