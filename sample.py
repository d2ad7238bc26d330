"""Sample pictures from a trained nanoDiT: Euler steps take noise to pictures.

    python sample.py                                # one picture of every class, in one grid
    python sample.py --class-id 3                   # four pictures of class 3
    python sample.py --class-name MONARCH "RED ADMIRAL" --num-images 8    # a row of eight for each
    python sample.py --class-id 3 --gif             # also an animation, from noise to pictures
    python sample.py --eta 1                        # fresh noise in each step, for better shapes
    python sample.py --checkpoint you/butterflies   # a model from the Hub

Prints the paths of the grid and of the animation. Without --output, the grid goes to
samples/class-<ids>-seed-<seed>.png, or to the next free name if there is such a file.
--save-images DIR also writes each picture, as DIR/<class name>/<n>.png; DIR must be new, or empty.
--cfg-scale is the guidance: by default the model's own, usually 3; 1 disables it. --eta is 0 for no
fresh noise, the default, and up to 1 for as much as in DDPM.
"""

import argparse
import itertools
import math
import re
import unicodedata
from pathlib import Path

from support import settings
from support.checkpoint import save_picture
from support.machine import autocast, pick_device
from support.settings import MAX_SEED, UserError, expanded, limited, png_path

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from model import DiT

DEFAULT_STEPS = 25  # Euler steps; more than this changes little, as the paths bend gently
MAX_BATCH = 64  # pictures at once on a CPU; four times as many on a GPU; guidance doubles both
GIF_SIZE = 560  # longest side of an animation in pixels, which keeps it below about 3 MB


# The method: how noise becomes a picture.


def guided(model, class_ids, cfg_scale):
    """The velocity with classifier-free guidance: a function (z, t) -> v, which a solver follows.

        v = v_null + w (v_class - v_null)    w = cfg_scale

    model: any callable (z, t, y) -> v that has num_classes, the id of the null class.
    class_ids: (B,) int64. z: (B,3,S,S); t: (B,) in (0, 1], as a DiT divides by it. w = 0 ignores
    the class, w = 1 is the velocity as it was learned. The network runs once at each call, on 2B
    pictures (B if w = 1). Gradients are kept: a solver of your own runs it in torch.no_grad(), as
    euler_states does. After Ho & Salimans 2022, arXiv 2207.12598, whose w is ours minus 1.
    """
    class_ids = torch.as_tensor(class_ids)

    def velocity(z, t):
        y = class_ids.to(z.device)
        if cfg_scale == 1:
            return model(z, t, y)
        # With and without the class in one batch, which is faster than two calls. (Another
        # condition, such as text, needs its own "none", here and in train.random_batch.)
        y_null = torch.full_like(y, model.num_classes)
        v_both = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, y_null]))
        v_class, v_null = v_both.chunk(2)
        return v_null + cfg_scale * (v_class - v_null)

    return velocity


@torch.no_grad()
def euler_states(velocity, noise, times, eta=0, randn_like=torch.randn_like):
    """Integrate dz/dt = v by Euler's method, and yield z at each of the times.

        z <- z - (t - t_next) v(z, t)

    velocity: a function (z, t) -> v of z (B, ...) and t (B,), such as guided(...). noise: z at the
    first of the times, not changed in place. times: decreasing numbers, such as uniform_times(25),
    from 1 (noise) to 0 (data). To start from a picture x that is half noise, begin at 0.5, with
    0.5 x + 0.5 eps. eta: how much fresh noise comes in after each step, from 0 for none to 1, as
    much as in DDPM; randn_like draws it. The last z, at t = 0, is x: about -1 to 1, not clamped.
    """
    times = [float(t) for t in times]
    z = noise
    yield z
    for t, t_next in zip(times, times[1:]):
        v = velocity(z, torch.full((len(z),), t, device=z.device))
        z = z - (t - t_next) * v
        if eta > 0:
            z = renew_noise(z, t_next, v, t - t_next, eta, randn_like(z))
        yield z


def sample_conditional_cfg(model, class_ids, steps, cfg_scale, noise, **fresh_noise):
    """Pictures x (B,3,S,S) of the classes (B,), from noise (B,3,S,S), by steps of equal length from
    t = 1 to 0, with guidance. fresh_noise: eta and randn_like, as euler_states takes them. For
    scripts: the command line uses generate_states."""
    velocity = guided(model, class_ids, cfg_scale)
    for z in euler_states(velocity, noise, uniform_times(steps), **fresh_noise):
        pass
    return z


def uniform_times(steps):
    """The times 1 (noise), 1 - 1/steps, ..., 0 (data)."""
    return [1 - step / steps for step in range(steps + 1)]


def renew_noise(z, t, v, dt, eta, new_eps):
    """Replace part of the noise in z_t by fresh noise new_eps, after an Euler step from t + dt down
    to t, by the velocity v of that step. This also washes out errors of earlier steps.

    eta = 0 keeps all noise. With eta = 1, the noises at t + dt and at t are correlated as if noise
    had been added step by step: the ancestral sampling of DDPM. Song et al. 2020 (DDIM), arXiv
    2010.02502.
    """
    x, eps = z - t * v, z + (1 - t) * v  # as z = (1-t) x + t eps, and v = eps - x
    correlation = (1 - t - dt) * t / ((1 - t) * (t + dt))  # of the noise at t and at t + dt
    fresh = eta * math.sqrt(1 - correlation**2)
    return (1 - t) * x + t * (math.sqrt(1 - fresh**2) * eps + fresh * new_eps)


# Which noise: a picture depends on its seed and its place, not on what is drawn beside it.


def stream(seed, number):
    """The seed of a random generator for one of many things, such as the picture at a place, or a
    training step. Neighbouring seeds share no stream. A CPU's generator takes 32 bits."""
    return (seed * 1_000_003 + number) % 2**32


def randn_like_of_places(seed, places):
    """A function like torch.randn_like, for pictures at these places (whole numbers): each has a
    generator of its own, on the CPU, so that it gets the same noise in any batch and on any device.
    """
    generators = [torch.Generator().manual_seed(stream(seed, place)) for place in places]

    def randn_like(z):
        noise = [torch.randn(z.shape[1:], generator=generator) for generator in generators]
        return torch.stack(noise).to(z.device)

    return randn_like


# Many pictures, in batches


def generate_states(model, class_ids, seed=0, steps=DEFAULT_STEPS, cfg_scale=None, eta=0):
    """Sample a picture for each of the class ids (N,), in batches of at most MAX_BATCH, or four
    times as many on a GPU.

    Yields a generator for each batch, that of euler_states. The default guidance is the model's
    own. A picture's noise depends only on the seed and on its place among the class ids.
    """
    cfg_scale = model.cfg_scale if cfg_scale is None else cfg_scale
    device = next(model.parameters()).device
    batch_size = MAX_BATCH if device.type == "cpu" else 4 * MAX_BATCH
    class_ids = torch.as_tensor(class_ids)
    for start in range(0, len(class_ids), batch_size):
        y = class_ids[start : start + batch_size].to(device)
        velocity = autocast(device)(guided(model, y, cfg_scale))  # called in that context
        randn_like = randn_like_of_places(seed, range(start, start + len(y)))
        shape = (len(y), 3, model.image_size, model.image_size)
        noise = randn_like(torch.empty(shape, device=device))
        yield euler_states(velocity, noise, uniform_times(steps), eta, randn_like)


def generate(model, class_ids, seed=0, steps=DEFAULT_STEPS, cfg_scale=None, eta=0):
    """Like generate_states, but yields the pictures of each batch: uint8 (b,3,S,S), on the CPU."""
    for states in generate_states(model, class_ids, seed, steps, cfg_scale, eta):
        for z in states:
            pass
        yield to_uint8(z)


# Pictures


def to_uint8(x):
    """Pictures in [-1, 1] as uint8 on the CPU; values outside are clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def to_grid(pictures, columns=None):
    """uint8 (N,3,S,S) as one PIL image; without `columns`, about three times as wide as high."""
    wide = math.ceil(math.sqrt(3 * len(pictures)))
    return to_pil_image(make_grid(pictures, nrow=columns or wide))


def save_gif(frames, path):
    """Write PIL images as an animation, whose last frame stays for a while."""
    for frame in frames:
        frame.thumbnail((GIF_SIZE, GIF_SIZE))  # in place
    small = [frame.quantize(64) for frame in frames]  # few colours: noise does not compress
    durations = [80] * (len(small) - 1) + [2000]  # milliseconds
    save_picture(small[0], path, save_all=True, append_images=small[1:], duration=durations, loop=0)


# The command line


def parse_flags(arguments):
    parser = settings.new_parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--class-id", type=int, nargs="+", metavar="ID", help="one row for each")
    which.add_argument("--class-name", nargs="+", metavar="NAME", help="case is ignored")
    which.add_argument("--list-classes", action="store_true", help="print ids and names, and exit")
    parser.add_argument("--num-images", type=limited(int, 1), help="pictures per class")
    parser.add_argument("--checkpoint", default="out", metavar="MODEL", help="a folder or a Hub id")
    parser.add_argument("--steps", type=limited(int, 1), default=DEFAULT_STEPS, help="Euler steps")
    parser.add_argument("--cfg-scale", type=limited(float), metavar="W", help="guidance")
    parser.add_argument("--eta", type=limited(float, 0, 1), default=0, help="fresh noise, 0 to 1")
    parser.add_argument("--seed", type=limited(int, 0, MAX_SEED), default=0, help="of the noise")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cuda, mps or cpu")
    parser.add_argument("--output", type=png_path, metavar="PNG", help="where the grid goes")
    parser.add_argument("--gif", action="store_true", help="also an animation of the sampling")
    parser.add_argument("--save-images", type=expanded, metavar="DIR", help="also every picture")
    return argparse.Namespace(**settings.parse(parser, arguments))


def chosen_classes(flags, class_names):
    """The class ids selected by the flags, without duplicates; [] if they select none."""
    class_ids = flags.class_id or [find_class(n, class_names) for n in flags.class_name or []]
    unknown = set(class_ids) - set(range(len(class_names)))
    if unknown:
        raise UserError(f"--class-id {min(unknown)} is not from 0 to {len(class_names) - 1}")
    return list(dict.fromkeys(class_ids))  # a class given twice has one row of the grid


def find_class(name, class_names):
    """The id of a class by its name. Case is ignored, and accents may be typed in either of
    Unicode's ways. Raises UserError if there is no such class, or several."""
    wanted, *forms = [unicodedata.normalize("NFC", n).casefold() for n in (name, *class_names)]
    if forms.count(wanted) != 1:
        near = settings.nearest(wanted, forms)
        raise UserError(f'no class, or more than one, is called "{name}": see --list-classes{near}')
    return forms.index(wanted)


def free_path(class_ids, seed):
    """Where the grid goes: samples/class-3-seed-0.png or, so that no picture is overwritten,
    samples/class-3-seed-0-2.png and so on."""
    stem = f"class-{'-'.join(map(str, class_ids))[:80] or 'all'}-seed-{seed}"
    path, numbers = Path("samples", f"{stem}.png"), itertools.count(2)
    while path.exists() or path.with_suffix(".gif").exists():
        path = path.with_name(f"{stem}-{next(numbers)}.png")
    return path


def folder_name(class_id, class_names):
    """The folder of a class: its name or, as a model from elsewhere may have a class called ../..,
    or two that differ by case alone, its id."""
    name = class_names[class_id]
    unsafe = re.search(r"[^\w ,.()&'+-]|^\.|[. ]$|^$|.{60}|^class-\d", name)
    alike = [other.casefold() for other in class_names].count(name.casefold())
    return f"class-{class_id}" if unsafe or alike > 1 else name


def main(arguments=None):
    """Sample. arguments: flags, such as ["--class-id", "3"]; by default the command line."""
    flags = parse_flags(arguments)
    if flags.checkpoint == "out" and not Path("out", "config.json").exists():
        raise UserError("no network in out: try --checkpoint assets/laptop, or assets/butterflies")
    model = DiT.from_pretrained(flags.checkpoint).to(pick_device(flags.device))
    if flags.list_classes:
        print("\n".join(f"{i:4} {name}" for i, name in enumerate(model.class_names)))
        return
    directory = flags.save_images
    if directory and directory.exists() and (directory.is_file() or any(directory.iterdir())):
        raise UserError(f"{directory} is not empty: choose a new folder for --save-images")

    # Which pictures: a row for each class; or, if there is just one of every class, or many of a
    # single one, a block.
    chosen = chosen_classes(flags, model.class_names)
    per_class = flags.num_images or (4 if chosen else 1)
    class_ids = torch.tensor(chosen or range(model.num_classes)).repeat_interleave(per_class)
    in_rows = per_class <= 12 or per_class < len(class_ids)
    columns = per_class if in_rows and (chosen or per_class > 1) else None

    # What is shown of each batch: its states for an animation, or else the last of them.
    shown = []
    how = (flags.seed, flags.steps, flags.cfg_scale, flags.eta)
    for batch in generate_states(model, class_ids, *how):
        states = [to_uint8(z) for z in batch]
        shown.append(states if flags.gif else states[-1:])
    frames = [torch.cat(parts) for parts in zip(*shown)]

    output = flags.output or free_path(chosen, flags.seed)
    save_picture(to_grid(frames[-1], columns), output)
    print(output)
    if flags.gif:
        save_gif([to_grid(frame, columns) for frame in frames], output.with_suffix(".gif"))
        print(output.with_suffix(".gif"))
    if directory:
        for i, (picture, class_id) in enumerate(zip(frames[-1], class_ids.tolist())):
            folder = directory / folder_name(class_id, model.class_names)
            save_picture(to_pil_image(picture), folder / f"{i % per_class}.png")


if __name__ == "__main__":
    settings.run_command(main, if_out_of_memory="lower MAX_BATCH in sample.py")
