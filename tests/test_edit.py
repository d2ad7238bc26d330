"""What the project is for: people edit the files. Copies of them are edited here, and run."""

import csv
import shutil
import signal
import threading
import time

import pytest
import torch
from conftest import POSIX, ROOT, SMALL, call, finish, refused, start
from PIL import Image

import train

FEW = [*SMALL, "--batch-size", 4]


def edited(folder, name, *changes):
    """A copy of the project in which each (old, new) has been replaced in one file."""
    copy = folder / "copy"
    shutil.copytree(ROOT / "data", copy / "data")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    edit(copy / name, *changes)
    return copy


def edit(file, *changes):
    """Replace each (old, new) in a file."""
    text = file.read_text("utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text, "utf-8")


def settings(folder):
    return torch.load(folder / "out" / "train_state.pt", weights_only=True)["settings"]


def constant(line):
    """The change of train.py that adds a line to its constants."""
    seed = "SEED = 0  # seeds all random numbers\n"
    return seed, f"{seed}{line}\n"


OWN = """
ONE_SPACE = 1.0 # my idea
NO_COMMENT = 2
STRANGE = "a # b"  # 100% of "it" {x} %s %(prog)s \\d # é 蝶
SWITCH = True  # on or off
NEGATIVE = -3  # below zero
ZERO = 0  # nothing
ANNOTATED: float = 0.5  # with a type
CHAINED = TWICE = 7
LARGE = 2**40  # computed
IN_PARENTHESES = (
    1.5  # on a line of its own
)
if SWITCH:
    INDENTED = 4
import numpy
NUMPY = numpy.float64(0.5)  # which torch.load would refuse
A_TUPLE = (1, 2)  # no flag
A_LIST = [1, 2]
NOTHING = None
A_PATH = Path("somewhere")
lower_case = 5
"""
OWN_SETTINGS = {
    "ONE_SPACE": 1.0,
    "NO_COMMENT": 2,
    "STRANGE": "a # b",
    "SWITCH": True,
    "NEGATIVE": -3,
    "ZERO": 0,
    "ANNOTATED": 0.5,
    "CHAINED": 7,
    "TWICE": 7,
    "LARGE": 2**40,
    "IN_PARENTHESES": 1.5,
    "INDENTED": 4,
    "NUMPY": 0.5,
}


def test_constants_of_ones_own_are_flags_and_come_back(pictures, tmp_path):
    an_import = ("import copy\n", "import copy\nfrom argparse import SUPPRESS\n")  # a str
    script = edited(tmp_path, "train.py", constant(OWN), an_import) / "train.py"
    out, _ = call(script, "--help", cwd=tmp_path)
    flags = {word for word in out.replace(",", " ").split() if word.startswith("--")}
    for name in OWN_SETTINGS:
        assert "--" + name.lower().replace("_", "-") in flags, name
    assert "--no-switch" in flags
    assert "my idea" in out and "100% of" in out and "{x} %s %(prog)s" in out
    for name in ("A_TUPLE", "A_LIST", "NOTHING", "A_PATH", "LOWER_CASE", "SUPPRESS"):
        assert "--" + name.lower().replace("_", "-") not in flags

    call(script, *FEW, "--dataset", pictures, "--steps", 1, cwd=tmp_path)
    assert OWN_SETTINGS.items() <= settings(tmp_path).items()
    changed = ["--one-space", 2.5, "--no-comment", -1, "--strange", "x", "--no-switch"]
    changed += ["--zero", 0.25, "--annotated", 3, "--large", "1e3", "--indented", "7"]
    expected = {**OWN_SETTINGS, "ONE_SPACE": 2.5, "NO_COMMENT": -1, "STRANGE": "x"}
    expected |= {"SWITCH": False, "ZERO": 0.25, "ANNOTATED": 3, "LARGE": 1000, "INDENTED": 7}
    call(script, *FEW, "--dataset", pictures, *changed, "--steps", 2, "--overwrite", cwd=tmp_path)
    assert expected.items() <= settings(tmp_path).items()
    assert isinstance(settings(tmp_path)["LARGE"], int)  # 1e3 is whole
    call(script, "--resume", "--steps", 3, cwd=tmp_path)
    assert expected.items() <= settings(tmp_path).items()


def test_a_constant_whose_flag_is_taken_is_named(tmp_path):
    script = edited(tmp_path, "train.py", constant("PRESET = 1")) / "train.py"
    assert "rename the constant PRESET" in refused(script, cwd=tmp_path)


def test_main_runs_in_a_notebook(pictures, tmp_path):
    (tmp_path / "ipykernel.py").touch()
    run = [*FEW, "--dataset", pictures, "--steps", "1", "--out-dir", "mine"]
    cell = f"import ipykernel, train; train.main({[*map(str, run)]})\n"
    cell += "train.OUT_DIR = 'mine'; train.DATASET = '/no/such'\ntrain.main()\n"
    (tmp_path / "kernel.py").write_text(cell)
    extra = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    code, _, err = finish(tmp_path / "kernel.py", "-f", "kernel.json", cwd=tmp_path, **extra)
    assert code == 1 and "UserError: mine holds a run" in err  # not: unrecognized arguments


def test_whole_numbers_and_floats_mean_the_same(pictures, tmp_path):
    changes = [
        ("FLIP_SHARE = 0.5", "FLIP_SHARE = 0"),
        ("GRAD_CLIP = 1.0", "GRAD_CLIP = 1"),
        ("STEPS = 12000", "STEPS = 2e0"),
        ("BATCH_SIZE = 256", "BATCH_SIZE = 4.0"),
        ("EVAL_EVERY = 250", "EVAL_EVERY = 1e0"),
    ]
    script = edited(tmp_path, "train.py", *changes) / "train.py"
    call(script, *SMALL, "--dataset", pictures, cwd=tmp_path)
    assert settings(tmp_path)["STEPS"] == 2 and settings(tmp_path)["BATCH_SIZE"] == 4
    assert settings(tmp_path)["FLIP_SHARE"] == 0
    call(script, "--resume", "--steps", "3e0", cwd=tmp_path)
    assert settings(tmp_path)["STEPS"] == 3
    call(script, "--resume", "--steps", 4, "--flip-share", 0.25, "--grad-clip", 0.5, cwd=tmp_path)
    assert settings(tmp_path)["FLIP_SHARE"] == 0.25 and settings(tmp_path)["GRAD_CLIP"] == 0.5
    assert (tmp_path / "out" / "log.csv").read_text().count("\n") == 5


BAD = [
    ("FLIP_SHARE", 1.5),
    ("LABEL_DROP", -0.1),
    ("DECAY_SHARE", 7),
    ("EMA_DECAY", 5),
    ("EVAL_EVERY", 0),
    ("SAMPLE_EVERY", -1),
    ("CHECKPOINT_EVERY", 0),
    ("LOG_EVERY", 2.5),
    ("STEPS", 10.5),
    ("WARMUP_STEPS", -1),
    ("T_STD", -1),
    ("T_MEAN", "inf"),
    ("GRAD_CLIP", "nan"),
    ("SEED", 2**63),
    ("COMPILE", "maybe"),
    ("DIM", 16.5),
]


@pytest.mark.parametrize("name, value", BAD)
def test_a_flag_out_of_range_is_refused_by_name(tmp_path, name, value):
    flag = "--" + name.lower().replace("_", "-")
    line = refused("train.py", *FEW, "--dataset", "drawn", flag, value, cwd=tmp_path)
    assert name in line and str(value) in line
    assert list(tmp_path.iterdir()) == []


def test_values_out_of_range_in_the_file_or_a_preset_are_refused_by_name(tmp_path):
    change = ("EMA_DECAY = 0.999", "EMA_DECAY = 5")
    script = edited(tmp_path / "file", "train.py", change) / "train.py"
    assert "EMA_DECAY is 5" in refused(script, "--dataset", "drawn", cwd=tmp_path)
    change = ("STEPS = 12000", 'STEPS = "many"')
    script = edited(tmp_path / "text", "train.py", change) / "train.py"
    assert "STEPS is 'many'" in refused(script, "--dataset", "drawn", cwd=tmp_path)
    change = ('"EMA_DECAY": 0.998', '"LABEL_DROP": 2')
    script = edited(tmp_path / "preset", "train.py", change) / "train.py"
    assert "LABEL_DROP is 2" in refused(script, "--preset", "laptop", cwd=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_state_with_a_value_out_of_range_is_refused_by_name(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    state = torch.load(tmp_path / "out" / "train_state.pt", weights_only=True)
    state["settings"]["EMA_DECAY"] = 5
    torch.save(state, tmp_path / "out" / "train_state.pt")
    line = refused("train.py", "--resume", "--steps", 40, cwd=tmp_path)
    assert "EMA_DECAY is 5" in line
    call("train.py", "--resume", "--steps", 31, "--ema-decay", 0.9, cwd=tmp_path)


def test_a_constant_edited_into_something_else_hurts_nobody(pictures, tmp_path):
    changes = [
        ("T_STD = 1.0", "T_STD = (0.5, 1.5)"),
        ("T_STD * n)", "T_STD[1] * n)"),
        ("WARMUP_STEPS = 200", "WARMUP_STEPS = None"),
        ("max(1, min(WARMUP_STEPS, STEPS // 10))", "1"),
    ]
    script = edited(tmp_path, "train.py", *changes) / "train.py"
    call(script, *FEW, "--dataset", pictures, "--steps", 2, cwd=tmp_path)
    call(script, "--resume", "--steps", 3, cwd=tmp_path)
    out, _ = call(script, "--help", cwd=tmp_path)
    assert "--t-std" not in out and "--t-mean" in out


def test_a_second_main_starts_from_the_same_constants(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(train.SETTINGS)
    run = [*map(str, FEW), "--dataset", str(pictures)]
    train.main([*run, "--steps", "2", "--ema-decay", "0.5"])
    assert {name: getattr(train, name) for name in before} == before
    train.main([*run, "--steps", "1", "--out-dir", "second"])
    second = torch.load("second/train_state.pt", weights_only=True)["settings"]
    assert second["EMA_DECAY"] == before["EMA_DECAY"] and second["STEPS"] == 1
    monkeypatch.setattr(train, "LABEL_DROP", 0.75)  # as a notebook would
    train.main([*run, "--steps", "1", "--out-dir", "third"])
    third = torch.load("third/train_state.pt", weights_only=True)["settings"]
    assert third["LABEL_DROP"] == 0.75 and train.LABEL_DROP == 0.75


def test_main_runs_in_a_thread(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*map(str, FEW), "--dataset", str(pictures), "--steps", "2"]
    thread = threading.Thread(target=train.main, args=(arguments,))
    thread.start()
    thread.join(100)
    assert torch.load("out/train_state.pt", weights_only=True)["step"] == 2


# Bugs, each planted where a reader might: (file, line before, the bug, what the traceback says).
BUGS = {
    "a NameError in DiT.__init__": (
        "model.py",
        "        self.image_size = image_size\n",
        "self.planted = foo",
        "NameError",
    ),
    "a TypeError in DiT.__init__": (
        "model.py",
        "        self.image_size = image_size\n",
        "planted = len(image_size)",
        "TypeError",
    ),
    "a RuntimeError in DiT.__init__": (
        "model.py",
        "        self.image_size = image_size\n",
        "planted = torch.zeros(3).view(2)",
        "RuntimeError",
    ),
    "a wrong shape in DiT.forward": (
        "model.py",
        "        c = F.silu(c)  # (B, dim)\n",
        "planted = z + torch.zeros(7)",
        "RuntimeError",
    ),
    "a ValueError in the model card": (
        "hub.py",
        "    has_grid = last_grid(run) is not None\n",
        "planted = int('many')",
        "ValueError",
    ),
    "a NameError in the loss": (
        "train.py",
        "    v = noise - x\n",
        "planted = foo",
        "NameError",
    ),
    "a KeyError in the loop": (
        "train.py",
        "            update_ema(ema, model, step)\n",
        "planted = {}['step']",
        "KeyError",
    ),
    "an open() of a missing file in the loop": (
        "train.py",
        "            update_ema(ema, model, step)\n",
        "planted = open('notes.txt')",
        "FileNotFoundError",
    ),
    "a wrong shape in the sampler": (
        "sample.py",
        "        z = z - v / steps\n",
        "planted = z + torch.zeros(7)",
        "RuntimeError",
    ),
    "an AttributeError while pictures are read": (
        "data/images.py",
        '    image = image.convert("RGBA" if transparent else "RGB")\n',
        "planted = image.colour",
        "AttributeError",
    ),
    "a KeyError in what the state holds": (
        "common.py",
        '    staging = out / ".writing"\n',
        "planted = {}['more']",
        "KeyError",
    ),
}


def edited_with(bug, folder):
    """A copy of the project in which one of BUGS is planted."""
    name, line, planted, _ = BUGS[bug]
    indent = " " * (len(line) - len(line.lstrip()))
    return edited(folder, name, (line, f"{line}{indent}{planted}\n"))


def assert_shown(bug, code, err):
    """The process ended with the bug's own traceback."""
    _, _, planted, error = BUGS[bug]
    assert code == 1 and "Traceback" in err
    assert planted in err and err.strip().splitlines()[-1].startswith(error)


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_of_ones_own_shows_its_line(pictures, tmp_path, bug):
    script = edited_with(bug, tmp_path) / "train.py"
    run = [*FEW, "--dataset", pictures, "--steps", 2, "--sample-every", 1]
    code, _, err = finish(script, *run, cwd=tmp_path)
    assert_shown(bug, code, err)


def test_a_bug_in_a_compiled_block_shows_its_line(pictures, tmp_path):
    line = "        x = x + gate2[:, None] * self.mlp(modulate(norm(x), shift2, scale2))\n"
    only_compiled = "        if x.device.type != 'meta':  # on which costs are counted\n"
    change = (line, f"{line}{only_compiled}            x = x + torch.zeros(7)\n")
    script = edited(tmp_path, "model.py", change) / "train.py"
    run = [*FEW, "--dataset", pictures, "--steps", 2, "--compile", "on"]
    code, _, err = finish(script, *run, cwd=tmp_path)
    assert code == 1 and "Traceback" in err and "x = x + torch.zeros(7)" in err


@pytest.mark.parametrize("bug", [bug for bug in BUGS if "__init__" in bug or "forward" in bug])
def test_a_bug_in_the_network_shows_its_line_when_a_checkpoint_is_sampled(trained, tmp_path, bug):
    script = edited_with(bug, tmp_path) / "sample.py"
    flags = ["--checkpoint", trained / "out", "--class-id", 0, "--device", "cpu"]
    code, _, err = finish(script, *flags, cwd=tmp_path)
    assert_shown(bug, code, err)


def test_a_module_of_ones_own_is_named_when_the_checkpoint_lacks_it(trained, tmp_path):
    line = "        self.final_modulation = nn.Linear(dim, 2 * dim)\n"
    change = (line, f"{line}        self.extra = nn.Linear(dim, dim)\n")
    script = edited(tmp_path, "model.py", change) / "sample.py"
    line = refused(script, "--checkpoint", trained / "out", cwd=tmp_path)
    assert "extra.weight" in line and "model.safetensors" in line
    shutil.copytree(trained / "out", tmp_path / "out")
    line = refused(script.with_name("train.py"), "--resume", "--steps", 40, cwd=tmp_path)
    assert "extra.weight" in line and "train_state.pt" in line


# What a researcher may add to model.py: weights that blocks share, dropout, a batch norm.
OWN_LAYERS = [
    (
        "ModuleList(Block(dim, heads) for _ in range(depth))",
        "ModuleList([Block(dim, heads)] * depth)",
    ),
    ("nn.Linear(4 * dim, dim))", "nn.Linear(4 * dim, dim), nn.Dropout(0.3))"),
    (
        "        self.initialize()\n",
        "        self.own = nn.BatchNorm1d(dim)\n        self.initialize()\n",
    ),
    ("        c = F.silu(c)  # (B, dim)\n", "        c = F.silu(self.own(c))\n"),
]
# And to train.py: a loss that looks at values, groups of weights, a column of the log.
OWN_LOSS = """
    loss = F.mse_loss(model(z_t, t, y), v)
    assert loss.item() < 99
    return loss
"""
TWO_GROUPS = """AdamW(
        [
            {"params": [w for w in model.parameters() if w.ndim > 1], "weight_decay": 0.1},
            {"params": [w for w in model.parameters() if w.ndim < 2]},
        ], """
OWN_TRAINING = [
    ("    return F.mse_loss(model(z_t, t, y), v)\n", OWN_LOSS),
    ("AdamW(model.parameters(), ", TWO_GROUPS),
]
OWN_COLUMN = (
    "                    row = {\n",
    '                    row = {\n                        "now": time.time(),\n',
)


def test_layers_of_ones_own_resume_bit_for_bit_and_can_be_sampled(pictures, tmp_path):
    copy = edited(tmp_path, "model.py", *OWN_LAYERS)
    edit(copy / "train.py", *OWN_TRAINING, OWN_COLUMN)
    run = [*FEW, "--depth", 2, "--dataset", pictures, "--warmup-steps", 1, "--decay-share", 0]
    run += ["--eval-every", 4]
    call(copy / "train.py", *run, "--steps", 12, "--out-dir", "whole", cwd=tmp_path)
    call(copy / "train.py", *run, "--steps", 5, cwd=tmp_path)
    call(copy / "train.py", "--resume", "--steps", 12, cwd=tmp_path)
    whole, parts = (
        torch.load(tmp_path / folder / "train_state.pt", weights_only=True)
        for folder in ("whole", "out")
    )
    for kind in ("model", "ema"):
        for name, tensor in whole[kind].items():
            assert torch.equal(tensor, parts[kind][name]), (kind, name)
    assert torch.equal(whole["ema"]["own.running_mean"], whole["model"]["own.running_mean"])
    assert whole["ema"]["own.running_mean"].abs().max() > 0
    rates = [group["lr"] for group in parts["optimizer"]["param_groups"]]
    assert rates == [train.LEARNING_RATE] * 2
    with open(tmp_path / "out" / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["4", "5", "8", "12"]
    out, _ = call(copy / "sample.py", "--class-id", 0, "--steps", 2, cwd=tmp_path)
    assert (tmp_path / out.strip()).exists()


def test_resume_says_what_it_keeps_and_takes_the_optimizer_of_the_file(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    change = ("BATCH_SIZE = 256 ", "BATCH_SIZE = 16 ")
    copy = edited(
        tmp_path, "train.py", change, ("betas=(0.9, 0.95)", "betas=(0.8, 0.95)"), OWN_COLUMN
    )
    before = (tmp_path / "out" / "log.csv").read_text()
    out, _ = call(copy / "train.py", "--resume", "--steps", 31, cwd=tmp_path)
    (line,) = [line for line in out.splitlines() if line.startswith("settings of the run")]
    assert "BATCH_SIZE 8" in line and "SEED" not in line and "STEPS" not in line
    state = torch.load(tmp_path / "out" / "train_state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["betas"] == (0.8, 0.95)
    assert (tmp_path / "out" / "log-1.csv").read_text() == before
    assert "log-1.csv" in out
    with open(tmp_path / "out" / "log.csv") as file:
        assert [(row["step"], float(row["now"]) > 0) for row in csv.DictReader(file)] == [
            ("31", True)
        ]


def test_a_preset_with_a_name_that_is_no_constant_is_refused(tmp_path):
    script = edited(tmp_path, "train.py", ('"CONV_DIM": 64', '"CONV_WIDTH": 64')) / "train.py"
    assert "CONV_WIDTH" in refused(script, "--preset", "small", cwd=tmp_path)


def test_the_home_folder_may_be_a_tilde(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "pictures")
    flags = ["--dataset=~/pictures", "--out-dir=~/run", "--steps", 1]
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    call("train.py", *FEW, *flags, cwd=tmp_path, **home)
    flags = ["--resume", "--dataset=~/pictures", "--out-dir=~/run", "--steps", 2]
    call("train.py", *flags, cwd=tmp_path, **home)
    assert (tmp_path / "run" / "config.json").exists() and not (tmp_path / "~").exists()


def test_names_that_a_terminal_cannot_show_are_escaped(tmp_path):
    (tmp_path / "p" / "蝶").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "p" / "蝶" / "1.png")
    plain = {"PYTHONIOENCODING": "cp1252"}
    out, _ = call("train.py", *FEW, "--dataset", "p", "--steps", 1, cwd=tmp_path, **plain)
    assert "\\u8776" in out
    out, _ = call("sample.py", "--list-classes", cwd=tmp_path, **plain)
    assert "\\u8776" in out


@POSIX
def test_a_second_ctrl_c_ends_a_step_that_does_not_end(pictures, tmp_path):
    line = "            update_ema(ema, model, step)\n"
    change = (line, f"{line}            time.sleep(100)\n")
    script = edited(tmp_path, "train.py", change) / "train.py"
    process = start(script, *FEW, "--dataset", pictures, "--steps", 2, cwd=tmp_path)
    while not (tmp_path / "out" / "train_state.pt").exists():
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(2)  # the first step has begun
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # still in that step
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "press Ctrl-C again" in err and "Traceback" not in err
    state = torch.load(tmp_path / "out" / "train_state.pt", weights_only=True)
    assert state["step"] == 0
