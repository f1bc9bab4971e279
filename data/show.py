r"""Show one trajectory of a file, of any that this project writes or reads.

    python -m data.show out/nano/sft2/rollouts.jsonl 3

prints the third trajectory: what carries loss in green, the rest in grey. The file may hold token
ids (the rollouts of a stage, the SFT data of a run) or text (AutoCoA's SFT files).
"""

import itertools
import sys
from pathlib import Path
from typing import Any

from common.errors import UserError, run_guarded
from common.terminal import asks_for_help, own_output, printable
from data.autocoa_files import read_json_rows
from data.sft_data import read_codec
from data.trajectory import TAGS, Codec, Role, Trajectory
from data.trajectory_rows import TrajectoryRow

USAGE = "usage: python -m data.show FILE [NUMBER]"

PLAIN = "\033[0m"
GREY = "\033[90m"
GREEN = "\033[1;32m"
COLORS = {
    Role.PROMPT: GREY,
    Role.THINK: PLAIN,
    Role.ACTION: "\033[1;34m",
    Role.OBSERVATION: "\033[33m",
    Role.ANSWER: GREEN,
}
# A piece of text, and 1 where it carries loss.
Piece = tuple[str, float]


def colored(codec: Codec, trajectory: Trajectory) -> str:
    """Return a trajectory as text for a terminal: each role in its colour, a line a step."""
    pieces = codec.pieces(trajectory.ids)
    steps = []
    start = 0
    for role, members in itertools.groupby(trajectory.role):
        end = start + len(list(members))
        steps.append(COLORS[Role(role)] + printable("".join(pieces[start:end])))
        start = end
    return PLAIN + f"{PLAIN}\n".join(steps) + PLAIN


def show(path: str | Path, number: int) -> None:
    """Print one trajectory of a file, counted from 1: what carries loss in green, the rest grey.

    Raises UserError for a file, or a row, that holds none.
    """
    path = Path(path)
    rows = read_json_rows(path, "trajectories", "data.show")
    if not 1 <= number <= len(rows):
        raise UserError(f"{path}: there is no trajectory {number}; it holds {len(rows)}")
    line, row = rows[number - 1]
    try:
        text = _color_by_loss(_pieces_of_row(row, path))
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError):
        raise UserError(
            f"{path}:{line}: not a trajectory; expected ids, mask and role, "
            "or AutoCoA's messages or pairs"
        ) from None
    print(text, file=own_output())


def _pieces_of_row(row: Any, path: Path) -> list[Piece]:
    if "tokens" in row:
        rollout = TrajectoryRow.from_json(row)
        return list(zip(rollout.tokens, rollout.mask, strict=False))
    if "ids" in row:
        # SFT data holds ids alone, which the run's tokenizer reads.
        tokens = read_codec(path.parent.parent / "base").pieces(row["ids"])
        return list(zip(tokens, row["mask"], strict=False))
    if "messages" in row:
        return pieces_of_messages(row["messages"])
    pieces: list[Piece] = [(turn["value"] + "\n", 0) for turn in row["conversation"]]
    pieces.append((f"+ {row['chosen']['value']}\n- {row['rejected']['value']}", 1))
    return pieces


def pieces_of_messages(messages: list[dict[str, str]]) -> list[Piece]:
    """Return the pieces of a conversation: the last turn is learned, but for observations."""
    pieces: list[Piece] = [(message["content"] + "\n", 0) for message in messages[:-1]]
    text = messages[-1]["content"]
    end = 0
    # Searched from where the last one ended: a pattern would begin anew at every opening tag.
    while (start := text.find(TAGS["result"], end)) >= 0:
        closing = text.find(TAGS["end_result"], start)
        if closing < 0:
            break
        pieces.append((text[end:start], 1))
        end = closing + len(TAGS["end_result"])
        pieces.append((text[start:end], 0))
    pieces.append((text[end:], 1))
    return pieces


def _color_by_loss(pieces: list[Piece]) -> str:
    text = ""
    for mask, members in itertools.groupby(pieces, key=lambda piece: piece[1]):
        color = GREEN if mask else GREY
        text += color + printable("".join(piece for piece, _ in members))
    return text + PLAIN


def main(arguments: list[str]) -> None:
    """Run the command. Raises UserError for bad arguments."""
    if asks_for_help(arguments):
        print(__doc__)
        return
    if len(arguments) == 1:
        show(arguments[0], 1)
    elif len(arguments) == 2 and arguments[1].isdecimal():
        show(arguments[0], int(arguments[1]))
    else:
        raise UserError(USAGE)


if __name__ == "__main__":
    run_guarded(lambda: main(sys.argv[1:]))
