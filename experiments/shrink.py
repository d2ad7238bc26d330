"""Save a trained network in half precision, for sharing: half the size, almost the same pictures.

    python experiments/shrink.py out assets/butterflies --cfg-scale 4

Writes weights, config and card, with the last grid of the run. sample.py loads it like any other.
To share it: hf upload you/butterflies assets/butterflies. (push_to_hub would double its size.)
"""

import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
from model import UserError  # noqa: E402


def main():
    parser = common.new_parser(__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("output", type=Path, help="a folder that does not exist yet")
    text = "the guidance that sample.py then uses by default (default: that of the run)"
    parser.add_argument("--cfg-scale", type=common.parse_finite, metavar="W", help=text)
    flags = parser.parse_args()
    if flags.output.exists():
        raise UserError(f"{flags.output} exists: choose another folder")
    if not flags.run.is_dir():
        raise UserError(f"{flags.run} is not a folder")

    model = common.load_model(flags.run)
    if flags.cfg_scale is not None:
        model.cfg_scale = flags.cfg_scale
    model.folder = flags.run  # for the card, which shows the run's figures and grid
    beside = flags.output.with_name(f".writing-{flags.output.name}")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        model.half().save_pretrained(beside)
        common.replace(beside, flags.output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {flags.output}: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(flags.output)


if __name__ == "__main__":
    common.run_command(main)
