"""A page in the browser on which pictures come out of the noise.

    pip install gradio
    python experiments/demo.py                                  # the network in assets/butterflies
    python experiments/demo.py --checkpoint you/butterflies     # a folder or a Hub id

It runs as a Space of Hugging Face as it is: push the repository there, with this at the beginning
of its README.md:

    ---
    title: nanoDiT
    sdk: gradio
    app_file: experiments/demo.py
    ---
"""

import queue
import sys
import threading
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
import sample  # noqa: E402
from model import UserError  # noqa: E402

CHECKPOINT = Path(__file__).parents[1] / "assets" / "butterflies"
MOST_PICTURES = 16
SIDE = 192  # at least so many pixels for a picture on the page, as 64 are too small to look at


def import_gradio():
    """Gradio, which is in no requirement. Raises UserError if it is missing."""
    try:
        import gradio
    except ImportError as error:
        raise UserError("the page needs gradio: pip install gradio") from error
    return gradio


def grids_on_the_way(model, class_id, num_images, steps, cfg_scale, seed):
    """Yield a PIL image of all pictures for the noise and after every step."""
    states = queue.Queue()

    def run():
        class_ids = torch.full((num_images,), class_id)
        try:
            for _ in sample.generate(model, class_ids, seed, steps, cfg_scale, states.put):
                pass
        finally:
            states.put(None)

    threading.Thread(target=run).start()
    for z in iter(states.get, None):
        yield sample.to_grid(sample.to_uint8(z), columns=min(num_images, 4))


def enlarged(grid, image_size):
    """A grid with every pixel as a square, as a browser would blur it."""
    factor = max(1, SIDE // image_size)
    return grid.resize((grid.width * factor, grid.height * factor), resample=0)


def command(checkpoint, class_id, num_images, steps, cfg_scale, seed):
    """The command line that makes the same pictures."""
    return (
        f"python sample.py --checkpoint {checkpoint} --class-id {class_id} "
        f"--num-images {num_images} --steps {steps} --cfg-scale {cfg_scale:g} --seed {seed}"
    )


def build_page(model, checkpoint):
    """The page, as a gradio Blocks."""
    gradio = import_gradio()

    def on_click(class_id, num_images, steps, cfg_scale, seed):
        settings = int(class_id), int(num_images), int(steps), float(cfg_scale), int(seed)
        line = command(checkpoint, *settings)
        busy, ready = gradio.Button(interactive=False), gradio.Button(interactive=True)
        for grid in grids_on_the_way(model, *settings):
            yield enlarged(grid, model.image_size), line, busy
        yield gradio.skip(), line, ready

    with gradio.Blocks(title="nanoDiT", analytics_enabled=False) as page:
        gradio.Markdown("# nanoDiT\nPictures out of noise, by a diffusion transformer.")
        with gradio.Row():
            with gradio.Column(scale=1):
                choices = [(name, class_id) for class_id, name in enumerate(model.class_names)]
                class_id = gradio.Dropdown(choices, value=0, label="class")
                guidance = gradio.Slider(1, 8, model.cfg_scale, step=0.5, label="guidance")
                steps = gradio.Slider(1, 100, sample.DEFAULT_STEPS, step=1, label="Euler steps")
                count = gradio.Slider(1, MOST_PICTURES, 4, step=1, label="pictures")
                seed = gradio.Number(0, label="seed", precision=0, minimum=0)
                button = gradio.Button("Sample", variant="primary")
            with gradio.Column(scale=2):
                grid = gradio.Image(label="pictures", type="pil", format="png", interactive=False)
                line = gradio.Code(
                    label="the same on the command line", language="shell", wrap_lines=True
                )
        button.click(on_click, [class_id, count, steps, guidance, seed], [grid, line, button])
    return page


def main():
    parser = common.new_parser(__doc__)
    text = "a folder or a Hub id (default: assets/butterflies)"
    parser.add_argument("--checkpoint", default=CHECKPOINT, metavar="MODEL", help=text)
    parser.add_argument("--port", type=common.int_in_range(1, 65535), default=7860, metavar="N")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cuda, mps or cpu")
    flags = parser.parse_args()
    model = common.load_model(flags.checkpoint).to(common.pick_device(flags.device))
    shown = flags.checkpoint
    if shown == CHECKPOINT:
        shown = "assets/butterflies"
    page = build_page(model, shown)
    try:
        page.launch(server_port=flags.port, show_error=True)
    except OSError as error:
        raise UserError(f"cannot serve on port {flags.port}: name another --port") from error


if __name__ == "__main__":
    common.run_command(main)
