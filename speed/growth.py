"""How the cost of ours grows with rows, context, calls of the tool, and rollouts of a question."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocoa import nll_loss, random_stream, rollout
from data.batches import Batch, Trie, build_trie, pack, pack_texts
from data.trajectory import Role, Trajectory
from speed.flops import TRAINING_PASSES, forward_flops, text_flops, trie_flops
from speed.ours import Ours
from speed.pairs import Spread, Timing, gflops_of, spread, with_unit
from tasks import Task

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
ACTIONS = (0, 1, 2, 3, 4, 6, 8)
GROUP_SIZES = (2, 4, 8, 16)

ROW_CONTEXT = 128  # tokens that each row has read, where rows grow
CONTEXT_ROWS = 8  # rows that are decoded, where the context grows
DECODED_TOKENS = 32
TRAINED_TOKENS = 8192  # of a training step in which the context grows
AGENT_ROWS = 48  # rollouts that go through the same number of calls
PROMPT_TOKENS = 24
THOUGHT_TOKENS = 24  # that a rollout writes before a call, and before its answer
OBSERVATION_TOKENS = 64
GROUP_QUESTIONS = 16


@dataclass
class Point:
    """What a size costs."""

    size: int  # what the curve's axis counts
    seconds: Spread  # of a unit
    gflops: float


@dataclass
class Curve:
    """How the cost of a unit grows."""

    name: str
    axis: str  # what grows
    unit: str  # what the cost is of
    points: list[Point]


def measure_growth(ours: Ours, task: Task, report: Callable[[Curve], None]) -> None:
    """Measure all curves on the network of a stage. report: is given each when it is done.

    Where rollouts of a question grow, its policy answers the questions of RL-2 with the tool. The
    other curves are of texts of random tokens, which share nothing.
    """
    repeats = ours.settings.repeats

    def curve(
        name: str, axis: str, unit: str, sizes: Sequence[int], run: Callable[[int], Timing]
    ) -> None:
        points = []
        for size in sizes:
            # The first run gets memory.
            run(size)
            timings = [run(size) for _ in range(repeats)]
            seconds = spread([timing.seconds_per_unit for timing in timings])
            points.append(Point(size, seconds, gflops_of(timings)))
        report(Curve(name, axis, unit, points))

    curve("rows", "rows", "token", ROWS, lambda rows: decode(ours, rows, ROW_CONTEXT))
    curve(
        "context: decoding",
        "tokens of context",
        "token",
        CONTEXTS,
        lambda context: decode(ours, CONTEXT_ROWS, context),
    )
    curve(
        "context: training",
        "tokens of context",
        "token",
        CONTEXTS,
        lambda context: train(ours, context),
    )
    curve("actions", "calls of the tool", "rollout", ACTIONS, lambda calls: act(ours, calls))
    curve(
        "group: sampling",
        "rollouts of a question",
        "rollout",
        GROUP_SIZES,
        lambda size: sample_groups(ours, task, size)[0],
    )
    curve(
        "group: update",
        "rollouts of a question",
        "rollout",
        GROUP_SIZES,
        lambda size: update_on_groups(ours, task, size),
    )


def decode(ours: Ours, rows: int, context: int) -> Timing:
    """Write some tokens on rows that have read different texts; a unit is a token of a row."""
    decoder = ours.lm.decoder(random_texts(ours, rows, context))
    start = time.perf_counter()
    decoder.decode([], [DECODED_TOKENS] * rows, 0.0)
    seconds = time.perf_counter() - start
    tokens = rows * DECODED_TOKENS
    keys = tokens * (context + DECODED_TOKENS / 2)
    return Timing(seconds, tokens, forward_flops(ours.config, tokens, keys, tokens))


def train(ours: Ours, context: int) -> Timing:
    """Make a training step on texts of one length; a unit is a token."""
    count = max(1, TRAINED_TOKENS // context)
    texts = [
        Trajectory(ids, [1] * context, [int(Role.THINK)] * context)
        for ids in random_texts(ours, count, context)
    ]
    per_pass = max(1, ours.settings.micro_tokens // context)
    batches = [pack_texts(texts[first : first + per_pass]) for first in range(0, count, per_pass)]
    seconds = train_without_effect(ours, batches)
    lengths = [context] * count
    flops = TRAINING_PASSES * text_flops(ours.config, lengths, count * context)
    return Timing(seconds, count * context, flops)


def act(ours: Ours, calls: int) -> Timing:
    """Write rollouts that all call the tool so many times; a unit is a rollout."""
    observations = [random_texts(ours, AGENT_ROWS, OBSERVATION_TOKENS) for _ in range(calls)]
    prompts = random_texts(ours, AGENT_ROWS, PROMPT_TOKENS)
    limits = [THOUGHT_TOKENS] * AGENT_ROWS
    start = time.perf_counter()
    decoder = ours.lm.decoder(prompts)
    decoder.decode([], limits, 0.0)
    for texts in observations:
        decoder.feed(texts)
        decoder.decode([], limits, 0.0)
    seconds = time.perf_counter() - start
    length = PROMPT_TOKENS + (calls + 1) * THOUGHT_TOKENS + calls * OBSERVATION_TOKENS
    written = AGENT_ROWS * (calls + 1) * THOUGHT_TOKENS
    return Timing(seconds, AGENT_ROWS, text_flops(ours.config, [length] * AGENT_ROWS, written))


def sample_groups(ours: Ours, task: Task, size: int) -> tuple[Timing, list[Trie]]:
    """Roll out some questions of RL-2 with the tool, each so many times; a unit is a rollout.

    The rollouts of each question are returned as a trie.
    """
    settings = ours.settings
    codec = ours.lm.codec
    questions = task.questions("rl2", GROUP_QUESTIONS)
    prompts = [codec.prompt(question.question) for question in questions for _ in range(size)]
    streams = [
        random_stream(settings.max_len, settings.seed, *divmod(number, size))
        for number in range(len(prompts))
    ]
    start = time.perf_counter()
    rollouts = rollout(
        ours.lm.decoder, codec, prompts, task.rl_search, settings, settings.temperature, streams
    )
    seconds = time.perf_counter() - start
    tries = [build_trie(rollouts[first : first + size]) for first in range(0, len(rollouts), size)]
    return Timing(seconds, len(rollouts), _flops_of(ours, tries)), tries


def update_on_groups(ours: Ours, task: Task, size: int) -> Timing:
    """Train on such groups, each as a trie, also on those that GRPO would skip."""
    _, tries = sample_groups(ours, task, size)
    seconds = train_without_effect(ours, [pack([trie]) for trie in tries])
    return Timing(seconds, len(tries) * size, TRAINING_PASSES * _flops_of(ours, tries))


def _flops_of(ours: Ours, tries: Sequence[Trie]) -> float:
    """Return the operations of reading some tries, with a distribution after the policy's own."""
    return trie_flops(ours.config, tries, sum(float(trie.mask.sum()) for trie in tries))


def train_without_effect(ours: Ours, batches: Sequence[Batch]) -> float:
    """Return the seconds of a training step whose learning rate is 0."""
    learned = float(sum(batch["mask"].sum() for batch in batches))
    for batch in batches:
        batch["norm"] = learned
    backend = ours.lm.backend
    optimizer: Any = backend.Optimizer(ours.lm.network, muon=False)
    start = time.perf_counter()
    backend.train_step(ours.lm.network, optimizer, nll_loss, batches, lr=0.0, muon_lr=0.0)
    return time.perf_counter() - start


def random_texts(ours: Ours, count: int, length: int) -> list[list[int]]:
    """Return texts of random tokens."""
    rng = np.random.default_rng([ours.settings.seed, count, length])
    return rng.integers(0, ours.config.vocab_size, (count, length)).tolist()


# ---- what is printed -----------------------------------------------------------------------------
def lines_of(curve: Curve) -> str:
    """Return a curve as a block of lines: the time of a unit, median and ends."""
    lines = [f"{curve.name}: time of a {curve.unit}, by {curve.axis}"]
    for point in curve.points:
        lowest = with_unit(point.seconds.lowest)
        highest = with_unit(point.seconds.highest)
        lines.append(
            f"{point.size:8}{with_unit(point.seconds.median):>12}"
            f"{f'({lowest} - {highest})':>24}{point.gflops:10.1f} GFLOP/s"
        )
    return "\n".join(lines)
