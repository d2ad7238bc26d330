"""Train nanoDiT: a class-conditional diffusion transformer, as a rectified flow.

    python train.py --preset laptop            # drawn butterflies: three minutes on two CPU cores
    python train.py                            # photographs from the Hub: two hours on two cores
    python train.py --dataset my_pictures      # a folder with one subfolder of pictures per class
    python train.py --resume                   # continue the run in out/, whatever stopped it
    torchrun --nproc_per_node=8 train.py       # the same training on eight GPUs

Every setting is a constant at the top of train.py, and also a flag of the same name. A run writes
everything to its OUT_DIR. A folder of pictures without class folders may hold a CSV table with the
columns filename and label; without one, it is a single class.
"""

import argparse
import copy
import json
import math
import shlex
import signal
import sys
import time
from pathlib import Path

from support import checkpoint, machine, settings
from support.machine import autocast, to_device
from support.settings import UserError, print_once

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sample
from data.images import load_dataset
from model import MIN_T, DiT

# Not settings: upper-case imports, such as MIN_T. (If a notebook runs this file again, its own
# constants are there already, and do not count.)
imported = globals().keys() - globals().get("SETTINGS", {}).keys()

# --- input and output ---
DATASET = "sayakpaul/butteflies_with_classes"  # a folder, a packed file, a Hub id, or "drawn"
OUT_DIR = "out"  # where checkpoints, the log and sample grids go
EVAL_EVERY = 250  # steps between rows of log.csv, with the held-out loss
SAMPLE_EVERY = 1000  # steps between grids in samples/
CHECKPOINT_EVERY = 500  # steps between checkpoints: the most that a crash can cost
LOG_EVERY = 10  # steps between losses on screen, each the mean since the last row of log.csv

# --- data ---
IMAGE_SIZE = 64  # pixels per side, after resizing and cropping; a multiple of PATCH_SIZE
FLIP_SHARE = 0.5  # share of pictures that are mirrored; 0 if left and right matter, as in text

# --- model ---
PATCH_SIZE = 8  # pixels per side of a patch; halving it costs four times the compute
DIM = 192  # width of the transformer; a multiple of HEADS
DEPTH = 6  # transformer blocks
HEADS = 6  # attention heads in each block
CONV_DIM = 64  # channels of convolutions around the blocks, for finer detail; 0 for a plain DiT

# --- optimizer ---
STEPS = 25000  # optimizer steps of the whole run
BATCH_SIZE = 32  # pictures per step, over all GPUs
LEARNING_RATE = 2e-3  # peak learning rate of AdamW; larger networks need a lower one
ACCUMULATE = 1  # gradient accumulation: micro-batches per step; same gradient, less memory
GRAD_CLIP = 1.0  # maximum norm of the gradient; 0 disables clipping
LABEL_DROP = 0.1  # label dropout: share of labels replaced by the null class, for guidance
EMA_DECAY = 0.999  # of the exponential moving average (EMA) of the weights; samples use it

# --- sampling ---
CFG_SCALE = 3.0  # guidance of the grids, and of sample.py with this network; 1 disables it

# --- schedule ---
WARMUP_STEPS = 200  # learning rate warmup, capped at a tenth of the run
DECAY_SHARE = 0.8  # last part of the run, over which the learning rate decays to zero

# --- timesteps, logit-normal: t = sigmoid(T_MEAN + T_STD n), n normal (arXiv 2403.03206) ---
T_MEAN = 0.4  # above 0 favours noisier pictures, in which shapes and colours are decided
T_STD = 1.0  # higher favours both ends, t near 0 (data) and 1 (noise)

# --- system ---
SEED = 0  # seeds all random numbers
DEVICE = "auto"  # cuda, mps or cpu; auto is the first that this machine has
PRECISION = "auto"  # bf16, fp32, or auto: bf16 if the hardware supports it; grids are always auto
COMPILE = "auto"  # torch.compile: on, off, or auto: on for CUDA, and on a CPU for longer runs

# Every upper-case bool, int, float or str above, including any that you add, is a setting: it gets
# a flag, and is saved with the run for --resume. These are the values in this file; during a run,
# flags and presets change the constants themselves.
SETTINGS = {
    name: value
    for name, value in globals().items()
    if name.isupper() and name not in imported and isinstance(value, (bool, int, float, str))
}

# A preset is a line of flags, which others may follow.
PRESETS = {
    # The drawn butterflies, and a network that two CPU cores train in three minutes.
    "laptop": "--dataset drawn --steps 2600 --batch-size 16 --dim 96 --heads 3 --conv-dim 0 "
    "--learning-rate 3e-3 --decay-share 0.4 --ema-decay 0.998 --sample-every 300"
}

# The settings that are arguments of DiT(): if you give it a new one, add the constant here.
MODEL_SETTINGS = ("IMAGE_SIZE", "PATCH_SIZE", "DIM", "DEPTH", "HEADS", "CONV_DIM")
EVAL_T = (0.1, 0.3, 0.5, 0.7, 0.9)  # the held-out loss is the mean over these t


# The method: what is learned, from which batches, at which rate.


def rectified_flow_loss(model, x, y, t, noise):
    """Mean squared error of the predicted velocity, a scalar.

        z_t = (1-t) x + t eps
        v = dz_t/dt = eps - x
        loss = |model(z_t, t, y) - v|^2

    model: any callable (z, t, y) -> v. x, noise: (B,3,S,S), the pictures in [-1, 1]. y: (B,) class
    ids. t: (B,) in (0, 1]: near 0 data, and at 1 noise. Liu et al. 2022, arXiv 2209.03003.

    If you change it, keep it a mean over the batch. The held-out loss is computed by it, too.
    """
    t_ = t[:, None, None, None]
    z_t = (1 - t_) * x + t_ * noise
    v = noise - x
    return F.mse_loss(model(z_t, t, y), v)


def random_batch(images, labels, train_ids, num_classes, step):
    """The training batch of a step, which SEED and the step determine.

    images: uint8 (N,3,S,S); labels: (N,); train_ids: which of the N are trained on. Returns
    pictures x (B,3,S,S) in [-1, 1], class ids y (B,), of which some are num_classes, the null
    class, times t (B,) from MIN_T to 1, and noise (B,3,S,S).
    """
    # Drawn on the CPU, so that every process and every kind of device has the same batch. The
    # factor keeps runs with neighbouring seeds from sharing batches.
    generator = torch.Generator().manual_seed((SEED * 1_000_003 + step) % 2**63)
    indices = torch.randint(len(train_ids), (BATCH_SIZE,), generator=generator)
    flipped = torch.rand(BATCH_SIZE, generator=generator) < FLIP_SHARE
    dropped = torch.rand(BATCH_SIZE, generator=generator) < LABEL_DROP
    n = torch.randn(BATCH_SIZE, generator=generator)
    noise = torch.randn(BATCH_SIZE, *images.shape[1:], generator=generator)
    t = torch.sigmoid(T_MEAN + T_STD * n).clamp_min(MIN_T)

    chosen = train_ids[indices]
    x = images[chosen].float() / 127.5 - 1
    x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    y = torch.where(dropped, num_classes, labels[chosen])
    return x, y, t, noise


def micro_batches(batch, rank, world_size):
    """The share of one process in a batch, which all of them have drawn alike, cut into ACCUMULATE
    parts: a list of (x, y, t, noise)."""
    slices = [tensor.tensor_split(world_size)[rank] for tensor in batch]
    return list(zip(*(tensor.chunk(ACCUMULATE) for tensor in slices)))


def held_out(labels):
    """Which pictures are for validation: a mask (N,) of every twentieth, in the order of classes,
    or of fewer where that would be more than about 1,000. Classes of fewer than four pictures keep
    theirs for training."""
    counts = labels.bincount()
    by_class = labels.argsort(stable=True)  # on the Hub they may come in any order
    candidates = by_class[counts[labels[by_class]] >= 4]
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[candidates[:: max(20, len(candidates) // 1000)]] = True
    return mask


@torch.no_grad()
def validation_loss(model, images, labels, val_ids, times=EVAL_T):
    """Mean loss over the pictures images[val_ids], uint8 (N,3,S,S), and over times, as a float. The
    noise is always the same, so that the losses of two runs can be compared."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for ids in val_ids.split(sample.MAX_BATCH):
        x = images[ids].float() / 127.5 - 1
        for t_value in times:
            noise = torch.randn(x.shape, generator=generator)
            t = torch.full((len(x),), t_value)
            batch = to_device((x, labels[ids], t, noise), device)
            with autocast(device, PRECISION):
                total += rectified_flow_loss(model, *batch) * len(x)
    return total.item() / (len(val_ids) * len(times))


def learning_rate_factor(step):
    """The factor on each group's own learning rate: linear warmup, then 1, then a linear decay that
    would reach zero after step STEPS."""
    warmup_steps = max(1, min(WARMUP_STEPS, STEPS // 10))
    decay_steps = max(1, DECAY_SHARE * STEPS)
    return min(1, step / warmup_steps, (STEPS + 1 - step) / decay_steps)


@torch.no_grad()
def update_ema(ema, model, step):
    """Move the averaged weights towards the model's. Early on the average spans fewer steps;
    otherwise the random initial weights would linger in it."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for average, weight in zip(ema.parameters(), model.parameters()):
        average.lerp_(weight, 1 - decay)
    for buffer, newest in zip(ema.buffers(), model.buffers()):  # of a batch norm, if you add one
        buffer.copy_(newest)


def load_initial_weights(name, model):
    """Give `model` the weights of the trained network in a folder or at a Hub id; if its classes
    are others, the class embeddings stay random. Raises UserError if the sizes differ."""
    trained = DiT.from_pretrained(name)
    weights = trained.state_dict()
    if trained.class_names != model.class_names:
        print_once(f"{name} has other classes: the class embeddings start from random values")
        weights["class_embedding.weight"] = model.class_embedding.weight
    config = trained._hub_mixin_config
    sizes = ", ".join(f"{size} {config.get(size.lower())}" for size in MODEL_SETTINGS)
    checkpoint.load_weights(model, weights, f"--init-from: {name} has {sizes}; this run differs")


# Settings: the constants, changed by a preset, by flags, or by the run that --resume continues.


def parse_flags(arguments=None, description=__doc__):
    """The command line as two dictionaries: how to begin, and the settings among the flags."""
    parser = settings.new_parser(description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, help="change several settings at once")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in OUT_DIR")
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--resume", action="store_true", help="continue the run in OUT_DIR")
    one_of.add_argument("--init-from", metavar="MODEL", help="trained weights: a folder or Hub id")
    settings.add_setting_flags(parser, SETTINGS, source_file=globals().get("__file__"))
    arguments = settings.command_line() if arguments is None else arguments
    options = vars(parser.parse_args(arguments))
    preset = PRESETS.get(options.get("preset"), "")
    options = vars(parser.parse_args([*preset.split(), *arguments]))
    if "resume" in options and "overwrite" in options:
        parser.error("--resume continues a run and --overwrite replaces it: choose one")
    flags = {name: options.pop(name) for name in SETTINGS if name in options}
    return options, flags


def apply_settings(options, flags):
    """Change the constants as the flags say, and check them. Returns the state of the run to be
    continued, or None. Raises UserError for what no run, or not this one, could be trained with."""
    changed, state = flags, None
    out = Path(flags.get("OUT_DIR", OUT_DIR)).expanduser()
    if "resume" in options:
        state = checkpoint.load_state(out / "train_state.pt")
        saved = {name: state["settings"].get(name, globals()[name]) for name in SETTINGS}
        for name in (*MODEL_SETTINGS, "SEED"):
            if flags.get(name, saved[name]) != saved[name]:
                raise UserError(f"--resume: {name} is {saved[name]} in {out}, not {flags[name]}")
        changed = {**saved, **flags}
    globals().update(changed, OUT_DIR=str(out))
    values = {name: globals()[name] for name in SETTINGS}
    settings.check_limits(values)  # which also turns 1e4 into 10000
    globals().update(values)
    if not state and "overwrite" not in options:
        if any((out / name).exists() for name in (*checkpoint.CHECKPOINT_FILES, "log.csv")):
            raise UserError(f"{out} holds a run: use --resume, --overwrite, or another --out-dir")
    return state


def main(arguments=None):
    """Train. arguments: flags, such as ["--steps", "100"]; by default those of the command line, or
    none in a notebook. Flags change constants of this module, which main() puts back."""
    constants = {name: globals()[name] for name in SETTINGS}
    try:
        options, flags = parse_flags(arguments)
        state = apply_settings(options, flags)
        if state and state["step"] >= STEPS:
            print_once(f"{OUT_DIR} is finished; with more --steps the learning rate rises again")
            return
        with checkpoint.the_only_run(Path(OUT_DIR)):
            train(state, options.get("init_from"))
    finally:
        globals().update(constants)


def train(state, init_from):
    """The whole run, from top to bottom. state: of the run to be continued, or None. init_from:
    where a new run has its first weights from; None for random ones."""
    # Device and processes. torchrun starts several, of which only the master writes files.
    out = Path(OUT_DIR)
    device = machine.pick_device(DEVICE)
    rank, world_size = machine.start_process(device, BATCH_SIZE)
    master = rank == 0
    torch.set_float32_matmul_precision("high")  # TF32, on GPUs that have it

    # Data: all pictures stay in the machine's memory; those held out are indices.
    images, labels, class_names = load_dataset(DATASET, IMAGE_SIZE)
    is_val = held_out(labels)
    train_ids = (~is_val).nonzero().flatten()
    # If no class is large enough to hold any out, the "held-out" loss is of training pictures.
    val_ids = is_val.nonzero().flatten() if is_val.any() else train_ids[:1000]

    # Model, EMA and optimizer: new, initialised from trained weights, or resumed.
    torch.manual_seed(SEED)
    sizes = {name.lower(): globals()[name] for name in MODEL_SETTINGS}
    dataset = Path(DATASET).resolve().name if Path(DATASET).exists() else DATASET
    model = DiT(class_names=class_names, dataset=dataset, cfg_scale=CFG_SCALE, **sizes).to(device)
    if init_from:
        load_initial_weights(init_from, model)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0, fused=True
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    steps_done, seconds_before = 0, 0.0
    losses, rows = [], []  # since the last row of the log; and its rows
    if state:
        checkpoint.restore_state(state, model, ema, optimizer)
        steps_done, seconds_before, rows = state["step"], state["seconds"], state["log"]
        losses = [loss.to(device) for loss in state["losses"]]
    precision = "bf16" if machine.uses_bf16(device, PRECISION) else "fp32"
    parameters = sum(weight.numel() for weight in model.parameters())
    print_once(f"{len(class_names)} classes, such as {', '.join(class_names[:6])}")
    print_once(f"{len(images)} pictures, {is_val.sum()} of them held out")
    print_once(f"each picture trained on is seen {STEPS * BATCH_SIZE / len(train_ids):.1f} times")
    print_once(f"{parameters / 1e6:.2f} M parameters, on {device} in {precision}")
    pays = machine.compiling_pays(device, parameters * len(model.positions) * BATCH_SIZE * STEPS)
    if COMPILE == "on" or (COMPILE == "auto" and pays):
        machine.compile_model(model)
    parallel_model = DistributedDataParallel(model) if world_size > 1 else model

    def save_checkpoint(step):
        """Write the EMA weights, and train_state.pt with everything that --resume needs."""
        # Through JSON, for plain types: torch.load would refuse a NumPy float.
        constants = json.loads(json.dumps({name: globals()[name] for name in SETTINGS}))
        new_state = {"step": step, "settings": constants, "class_names": class_names}
        new_state |= {"seconds": time.perf_counter() - started, "losses": losses, "log": rows}
        new_state |= {"model": model.state_dict(), "ema": ema.state_dict()}
        new_state |= {"optimizer": optimizer.state_dict()}
        new_state |= {"optimizer_is": checkpoint.describe_optimizer(optimizer)}
        checkpoint.save_checkpoint(out, ema, new_state)

    # DDP's constructor waits for all processes: by now each has read what OUT_DIR held.
    started = time.perf_counter() - seconds_before
    if master and not state:
        for file in [out / "log.csv", *out.glob("samples/step-*.png")]:  # of an overwritten run
            file.unlink(missing_ok=True)
        save_checkpoint(step=0)  # from here on --resume works
    grid_classes = range(len(class_names))[:75]

    # The loop
    resume = f"python train.py --resume --out-dir={shlex.quote(OUT_DIR)}"
    row_step, row_time = steps_done, time.perf_counter()  # of the last row of the log
    bar = tqdm(total=STEPS, initial=steps_done, unit="step", disable=not master)
    with bar, machine.stop_signals() as signals:
        for step in range(steps_done + 1, STEPS + 1):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * learning_rate_factor(step)
            # For layers that you may add, such as dropout: a resumed run draws the same.
            torch.manual_seed(SEED + step * world_size + rank)

            # The gradients of the parts, in all processes, add up to that of the whole batch.
            batch = random_batch(images, labels, train_ids, model.num_classes, step)
            parts = micro_batches(batch, rank, world_size)
            step_loss = torch.zeros((), device=device)
            for number, part in enumerate(parts, 1):
                x, y, t, noise = to_device(part, device)
                # DDP exchanges gradients during backward(): once per step is enough.
                parallel_model.require_backward_grad_sync = number == len(parts)
                with autocast(device, PRECISION):
                    loss = rectified_flow_loss(parallel_model, x, y, t, noise)
                loss = loss * (len(x) / BATCH_SIZE)
                (loss * world_size).backward()  # DDP averages over processes; this makes it a sum
                step_loss += loss.detach()

            weights = model.parameters()
            gradient_norm = torch.nn.utils.clip_grad_norm_(weights, GRAD_CLIP or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            update_ema(ema, model, step)
            bar.update()

            # A signal to any process stops them all after this step.
            stop = len(signals) > 0
            if world_size > 1:
                dist.all_reduce(step_loss)
                stops = torch.tensor(int(stop))  # on the CPU, not to wait for a GPU
                dist.all_reduce(stops)
                stop = stops.item() > 0
            losses.append(step_loss)

            # Look at the loss, which makes the CPU wait for the GPU.
            evaluate = step % EVAL_EVERY == 0 or step == STEPS
            save = step % CHECKPOINT_EVERY == 0 or step == STEPS or stop
            if step % LOG_EVERY == 0 or evaluate or save:
                train_loss = torch.stack(losses).mean().item()
                bar.set_postfix_str(f"loss {train_loss:.4f}", refresh=False)
                if not math.isfinite(train_loss) or not gradient_norm.isfinite():
                    hint = f"{resume} --learning-rate {LEARNING_RATE / 2:g}"
                    raise UserError(f"the loss is not finite at step {step}: try {hint}")

            # Evaluate the averaged weights at fixed t, and add a row to the log. Its two losses are
            # of different t: each compares only with itself.
            if evaluate:
                speed = (step - row_step) * BATCH_SIZE / (time.perf_counter() - row_time)
                losses = []
                if master:
                    val_loss = validation_loss(ema, images, labels, val_ids)
                    bar.write(f"step {step}: loss {train_loss:.4f}, held-out loss {val_loss:.4f}")
                    row = {
                        "step": f"{step}",
                        "train_loss": f"{train_loss:.6f}",
                        "val_loss": f"{val_loss:.6f}",
                        "learning_rate": f"{LEARNING_RATE * learning_rate_factor(step):.4g}",
                        "images_per_second": f"{speed:.1f}",
                        "seconds": f"{time.perf_counter() - started:.1f}",
                    }
                    rows.append(row)
                    checkpoint.write_log(out / "log.csv", rows)

            # Sample from the averaged weights: always the same classes, and the same noise.
            if master and (step % SAMPLE_EVERY == 0 or step == STEPS):
                pictures = torch.cat(list(sample.generate(ema, grid_classes, seed=SEED)))
                grid = sample.to_grid(pictures)
                checkpoint.save_picture(grid, out / "samples" / f"step-{step:06}.png")

            if master and save:
                save_checkpoint(step)

            # Evaluating, sampling and saving do not count in the next row's speed.
            if evaluate:
                row_step, row_time = step, time.perf_counter()
            if stop:
                break

    if world_size > 1:
        dist.destroy_process_group()
    if stop:
        print_once(f"stopped at step {step}, and saved; to go on: {resume}", file=sys.stderr)
        sys.exit(128 + (signals[0] if signals else signal.SIGTERM))
    if master:
        print(f"trained in {(time.perf_counter() - started) / 60:.1f} minutes: see {out}")


if __name__ == "__main__":
    settings.run_command(main, if_out_of_memory="lower BATCH_SIZE, or raise ACCUMULATE")
