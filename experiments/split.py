"""Sort the photographs that the figures in RESULTS.md rest on: trained on, and held out.

    python -m experiments.split photographs

photographs has a folder for each class, as the default data set does. Copies what split.csv names
into the new folders butterflies and butterflies-held-out.
"""

import csv
import shutil
from pathlib import Path

from support.settings import UserError, expanded, new_parser, run_command

FOLDERS = {"train": Path("butterflies"), "held-out": Path("butterflies-held-out")}


def main():
    parser = new_parser(__doc__)
    parser.add_argument(
        "photographs", type=expanded, help="a folder with one folder for each class"
    )
    flags = parser.parse_args()
    for folder in FOLDERS.values():
        if folder.exists():
            raise UserError(f"{folder} exists: move it away, or run this in another folder")
    with open(Path(__file__).with_name("split.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        source = flags.photographs / row["class"] / row["filename"]
        if not source.is_file():
            raise UserError(f"{source} is missing: is {flags.photographs} the right folder?")
        target = FOLDERS[row["part"]] / row["class"]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    print(f"{len(rows)} photographs are in {' and '.join(map(str, FOLDERS.values()))}")


if __name__ == "__main__":
    run_command(main)
