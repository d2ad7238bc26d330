"""Sample from a trained nanoDiT: noise flows to pictures, in Euler steps. Prints where they are.

python sample.py                               # a picture of every class, in one grid
python sample.py --class-id 3                  # four of class 3
python sample.py --class-name MONARCH "RED ADMIRAL" --num-images 8   # a row of eight for each
python sample.py --class-id 3 --gif            # and how they came out of the noise
python sample.py --checkpoint you/butterflies  # a model from the Hub
"""

import argparse
import contextlib
import math
import re
import sys
from pathlib import Path

import torch
from huggingface_hub.utils.logging import set_verbosity_error
from PIL import ImageOps
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from model import DiT, UserError

DEFAULT_STEPS = 25  # Euler steps: each runs the network once, on twice the pictures
DEFAULT_CFG_SCALE = 3.0  # guidance w: 1 is none; more is closer to the class, with less variety
MAX_BATCH = 64  # pictures that go through the network together; on a GPU four times as many


@torch.no_grad()
def sample_conditional_cfg(model, class_ids, steps, cfg_scale, noise, record=lambda z: None):
    """Integrate dz/dt = v from noise at t = 1 to data at t = 0, with classifier-free guidance.
    z <- z - v / steps   at t = 1, 1 - 1/steps, ..., 1/steps
    v = v_null + w (v_class - v_null)   with w = cfg_scale: Ho & Salimans 2022, arXiv 2207.12598
    model: a callable (z, t, y) -> v with num_classes; class_ids: (B,) int64; noise: (B,3,S,S).
    Returns x (B,3,S,S), not clamped. The network runs on 2B pictures a step; at w = 1 on B."""
    z = noise
    record(z)  # as after each step
    y = torch.as_tensor(class_ids, device=z.device)
    y_both = torch.cat([y, torch.full_like(y, model.num_classes)])
    for step in range(steps):
        t = torch.full((len(z),), 1 - step / steps, device=z.device)
        if cfg_scale == 1:
            v = model(z, t, y)
        else:
            v_class, v_null = model(torch.cat([z, z]), torch.cat([t, t]), y_both).chunk(2)
            v = v_null + cfg_scale * (v_class - v_null)
        z = z - v / steps
        record(z)
    return z


def generate(model, class_ids, seed=0, steps=DEFAULT_STEPS, cfg_scale=DEFAULT_CFG_SCALE, **kwargs):
    """Yield uint8 pictures (b,3,S,S) of the class ids (N,), a batch at a time, on the CPU."""
    device, size = next(model.parameters()).device, model.image_size
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
    for y in class_ids.split(MAX_BATCH if device.type == "cpu" else 4 * MAX_BATCH):
        noise = torch.randn(len(y), 3, size, size, generator=generator).to(device)
        with autocast(device):
            x = sample_conditional_cfg(model, y.to(device), steps, cfg_scale, noise, **kwargs)
        yield to_uint8(x)


def to_uint8(x):
    """Pictures in [-1, 1] -> uint8 on the CPU; what overshoots is clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def to_grid(pictures, columns=None):
    """uint8 (N,3,S,S) -> one PIL image; without `columns` about three times as wide as high."""
    return to_pil_image(make_grid(pictures, nrow=columns or math.ceil((3 * len(pictures)) ** 0.5)))


def pick_device(name):
    """The torch device of that name; "auto" is cuda, else mps, else cpu."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    usable = [device for device in usable if usable[device]] + ["cpu"]
    if name != "auto" and name.split(":")[0] not in usable:
        raise UserError(f'DEVICE "{name}" is not here: choose auto or {" or ".join(usable)}')
    return torch.device(usable[0] if name == "auto" else name)


def autocast(device):
    """bf16 on CUDA devices that compute in it; elsewhere it would be slow, so float32 stays."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def write_beside(path, write):
    """write(name) under another name, then rename to `path`: it is there whole, or as it was."""
    beside = path.with_name(f".writing-{path.name}")
    write(beside)
    beside.replace(path)


@contextlib.contextmanager
def blamed_on(what):
    """Whatever goes wrong within becomes a UserError, which names `what` and says why in a line."""
    try:
        yield
    except Exception as error:  # files and libraries have many ways to be wrong
        raise UserError(f"{what}: {str(error)[:200] or type(error).__name__}") from error


def load_model(checkpoint):
    """The model in a folder such as out/, or of a Hub id such as you/name; UserError if none."""
    if Path(checkpoint).is_dir() or "/" not in checkpoint:
        if not Path(checkpoint, "config.json").is_file():
            raise UserError(f"no model in {checkpoint}: `python train.py` makes one, in out")
    with blamed_on(f"no model from {checkpoint}, its config.json and model.safetensors"):
        return DiT.from_pretrained(checkpoint)


def new_parser(description, **kwargs):
    """A parser of flags whose errors are one line: without a usage there is none to print."""
    kwargs |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS, **kwargs)


def run(main):
    """Run a command line: what the user can mend becomes one line on stderr and exit status 2."""
    set_verbosity_error()  # the Hub's library would add lines of its own
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        hint = "lower BATCH_SIZE, or raise ACCUMULATE: " * isinstance(error, torch.OutOfMemoryError)
        print(f"{Path(sys.argv[0]).name}: error:", *f"{hint}{error}".split(), file=sys.stderr)
        sys.exit(2)


def parse_flags():
    parser = new_parser(__doc__)
    group = parser.add_argument_group("which pictures")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--class-id", type=int, nargs="+", metavar="ID", help="one or several, a row each")
    either("--class-name", nargs="+", metavar="NAME", help="instead of ids; case is ignored")
    either("--list-classes", action="store_true", help="print ids and names, and stop")
    add("--num-images", type=int, metavar="N", help="pictures a class (4; 1 if no class is given)")
    add = parser.add_argument_group("how they come about").add_argument
    add("--steps", type=int, default=DEFAULT_STEPS, help="Euler steps (%(default)s)")
    add("--cfg-scale", type=float, default=DEFAULT_CFG_SCALE, help="guidance w (%(default)s)")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (%(default)s)")
    add("--checkpoint", default="out", help="a folder or a Hub id (%(default)s)")
    add = parser.add_argument_group("where they go").add_argument
    add("--output", type=Path, metavar="PNG", help="the grid (samples/<classes>-seed-<seed>.png)")
    add("--gif", action="store_true", help="also the way from noise to pictures, beside the PNG")
    add("--save-images", type=Path, metavar="DIR", help="also each as DIR/<class name>/<n>.png")
    flags = parser.parse_args()
    counts = (flags.steps, 1 if flags.num_images is None else flags.num_images)
    if min(counts) < 1 or not math.isfinite(flags.cfg_scale) or not 0 <= flags.seed < 2**63:
        raise UserError("--steps, --num-images: from 1; --cfg-scale: finite; --seed: 0 to 2^63 - 1")
    return flags


def main():
    flags = parse_flags()
    model = load_model(flags.checkpoint).to(pick_device(flags.device))
    names = model.class_names
    if flags.list_classes:
        print("\n".join(f"{i:4} {name}" for i, name in enumerate(names)))
        return
    ids, wanted = {name.casefold(): i for i, name in enumerate(names)}, flags.class_name or []
    if unknown := [name for name in wanted if name.casefold() not in ids]:
        raise UserError(f'--class-name "{unknown[0]}" is no class here: see --list-classes')
    chosen = flags.class_id or [ids[name.casefold()] for name in wanted]
    chosen = list(dict.fromkeys(chosen))  # a class named twice is one row
    if wrong := [i for i in chosen if not 0 <= i < len(names)]:
        raise UserError(f"--class-id {wrong[0]} is not from 0 to {len(names) - 1} (--list-classes)")
    each = flags.num_images or (4 if chosen else 1)
    class_ids = torch.tensor(chosen or range(len(names))).repeat_interleave(each)
    name = f"class-{'-'.join(map(str, chosen[:8])) or 'all'}-seed-{flags.seed}.png"
    output = flags.output or Path("samples", name)
    if output.suffix.lower() != ".png" or output.is_dir():
        raise UserError(f"--output {output} is not the name of a .png file")
    output.parent.mkdir(parents=True, exist_ok=True)
    # As folders, names keep letters, digits and little else: a model from elsewhere may say ../..
    safe = [re.sub(r"[^\w ,.()&'+-]|^\.", "_", name)[:60] for name in names]
    folders = [a if a == b != "" else f"{a}-{i}" for i, (a, b) in enumerate(zip(safe, names))]
    files = [(folders[y], f"{n % each}.png") for n, y in enumerate(class_ids.tolist())]
    files = [Path(flags.save_images, *file) for file in files] if flags.save_images else []
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            raise UserError(f"{file} is there already: give --save-images a new folder")
    shown = min(each, max(1, 1000 * each // len(class_ids)))  # of a class: no larger grids
    in_grid = torch.arange(len(class_ids)) % each < shown
    pictures, passed = [], []  # passed: the states on the way, of one batch after another
    record = (lambda z: passed.append(to_uint8(z))) if flags.gif else (lambda z: None)
    batches = generate(model, class_ids, flags.seed, flags.steps, flags.cfg_scale, record=record)
    options = {"total": len(class_ids), "unit": "picture", "disable": len(class_ids) <= MAX_BATCH}
    for n, picture in enumerate(tqdm((p for batch in batches for p in batch), **options)):
        if files:
            to_pil_image(picture).save(files[n])
        if in_grid[n]:
            pictures.append(picture.clone())  # a view would keep its batch
    columns = shown if chosen or each > 1 else None  # a row a class, or a block
    grid = to_grid(torch.stack(pictures), columns)
    write_beside(output, lambda beside: grid.save(beside, "PNG"))
    print(output)
    if flags.gif:
        frames = [torch.cat(passed[i :: flags.steps + 1])[in_grid] for i in range(flags.steps + 1)]
        shrink = min(1, (2.7e6 / len(frames) / grid.width / grid.height) ** 0.5)  # to below 3 MB
        frames = [ImageOps.scale(to_grid(f, columns), shrink).quantize(64) for f in frames]
        times = [80] * flags.steps + [2000]  # milliseconds: the result stays for a while
        options = {"save_all": True, "append_images": frames[1:], "loop": 0, "duration": times}
        gif = output.with_suffix(".gif")
        write_beside(gif, lambda beside: frames[0].save(beside, "GIF", **options))
        print(gif)


if __name__ == "__main__":
    run(main)
