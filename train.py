"""Train nanoDiT: a class-conditional diffusion transformer, as a rectified flow.

    python train.py --preset laptop            # drawn butterflies, three minutes on two CPU cores
    python train.py                            # photographs from the Hub, sized for one large GPU
    python train.py --dataset my_pictures      # a folder that holds a folder of pictures a class
    python train.py --resume                   # go on with the run in out/, whatever stopped it
    torchrun --nproc_per_node=8 train.py       # the same training, on eight GPUs

Every constant below is a flag, as in --dim 256 --out-dir wide. All that a run writes is in out/.
"""

import argparse
import copy
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

import sample
from assets.draw_butterflies import draw_butterflies
from model import DiT, UserError

# input and output
DATASET = "sayakpaul/butteflies_with_classes"  # a Hub id, a folder of class folders, or "drawn"
OUT_DIR = "out"  # checkpoints, log and sample grids go here
EVAL_EVERY = 250  # steps from one row of log.csv to the next, with the held-out loss
SAMPLE_EVERY = 1000  # steps from one grid in samples/ to the next
CHECKPOINT_EVERY = 500  # steps from one checkpoint to the next; --resume loses no more than these
# data
IMAGE_SIZE = 64  # pixels a side, after resizing and cropping; a multiple of PATCH_SIZE
FLIP_SHARE = 0.5  # pictures seen mirrored; 0 where left and right differ, as in writing
# model
PATCH_SIZE = 4  # pixels a side; half of it costs four times the compute
DIM = 384  # width; a multiple of HEADS
DEPTH = 12  # blocks
HEADS = 6  # attention heads
# optimizer
STEPS = 12000  # optimizer steps of the whole run
BATCH_SIZE = 256  # pictures a step, of all GPUs together
LEARNING_RATE = 4e-4  # of AdamW, at its highest; smaller networks take more
ACCUMULATE = 1  # parts of a batch, one after another: the same gradient in less memory
GRAD_CLIP = 1.0  # largest norm of the gradient
LABEL_DROP = 0.1  # pictures seen without their class: what guidance needs
EMA_DECAY = 0.999  # memory of the averaged weights, from which samples are drawn
# schedule
WARMUP_STEPS = 200  # of the learning rate, clipped to a tenth of a short run
DECAY_SHARE = 0.4  # last part of the run, in which the learning rate falls to zero
# t from 0, data, to 1, noise: the logistic of a normal number (Esser et al., arXiv 2403.03206)
T_MEAN = 0.4  # above 0: more time on noisy pictures, where shapes and colours are decided
T_STD = 1.0  # larger: more time near both ends
# system
SEED = 0  # of everything drawn at random
DEVICE = "auto"  # auto is cuda, else mps, else cpu
COMPILE = 1  # torch.compile on CUDA, where it pays; 0 for never

# --preset laptop: the drawn butterflies, a network that two CPU cores train in three minutes
LAPTOP = {"DATASET": "drawn", "PATCH_SIZE": 8, "DIM": 96, "DEPTH": 6, "HEADS": 3, "STEPS": 2600}
LAPTOP |= {"BATCH_SIZE": 16, "LEARNING_RATE": 3e-3, "EMA_DECAY": 0.998}

# name -> comment of every constant above; each is a flag, and kept in train_state.pt
CONSTANTS = Path(__file__).read_text("utf-8").split("LAPTOP =")[0]
SETTINGS = dict(re.findall(r"^([A-Z]\w+) = .+?  # (.+)$", CONSTANTS, re.M))
MODEL_SETTINGS = ("IMAGE_SIZE", "PATCH_SIZE", "DIM", "DEPTH", "HEADS")
LOG_HEADER = "step,train_loss,val_loss,learning_rate,images_per_second,seconds\n"
RUN_FILES = ("config.json", "model.safetensors", "log.csv", "train_state.pt")
EVAL_T = (0.1, 0.3, 0.5, 0.7, 0.9)  # the validation loss is the mean over these t
LOG_EVERY = 10  # steps between looks at the loss: each look makes the CPU wait for the GPU


def rectified_flow_loss(model, x, y, t, noise):
    """Mean squared error of the velocity on the line from data to noise: a scalar.
    z_t = (1-t) x + t eps,   v = dz_t/dt = eps - x,   loss = |model(z_t, t, y) - v|^2
    x, noise: (B,3,S,S); y: (B,) class ids; t: (B,) in [0, 1]. Liu et al. 2022, arXiv 2209.03003."""
    t_ = t[:, None, None, None]
    z_t = (1 - t_) * x + t_ * noise
    v = noise - x
    return F.mse_loss(model(z_t, t, y), v)


@torch.no_grad()
def validation_loss(model, images, labels, times=EVAL_T):
    """Mean loss over uint8 images (N,3,S,S) and times, with the same noise every time: a float."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for batch, y in zip(images.split(sample.MAX_BATCH), labels.split(sample.MAX_BATCH)):
        x = batch.float() / 127.5 - 1
        for t in times:
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            t = torch.full((len(x),), t, device=x.device)
            with sample.autocast(x.device):
                total += rectified_flow_loss(model, x, y, t, noise) * len(x)
    return total.item() / (len(images) * len(times))


def random_batch(images, labels, num_classes, step):
    """Pictures x, class ids y (some null), times t and noise: all follow from SEED and the step."""
    device = images.device if images.is_cuda else torch.device("cpu")
    generator = torch.Generator(device).manual_seed(SEED * 1_000_003 + step)

    def draw(distribution, *shape):
        return distribution(shape, generator=generator, device=device).to(images.device)

    i = draw(lambda shape, **where: torch.randint(len(images), shape, **where), BATCH_SIZE)
    x = images[i].float() / 127.5 - 1
    x = torch.where(draw(torch.rand, BATCH_SIZE, 1, 1, 1) < FLIP_SHARE, x.flip(3), x)
    y = torch.where(draw(torch.rand, BATCH_SIZE) < LABEL_DROP, num_classes, labels[i])
    t = torch.sigmoid(T_MEAN + T_STD * draw(torch.randn, BATCH_SIZE))
    return x, y, t, draw(torch.randn, *x.shape)


def load_images(folder, image_size):
    """A folder of class folders -> uint8 (N,3,S,S), int64 labels (N,), [class names, sorted]. Loose
    pictures are a class, hidden ones none; broken ones are named; UserError if a class has none."""
    folder = Path(folder)
    classes = {d.name: find_pictures(d, "**/*") for d in folder.iterdir() if d.is_dir()}
    if loose := find_pictures(folder, "*"):
        classes[folder.resolve().name] = loose
    names = sorted(name for name in classes if not name.startswith("."))
    files = [(path, y) for y, name in enumerate(names) for path in classes[name]]
    options = {"desc": "reading pictures", "leave": False, "disable": None}  # None: on terminals
    pictures = thread_map(lambda file: read_picture(file[0], image_size), files, **options)
    if broken := [str(path) for (path, _), picture in zip(files, pictures) if picture is None]:
        named = ", ".join(broken[:10]) + ", ..." * (len(broken) > 10)
        print(f"skipped {len(broken)} pictures that cannot be read: {named}", file=sys.stderr)
    labels = torch.tensor([y for (_, y), picture in zip(files, pictures) if picture is not None])
    missing = sorted(set(range(len(names))) - set(labels.tolist()))
    if missing or not names:
        where = folder / names[missing[0]] if names else folder
        raise UserError(f"no pictures in {where}: put some there, or remove an empty class")
    return torch.stack([picture for picture in pictures if picture is not None]), labels, names


def find_pictures(folder, pattern):
    """Paths of the pictures that match, sorted; nothing hidden, nor in a hidden folder."""
    paths = [p for p in folder.glob(pattern) if p.suffix.lower() in (*IMG_EXTENSIONS, ".gif")]
    shown = [p for p in paths if "/." not in f"/{p.relative_to(folder).as_posix()}"]
    return sorted(path for path in shown if path.is_file())


def read_picture(path, image_size):
    """uint8 (3,S,S): upright, on white, short side resized, centre cropped; None if unreadable."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip to white
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return pil_to_tensor(ImageOps.fit(image.convert("RGB"), (image_size, image_size)))
    except Exception:  # a broken file can raise nearly anything
        return None


def load_dataset():
    """What DATASET names, as load_images returns it. The Hub's go into the Hub's own cache."""
    if DATASET == "drawn":
        return draw_butterflies(images_per_class=54, image_size=IMAGE_SIZE, seed=0)
    if Path(DATASET).is_dir():
        return load_images(DATASET, IMAGE_SIZE)
    with sample.blamed_on(f"no data at {DATASET}; try --preset laptop, or --dataset FOLDER"):
        folder = snapshot_download(DATASET, repo_type="dataset")
    return load_images(folder, IMAGE_SIZE)


def held_out(labels):
    """Mask (N,) of the validation pictures: every twentieth of each class that has two or more."""
    counts = torch.bincount(labels)
    place_in_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels]
    return (place_in_class % 20 == 0) & (counts[labels] > 1)


def learning_rate_at(step):
    """Linear warmup, constant, linear decay to zero just after the last of the steps 1 to STEPS."""
    warmup = max(1, min(WARMUP_STEPS, STEPS // 10))
    decay = max(1, DECAY_SHARE * STEPS)
    return LEARNING_RATE * min(1, step / warmup, (STEPS + 1 - step) / decay)


@torch.no_grad()
def update_ema(ema, model, step):
    """Average over about 1 / (1 - EMA_DECAY) steps; early on over fewer, or it stays grey."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def save_checkpoint(model, ema, optimizer, now):
    """Write beside, then rename; the state last, for it alone decides where --resume goes on."""
    state = {**now, "model": model.state_dict(), "ema": ema.state_dict()}
    state |= {"optimizer": optimizer.state_dict(), "class_names": model.class_names}
    state |= {"settings": {name: globals()[name] for name in SETTINGS}}
    beside = Path(OUT_DIR, ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    with sample.blamed_on(f"cannot write to {OUT_DIR}, whose last checkpoint stays"):
        ema.save_pretrained(beside)
        (beside / "log.csv").write_text(now["log"])
        torch.save(state, beside / "train_state.pt")
        for name in RUN_FILES:
            (beside / name).replace(Path(OUT_DIR, name))
    shutil.rmtree(beside)


def save_grid(ema, step):
    """A picture of every class, or of 75 spread over them, from the same noise every time."""
    classes = torch.linspace(0, ema.num_classes - 1, min(ema.num_classes, 75)).round().long()
    grid = sample.to_grid(torch.cat(list(sample.generate(ema, classes, seed=SEED))))
    path = Path(OUT_DIR, "samples", f"step-{step:06}.png")
    sample.write_beside(path, lambda beside: grid.save(beside, "PNG"))


def parse_flags():
    """(options, the constants among them); a constant's comment is the help of its flag."""
    parser = sample.new_parser(__doc__, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("how to begin")
    group.add_argument("--preset", choices=["laptop"], help="the constants in LAPTOP")
    either = group.add_mutually_exclusive_group().add_argument
    either("--init-from", metavar="MODEL", help="start from trained weights: a folder or a Hub id")
    either("--resume", action="store_true", help="go on with the run in OUT_DIR")
    either("--overwrite", action="store_true", help="replace the run in OUT_DIR")
    for title, name in re.findall(r"^# ([a-z ]+)$|^([A-Z]\w+) = ", CONSTANTS, re.M):
        if title:
            group = parser.add_argument_group(title)
        else:
            default, flag = globals()[name], "--" + name.lower().replace("_", "-")
            text = f"{SETTINGS[name]} ({default})"
            group.add_argument(flag, dest=name, type=type(default), metavar="", help=text)
    options = vars(parser.parse_args())
    return options, {name: options[name] for name in SETTINGS if name in options}


def apply_settings(settings):
    """Make the settings the constants of this module; UserError names one that cannot be."""
    for name, value in settings.items():
        lowest = {"SEED": 0, "COMPILE": 0, "T_MEAN": -100}.get(name, isinstance(value, int))
        if not isinstance(value, str) and not lowest <= value < 3e38:
            raise UserError(f"{name} cannot be {value}: {int(lowest)} is the lowest")
    globals().update(settings)


def load_state(settings, flags):
    """The state of the run in OUT_DIR; its settings become the constants, but for the flags."""
    path = Path(OUT_DIR, "train_state.pt")
    what = f"--resume: {path} is missing, damaged, or no state of a run"
    with sample.blamed_on(f"{what}; leave --resume away, or name --out-dir"):
        if record := zipfile.ZipFile(path).testzip():  # torch.load does not look at checksums
            raise UserError(f"the checksum of {record} is another")
        state = torch.load(path, map_location="cpu", weights_only=True)
        kept, _ = state["settings"], state["step"]  # KeyError now, not later
        kept = {name: kept.get(name, globals()[name]) for name in SETTINGS}
    for name in (*MODEL_SETTINGS, "SEED"):
        if (wanted := settings.get(name, kept[name])) != kept[name]:
            raise UserError(f"--resume: {name} stays {kept[name]} in {OUT_DIR}, not {wanted}")
    apply_settings({**kept, "OUT_DIR": OUT_DIR, **flags})
    return state


def new_model(class_names):
    sizes = {name.lower(): globals()[name] for name in MODEL_SETTINGS}
    dataset = Path(DATASET).resolve().name if Path(DATASET).is_dir() else DATASET
    return DiT(class_names=class_names, dataset=dataset, **sizes)


def flops_per_image():
    """What training costs: operations of one picture's way forward and backward, counted."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):  # shapes, no numbers
        x, y = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), torch.zeros(1, dtype=torch.long)
        rectified_flow_loss(new_model(["any"]), x, y, torch.ones(1), x).backward()
    return counter.get_total_flops()


def start_process(device):
    """(number of this process, number of all): torchrun starts several, which meet here."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > BATCH_SIZE:
        raise UserError(f"BATCH_SIZE {BATCH_SIZE} is less than a picture for each of {world} GPUs")
    if world > 1:
        with sample.blamed_on(f"process {rank} of {world} cannot start"):
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group()
    if rank > 0:  # the first process alone speaks and writes; errors are for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return rank, world


def init_from(checkpoint, model):
    """Give `model` the weights of a trained one; with other classes, class embeddings stay new."""
    trained = sample.load_model(checkpoint)
    if trained.class_names != model.class_names:
        print(f"{checkpoint} knows other classes: class embeddings start anew")
        trained.class_embedding = model.class_embedding
    with sample.blamed_on(f"--init-from {checkpoint} needs the sizes it was trained with"):
        model.load_state_dict(trained.state_dict())


def train_step(model, optimizer, batch, rank=0, world=1):
    """A step of the optimizer: this process's share of the loss, and the norm of the gradient."""
    parts = [tensor.tensor_split(world)[rank].chunk(ACCUMULATE) for tensor in batch]
    total = torch.zeros((), device=batch[0].device)
    for x, y, t, noise in zip(*parts):
        model.require_backward_grad_sync = x is parts[0][-1]  # once a step is enough
        with sample.autocast(x.device):
            loss = rectified_flow_loss(model, x, y, t, noise) * (len(x) / BATCH_SIZE)
        (loss * world).backward()  # of the gradients, processes take the mean
        total += loss.detach()
    gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return total, gradient_norm


def train(model, ema, optimizer, data, val_data, now, rank, world):
    """The steps that are left, with losses, log, grids and checkpoints; a signal ends them."""
    out, device = Path(OUT_DIR), data[0].device
    row_step, row_time, first_step = now["step"], time.perf_counter(), now["step"] + 1
    started = row_time - now["seconds"]
    if COMPILE and device.type == "cuda":
        model.compile()  # in place, so that the weights keep their names
    # Processes meet here: before the first one writes to OUT_DIR, all have read what was there.
    parallel = DistributedDataParallel(model) if world > 1 else model
    if rank == 0 and now["step"] == 0:
        for old in (out / "samples").glob("step-*.png"):  # of the run that --overwrite replaces
            old.unlink()
        save_checkpoint(model, ema, optimizer, now)  # from here on --resume works
    caught = []  # signals; the step under way is ended first
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    options = {"unit": "img", "unit_scale": True, "initial": now["step"] * BATCH_SIZE}
    with tqdm(total=STEPS * BATCH_SIZE, smoothing=0, disable=rank > 0, **options) as bar:
        for step in range(first_step, STEPS + 1):
            optimizer.param_groups[0]["lr"] = learning_rate_at(step)
            batch = random_batch(*data, ema.num_classes, step)
            loss, gradient_norm = train_step(parallel, optimizer, batch, rank, world)
            update_ema(ema, model, step)
            now["step"] = step
            stop = torch.tensor(len(caught))
            if world > 1:
                dist.all_reduce(loss)  # the sum over all processes
                dist.all_reduce(stop)  # a signal to one stops all, after the same step
            now["losses"].append(loss)
            if step == first_step:  # takes long, where it compiles: the time left looks past it
                bar.unpause()
            bar.update(BATCH_SIZE)
            intervals = (EVAL_EVERY, SAMPLE_EVERY, CHECKPOINT_EVERY, LOG_EVERY)
            evaluate, show, save, look = (step % n == 0 or step == STEPS for n in intervals)
            if evaluate or show or save or look or stop:
                train_loss = torch.stack(now["losses"]).mean().item()
                if not math.isfinite(train_loss + gradient_norm.item()):
                    hint = f"lower LEARNING_RATE {LEARNING_RATE}; {out} keeps its last checkpoint"
                    raise UserError(f"the loss is not finite at step {step}; {hint}")
                bar.set_postfix_str(f"step {step}, loss {train_loss:.4f}", refresh=False)
            if evaluate:
                rate = (step - row_step) * BATCH_SIZE / (time.perf_counter() - row_time)
                val_loss = validation_loss(ema, *val_data)
                row_step, row_time = step, time.perf_counter()
                row = f"{step},{train_loss:.6f},{val_loss:.6f},{learning_rate_at(step):.4g}"
                now["log"] += f"{row},{rate:.1f},{row_time - started:.1f}\n"
                now["losses"] = []
                bar.write(f"step {step}: loss {train_loss:.4f}, held-out loss {val_loss:.4f}")
            if rank == 0 and evaluate:
                sample.write_beside(out / "log.csv", lambda log: log.write_text(now["log"]))
            if rank == 0 and show:
                save_grid(ema, step)
            if rank == 0 and (save or stop):
                now["seconds"] = time.perf_counter() - started
                save_checkpoint(model, ema, optimizer, now)
            if stop:
                break
    if world > 1:
        dist.destroy_process_group()
    if stop:
        print(f"stopped at step {step} with the state in {out}: --resume goes on", file=sys.stderr)
        sys.exit(128 + (caught or [signal.SIGTERM])[0])


def main():
    options, flags = parse_flags()
    settings = {**(LAPTOP if "preset" in options else {}), **flags}
    apply_settings(settings)
    state = load_state(settings, flags) if "resume" in options else None
    out = Path(OUT_DIR)
    if state and state["step"] >= STEPS:
        print(f"the run in {out} is finished, at step {state['step']}; more --steps go on")
        return
    if not (state or "overwrite" in options) and any((out / name).exists() for name in RUN_FILES):
        raise UserError(f"{out} holds a run: --resume it, --overwrite it, or name an --out-dir")
    device = sample.pick_device(DEVICE)
    rank, world = start_process(device)
    flops = flops_per_image()
    if device.type == "cpu":
        minutes = flops * BATCH_SIZE * STEPS / 1e11 / 60
        print(f"about {minutes:,.0f} minutes on two CPU cores; --preset laptop takes about three")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    images, labels, class_names = load_dataset()
    val = held_out(labels)
    data = images[~val].to(device), labels[~val].to(device)
    val_data = (images[val].to(device), labels[val].to(device)) if val.any() else data
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")  # TF32, on GPUs that have it
    model = new_model(class_names).to(device)
    if "init_from" in options:
        init_from(options["init_from"], model)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    millions = sum(w.numel() for w in model.parameters()) / 1e6
    print(f"{len(class_names)} classes, {len(images)} pictures, {val.sum()} of them held out")
    print(f"{millions:.2f} M parameters, {flops / 1e9:.2f} GFLOP an image, {device}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)
    now = {"step": 0, "seconds": 0.0, "log": LOG_HEADER, "losses": []}  # since the last row
    if state:
        with sample.blamed_on(f"{out / 'train_state.pt'} does not fit"):
            if class_names != state["class_names"]:
                raise UserError(f"{DATASET} has other classes than the run in {out}")
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
            now = {name: state[name] for name in now}
            now["losses"] = [loss.to(device) for loss in now["losses"]]
    train(model, ema, optimizer, data, val_data, now, rank, world)
    peak = torch.cuda.max_memory_allocated() / 2**30
    if device.type != "cuda" and os.name == "posix":  # Windows keeps no such record
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak /= 2**30 if sys.platform == "darwin" else 2**20
    print(f"trained in {now['seconds'] / 60:.1f} minutes, {peak:.2f} GiB at most: see {out}")


if __name__ == "__main__":
    sample.run(main)
