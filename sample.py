"""Sample pictures from a trained nanoDiT: Euler steps take noise to pictures.

    python sample.py                                # one picture of every class, in one grid
    python sample.py --class-id 3                   # four pictures of class 3
    python sample.py --class-name MONARCH "RED ADMIRAL" --num-images 8    # a row of eight for each
    python sample.py --class-id 3 --gif             # also an animation, from noise to pictures
    python sample.py --eta 1                        # fresh noise in each step, for better shapes
    python sample.py --checkpoint you/butterflies   # a model from the Hub

Prints the paths of the grid and of the animation.
"""

import functools
import math
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import common
from model import UserError

DEFAULT_STEPS = 25  # Euler steps; more than this changes little, as the paths bend gently
MAX_BATCH = 64  # pictures sampled together on a CPU; on GPUs four times as many


@torch.no_grad()
def sample_conditional_cfg(model, class_ids, steps, cfg_scale, noise, record=None, renew=None):
    """Integrate dz/dt = v from noise (t = 1) to data (t = 0), with classifier-free guidance.

        v = v_null + w (v_class - v_null)    w = cfg_scale
        z <- z - v / steps                   at t = 1, 1 - 1/steps, ..., 1/steps

    model: any callable (z, t, y) -> v that has num_classes, the id of the null class.
    class_ids: (B,) int64. noise: (B,3,S,S), standard normal. record, if given, is called with z at
    the start and after every step. renew, if given, is called after every step with z, t, the v
    that led there and 1/steps, and returns the z to continue from: see common.renew_noise. Returns
    x (B,3,S,S), about -1 to 1 and not clamped. The network runs once per step, on 2B pictures (B if
    w = 1). Ho & Salimans 2022, arXiv 2207.12598.
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
            # With and without the class in one batch, which is faster than two calls.
            v_both = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, y_null]))
            v_class, v_null = v_both.chunk(2)
            v = v_null + cfg_scale * (v_class - v_null)
        # An Euler step, against v: t falls by 1/steps, from noise towards data.
        z = z - v / steps
        if renew:
            z = renew(z, 1 - (step + 1) / steps, v, 1 / steps)
        if record:
            record(z)
    return z


def generate(model, class_ids, seed=0, steps=DEFAULT_STEPS, cfg_scale=None, record=None, eta=0):
    """Sample a picture for each of the class ids (N,), in batches that fit into memory.

    Yields uint8 (b,3,S,S) on the CPU, in the order of class_ids. The default guidance is the
    model's own. `record` sees every batch. eta, from 0 to 1: how much of the noise each step
    renews; above 0, the pictures also depend on how many are sampled together.
    """
    if cfg_scale is None:
        cfg_scale = model.cfg_scale
    device = next(model.parameters()).device
    batch_size = MAX_BATCH if device.type == "cpu" else 4 * MAX_BATCH
    # Drawn on the CPU, so that a seed means the same noise on every device.
    generator = torch.Generator().manual_seed(seed)
    renew = functools.partial(common.renew_noise, eta=eta, generator=generator) if eta else None
    for y in class_ids.split(batch_size):
        shape = (len(y), 3, model.image_size, model.image_size)
        noise = torch.randn(shape, generator=generator).to(device)
        with common.autocast(device):
            x = sample_conditional_cfg(model, y.to(device), steps, cfg_scale, noise, record, renew)
        yield to_uint8(x)


def to_uint8(x):
    """Pictures in [-1, 1] as uint8 on the CPU; values outside are clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def to_grid(pictures, columns=None):
    """uint8 (N,3,S,S) as one PIL image; without `columns`, about three times as wide as high."""
    if columns is None:
        columns = math.ceil(math.sqrt(3 * len(pictures)))
    return to_pil_image(make_grid(pictures, nrow=columns))


def parse_flags(arguments):
    parser = common.new_parser(__doc__)
    count = common.int_in_range(1)

    group = parser.add_argument_group("what to sample")
    one_of = group.add_mutually_exclusive_group()
    one_of.add_argument("--class-id", type=int, nargs="+", metavar="ID", help="one row for each")
    one_of.add_argument("--class-name", nargs="+", metavar="NAME", help="case is ignored")
    one_of.add_argument("--list-classes", action="store_true", help="print ids and names, and exit")
    text = "pictures per class (default: 4, or 1 if no class is given)"
    group.add_argument("--num-images", type=count, metavar="N", help=text)

    group = parser.add_argument_group("how to sample")
    text = "a folder or a Hub id (default: %(default)s)"
    group.add_argument("--checkpoint", default="out", metavar="MODEL", help=text)
    text = "Euler steps (default: %(default)s)"
    group.add_argument("--steps", type=count, default=DEFAULT_STEPS, metavar="N", help=text)
    text = "classifier-free guidance; 1 disables it (default: the model's own, usually 3)"
    group.add_argument("--cfg-scale", type=common.parse_finite, metavar="W", help=text)
    text = "fresh noise in each step: from 0 for none to 1 as in DDPM (default: %(default)g)"
    group.add_argument("--eta", type=common.parse_share, default=0, metavar="ETA", help=text)
    text = "seed of the noise (default: %(default)s)"
    group.add_argument("--seed", type=common.int_in_range(0), default=0, metavar="N", help=text)
    text = "auto, cuda, mps or cpu (default: %(default)s)"
    group.add_argument("--device", default="auto", metavar="NAME", help=text)

    group = parser.add_argument_group("what to write")
    text = "the grid (default: samples/class-<ids>-seed-<seed>.png, plus further flags)"
    group.add_argument("--output", type=common.parse_png, metavar="PNG", help=text)
    group.add_argument("--gif", action="store_true", help="also an animation, out of the noise")
    text = "also every picture, as DIR/<class name>/<n>.png"
    group.add_argument("--save-images", type=Path, metavar="DIR", help=text)

    return parser.parse_args(arguments)


def chosen_classes(flags, class_names):
    """The class ids selected by the flags, without duplicates; [] if they select none."""
    class_ids = list(flags.class_id or [])
    for name in flags.class_name or []:
        class_ids.append(common.find_class(name, class_names))
    for class_id in class_ids:
        if not 0 <= class_id < len(class_names):
            ids = f"0 to {len(class_names) - 1}"
            raise UserError(f"--class-id {class_id} is not a class of this model, which has {ids}")
    return list(dict.fromkeys(class_ids))  # a class given twice has one row of the grid


def main(arguments=None):
    """Sample. arguments: flags, such as ["--class-id", "3"]; by default the command line."""
    flags = parse_flags(arguments)
    model = common.load_model(flags.checkpoint).to(common.pick_device(flags.device))
    if flags.list_classes:
        for class_id, name in enumerate(model.class_names):
            print(f"{class_id:4} {name}")
        return

    # Which pictures: a row for each class; or, if there is just one of every class, a block.
    chosen = chosen_classes(flags, model.class_names)
    per_class = flags.num_images or (4 if chosen else 1)
    class_ids = torch.tensor(chosen or range(model.num_classes)).repeat_interleave(per_class)
    columns = per_class if chosen or per_class > 1 else None

    # Where they go. What could be in the way is found out before the work begins.
    output = flags.output or common.name_grid(flags, chosen, DEFAULT_STEPS)
    common.make_folder(output.parent)
    files = []
    if flags.save_images:
        files = common.prepare_files(flags.save_images, model.class_names, class_ids)

    pictures = []
    states = []  # of the current batch: its noise, and what every step made of it
    states_per_batch = []
    record = states.append if flags.gif else None
    how = (flags.seed, flags.steps, flags.cfg_scale, record, flags.eta)
    # A few pictures need no progress bar.
    with tqdm(total=len(class_ids), unit="picture", disable=len(class_ids) <= MAX_BATCH) as bar:
        for batch in generate(model, class_ids, *how):
            for picture in batch:
                if files:
                    common.save_picture(to_pil_image(picture), files[len(pictures)])
                pictures.append(picture)
            states_per_batch.append([to_uint8(z) for z in states])
            states.clear()
            bar.update(len(batch))

    common.save_picture(to_grid(torch.stack(pictures), columns), output)
    print(output)
    if flags.gif:
        gif = output.with_suffix(".gif")
        frames = [torch.cat(parts) for parts in zip(*states_per_batch)]  # one for every step
        common.save_gif([to_grid(frame, columns) for frame in frames], gif)
        print(gif)


if __name__ == "__main__":
    common.run_command(main, if_out_of_memory="lower MAX_BATCH in sample.py")
