"""Read a data set once, into one file, from which a run starts at once, whatever its size.

    python data/pack.py ../pictures pictures.safetensors --image-size 64
    python train.py --dataset pictures.safetensors --image-size 64

The source is what --dataset takes: a folder, or a data set on the Hub. The pictures are the same,
in the same order, as if it was trained on directly. The file has uint8 images (N,3,S,S), int64
labels (N,) and the class names; it is written piece by piece, so that it may be larger than the
memory.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as this script is in a folder

from support.checkpoint import write_beside  # noqa: E402
from support.settings import UserError, limited, new_parser, run_command  # noqa: E402

import torch  # noqa: E402

from data.images import read_dataset  # noqa: E402


def header(class_names, source, count, image_size):
    """The text at the beginning of a safetensors file; spaces may follow it."""
    shape = [count, 3, image_size, image_size]
    end = 3 * count * image_size**2
    images = {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}
    labels = {"dtype": "I64", "shape": [count], "data_offsets": [end, end + 8 * count]}
    metadata = {"class_names": json.dumps(class_names), "source": source}
    return json.dumps({"__metadata__": metadata, "images": images, "labels": labels}).encode()


def main():
    parser = new_parser(__doc__)
    parser.add_argument("source", help="a folder, or a Hub id such as you/pictures")
    parser.add_argument("path", type=Path, help="a new file, such as pictures.safetensors")
    parser.add_argument("--image-size", type=limited(int, 1), default=64, help="(%(default)s)")
    args = parser.parse_args()
    if args.path.suffix != ".safetensors" or args.path.exists():
        raise UserError(f"{args.path} exists, or does not end with .safetensors: choose a new name")

    class_names, at_most, pictures = read_dataset(args.source, args.image_size)
    room = len(header(class_names, args.source, at_most, args.image_size))
    labels = []

    def write(beside):
        with open(beside, "wb") as file:
            file.seek(8 + room)
            for picture, label in pictures:
                file.write(picture.numpy().tobytes())
                labels.append(label)
            file.write(torch.tensor(labels).numpy().tobytes())
            file.seek(0)
            file.write(room.to_bytes(8, "little"))
            file.write(header(class_names, args.source, len(labels), args.image_size).ljust(room))

    write_beside(args.path, write)
    print(f"{len(labels)} pictures of {len(class_names)} classes are in {args.path}")


if __name__ == "__main__":
    run_command(main)
