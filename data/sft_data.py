"""The SFT data of a run, kept as token ids: out/<run>/data/coa.jsonl, cot.jsonl and pairs.jsonl.

A line is {"ids", "mask", "role"}, one entry a token. In pairs.jsonl chosen and rejected
trajectories take turns. checksums.json knows the three files.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from backends.model_files import read_tokenizer
from common.errors import UserError
from common.files import (
    CHECKSUMS_FILE,
    parse_json,
    refuse_damage,
    to_json,
    write_bytes,
    write_text,
)
from data.batches import Pair
from data.trajectory import Codec, Trajectory


@dataclass
class SFTData:
    """What the three SFT stages learn from."""

    chains_of_action: list[Trajectory] = field(default_factory=list)
    chains_of_thought: list[Trajectory] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)  # (chosen, rejected)

    @property
    def chains(self) -> list[Trajectory]:
        """What SFT-2 and SFT-3 learn from."""
        return self.chains_of_action + self.chains_of_thought


def read_sft_data(folder: Path, remedy: str = "python train_sft.py") -> SFTData:
    """Read the SFT data of a run.

    remedy: the command that makes it, for the message.
    Raises UserError for a file that is missing or damaged.
    """
    _refuse_damage(folder)
    chains_of_action = read_trajectories(folder / "coa.jsonl", remedy)
    chains_of_thought = read_trajectories(folder / "cot.jsonl", remedy)
    sides = read_trajectories(folder / "pairs.jsonl", remedy)
    if len(sides) % 2:
        raise _damaged(folder / "pairs.jsonl", len(sides))
    pairs = list(zip(sides[0::2], sides[1::2], strict=True))
    return SFTData(chains_of_action, chains_of_thought, pairs)


def read_chains_of_action(root: Path) -> list[Trajectory]:
    """Read the chains of action that a run's SFT learned from.

    root: of the run. Raises UserError for a file that is missing or damaged.
    """
    _refuse_damage(root / "data")
    return read_trajectories(root / "data" / "coa.jsonl")


def read_trajectories(path: Path, remedy: str = "python train_sft.py") -> list[Trajectory]:
    """Read trajectories that are kept as token ids.

    remedy: the command that makes the file, for the message.
    Raises UserError with file:line.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; make it with: {remedy}")
    trajectories = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = parse_json(line)
            columns = [row["ids"], row["mask"], row["role"]]
            if not all(isinstance(column, list) for column in columns):
                raise ValueError("a column that is no list")
            if len({len(column) for column in columns}) != 1:
                raise ValueError("a token without its mask or its role")
        except (ValueError, KeyError, TypeError):
            raise _damaged(path, number) from None
        trajectories.append(Trajectory(*columns))
    return trajectories


def _refuse_damage(folder: Path) -> None:
    refuse_damage(folder, f"remove {folder} and run train_sft.py again, which makes it anew")


def _damaged(path: Path, line: int) -> UserError:
    return UserError(
        f"{path}:{line}: cut or damaged; remove {path.parent} and run train_sft.py again, "
        "which makes it anew"
    )


def write_sft_data(folder: Path, data: SFTData) -> None:
    """Write the SFT data of a run, pairs last; each file is whole or not there."""
    contents = {
        "coa.jsonl": _to_jsonl(data.chains_of_action),
        "cot.jsonl": _to_jsonl(data.chains_of_thought),
        "pairs.jsonl": _to_jsonl([side for pair in data.pairs for side in pair]),
    }
    checksums = {name: hashlib.sha256(text).hexdigest() for name, text in contents.items()}
    write_text(folder / CHECKSUMS_FILE, to_json(checksums, indent=1))
    for name, text in contents.items():
        write_bytes(folder / name, text)


def _to_jsonl(trajectories: Iterable[Trajectory]) -> bytes:
    rows = [
        {"ids": trajectory.ids, "mask": trajectory.mask, "role": trajectory.role}
        for trajectory in trajectories
    ]
    return "".join(to_json(row) + "\n" for row in rows).encode()


def keep_what_fits(data: SFTData, max_len: int, source: str = "") -> SFTData:
    """Return what is not longer than max_len tokens, and print how much that is.

    A pair goes where one of its sides is too long.
    source: where the data comes from, which the printed line begins with.
    """
    trajectories = [*data.chains_of_action, *data.chains_of_thought]
    for pair in data.pairs:
        trajectories += pair
    lengths = [len(trajectory.ids) for trajectory in trajectories]
    too_long = [length for length in lengths if length > max_len]
    if too_long:
        print(
            f"{len(too_long)} trajectories are longer than max_len {max_len} "
            f"(the longest has {max(too_long)} tokens) and are left out"
        )
    kept = SFTData(
        [chain for chain in data.chains_of_action if len(chain.ids) <= max_len],
        [chain for chain in data.chains_of_thought if len(chain.ids) <= max_len],
        [pair for pair in data.pairs if max(len(side.ids) for side in pair) <= max_len],
    )
    print(
        f"{source}{len(kept.chains_of_action)} chains of action, "
        f"{len(kept.chains_of_thought)} chains of thought, {len(kept.pairs)} pairs",
        flush=True,
    )
    return kept


def read_codec(folder: Path) -> Codec:
    """Return the codec of a run's tokenizer, from the folder of one of its models.

    Raises UserError where there is none, or a damaged one.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer; give a file inside out/<run>/")
    return Codec(read_tokenizer(folder))
