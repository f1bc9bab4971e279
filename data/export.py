"""Write what this project reads in the forms of other projects.

    python -m data.export out/nano/data FOLDER

leaves the SFT data of a run as AutoCoA's files, coa.jsonl, cot.jsonl and pairs.json, in FOLDER (see
data/autocoa_files.py), and

    python -m data.export hotpotqa_dev.jsonl nq_dev.jsonl test.parquet

question files as one file of verl's (see data/verl.py), and

    python -m data.export test.parquet FOLDER

verl's files as FlashRAG's, FOLDER/nq.jsonl and so on, a file for each set.
"""

import sys
from pathlib import Path

from common.errors import UserError, run_guarded
from common.files import write_jsonl
from common.terminal import asks_for_help
from data import verl
from data.autocoa_files import write_sft_files
from data.flashrag import flashrag_row
from data.question_files import read_question_sets
from data.sft_data import read_codec, read_sft_data

USAGE = (
    "usage: python -m data.export out/<run>/data FOLDER, or "
    "python -m data.export QUESTIONS.jsonl .. FILE.parquet, or "
    "python -m data.export FILE.parquet .. FOLDER"
)


def main(arguments: list[str]) -> None:
    """Run the command. Raises UserError for bad arguments, and for data that is not there."""
    if asks_for_help(arguments):
        print(__doc__)
        return
    if len(arguments) > 1 and verl.is_parquet(arguments[-1]):
        export_questions(arguments[:-1], Path(arguments[-1]))
    elif len(arguments) > 1 and verl.is_parquet(arguments[0]):
        export_sets(arguments[:-1], Path(arguments[-1]))
    elif len(arguments) == 2:
        export_sft_data(Path(arguments[0]), Path(arguments[1]))
    else:
        raise UserError(USAGE)


def export_questions(paths: list[str], out_file: Path) -> None:
    """Write question files as one file of verl's. Raises UserError."""
    question_sets = read_question_sets(paths, "data.export")
    verl.write_question_sets(out_file, question_sets)
    counts = [f"{name} {len(questions):,}" for name, questions in question_sets.items()]
    print(f"{out_file}: {', '.join(counts)} questions")


def export_sets(paths: list[str], out_folder: Path) -> None:
    """Write the sets of question files as one file of FlashRAG's each.

    Raises UserError for a set whose name is none of a file, and for a file that is there.
    """
    if out_folder.suffix in (".json", ".jsonl"):
        raise UserError(f"{out_folder}: a folder is needed, for a file of each set; {USAGE}")
    question_sets = read_question_sets(paths, "data.export")
    out_files = {name: out_folder / f"{name}.jsonl" for name in question_sets}
    for name, out_file in out_files.items():
        if out_file.parent != out_folder or name.startswith("."):
            raise UserError(f"{', '.join(paths)}: the set {name!r} can't be the name of a file")
        if out_file.exists():
            raise UserError(f"{out_file}: it is there already; remove it, or name another folder")
    for name, questions in question_sets.items():
        out_file = out_files[name]
        write_jsonl(out_file, [flashrag_row(question, name) for question in questions])
        print(f"{out_file}: {len(questions):,} questions")


def export_sft_data(data_folder: Path, out_folder: Path) -> None:
    """Write the SFT data of a run as AutoCoA's files. Raises UserError."""
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
