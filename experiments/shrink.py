"""A trained network in half precision, to be shared: half the size, the same pictures.

    python experiments/shrink.py out assets/butterflies --cfg-scale 4

Writes weights, config and card, with the last grid of the run. sample.py reads it as any other.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
from model import DiT, UserError  # noqa: E402


def main():
    parser = common.new_parser(__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("output", type=Path, help="a folder that does not exist yet")
    text = "the guidance that sample.py is to use with it (default: that of the run)"
    parser.add_argument("--cfg-scale", type=common.parse_finite, metavar="W", help=text)
    flags = parser.parse_args()
    if flags.output.exists():
        raise UserError(f"{flags.output} exists: name another folder")

    weights = common.load_model(flags.run).state_dict()
    config = json.loads((flags.run / "config.json").read_text("utf-8"))
    if flags.cfg_scale is not None:
        config["cfg_scale"] = flags.cfg_scale
    model = DiT(**config)
    model.load_state_dict(weights)
    model.folder = flags.run
    model.half().save_pretrained(flags.output)
    print(flags.output)


if __name__ == "__main__":
    common.run_command(main)
