"""Write the SFT data of a run as AutoCoA's files.

    python -m data.export out/nano/data FOLDER

leaves coa.jsonl, cot.jsonl and pairs.json in FOLDER (see data/autocoa_files.py).
"""

import sys
from pathlib import Path

from common.errors import UserError, run_guarded
from data.autocoa_files import write_sft_files
from data.sft_data import read_codec, read_sft_data

USAGE = "usage: python -m data.export out/<run>/data FOLDER"


def main(arguments: list[str]) -> None:
    """Run the command. Raises UserError for bad arguments, and for data that is not there."""
    if len(arguments) != 2:
        raise UserError(USAGE)
    data_folder = Path(arguments[0])
    out_folder = Path(arguments[1])
    run = data_folder.parent.name
    data = read_sft_data(data_folder, f"python train_sft.py --run={run}")
    codec = read_codec(data_folder.parent / "base")
    write_sft_files(codec, out_folder, data)
    print(
        f"{out_folder}: {len(data.chains_of_action):,} chains of action, "
        f"{len(data.chains_of_thought):,} chains of thought, {len(data.pairs):,} pairs"
    )


if __name__ == "__main__":
    run_guarded(lambda: main(sys.argv[1:]))
