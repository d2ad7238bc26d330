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
import inspect
import math
import sys
import time
from pathlib import Path

from support import checkpoint, hub, machine, settings
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
EVAL_EVERY = 500  # steps between rows of log.csv, with losses at fixed t
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
STEPS = 25000  # optimizer steps of the whole run, over which the learning rate rises and falls
BATCH_SIZE = 32  # pictures per step, over all GPUs
LEARNING_RATE = 2e-3  # peak learning rate of AdamW; larger networks need a lower one
ACCUMULATE = 1  # gradient accumulation: micro-batches per step; same gradient, less memory
GRAD_CLIP = 1.0  # maximum norm of the gradient; 0 disables clipping
LABEL_DROP = 0.1  # label dropout: share given the null class, for guidance; if 0, set CFG_SCALE 1
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

# A preset is a line of flags. Those on the command line override it.
PRESETS = {
    # The drawn butterflies, and a network that two CPU cores train in three minutes.
    "laptop": "--dataset drawn --steps 2600 --batch-size 16 --dim 96 --heads 3 --conv-dim 0 "
    "--learning-rate 3e-3 --decay-share 0.4 --ema-decay 0.998 --sample-every 300"
}

EVAL_T = (0.1, 0.3, 0.5, 0.7, 0.9)  # the t of the losses in log.csv

# The constants that are arguments of DiT, such as DIM. If you give DiT a new argument, add a
# constant of the same name above.
MODEL_SETTINGS = [name.upper() for name in inspect.signature(DiT.__init__).parameters]
MODEL_SETTINGS = [name for name in MODEL_SETTINGS if name in SETTINGS and name != "DATASET"]

# What a resumed run can't change: its seed, and what its weights depend on.
FIXED_SETTINGS = ["SEED", *(name for name in MODEL_SETTINGS if name != "CFG_SCALE")]


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


def random_batch(images, labels, train_ids, num_classes, step, device="cpu", rank=0, world_size=1):
    """The training batch of a step, on the device, drawn with replacement: there are no epochs.
    SEED and the step determine it. Of several processes, each gets a slice: B of BATCH_SIZE.

    images: uint8 (N,3,S,S); labels: (N,); train_ids: which of the N are trained on. Returns
    pictures x (B,3,S,S) in [-1, 1], class ids y (B,), of which some are num_classes, the null
    class, times t (B,) from MIN_T to 1, and noise (B,3,S,S).
    """
    # What is small is drawn on the CPU: every process, and every kind of device, has the same.
    generator = torch.Generator().manual_seed(sample.stream(SEED, step))
    chosen = train_ids[torch.randint(len(train_ids), (BATCH_SIZE,), generator=generator)]
    flipped = torch.rand(BATCH_SIZE, generator=generator) < FLIP_SHARE
    dropped = torch.rand(BATCH_SIZE, generator=generator) < LABEL_DROP
    n = torch.randn(BATCH_SIZE, generator=generator)
    t = torch.sigmoid(T_MEAN + T_STD * n).clamp_min(MIN_T)
    y = torch.where(dropped, num_classes, labels[chosen])

    # What is large is made on the device, to which the pictures go as bytes. Each process draws the
    # noise of the whole batch, so that any number of them has the same.
    if torch.device(device).type != "cpu":
        generator = torch.Generator(device).manual_seed(sample.stream(SEED, step))
    noise = torch.randn(BATCH_SIZE, *images.shape[1:], generator=generator, device=device)
    mine = slice(BATCH_SIZE * rank // world_size, BATCH_SIZE * (rank + 1) // world_size)
    batch = (images[chosen[mine]], flipped[mine], y[mine], t[mine])
    x, flipped, y, t = machine.to_device(batch, torch.device(device))
    x = torch.where(flipped[:, None, None, None], x.flip(3), x).float() / 127.5 - 1
    return x, y, t, noise[mine]


def held_out(labels):
    """Which pictures are for validation: a mask (N,) of every twentieth, counted class by class;
    among more than 20,000, of about 1,000. Classes of fewer than four pictures are only trained
    on; if there are no larger ones, those of a single picture."""
    counts = labels.bincount()
    by_class = labels.argsort(stable=True)  # on the Hub they may come in any order
    candidates = by_class[counts[labels[by_class]] >= (4 if counts.max() >= 4 else 2)]
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[candidates[:: max(20, len(candidates) // 1000)]] = True
    return mask


@torch.no_grad()
def losses_at(times, model, images, labels, ids):
    """The mean loss of the pictures images[ids] at each of the times, a list of floats; nan
    if ids is empty. The noise is always the same, so that two runs can be compared.

    images: uint8 (N,3,S,S); labels: (N,); ids: which of the N.
    """
    device = next(model.parameters()).device
    totals = torch.zeros(len(times), device=device)
    for start in range(0, len(ids), BATCH_SIZE):
        chosen = ids[start : start + BATCH_SIZE]
        x = images[chosen].float() / 127.5 - 1  # as in random_batch
        randn_like = sample.randn_like_of_places(0, range(start, start + len(x)))
        for number, time_value in enumerate(times):
            t = torch.full((len(x),), time_value)
            batch = machine.to_device((x, labels[chosen], t, randn_like(x)), device)
            with machine.autocast(device, PRECISION):
                totals[number] += rectified_flow_loss(model, *batch) * len(x)
    return (totals / len(ids)).tolist()


def learning_rate_factor(step):
    """The multiplier for each group's own learning rate: linear warmup, then 1, then a linear decay
    that would reach zero after step STEPS."""
    warmup_steps = max(1, min(WARMUP_STEPS, STEPS // 10))
    decay_steps = max(1, DECAY_SHARE * STEPS)
    return min(1, step / warmup_steps, (STEPS + 1 - step) / decay_steps)


@torch.no_grad()
def update_ema(ema, model, step):
    """Move the averaged weights towards the model's. Early on the average spans fewer steps;
    otherwise the random initial weights would linger in it."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for buffer, newest in zip(ema.buffers(), model.buffers()):  # of a batch norm, if you add one
        buffer.copy_(newest)


def training_steps(network, ema, optimizer, images, labels, train_ids, first_step=1):
    """The method: train until STEPS. Yields (step, loss, norm of the gradient) after each step, the
    latter two as scalars on the device: reading them makes the CPU wait.

    network: a DiT, which may be compiled, or wrapped by DistributedDataParallel. ema: its copy that
    becomes the average. images: uint8 (N,3,S,S); labels: (N,); train_ids: which of the N, a tensor.
    The loss is the share of this process: the sum over all processes is the mean over the batch. A
    script that takes some steps sets constants as train.BATCH_SIZE = 8, or by apply_settings.
    """
    device = next(ema.parameters()).device
    here = rank, world_size = machine.processes()
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])

    for step in range(first_step, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor(step)
        # For layers that you may add, such as dropout: a resumed run draws the same. Negative, so
        # that it is no stream of a batch.
        torch.manual_seed(sample.stream(SEED, -(step * world_size + rank)))

        # The gradients of the processes' slices of a batch, each of them cut into up to ACCUMULATE
        # parts, add up to that of the whole.
        batch = random_batch(images, labels, train_ids, ema.num_classes, step, device, *here)
        parts = list(zip(*(tensor.chunk(ACCUMULATE) for tensor in batch)))
        step_loss = torch.zeros((), device=device)
        for number, (x, y, t, noise) in enumerate(parts, 1):
            # With several processes, backward() also exchanges gradients: once a step is enough.
            network.require_backward_grad_sync = number == len(parts)
            with machine.autocast(device, PRECISION):
                loss = rectified_flow_loss(network, x, y, t, noise)
            loss = loss * (len(x) / BATCH_SIZE)
            (loss * world_size).backward()  # DDP averages over processes; this makes it a sum
            step_loss += loss.detach()

        gradient_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), GRAD_CLIP or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, network, step)
        yield step, step_loss, gradient_norm


# What is trained: a network and its optimizer.


def make_network(class_names, dataset=""):
    """A new network, of the sizes in the constants. Raises NetworkError, which names those that are
    impossible."""
    sizes = {name.lower(): globals()[name] for name in MODEL_SETTINGS}
    return DiT(class_names=class_names, dataset=dataset, **sizes)


def make_optimizer(network):
    """AdamW without weight decay. The schedule multiplies the learning rate of each group. If you
    need two optimizers, write a class of both, with step, zero_grad, load_state_dict, param_groups
    (one list), and a state_dict whose "param_groups" are in the same order.
    """
    options = {"betas": (0.9, 0.95), "weight_decay": 0, "fused": True}
    return torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, **options)


def load_initial_weights(name, model):
    """Give `model` the weights of the trained network in a folder or at a Hub id. Of the class
    embeddings, it gets those of classes with the same name, and that of the null class. The others,
    and layers that the trained network lacks, stay as they are. The model's `dataset` says where
    the weights came from. Raises UserError if sizes differ.
    """
    trained = DiT.from_pretrained(name, strict=False)
    own = model.state_dict()  # shares memory with the model, as do the embeddings below
    learned = {n: w for n, w in trained.state_dict().items() if n not in trained.lacking}
    embeddings, known = own["class_embedding.weight"], learned["class_embedding.weight"]
    learned["class_embedding.weight"] = embeddings
    checkpoint.load_into(model, own | learned, f"--init-from: {name} is of another network")

    kept = [class_name for class_name in model.class_names if class_name in trained.class_names]
    for label in kept:  # row by row: for a list of rows, `known` would have to be on the GPU, too
        embeddings[model.class_names.index(label)] = known[trained.class_names.index(label)]
    embeddings[-1] = known[-1]  # of the null class
    new = ", ".join(layer for layer in own if layer not in learned) or "none"
    print_once(f"{len(kept)} of {model.num_classes} classes are known to {name}; new layers: {new}")
    model.dataset += f", from a network of {trained.dataset}"


# Settings: the constants, changed by a preset, by flags, or by the run that --resume continues.


def parse_flags(arguments=None, description=__doc__):
    """The command line as two dictionaries: how to begin, and the settings among the flags."""
    parser = settings.new_parser(description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, help="change several settings at once")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in OUT_DIR")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT_DIR")
    parser.add_argument("--init-from", metavar="MODEL", help="trained weights: a folder or Hub id")
    settings.add_setting_flags(parser, SETTINGS, source_file=globals().get("__file__"))
    options = settings.parse(parser, arguments, PRESETS)
    if "resume" in options and options.keys() & {"overwrite", "init_from"}:
        parser.error("--resume continues a run: leave out --overwrite and --init-from")
    return options, {name: options.pop(name) for name in SETTINGS if name in options}


def apply_settings(options, flags):
    """Change the constants as the flags say, until main() restores them, and check them. Returns
    the state of the run to be continued, or None. A script that writes no OUT_DIR passes
    {"overwrite": True} as options. Raises UserError, or NetworkError for impossible sizes, if no
    run can have such settings, or not the resumed one, or if OUT_DIR holds another run."""
    changed, state = flags, None
    out = settings.expanded(flags.get("OUT_DIR", OUT_DIR))
    if "resume" in options:
        state = checkpoint.load_state(out / "train_state.pt")
        now = {name: globals()[name] for name in SETTINGS}
        changed = checkpoint.resumed_settings(state, now, flags, FIXED_SETTINGS, out)
    globals().update(changed, OUT_DIR=str(out))
    globals().update(settings.checked({name: globals()[name] for name in SETTINGS}))
    make_network(["any"])  # refuses impossible sizes before pictures are read
    if not state and "overwrite" not in options:
        names = (*checkpoint.CHECKPOINT_FILES, "log.csv", "samples/step-*.png")
        if any(any(out.glob(name)) for name in names):
            raise UserError(f"{out} holds a run: use --resume, --overwrite, or another --out-dir")
    return state


def main(arguments=None):
    """Train. arguments: flags, such as ["--steps", "100"]; by default those of the command line, or
    none in a notebook. Flags change constants of this module, which main() restores."""
    constants = {name: globals()[name] for name in SETTINGS}
    try:
        options, flags = parse_flags(arguments)
        state = apply_settings(options, flags)
        if state and state["step"] >= STEPS:
            print_once(f"{OUT_DIR} is finished: more --steps train on, at a raised learning rate")
            return
        with checkpoint.the_only_run(Path(OUT_DIR)):
            train(state, settings.plain(constants), options.get("init_from"))
    finally:
        globals().update(constants)


def train(state, constants, init_from):
    """The whole run, from top to bottom, around the steps of the method. state: of the run to be
    continued, or None. constants: those in this file, without flags. init_from: where a new run
    gets its initial weights; None for random ones."""
    # Device and processes. torchrun starts several, of which only the master writes files.
    out = Path(OUT_DIR)
    device = machine.pick_device(DEVICE)
    machine.join_processes(device, BATCH_SIZE)
    rank, world_size = machine.processes()
    master = rank == 0
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, on GPUs that have it
    torch.manual_seed(SEED)

    # Data: all pictures stay in the machine's memory; an index tells who is held out. As many of
    # those trained on are evaluated, too: a gap between the two losses is overfitting.
    images, labels, class_names = load_dataset(DATASET, IMAGE_SIZE)
    is_val = held_out(labels)
    train_ids, val_ids = (~is_val).nonzero().flatten(), is_val.nonzero().flatten()
    count = len(val_ids) or min(len(train_ids), 1000)
    seen_ids = train_ids[torch.linspace(0, len(train_ids) - 1, count).long()]

    # Model, EMA and optimizer: new, initialised from trained weights, or resumed.
    dataset = Path(DATASET).resolve().name if Path(DATASET).exists() else DATASET
    model = make_network(class_names, dataset).to(device)
    if init_from:
        load_initial_weights(init_from, model)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = make_optimizer(model)
    steps_done, seconds_before, rows = 0, 0.0, []  # rows of the log
    loss_sum, loss_count = torch.zeros((), device=device), 0  # since the last row
    counts = labels.bincount().tolist()  # pictures in each class
    if state:
        checkpoint.restore_state(state, model, ema, optimizer, counts)
        steps_done, seconds_before, rows = state["step"], state["seconds"], state["log"]
        loss_sum, loss_count = state["loss_sum"].to(device), state["loss_count"]
    precision = "bf16" if machine.uses_bf16(device, PRECISION) else "fp32"
    parameters = sum(weight.numel() for weight in model.parameters())
    print_once(f"{len(class_names)} classes, such as {', '.join(class_names[:6])}")
    print_once(f"{len(images)} pictures, {len(val_ids)} of them held out")
    print_once(f"{parameters / 1e6:.2f} M parameters, on {device} in {precision}")

    pays = machine.compiling_pays(device, parameters, STEPS * BATCH_SIZE)
    if COMPILE == "on" or (COMPILE == "auto" and pays):
        machine.compile_model(model)
    network = DistributedDataParallel(model) if world_size > 1 else model

    def save(step):
        """Write the averaged weights, the page about them, and all that --resume needs."""
        state = {"settings": {name: globals()[name] for name in SETTINGS}, "constants": constants}
        state |= {"class_names": ema.class_names, "counts": counts, "dataset": ema.dataset}
        state |= {"step": step, "seconds": time.perf_counter() - started, "log": rows}
        state |= {"loss_sum": loss_sum, "loss_count": loss_count, "ema": ema.state_dict()}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save_checkpoint(out, ema, state)
        hub.write_card(out, ema, f"{step:,} steps of {BATCH_SIZE} pictures", rows)

    # DDP's constructor waits for all processes: by now each has read what OUT_DIR held.
    started = time.perf_counter() - seconds_before
    if master and not state:
        # What is left of an overwritten run.
        for file in (out / "log.csv", *out.glob("samples/step-*.png")):
            file.unlink(missing_ok=True)
        save(step=0)  # from here on --resume works

    # The loop
    resume = f'python train.py --resume --out-dir="{OUT_DIR}"'
    row_step, row_time = steps_done, time.perf_counter()  # when the last row of the log was written
    bar = tqdm(total=STEPS, initial=steps_done, unit="step", disable=not master)
    steps = training_steps(network, ema, optimizer, images, labels, train_ids, steps_done + 1)
    with bar, machine.stop_signals() as signals:
        for step, loss, gradient_norm in steps:
            bar.update()

            # A signal to any process stops them all after this step.
            stop = len(signals) > 0
            if world_size > 1:
                dist.all_reduce(loss)
                stops = torch.tensor(int(stop))  # on the CPU, not to wait for a GPU
                dist.all_reduce(stops)
                stop = stops.item() > 0
            loss_sum += loss
            loss_count += 1

            # Look at the loss, which makes the CPU wait for the GPU.
            is_last = step == STEPS
            evaluating = step % EVAL_EVERY == 0 or is_last
            drawing = step % SAMPLE_EVERY == 0 or is_last
            saving = step % CHECKPOINT_EVERY == 0 or is_last or stop
            if step % LOG_EVERY == 0 or evaluating or drawing or saving:
                train_loss = (loss_sum / loss_count).item()
                bar.set_postfix_str(f"loss {train_loss:.4f}", refresh=False)
                if not math.isfinite(train_loss) or not gradient_norm.isfinite():
                    hint = f"{resume} --learning-rate {LEARNING_RATE / 2:g}"
                    raise UserError(f"loss or gradient is not finite at step {step}: try {hint}")
            pause = time.perf_counter()

            # Evaluate the averaged weights at fixed t, and add a row to the log.
            if evaluating:
                speed = (step - row_step) * BATCH_SIZE / (pause - row_time)
                row_step, row_time = step, pause
                loss_sum, loss_count = torch.zeros_like(loss_sum), 0
                if master:
                    val_losses = losses_at(EVAL_T, ema, images, labels, val_ids)
                    seen_losses = losses_at(EVAL_T, ema, images, labels, seen_ids)
                    row = {
                        "step": step,
                        "train_loss": round(train_loss, 6),
                        "val_loss": round(sum(val_losses) / len(EVAL_T), 6),
                        "seen_loss": round(sum(seen_losses) / len(EVAL_T), 6),
                        "learning_rate": LEARNING_RATE * learning_rate_factor(step),
                        "images_per_second": round(speed, 1),
                        "seconds": round(time.perf_counter() - started, 1),
                    }
                    row |= {f"val_{t}": round(loss, 6) for t, loss in zip(EVAL_T, val_losses)}
                    row |= {f"seen_{t}": round(loss, 6) for t, loss in zip(EVAL_T, seen_losses)}
                    rows.append(settings.plain(row))
                    checkpoint.write_log(out / "log.csv", rows)
                    both = f"held out {row['val_loss']:.4f}, seen {row['seen_loss']:.4f}"
                    bar.write(f"step {step}: {both}; in training {train_loss:.4f}")
                    # Once each time: the newest is 2% above the best, and the one before was not.
                    losses = [old["val_loss"] for old in rows]
                    if losses[-1] > 1.02 * min(losses) >= losses[-2:][0]:
                        bar.write("held out rises: more steps make copies; more pictures help")

            # Sample from the averaged weights, always with the same noise: a picture of each class,
            # up to 75 of them, or rows of eight if there are few.
            if master and drawing:
                columns = 8 if len(class_names) < 10 else None
                class_ids = torch.arange(len(class_names))[:75].repeat_interleave(columns or 1)
                pictures = [*sample.generate(ema, class_ids, SEED)]
                path = out / "samples" / f"step-{step:06}.png"
                checkpoint.save_picture(sample.to_grid(torch.cat(pictures), columns), path)

            if master and saving:
                save(step)

            row_time += time.perf_counter() - pause  # only training counts in the log's speed
            if stop:
                break

    if world_size > 1:
        dist.destroy_process_group()
    if stop:
        print_once(f"stopped at step {step}, and saved; to go on: {resume}", file=sys.stderr)
        sys.exit(128 + (signals[0] if signals else 15))  # 15: SIGTERM, of another process
    print_once(f"trained for {(time.perf_counter() - started) / 60:.1f} minutes in all: see {out}")


if __name__ == "__main__":
    settings.run_command(main, if_out_of_memory="lower BATCH_SIZE, or raise ACCUMULATE")
