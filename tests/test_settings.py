"""What people do first: they edit a constant, add one of their own, break something, and look at
the traceback. Here copies of the files are edited, and imported in place of the project's own."""

import contextlib
import errno
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType

import helpers
import pytest
import torch
from fuzz import fuzz
from helpers import FEW, POSIX, ROOT, SMALL, call, edit, edited, finish, refused, rows, save
from helpers import solid, state

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


def test_constants_of_ones_own_are_flags_and_come_back(use, pictures, tmp_path):
    an_import = ("import copy\n", "import copy\nfrom argparse import SUPPRESS\n")  # a str
    use(edited(tmp_path, "train.py", constant(OWN), an_import))
    out, _ = call("train", "--help", cwd=tmp_path)
    flags = set(re.findall(r"--[\w-]+", out))
    assert flags >= {flag_of(name) for name in OWN_SETTINGS} | {"--no-switch"}
    assert "my idea" in out and "100% of" in out and "{x} %s %(prog)s" in out
    for name in ("A_TUPLE", "A_LIST", "NOTHING", "A_PATH", "LOWER_CASE", "SUPPRESS", "MIN_T"):
        assert flag_of(name) not in flags

    call("train", *FEW, "--dataset", pictures, "--steps", 1, cwd=tmp_path)
    assert OWN_SETTINGS.items() <= saved_settings(tmp_path).items()
    changed = ["--one-space", 2.5, "--no-comment", -1, "--strange", "x", "--no-switch"]
    changed += ["--zero", 0.25, "--annotated", 3, "--large", "1e3", "--indented", "7"]
    expected = {**OWN_SETTINGS, "ONE_SPACE": 2.5, "NO_COMMENT": -1, "STRANGE": "x"}
    expected |= {"SWITCH": False, "ZERO": 0.25, "ANNOTATED": 3, "LARGE": 1000, "INDENTED": 7}
    call("train", *FEW, "--dataset", pictures, *changed, "--steps", 2, "--overwrite", cwd=tmp_path)
    assert expected.items() <= saved_settings(tmp_path).items()
    assert isinstance(saved_settings(tmp_path)["LARGE"], int)  # 1e3 is whole
    call("train", "--resume", "--steps", 3, cwd=tmp_path)
    assert expected.items() <= saved_settings(tmp_path).items()


def test_help_lists_each_setting_with_its_section_comment_and_value(tmp_path):
    out, _ = call("train", "--help", cwd=tmp_path)
    data = out.split("\ndata:\n")[1].split("\nmodel:\n")[0]
    assert "--image-size" in data and "--flip-share" in data and "--dim" not in data
    assert "share of pictures that are mirrored" in data and "(default: 0.5)" in data
    assert all(flag_of(name) in out for name in train.SETTINGS)


def test_a_constant_whose_flag_is_taken_is_named(use, tmp_path):
    use(edited(tmp_path, "train.py", constant("PRESET = 1")))
    assert "rename the constant PRESET" in refused("train", cwd=tmp_path)


def test_whole_numbers_and_floats_mean_the_same(use, pictures, tmp_path):
    changes = [
        ("FLIP_SHARE = 0.5", "FLIP_SHARE = 0"),
        ("GRAD_CLIP = 1.0", "GRAD_CLIP = 1"),
        ("STEPS = 25000", "STEPS = 2e0"),
        ("BATCH_SIZE = 32", "BATCH_SIZE = 4.0"),
        ("EVAL_EVERY = 250", "EVAL_EVERY = 1e0"),
    ]
    use(edited(tmp_path, "train.py", *changes))
    call("train", *SMALL, "--dataset", pictures, cwd=tmp_path)
    saved = saved_settings(tmp_path)
    assert saved["STEPS"] == 2 and saved["BATCH_SIZE"] == 4 and saved["FLIP_SHARE"] == 0
    call("train", "--resume", "--steps", "3e0", cwd=tmp_path)
    assert saved_settings(tmp_path)["STEPS"] == 3
    call("train", "--resume", "--steps", 4, "--flip-share", 0.25, "--grad-clip", 0.5, cwd=tmp_path)
    saved = saved_settings(tmp_path)
    assert saved["FLIP_SHARE"] == 0.25 and saved["GRAD_CLIP"] == 0.5
    assert len(rows(tmp_path / "out")) == 4


def test_a_constant_edited_into_something_else_hurts_nobody(use, pictures, tmp_path):
    changes = [
        ("T_STD = 1.0", "T_STD = (0.5, 1.5)"),
        ("T_STD * n)", "T_STD[1] * n)"),
        ("WARMUP_STEPS = 200", "WARMUP_STEPS = None"),
        ("max(1, min(WARMUP_STEPS, STEPS // 10))", "1"),
    ]
    use(edited(tmp_path, "train.py", *changes))
    call("train", *FEW, "--dataset", pictures, "--steps", 2, cwd=tmp_path)
    call("train", "--resume", "--steps", 3, cwd=tmp_path)
    out, _ = call("train", "--help", cwd=tmp_path)
    assert "--t-std" not in out and "--t-mean" in out


# Limits

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
    ("BATCH_SIZE", 0),
    ("ACCUMULATE", 0),
    ("WARMUP_STEPS", -1),
    ("LEARNING_RATE", "inf"),
    ("T_STD", -1),
    ("T_MEAN", "inf"),
    ("GRAD_CLIP", "nan"),
    ("CFG_SCALE", "nan"),
    ("SEED", 2**63),
    ("COMPILE", "maybe"),
    ("PRECISION", "fp8"),
    ("DIM", 16.5),
    ("DEPTH", "three"),
    ("PATCH_SIZE", 5),  # of which 16 is no multiple
    ("HEADS", 3),
]


@pytest.mark.parametrize("name, value", BAD)
def test_a_flag_out_of_range_is_refused_by_name(tmp_path, name, value):
    line = refused("train", *FEW, "--dataset", "drawn", flag_of(name), value, cwd=tmp_path)
    assert name in line or flag_of(name) in line
    assert str(value) in line
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
    line = refused("train", "--preset", "small", cwd=tmp_path)
    assert "small" in line and "laptop" in line and "mine" in line
    assert list(tmp_path.iterdir()) == []


# Notebooks


def flags(pictures, *more):
    return [*map(str, FEW), "--dataset", str(pictures), *map(str, more)]


def test_main_runs_in_a_notebook(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    train.main(flags(pictures, "--steps", 1, "--out-dir", "mine"))
    monkeypatch.setattr(train, "OUT_DIR", "mine")
    with pytest.raises(train.UserError, match="mine holds a run"):  # not: unrecognized arguments
        train.main()


def test_a_second_main_starts_from_the_same_constants(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(train.SETTINGS)
    train.main(flags(pictures, "--steps", 2, "--ema-decay", 0.5))
    assert {name: getattr(train, name) for name in before} == before
    monkeypatch.setattr(train, "LABEL_DROP", 0.75)  # as a notebook would
    train.main(flags(pictures, "--steps", 1, "--out-dir", "second"))
    second = state(tmp_path / "second")["settings"]
    assert second["EMA_DECAY"] == before["EMA_DECAY"] and second["STEPS"] == 1
    assert second["LABEL_DROP"] == 0.75 and train.LABEL_DROP == 0.75


def test_main_runs_in_a_thread(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thread = threading.Thread(target=train.main, args=(flags(pictures, "--steps", 2),))
    thread.start()
    thread.join(100)
    assert state(tmp_path / "out")["step"] == 2


def assert_all_settings_are_saved(main, pictures, folder, expected):
    """Two runs, of which the second continues the first."""
    main(flags(pictures, "--steps", 1, "--ema-decay", 0.5))
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
    code = compile((ROOT / "train.py").read_text("utf-8"), "train.py", "exec")
    namespace = {"__name__": "a notebook", "MINE": 5}  # a name of the notebook, and no setting
    exec(code, namespace)
    exec(code, namespace)
    main = namespace["main"]
    assert_all_settings_are_saved(main, pictures, tmp_path, train.SETTINGS.keys())


# Bugs, each planted where a reader might: (file, line before, the bug, what the traceback says).

INIT = "        self.image_size = image_size\n"
LOOP = "            update_ema(ema, model, step)\n"
BUGS = {
    "a NameError in DiT.__init__": ("model.py", INIT, "self.planted = foo", NameError),
    "a TypeError in DiT.__init__": ("model.py", INIT, "planted = len(image_size)", TypeError),
    "a RuntimeError in DiT.__init__": (
        "model.py",
        INIT,
        "planted = torch.zeros(3).view(2)",
        RuntimeError,
    ),
    "a wrong shape in DiT.forward": (
        "model.py",
        "        c = F.silu(c)  # (B, dim)\n",
        "planted = z + torch.zeros(7)",
        RuntimeError,
    ),
    "a ValueError in the model card": (
        "support/hub.py",
        '    facts |= {"classes": network.num_classes, "size": network.image_size}\n',
        "planted = int('many')",
        ValueError,
    ),
    "a NameError in the loss": ("train.py", "    v = noise - x\n", "planted = foo", NameError),
    "a KeyError in the loop": ("train.py", LOOP, "planted = {}['step']", KeyError),
    "a missing file in the loop": (
        "train.py",
        LOOP,
        "planted = open('notes.txt')",
        FileNotFoundError,
    ),
    "a wrong shape in the sampler": (
        "sample.py",
        "        z = z - v / steps\n",
        "planted = z + torch.zeros(7)",
        RuntimeError,
    ),
    "a KeyError in what the state holds": (
        "support/checkpoint.py",
        '    staging = out / ".writing"\n',
        "planted = {}['more']",
        KeyError,
    ),
}


def planted(bug, folder):
    """A copy of the project in which one of BUGS is planted."""
    name, line, statement, _ = BUGS[bug]
    indent = " " * (len(line) - len(line.lstrip()))
    return edited(folder, name, (line, f"{line}{indent}{statement}\n"))


def assert_raised(bug, *command, cwd):
    """The command ends with the bug's own error, and a traceback that shows its line."""
    _, _, statement, error = BUGS[bug]
    with pytest.raises(error) as raised:
        finish(*command, cwd=cwd)
    assert raised.type is error
    assert statement in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_of_ones_own_shows_its_line(use, pictures, tmp_path, bug):
    use(planted(bug, tmp_path))
    run = [*FEW, "--dataset", pictures, "--steps", 2, "--sample-every", 1]
    assert_raised(bug, "train", *run, cwd=tmp_path)


@pytest.mark.parametrize("bug", [bug for bug in BUGS if "DiT" in bug])
def test_a_bug_in_the_network_shows_its_line_when_it_is_sampled(use, trained, tmp_path, bug):
    use(planted(bug, tmp_path))
    command = ["sample", "--checkpoint", trained / "out", "--class-id", 0, "--device", "cpu"]
    assert_raised(bug, *command, cwd=tmp_path)


def test_a_bug_in_a_compiled_block_shows_its_line(use, pictures, tmp_path):
    line = "        x = x + gate2[:, None] * self.mlp(modulate(norm(x), shift2, scale2))\n"
    change = (line, f"{line}        x = x + torch.zeros(7)\n")
    use(edited(tmp_path, "model.py", change))
    run = [*FEW, "--dataset", pictures, "--steps", 2, "--compile", "on"]
    with pytest.raises(RuntimeError) as raised:
        finish("train", *run, cwd=tmp_path)
    assert "        x = x + torch.zeros(7)" not in str(raised.value)
    assert "x = x + torch.zeros(7)" in "".join(traceback.format_exception(raised.value))


def test_python_itself_prints_the_traceback_of_a_bug(pictures, tmp_path):
    script = planted("a KeyError in the loop", tmp_path) / "train.py"
    code, _, err = finish(script, *FEW, "--dataset", pictures, "--steps", 2, cwd=tmp_path)
    assert code == 1 and "Traceback" in err and "planted = {}['step']" in err
    assert err.splitlines()[-1] == "KeyError: 'step'"


# Edits of the network and of the training

OWN_LAYERS = [  # weights that blocks share, dropout, a batch norm
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
OWN_LOSS = """
    loss = F.mse_loss(model(z_t, t, y), v)
    assert loss.item() < 99
    return loss
"""
TWO_GROUPS = """
        [
            {"params": [w for w in model.parameters() if w.ndim > 1], "weight_decay": 0.1},
            {"params": [w for w in model.parameters() if w.ndim < 2], "lr": LEARNING_RATE / 100},
        ],
        lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True
"""
OPTIMIZER = (
    "\n        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0, fused=True\n"
)
OWN_COLUMN = ("                    row = {\n", '                    row = {\n"now": 1,\n')
OWN_TRAINING = [
    ("    return F.mse_loss(model(z_t, t, y), v)\n", OWN_LOSS),
    (OPTIMIZER, TWO_GROUPS),
    OWN_COLUMN,
]


def test_layers_of_ones_own_resume_bit_for_bit_and_can_be_sampled(use, pictures, tmp_path):
    copy = edited(tmp_path, "model.py", *OWN_LAYERS)
    edit(copy / "train.py", *OWN_TRAINING)
    use(copy)
    run = [*FEW, "--depth", 2, "--dataset", pictures, "--warmup-steps", 1, "--decay-share", 0]
    run += ["--eval-every", 4]
    call("train", *run, "--steps", 12, "--out-dir", "whole", cwd=tmp_path)
    call("train", *run, "--steps", 5, cwd=tmp_path)
    call("train", "--resume", "--steps", 12, cwd=tmp_path)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "out")
    for kind in ("model", "ema"):
        for name, tensor in whole[kind].items():
            assert torch.equal(tensor, parts[kind][name]), (kind, name)
    assert torch.equal(whole["ema"]["own.running_mean"], whole["model"]["own.running_mean"])
    assert whole["ema"]["own.running_mean"].abs().max() > 0
    rates = [group["lr"] for group in parts["optimizer"]["param_groups"]]
    assert rates == [train.LEARNING_RATE, train.LEARNING_RATE / 100]
    assert [row["step"] for row in rows(tmp_path / "out")] == ["4", "5", "8", "12"]
    out, _ = call("sample", "--class-id", 0, "--steps", 2, cwd=tmp_path)
    assert (tmp_path / out.strip()).exists()


def test_a_resumed_run_takes_optimizer_and_columns_of_the_file(use, trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    betas = ("betas=(0.9, 0.95)", "betas=(0.8, 0.95)")
    use(edited(tmp_path, "train.py", ("BATCH_SIZE = 32 ", "BATCH_SIZE = 16 "), betas, OWN_COLUMN))
    call("train", "--resume", "--steps", 31, cwd=tmp_path)
    assert saved_settings(tmp_path)["BATCH_SIZE"] == 8  # the run's, not the file's
    assert state(tmp_path / "out")["optimizer"]["param_groups"][0]["betas"] == (0.8, 0.95)
    table = [(row["step"], row["now"]) for row in rows(tmp_path / "out")]
    assert table == [("10", ""), ("20", ""), ("30", ""), ("31", "1")]


MISFITS = {
    "extra.weight": (
        "model.py",
        "        self.final_modulation = nn.Linear(dim, 2 * dim)\n",
        "        self.extra = nn.Linear(dim, dim)\n",
    ),
    "amsgrad": ("train.py", "weight_decay=0, fused=True", ", amsgrad=True"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_edit_that_does_not_fit_the_state_is_named(use, trained, tmp_path, name):
    file, line, more = MISFITS[name]
    use(edited(tmp_path, file, (line, line + more)))
    shutil.copytree(trained / "out", tmp_path / "out")
    line = refused("train", "--resume", "--steps", 40, cwd=tmp_path)
    assert name in line and "train_state.pt" in line
    if file == "model.py":
        line = refused("sample", cwd=tmp_path)
        assert name in line and "model.safetensors" in line


# Paths and names


def test_the_home_folder_may_be_a_tilde(pictures, tmp_path, monkeypatch):
    shutil.copytree(pictures, tmp_path / "pictures")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    run = [*FEW, "--dataset=~/pictures", "--out-dir=~/run", "--steps", 1]
    call("train", *run, cwd=tmp_path)
    call("train", "--resume", "--out-dir=~/run", "--steps", 2, cwd=tmp_path)
    call("sample", "--checkpoint=~/run", "--class-id", 0, "--steps", 1, cwd=tmp_path)
    assert (tmp_path / "run" / "config.json").exists() and not (tmp_path / "~").exists()


def test_names_that_a_terminal_cannot_show_are_escaped():
    terminal = io.TextIOWrapper(io.BytesIO(), "cp1252")
    with contextlib.redirect_stdout(terminal):
        helpers.run_command(lambda: print("蝶"))
    terminal.flush()
    assert terminal.buffer.getvalue().strip() == b"\\u8776"


def pasted(command, folder):
    """The arguments of `python train.py` in a printed command, as a shell reads it."""
    (folder / "train.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
    shell = ["bash", "-c", python + command]
    out = subprocess.run(shell, cwd=folder, capture_output=True, text=True, check=True).stdout
    return json.loads(out)


@POSIX
@pytest.mark.parametrize("name", ["out", "my run", "l'été 蝶", 'a"b$c\\d', "-x"])
def test_what_a_run_tells_one_to_type_can_be_pasted(monkeypatch, pictures, tmp_path, name):
    update_ema = train.update_ema

    def stopped(ema, model, step):
        update_ema(ema, model, step)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "update_ema", stopped)
    out_dir = f"--out-dir={name}"
    run = [*FEW, "--dataset", pictures, "--steps", 3, out_dir]
    _, err = call("train", *run, cwd=tmp_path, status=143)
    (command,) = re.findall("continue with (python .*)", err)
    monkeypatch.setattr(train, "update_ema", update_ema)
    call("train", *pasted(command, tmp_path), cwd=tmp_path)
    assert state(tmp_path / name)["step"] == 3

    # The other command that a run prints: of a loss that is not finite.
    monkeypatch.setattr(train, "update_ema", lambda ema, model, step: None)
    loss = lambda model, x, y, t, noise: model(x, t, y).sum() * float("nan")  # noqa: E731
    monkeypatch.setattr(train, "rectified_flow_loss", loss)
    run = ["--resume", "--steps", 4, out_dir]
    _, err = call("train", *run, cwd=tmp_path, status=2)
    (command,) = re.findall("lower LEARNING_RATE: (python .*)", err)
    _, settings = train.parse_flags(pasted(command, tmp_path))
    assert settings == {"OUT_DIR": name, "LEARNING_RATE": train.LEARNING_RATE / 2}


# Memory and disk: what is one line, and what is a bug


def one_line_of(error, capsys):
    """What run_command prints for an exception, if it ends with status 2."""

    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        helpers.run_command(fail, if_out_of_memory="lower it")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


def test_too_little_memory_is_one_line(pictures, tmp_path, capsys):
    run = [*SMALL, "--dataset", pictures, "--batch-size", 10**15]  # no address space is as large
    line = refused("train", *run, cwd=tmp_path)
    assert "out of memory: lower BATCH_SIZE" in line or "out of memory: close other" in line
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        RuntimeError("DefaultCPUAllocator: not enough memory"),  # on Windows
    ):
        assert "error: out of memory: lower it" in one_line_of(error, capsys)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "ENOTDIR", "EISDIR"])
def test_a_disk_that_cannot_be_written_is_one_line(capsys, name):
    number = getattr(errno, name)
    line = one_line_of(OSError(number, os.strerror(number), "out/samples/grid.png"), capsys)
    assert os.strerror(number) in line and "out/samples/grid.png" in line


def test_a_file_in_the_place_of_the_folder_is_one_line(pictures, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/run"):
        line = refused("train", *FEW, "--dataset", pictures, "--out-dir", out, cwd=tmp_path)
        assert "file" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no file"), RuntimeError("a shape")])
def test_other_errors_are_bugs(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        helpers.run_command(fail)


# Long


@pytest.mark.slow
def test_mutated_files_are_read_or_refused():
    assert fuzz(20, seed=100) == []


@pytest.mark.slow
def test_ten_thousand_classes_train_resume_and_are_sampled(tmp_path):
    for n in range(10_000):
        colour = (n % 256, n // 256, 90)
        save(solid(colour=colour, size=(4, 4)), tmp_path / "many" / f"c{n:05}" / "0.png")
    call("train", *FEW, "--dataset", "many", "--steps", 2, cwd=tmp_path)
    out, _ = call("train", "--resume", "--steps", 3, cwd=tmp_path)
    assert "10000 classes: c00000, c00001, c00002, ..., c09997" in out
    call("sample", "--class-name", "C09999", "--steps", 1, "--output", "one.png", cwd=tmp_path)
    assert (tmp_path / "one.png").exists()
