"""Tool calls around another library's generation, as one would write them."""

import time
from collections.abc import Callable, Sequence

from common.settings import RolloutSettings
from data.trajectory import Codec
from speed.flops import text_flops
from speed.ours import Ours
from speed.pairs import Timing
from tools import Library

# A library's batched generation with caches: (row numbers, ids that each row has to read, tokens
# that each may write) -> what each wrote, its stop token included.
Generate = Callable[[list[int], list[list[int]], list[int]], list[list[int]]]


def time_agents(
    generate: Generate, ours: Ours, prompts: Sequence[list[int]], search: Library
) -> Timing:
    """Return what the agents of a library took, greedily; a unit is an agent."""
    start = time.perf_counter()
    texts = run_agents(generate, ours.lm.codec, prompts, search, ours.settings)
    seconds = time.perf_counter() - start
    lengths = [len(text) for text in texts]
    # About half of a text is the policy's own.
    flops = text_flops(ours.config, lengths, sum(lengths) / 2)
    return Timing(seconds, len(texts), flops, texts)


def run_agents(
    generate: Generate,
    codec: Codec,
    prompts: Sequence[list[int]],
    search: Library,
    settings: RolloutSettings,
) -> list[list[int]]:
    """Put tool calls around a library's generation; return the ids of each whole text.

    Answers that are forced are left out.
    """
    texts = [list(prompt) for prompt in prompts]
    unread = dict(enumerate(prompts))
    longest = settings.max_len - settings.forced_answer_room
    for _ in range(settings.max_actions + 1):
        rows = list(unread)
        budgets = [longest - len(texts[row]) for row in rows]
        queries = {}
        for row, ids in zip(rows, generate(rows, list(unread.values()), budgets), strict=True):
            texts[row] += ids
            if ids[-1] == codec.end_search_id and codec.search_id in ids:
                queries[row] = codec.last_query(ids)
        if not queries:
            break
        unread = {}
        observations = search(list(queries.values()))
        for row, observation in zip(queries, observations, strict=True):
            text = codec.fit(observation.text, settings.max_observation)
            ids = codec.wrap_observation(text)
            if len(texts[row]) + len(ids) < longest:
                texts[row] += ids
                unread[row] = ids
        if not unread:
            break
    return texts
