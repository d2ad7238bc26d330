"""Train nanoDiT: a class-conditional diffusion transformer, as a rectified flow.

    python train.py --preset laptop            # drawn butterflies: three minutes on two CPU cores
    python train.py                            # photographs from the Hub: sized for one large GPU
    python train.py --dataset my_pictures      # a folder with one subfolder of pictures per class
    python train.py --resume                   # continue the run in out/, whatever stopped it
    torchrun --nproc_per_node=8 train.py       # the same training on eight GPUs

Every setting is a constant at the top of train.py, and also a flag of the same name. A run writes
everything to its OUT_DIR.
"""

import argparse
import copy
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
import sample
from data.images import held_out, load_dataset
from model import MIN_T, DiT, UserError

imported = set(globals())  # the names above, which are not settings even if upper-case

# --- input and output ---
DATASET = "sayakpaul/butteflies_with_classes"  # a Hub id, a folder of class folders, or "drawn"
OUT_DIR = "out"  # where checkpoints, the log and sample grids go
EVAL_EVERY = 250  # steps between rows of log.csv, with the held-out loss
SAMPLE_EVERY = 1000  # steps between grids in samples/
CHECKPOINT_EVERY = 500  # steps between checkpoints: the most that a crash can cost
LOG_EVERY = 10  # steps between losses on screen; each makes the CPU wait for the GPU

# --- data ---
IMAGE_SIZE = 64  # pixels per side, after resizing and cropping; a multiple of PATCH_SIZE
FLIP_SHARE = 0.5  # share of pictures that are mirrored; 0 if left and right matter, as in text

# --- model ---
PATCH_SIZE = 4  # pixels per side of a patch; halving it costs four times the compute
DIM = 384  # width of the transformer; a multiple of HEADS
DEPTH = 12  # transformer blocks
HEADS = 6  # attention heads in each block
CONV_DIM = 0  # channels of convolutions around the blocks, for finer detail; 0 for a plain DiT

# --- optimizer ---
STEPS = 12000  # optimizer steps of the whole run
BATCH_SIZE = 256  # pictures per step, over all GPUs
LEARNING_RATE = 4e-4  # peak learning rate of AdamW; smaller networks allow a higher one
ACCUMULATE = 1  # gradient accumulation: micro-batches per step; same gradient, less memory
GRAD_CLIP = 1.0  # maximum norm of the gradient; 0 disables clipping
LABEL_DROP = 0.1  # label dropout: share of labels replaced by the null class, for guidance
EMA_DECAY = 0.999  # of the exponential moving average (EMA) of the weights; samples use it

# --- sampling ---
CFG_SCALE = 3.0  # guidance of the grids, and of sample.py with this network; 1 disables it

# --- schedule ---
WARMUP_STEPS = 200  # learning rate warmup, capped at a tenth of the run
DECAY_SHARE = 0.4  # last part of the run, over which the learning rate decays to zero

# --- timesteps, logit-normal: t = sigmoid(T_MEAN + T_STD n), n normal (arXiv 2403.03206) ---
T_MEAN = 0.4  # above 0 favours noisier pictures, in which shapes and colours are decided
T_STD = 1.0  # higher favours both ends, t near 0 (data) and 1 (noise)

# --- system ---
SEED = 0  # seeds all random numbers
DEVICE = "auto"  # cuda, mps or cpu; auto is the first that this machine has
PRECISION = "auto"  # bf16, fp32, or auto: bf16 if the hardware supports it; grids are always auto
COMPILE = "auto"  # torch.compile: on, off, or auto: on for CUDA, and on a CPU for longer runs

# Every upper-case bool, int, float or str above, including any that you add, is a setting: it gets
# a flag, and is saved with the run for --resume.
SETTINGS = {
    name: value
    for name, value in globals().items()
    if name.isupper() and name not in imported and isinstance(value, (bool, int, float, str))
}

# Presets: they win over edits of the constants above, and flags win over both.
LAPTOP = {  # the drawn butterflies, and a network that two CPU cores train in three minutes
    "DATASET": "drawn",
    "PATCH_SIZE": 8,
    "DIM": 96,
    "DEPTH": 6,
    "HEADS": 3,
    "STEPS": 2600,
    "BATCH_SIZE": 16,
    "LEARNING_RATE": 3e-3,
    "EMA_DECAY": 0.998,
}
SMALL = {  # photographs, and a network that two CPU cores train in 134 minutes
    "PATCH_SIZE": 8,
    "DIM": 192,
    "DEPTH": 6,
    "STEPS": 25000,
    "BATCH_SIZE": 32,
    "LEARNING_RATE": 2e-3,
    "DECAY_SHARE": 0.8,
    "CONV_DIM": 64,
}
PRESETS = {"laptop": LAPTOP, "small": SMALL}

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


def random_batch(images, labels, num_classes, step):
    """The training batch of a step, which SEED and the step determine.

    images: uint8 (N,3,S,S); labels: (N,). Returns pictures x (B,3,S,S) in [-1, 1], class ids y
    (B,), of which some are num_classes, the null class, times t (B,) from MIN_T to 1, and noise
    (B,3,S,S).
    """
    # Drawn on the CPU, so that every process and every kind of device has the same batch. The
    # factor keeps runs with neighbouring seeds from sharing batches.
    generator = torch.Generator().manual_seed((SEED * 1_000_003 + step) % 2**63)
    indices = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
    flipped = torch.rand(BATCH_SIZE, generator=generator) < FLIP_SHARE
    dropped = torch.rand(BATCH_SIZE, generator=generator) < LABEL_DROP
    n = torch.randn(BATCH_SIZE, generator=generator)
    noise = torch.randn(BATCH_SIZE, *images.shape[1:], generator=generator)
    t = torch.sigmoid(T_MEAN + T_STD * n).clamp_min(MIN_T)

    drawn = (indices, flipped, dropped, t, noise)
    indices, flipped, dropped, t, noise = common.to_device(drawn, images.device)
    x = images[indices].float() / 127.5 - 1
    x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    y = torch.where(dropped, num_classes, labels[indices])
    return x, y, t, noise


def micro_batches(batch, rank, world_size):
    """The share of one process in a batch, which all of them have drawn alike, cut into ACCUMULATE
    parts: a list of (x, y, t, noise)."""
    slices = [tensor.tensor_split(world_size)[rank] for tensor in batch]
    return list(zip(*(tensor.chunk(ACCUMULATE) for tensor in slices)))


@torch.no_grad()
def validation_loss(model, images, labels, times=EVAL_T):
    """Mean loss over uint8 images (N,3,S,S) and times, as a float. The noise is always the same, so
    that the losses of two runs can be compared."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    batches = zip(images.split(sample.MAX_BATCH), labels.split(sample.MAX_BATCH))
    for batch_images, y in batches:
        x = batch_images.float() / 127.5 - 1
        for t_value in times:
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            t = torch.full((len(x),), t_value, device=x.device)
            with common.autocast(x.device, PRECISION):
                total += rectified_flow_loss(model, x, y, t, noise) * len(x)
    return total.item() / (len(images) * len(times))


def learning_rate_at(step):
    """Linear warmup, then constant, then a linear decay that would reach zero after step STEPS."""
    warmup_steps = max(1, min(WARMUP_STEPS, STEPS // 10))
    decay_steps = max(1, DECAY_SHARE * STEPS)
    warmup = step / warmup_steps
    decay = (STEPS + 1 - step) / decay_steps
    return LEARNING_RATE * min(1, warmup, decay)


@torch.no_grad()
def update_ema(ema, model, step):
    """Move the averaged weights towards the model's. Early on the average spans fewer steps;
    otherwise the random initial weights would linger in it."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for average, weight in zip(ema.parameters(), model.parameters()):
        average.lerp_(weight, 1 - decay)
    for buffer, newest in zip(ema.buffers(), model.buffers()):  # of a batch norm, if you add one
        buffer.copy_(newest)


def new_model(class_names):
    """A DiT of the sizes in the constants, with random weights."""
    sizes = {name.lower(): globals()[name] for name in MODEL_SETTINGS}
    dataset = Path(DATASET).resolve().name if Path(DATASET).is_dir() else DATASET
    return DiT(class_names=class_names, dataset=dataset, cfg_scale=CFG_SCALE, **sizes)


# Settings: the constants, changed by a preset, by flags, or by the run that --resume continues.


def parse_flags(arguments=None, description=__doc__):
    """The command line as two dictionaries: how to begin, and the settings among the flags."""
    parser = common.new_parser(description, argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("how to begin")
    group.add_argument("--preset", choices=PRESETS, help="change several settings at once")
    group.add_argument("--overwrite", action="store_true", help="replace the run in OUT_DIR")
    one_of = group.add_mutually_exclusive_group()
    one_of.add_argument("--resume", action="store_true", help="continue the run in OUT_DIR")
    one_of.add_argument("--init-from", metavar="MODEL", help="trained weights: a folder or Hub id")
    common.add_setting_flags(parser, SETTINGS, source_file=__file__)
    if arguments is None and "ipykernel" in sys.modules and __name__ != "__main__":
        arguments = []  # a notebook's command line is that of its kernel
    options = vars(parser.parse_args(arguments))
    if "resume" in options and "overwrite" in options:
        parser.error("--resume continues a run and --overwrite replaces it: choose one")
    flags = {name: options.pop(name) for name in SETTINGS if name in options}
    return options, flags


def resume_settings(state, preset, flags):
    """Set the constants to those of the resumed run, except for what the flags change. Raises
    UserError if a flag or the preset would make it another run."""
    saved = {name: state["settings"].get(name, globals()[name]) for name in SETTINGS}
    wanted = {**saved, **preset, **flags}
    for name in (*MODEL_SETTINGS, "SEED"):
        if wanted[name] != saved[name]:
            raise UserError(f"--resume: {name} is {saved[name]} in {OUT_DIR}, not {wanted[name]}")
    common.print_kept_settings(saved, globals(), flags)
    globals().update({**saved, **flags, "OUT_DIR": OUT_DIR})


# Checkpoints


def save_checkpoint(model, ema, optimizer, progress, required=True):
    """Write the EMA weights, and train_state.pt with everything that --resume needs.

    progress: {"step": the last one done, "seconds": time spent, "losses": since the last row of the
    log, "pictures": of each class}. Raises UserError if it cannot be written; the last checkpoint
    stays. If this one is not required, a file that another program holds is only a warning.
    """
    state = {
        **progress,
        # Through JSON, for plain types: torch.load would refuse a constant that is a NumPy float.
        "settings": json.loads(json.dumps({name: globals()[name] for name in SETTINGS})),
        "class_names": model.class_names,
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    common.write_checkpoint(Path(OUT_DIR), ema, state, required)


def main(arguments=None):
    """Train. arguments: flags, such as ["--steps", "100"]; by default those of the command line, or
    none in a notebook. Flags change constants of this module, which main() puts back."""
    constants = {name: globals()[name] for name in SETTINGS}
    try:
        train(*parse_flags(arguments))
    finally:
        globals().update(constants)
        common.unlock_folder()


def train(options, flags):
    """The whole run, from top to bottom. The arguments are what parse_flags returns."""
    # Settings: a preset changes the constants, then the flags do; a resumed run has its own.
    preset = PRESETS.get(options.get("preset"), {})
    common.check_preset(preset, SETTINGS)
    globals().update({**preset, **flags})
    common.expand_home(globals(), "OUT_DIR")
    out, state = Path(OUT_DIR), None
    if "resume" in options:
        state = common.load_state(out / "train_state.pt")
        resume_settings(state, preset, flags)
    common.expand_home(globals(), "DATASET")
    common.check_settings(globals())
    if state and state["step"] >= STEPS:
        common.print_once(f"the run in {out} is finished; raise --steps above {state['step']}")
        return
    if not state and "overwrite" not in options:
        common.check_holds_no_run(out)

    # Device and processes. torchrun starts several, of which only the master writes files.
    device, rank, world_size = common.start_process(common.pick_device(DEVICE), BATCH_SIZE)
    master = rank == 0
    torch.set_float32_matmul_precision("high")  # TF32, on GPUs that have it

    # Data: all pictures stay on the device.
    common.make_folder(out / "samples")
    if master:
        common.lock_folder(out)
    images, labels, class_names = load_dataset(DATASET, IMAGE_SIZE)
    is_val = held_out(labels)
    train_images, train_labels = images[~is_val].to(device), labels[~is_val].to(device)
    val_images, val_labels = train_images, train_labels  # if there are too few to hold any out
    if is_val.any():
        val_images, val_labels = images[is_val].to(device), labels[is_val].to(device)
    class_sizes = labels.bincount().tolist()
    del images, labels  # both parts are copies

    # Model, EMA and optimizer: new, initialised from trained weights, or resumed.
    torch.manual_seed(SEED)
    model = new_model(class_names).to(device)
    if "init_from" in options:
        common.load_initial_weights(options["init_from"], model)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)
    progress = {"step": 0, "seconds": 0.0, "losses": [], "pictures": class_sizes}
    if state:
        common.restore_state(state, model, ema, optimizer, class_sizes)
        progress |= {name: state[name] for name in ("step", "seconds", "losses")}
    steps_done = progress["step"]
    losses = [loss.to(device) for loss in progress["losses"]]  # since the last row of the log
    flops = common.flops_per_image(new_model, class_names, rectified_flow_loss)
    run_flops = flops * BATCH_SIZE * STEPS
    if COMPILE == "on" or (COMPILE == "auto" and common.compiling_pays(device, run_flops)):
        batch = random_batch(train_images, train_labels, model.num_classes, step=1)
        part = micro_batches(batch, rank, world_size)[0]
        uneven = BATCH_SIZE % (world_size * ACCUMULATE) > 0  # parts differ in size
        with common.autocast(device, PRECISION):
            common.compile_model(model, lambda: rectified_flow_loss(model, *part), uneven)
    parallel_model = DistributedDataParallel(model) if world_size > 1 else model

    # Files. DDP's constructor waits for all processes: by now each has read what OUT_DIR held.
    grid_size = min(len(class_names), 75)  # of more classes, evenly spread ones
    grid_classes = torch.linspace(0, len(class_names) - 1, grid_size).round().long()
    if master:
        common.print_summary(model, is_val, flops, device, PRECISION)
        if not state:
            common.delete_files((out / "samples").glob("step-*.png"))  # of an overwritten run
            save_checkpoint(model, ema, optimizer, progress)  # from here on --resume works
        log = common.Log(out / "log.csv", steps_done)

    # The loop
    max_norm = GRAD_CLIP if GRAD_CLIP > 0 else math.inf
    started = time.perf_counter() - progress["seconds"]
    last_row_step, last_row_time = steps_done, time.perf_counter()
    total, initial = STEPS * BATCH_SIZE, steps_done * BATCH_SIZE
    bar = tqdm(unit="img", unit_scale=True, total=total, initial=initial, disable=not master)
    with bar, common.stop_signals() as signals:
        for step in range(steps_done + 1, STEPS + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step)
            # For layers that you may add, such as dropout. (Python randomises only hashes of text.)
            torch.manual_seed(hash((SEED, step, rank)))

            # The gradients of the parts, in all processes, add up to that of the whole batch.
            batch = random_batch(train_images, train_labels, model.num_classes, step)
            parts = micro_batches(batch, rank, world_size)
            step_loss = torch.zeros((), device=device)
            for number, (x, y, t, noise) in enumerate(parts, 1):
                # DDP exchanges gradients during backward(): once per step is enough.
                parallel_model.require_backward_grad_sync = number == len(parts)
                with common.autocast(device, PRECISION):
                    loss = rectified_flow_loss(parallel_model, x, y, t, noise)
                loss = loss * (len(x) / BATCH_SIZE)
                (loss * world_size).backward()  # DDP averages over processes; this makes it a sum
                step_loss += loss.detach()

            gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            update_ema(ema, model, step)
            bar.update(BATCH_SIZE)

            # A signal to any process stops them all after this step.
            stop = len(signals) > 0
            if world_size > 1:
                dist.all_reduce(step_loss)
                stops = torch.tensor(int(stop))
                dist.all_reduce(stops)
                stop = stops.item() > 0
            losses.append(step_loss)

            # Look at the loss, which makes the CPU wait for the GPU.
            evaluate = step % EVAL_EVERY == 0 or step == STEPS
            save = step % CHECKPOINT_EVERY == 0 or step == STEPS or stop
            if step % LOG_EVERY == 0 or evaluate or save:
                train_loss = torch.stack(losses).mean().item()
                bar.set_postfix_str(f"step {step}, loss {train_loss:.4f}", refresh=False)
                if not math.isfinite(train_loss) or not gradient_norm.isfinite():
                    retry = f"--resume --out-dir {out} --learning-rate {LEARNING_RATE / 2:g}"
                    hint = f"lower LEARNING_RATE: {retry}"
                    raise UserError(f"the loss is not finite at step {step}; {hint}")

            # Evaluate, and add a row to the log.
            if evaluate:
                row_images = (step - last_row_step) * BATCH_SIZE
                images_per_second = row_images / (time.perf_counter() - last_row_time)
                losses = []
                if master:
                    val_loss = validation_loss(ema, val_images, val_labels)
                    bar.write(f"step {step}: loss {train_loss:.4f}, held-out loss {val_loss:.4f}")
                    row = {
                        "step": f"{step}",
                        "train_loss": f"{train_loss:.6f}",
                        "val_loss": f"{val_loss:.6f}",
                        "learning_rate": f"{learning_rate_at(step):.4g}",
                        "images_per_second": f"{images_per_second:.1f}",
                        "seconds": f"{time.perf_counter() - started:.1f}",
                    }
                    log.append(row)

            # Sample from the averaged weights: always the same classes, and the same noise.
            if master and (step % SAMPLE_EVERY == 0 or step == STEPS):
                pictures = torch.cat(list(sample.generate(ema, grid_classes, seed=SEED)))
                grid = out / "samples" / f"step-{step:06}.png"
                common.save_picture(sample.to_grid(pictures), grid, required=False)

            if master and save:
                seconds = time.perf_counter() - started
                progress |= {"step": step, "seconds": seconds, "losses": losses}
                save_checkpoint(model, ema, optimizer, progress, required=stop or step == STEPS)

            # Evaluating, sampling and saving do not count in the next row's images_per_second.
            if evaluate:
                last_row_step, last_row_time = step, time.perf_counter()
            if stop:
                break

    if world_size > 1:
        dist.destroy_process_group()
    if stop:
        then = f"continue with --resume --out-dir {out}"
        common.print_once(f"stopped at step {step} and saved in {out}: {then}", file=sys.stderr)
        sys.exit(128 + (signals[0] if signals else signal.SIGTERM))
    if master:
        print(f"trained in {seconds / 60:.1f} minutes: see {out}")


if __name__ == "__main__":
    common.run_command(main, if_out_of_memory="lower BATCH_SIZE, or raise ACCUMULATE")
