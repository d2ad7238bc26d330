"""A web page on which you can watch pictures come out of the noise.

    pip install gradio
    python -m experiments.demo                                  # the network in assets/butterflies
    python -m experiments.demo --checkpoint you/butterflies     # a folder or a Hub id

It also runs as a Hugging Face Space. Make an app.py of one line beside train.py:

    from experiments.demo import main; main()

and put this at the top of README.md; then `hf upload you/nanodit . --repo-type space`.

    ---
    title: nanoDiT
    sdk: gradio
    app_file: app.py
    ---
"""

import math
import shlex

from support.machine import pick_device
from support.settings import MAX_SEED, UserError, limited, new_parser, run_command

import torch
from PIL import Image

import sample
from model import DiT

CHECKPOINT = "assets/butterflies"  # a Space may name a Hub id here
MAX_PICTURES = 16  # at once; the page shows a batch, of at most sample.MAX_BATCH, as one grid
SIDE = 192  # a picture has at least this many pixels on the page, as 64 are too small to look at


def import_gradio():
    """Gradio, which requirements.txt does not list. Raises UserError if it is missing."""
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"the page needs gradio: pip install -U gradio ({error})") from error
    return gradio


def grids_on_the_way(model, class_id, num_images, steps, cfg_scale, seed, eta):
    """Yield a PIL image with all the pictures: first the noise, then the result of each step."""
    class_ids = torch.full((num_images,), class_id)
    columns = math.ceil(math.sqrt(num_images))
    for states in sample.generate_states(model, class_ids, seed, steps, cfg_scale, eta):
        for z in states:
            yield sample.to_grid(sample.to_uint8(z), columns)


def enlarged(grid, image_size):
    """A grid with each pixel enlarged to a square; a browser would blur it instead."""
    factor = math.ceil(SIDE / image_size)
    size = (grid.width * factor, grid.height * factor)
    return grid.resize(size, Image.Resampling.NEAREST)


def command(checkpoint, class_id, num_images, steps, cfg_scale, seed, eta):
    """The command line that makes the same pictures."""
    return (
        f"python sample.py --checkpoint {shlex.quote(str(checkpoint))} --class-id {class_id} "
        f"--num-images {num_images} --steps {steps} --cfg-scale {cfg_scale:g} --seed {seed} "
        f"--eta {eta:g}"
    )


def build_page(model, checkpoint):
    """The page, as a gradio Blocks."""
    gradio = import_gradio()
    # Fresh noise in each step gives photographs better shapes; drawings do not need it.
    eta = 0 if model.dataset == "drawn" else 1

    def on_click(class_id, num_images, steps, cfg_scale, seed, eta):
        seed = seed or 0  # the field may be empty
        settings = (int(class_id), int(num_images), int(steps), float(cfg_scale), int(seed), eta)
        line = command(checkpoint, *settings)
        for grid in grids_on_the_way(model, *settings):
            yield enlarged(grid, model.image_size), line

    # Pictures that are older than ten minutes are deleted: each step leaves one in gradio's cache.
    options = {"analytics_enabled": False, "delete_cache": (600, 600)}
    with gradio.Blocks(title="nanoDiT", **options) as page:
        gradio.Markdown("# nanoDiT\nPictures out of noise, by a diffusion transformer.")
        with gradio.Row():
            with gradio.Column(scale=1):
                choices = [(name, class_id) for class_id, name in enumerate(model.class_names)]
                class_menu = gradio.Dropdown(choices, value=0, label="class")
                low = min(1, model.cfg_scale)
                high = max(8, model.cfg_scale)
                guidance = gradio.Slider(low, high, model.cfg_scale, step=0.1, label="guidance")
                fresh = gradio.Slider(0, 1, eta, step=0.1, label="fresh noise in each step")
                steps = gradio.Slider(1, 100, sample.DEFAULT_STEPS, step=1, label="Euler steps")
                count = gradio.Slider(1, MAX_PICTURES, 4, step=1, label="pictures")
                seed = gradio.Number(0, label="seed", precision=0, minimum=0, maximum=MAX_SEED)
                button = gradio.Button("Sample", variant="primary")
            with gradio.Column(scale=2):
                grid = gradio.Image(show_label=False, type="pil", format="png", interactive=False)
                text = "the same on the command line"
                line = gradio.Code(label=text, language="shell", wrap_lines=True)
        # The button is disabled while pictures come, and back after an error, too.
        inputs = [class_menu, count, steps, guidance, seed, fresh]
        busy = button.click(lambda: gradio.Button(interactive=False), None, button)
        done = busy.then(on_click, inputs, [grid, line])
        done.then(lambda: gradio.Button(interactive=True), None, button)
    return page


def main():
    parser = new_parser(__doc__)
    text = "a folder or a Hub id (default: %(default)s)"
    parser.add_argument("--checkpoint", default=CHECKPOINT, metavar="MODEL", help=text)
    text = "port of the page (default: %(default)s)"
    port = limited(int, 1, 65535)
    parser.add_argument("--port", type=port, default=7860, metavar="N", help=text)
    text = "auto, cuda, mps or cpu (default: %(default)s)"
    parser.add_argument("--device", default="auto", metavar="NAME", help=text)
    flags = parser.parse_args()
    import_gradio()  # if it is missing, now is the time to say so
    model = DiT.from_pretrained(flags.checkpoint).to(pick_device(flags.device))
    page = build_page(model, flags.checkpoint)
    try:
        page.launch(server_port=flags.port, show_error=True)
    except Exception as error:  # ports, proxies, the network: gradio raises all sorts of things
        message = "cannot serve the page: try another --port; behind a proxy, NO_PROXY=localhost"
        raise UserError(f"{message} ({error})") from error


if __name__ == "__main__":
    run_command(main)
