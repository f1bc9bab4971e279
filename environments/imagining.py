"""What a model writes in the place of the search tool, and how likely or unsure it is of that."""

from collections.abc import Callable, Sequence

import numpy as np

from common import ranks
from common.batching import fill_by_tokens
from common.progress import tqdm
from common.settings import RolloutSettings
from data.batches import Batch, pack_texts
from data.passages import NOTHING_FOUND
from data.trajectory import Codec, Role, Trajectory
from model import LM

SCORED_TOKENS = 4000  # tokens that go through the network at once when a text is scored

# network, batch -> a number for each node, 0 where the mask is 0: (nodes,).
Score = Callable[[object, Batch], np.ndarray]


def imagine(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    settings: RolloutSettings,
    bar: tqdm | None = None,
) -> list[list[int]]:
    """Return the ids that a model writes after each prompt, greedily.

    A prompt ends with an opened observation; the tag that closes it is the last id. Several
    processes share the prompts.
    """

    def write(share: list[int], search: None) -> list[list[int]]:
        written: dict[int, list[int]] = {}
        # Prompts of like length are read together.
        shortest_first = sorted(share, key=lambda row: len(prompts[row]))
        for start in range(0, len(share), settings.batch_rows):
            rows = shortest_first[start : start + settings.batch_rows]
            batch = _imagine_batch(lm, [list(prompts[row]) for row in rows], settings)
            written.update(zip(rows, batch, strict=True))
            if bar is not None:
                bar.update(len(rows))
        return [written[row] for row in share]

    return ranks.split(prompts, write)


def _imagine_batch(lm: LM, prompts: list[list[int]], settings: RolloutSettings) -> list[list[int]]:
    """Return what a model writes after some prompts that are read together.

    Some observations are several times as long as others. So a pass ends when half of the rows are
    done, and the others go on without them.
    """
    stops = [lm.codec.end_result_id, *lm.codec.eos_ids]
    decoder = lm.decoder(prompts)
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # those that still write, in the order of the decoder
    # One token more than an observation may have, for the tag that closes it.
    most = settings.max_observation + 1
    while rows:
        limits = [most - len(written[row]) for row in rows]
        new_ids, _ = decoder.decode(stops, limits, 0.0, writing_share=0.5)
        for row, ids in zip(rows, new_ids, strict=True):
            written[row] = written[row] + ids
        is_writing = [written[row][-1] not in stops and len(written[row]) < most for row in rows]
        rows = [row for row, writes in zip(rows, is_writing, strict=True) if writes]
        if rows:
            decoder.keep([place for place, writes in enumerate(is_writing) if writes])
            decoder.feed([[] for _ in rows])
    return written


def observation_text(codec: Codec, ids: Sequence[int]) -> str:
    """Return what a model imagined as a policy would read it."""
    words = [token for token in ids if token not in (codec.end_result_id, *codec.eos_ids)]
    return codec.decode(words).strip() or NOTHING_FOUND


def sum_over_continuations(
    lm: LM,
    score: Score,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[list[int]],
) -> list[float]:
    """Return for each continuation of a prompt the sum of a score over its tokens.

    Several processes share them.
    """

    def sum_up(share: list[int], search: None) -> list[float]:
        trajectories = []
        for row in share:
            trajectory = Trajectory()
            trajectory.add(list(prompts[row]), Role.PROMPT, 0)
            trajectory.add(continuations[row], Role.OBSERVATION, 1)
            trajectories.append(trajectory)
        sums = [0.0] * len(trajectories)
        lengths = [len(trajectory.ids) for trajectory in trajectories]
        for group in fill_by_tokens(lengths, SCORED_TOKENS):
            batch = pack_texts([trajectories[row] for row in group])
            values = score(lm.network, batch)
            for row, (start, end) in zip(group, batch["parts"], strict=True):
                sums[row] = float(values[start:end].sum())
        return sums

    return ranks.split(prompts, sum_up)
