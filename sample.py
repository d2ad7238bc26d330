"""Sample pictures from a trained nanoDiT: Euler steps take noise to pictures.

    python sample.py                                # one picture of every class, in one grid
    python sample.py --class-id 3                   # four pictures of class 3
    python sample.py --class-name MONARCH "RED ADMIRAL" --num-images 8    # a row of eight for each
    python sample.py --class-id 3 --gif             # also an animation, from noise to pictures
    python sample.py --checkpoint you/butterflies   # a model from the Hub

Prints the path of each file that it writes.
"""

import math
import re
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import common
from common import load_model
from model import UserError, autocast, pick_device

DEFAULT_STEPS = 25  # Euler steps; more than this changes little, as the paths are nearly straight
DEFAULT_CFG_SCALE = 3.0  # guidance w: 1 is none; more means closer to the class and less variety
MAX_BATCH = 64  # pictures sampled at once on a CPU; GPUs take four times as many
GIF_SIZE = 560  # longest side of an animation in pixels, which keeps it below some 3 MB


@torch.no_grad()
def sample_conditional_cfg(model, class_ids, steps, cfg_scale, noise, record=None):
    """Integrate dz/dt = v from noise (t = 1) to data (t = 0), with classifier-free guidance.

        v = v_null + w (v_class - v_null)    w = cfg_scale
        z <- z - v / steps                   at t = 1, 1 - 1/steps, ..., 1/steps

    model: any callable (z, t, y) -> v that has num_classes, the id of the null class.
    class_ids: (B,) int64. noise: (B,3,S,S), standard normal. record, if given, is called with z at
    the start and after every step. Returns x (B,3,S,S), about -1 to 1 and not clamped. The network
    runs once a step, on 2B pictures; at w = 1 on B. Guidance: Ho & Salimans 2022, arXiv 2207.12598.
    """
    z = noise
    y = torch.as_tensor(class_ids, device=z.device)
    y_null = torch.full_like(y, model.num_classes)
    if record:
        record(z)
    for step in range(steps):
        t = torch.full((len(z),), 1 - step / steps, device=z.device)
        if cfg_scale == 1:
            v = model(z, t, y)
        else:
            v_both = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, y_null]))
            v_class, v_null = v_both.chunk(2)
            v = v_null + cfg_scale * (v_class - v_null)
        z = z - v / steps
        if record:
            record(z)
    return z


def generate(
    model, class_ids, seed=0, steps=DEFAULT_STEPS, cfg_scale=DEFAULT_CFG_SCALE, record=None
):
    """Sample a picture for each of the class ids (N,), in batches that fit into memory.

    Yields uint8 (b,3,S,S) on the CPU, in the order of class_ids. `record` sees every batch.
    """
    device = next(model.parameters()).device
    batch_size = MAX_BATCH if device.type == "cpu" else 4 * MAX_BATCH
    # Drawn on the CPU, so that a seed means the same noise on every device.
    generator = torch.Generator().manual_seed(seed)
    for y in class_ids.split(batch_size):
        noise = torch.randn(len(y), 3, model.image_size, model.image_size, generator=generator)
        with autocast(device):
            x = sample_conditional_cfg(
                model, y.to(device), steps, cfg_scale, noise.to(device), record
            )
        yield to_uint8(x)


def to_uint8(x):
    """Pictures in [-1, 1] as uint8 on the CPU; values beyond are clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def to_grid(pictures, columns=None):
    """uint8 (N,3,S,S) as one PIL image; without `columns`, about three times as wide as high."""
    if columns is None:
        columns = math.ceil(math.sqrt(3 * len(pictures)))
    return to_pil_image(make_grid(pictures, nrow=columns))


def parse_flags():
    parser = common.new_parser(__doc__)
    count = common.whole_number(1)

    group = parser.add_argument_group("what to sample")
    one_of = group.add_mutually_exclusive_group()
    one_of.add_argument("--class-id", type=int, nargs="+", metavar="ID", help="a row for each")
    one_of.add_argument("--class-name", nargs="+", metavar="NAME", help="case is ignored")
    one_of.add_argument("--list-classes", action="store_true", help="print ids and names, and exit")
    help = "pictures of each class (default: 4, or 1 where no class is given)"
    group.add_argument("--num-images", type=count, metavar="N", help=help)

    group = parser.add_argument_group("how to sample")
    help = "a folder or a Hub id (default: %(default)s)"
    group.add_argument("--checkpoint", default="out", metavar="MODEL", help=help)
    help = "Euler steps (default: %(default)s)"
    group.add_argument("--steps", type=count, default=DEFAULT_STEPS, metavar="N", help=help)
    help = "classifier-free guidance; 1 is none (default: %(default)s)"
    kind = common.finite_number
    group.add_argument("--cfg-scale", type=kind, default=DEFAULT_CFG_SCALE, metavar="W", help=help)
    help = "of the noise (default: %(default)s)"
    group.add_argument("--seed", type=common.whole_number(0), default=0, metavar="N", help=help)
    help = "auto, cuda, mps or cpu (default: %(default)s)"
    group.add_argument("--device", default="auto", metavar="NAME", help=help)

    group = parser.add_argument_group("what to write")
    help = "the grid (default: samples/class-<ids>-seed-<seed>.png)"
    group.add_argument("--output", type=Path, metavar="PNG", help=help)
    help = "also an animation, from noise to pictures, beside the grid"
    group.add_argument("--gif", action="store_true", help=help)
    help = "also every picture, as DIR/<class name>/<n>.png"
    group.add_argument("--save-images", type=Path, metavar="DIR", help=help)

    flags = parser.parse_args()
    if flags.output and (flags.output.suffix.lower() != ".png" or flags.output.is_dir()):
        parser.error(f"--output {flags.output} is not the name of a .png file")
    return flags


def chosen_classes(flags, class_names):
    """The class ids that the flags name, each once; [] if they name none."""
    id_of = {name.casefold(): i for i, name in enumerate(class_names)}
    class_ids = list(flags.class_id or [])
    for name in flags.class_name or []:
        if name.casefold() not in id_of:
            raise UserError(f'--class-name "{name}" is not a class here: see --list-classes')
        class_ids.append(id_of[name.casefold()])
    for class_id in class_ids:
        if not 0 <= class_id < len(class_names):
            highest = len(class_names) - 1
            raise UserError(f"--class-id {class_id} is not from 0 to {highest}: see --list-classes")
    return list(dict.fromkeys(class_ids))


def folder_names(class_names):
    """A folder name for each class that is safe and unique: a model from elsewhere may have a
    class called ../.. or two that differ only in what a file name cannot hold."""
    folders = []
    for class_id, name in enumerate(class_names):
        safe = re.sub(r"[^\w ,.()&'+-]|^\.", "_", name)[:60]
        folders.append(safe if safe == name and name else f"{safe}-{class_id}")
    return folders


def single_files(directory, class_names, class_ids):
    """Where each picture goes on its own: DIR/<class name>/<n>.png, in folders made here. Raises
    UserError if one of the files exists."""
    folders = folder_names(class_names)
    count = [0] * len(class_names)  # pictures of each class so far
    files = []
    for class_id in class_ids.tolist():
        file = directory / folders[class_id] / f"{count[class_id]}.png"
        count[class_id] += 1
        if file.exists():
            raise UserError(f"{file} exists: name a new folder for --save-images")
        common.make_folder(file.parent)
        files.append(file)
    return files


def save_gif(states, path, columns):
    """Write an animation. states: one uint8 (N,3,S,S) for the noise and one for every step."""
    frames = []
    for pictures in states:
        frame = to_grid(pictures, columns)
        frame.thumbnail((GIF_SIZE, GIF_SIZE))
        frames.append(frame.quantize(64))
    durations = [80] * (len(frames) - 1) + [2000]  # milliseconds: the result stays for a while
    common.save_picture(
        frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0
    )


def main():
    flags = parse_flags()
    model = load_model(flags.checkpoint).to(pick_device(flags.device))
    if flags.list_classes:
        for class_id, name in enumerate(model.class_names):
            print(f"{class_id:4} {name}")
        return

    # Which pictures: class after class, a row of the grid each; or every class, in one block.
    chosen = chosen_classes(flags, model.class_names)
    per_class = flags.num_images or (4 if chosen else 1)
    classes = torch.tensor(chosen or range(model.num_classes))
    class_ids = classes.repeat_interleave(per_class)
    columns = per_class if chosen or per_class > 1 else None

    # Where they go: everything that could be in the way is looked at before the work begins.
    shown = "-".join(map(str, chosen[:8])) or "all"
    output = flags.output or Path("samples", f"class-{shown}-seed-{flags.seed}.png")
    common.make_folder(output.parent)
    files = []
    if flags.save_images:
        files = single_files(flags.save_images, model.class_names, class_ids)

    pictures = []
    states = []  # of the batch under way: its noise, and what every step made of it
    batches = []  # such states of each batch
    small = len(class_ids) <= MAX_BATCH  # no need to show progress
    record = states.append if flags.gif else None
    with tqdm(total=len(class_ids), unit="picture", disable=small) as bar:
        for batch in generate(model, class_ids, flags.seed, flags.steps, flags.cfg_scale, record):
            for picture in batch:
                if files:
                    common.save_picture(to_pil_image(picture), files[len(pictures)])
                pictures.append(picture)
            batches.append([to_uint8(z) for z in states])
            states.clear()
            bar.update(len(batch))

    common.save_picture(to_grid(torch.stack(pictures), columns), output)
    print(output)
    if flags.gif:
        gif = output.with_suffix(".gif")
        save_gif([torch.cat(states) for states in zip(*batches)], gif, columns)
        print(gif)


if __name__ == "__main__":
    common.run_command(main, if_out_of_memory="lower MAX_BATCH in sample.py")
