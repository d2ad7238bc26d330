"""Read a data set into one file, from which any run starts at once, whatever its size.

    python data/pack.py ../pictures pictures.safetensors --image-size 64
    python train.py --dataset pictures.safetensors --image-size 64

The source is what --dataset takes: a folder, or a data set on the Hub. The pictures are the same,
in the same order, as in training on the source itself. The file has uint8 images (N,3,S,S), int64
labels (N,) and the class names. It may be larger than memory; writing it takes twice its size on
the disk.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as this script is in a folder

from support.checkpoint import write_beside  # noqa: E402
from support.settings import UserError, expanded, limited, new_parser, run_command  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from data.images import load_dataset  # noqa: E402


def main():
    parser = new_parser(__doc__)
    parser.add_argument("source", help="a folder, or a Hub id such as you/pictures")
    parser.add_argument("path", type=expanded, help="a new file: pictures.safetensors")
    parser.add_argument("--image-size", type=limited(int, 1), default=64, help="px (%(default)s)")
    args = parser.parse_args()
    if args.path.suffix != ".safetensors" or args.path.exists():
        raise UserError(f"{args.path} exists, or does not end with .safetensors: choose a new name")

    # The tensor of the pictures is a file, too, as they may not fit into memory.
    args.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.path.parent, ignore_cleanup_errors=True) as scratch:

        def empty(shape, dtype):
            file, size = str(Path(scratch, "images")), torch.Size(shape).numel()
            if shutil.disk_usage(scratch).free < 2 * size:  # else a bus error, when it is full
                raise UserError(f"{args.path} needs {2 * size / 1e9:,.1f} GB of free disk")
            return torch.from_file(file, shared=True, size=size, dtype=dtype).view(shape)

        images, labels, class_names = load_dataset(args.source, args.image_size, empty)
        metadata = {"class_names": json.dumps(class_names), "source": args.source}
        tensors = {"images": images, "labels": labels}
        write_beside(args.path, lambda beside: save_file(tensors, beside, metadata))
    print(f"{len(labels)} pictures of {len(class_names)} classes are in {args.path}")


if __name__ == "__main__":
    run_command(main)
