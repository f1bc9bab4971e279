r"""AutoCoA: the method, without a framework (arXiv 2503.06580).

    python autocoa.py --ask "Who directed Lost Story?"      # by the last trained stage of out/nano
    python autocoa.py --start=sft2 --ask ".."               # the same by another stage

What a trajectory is stands in data/trajectory.py: token ids, and for each its role (who wrote it,
in which kind of step) and its mask (1 where it is learned; in a rollout, the policy's own). Here is
what is done with trajectories:

1. Reward and advantage: what a rollout is worth.
2. Losses of the three SFT stages and of GRPO.
3. Algorithm 1: how the policy and its environment write a trajectory together.
4. `--ask`: one question, answered before your eyes.
"""

# Imported first: from here on Ctrl-C is one line, and not a traceback.
from common.errors import UserError

# isort: split
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, Protocol

import numpy as np

import model
from common import memory, runs
from common.settings import ModelSettings, RolloutSettings, TaskRunSettings, main
from common.terminal import own_output
from data.batches import Batch
from data.scores import exact_match
from data.show import colored
from data.trajectory import Codec, Observation, Provenance, Role, Trajectory
from tasks import open_task

# An array of NumPy, torch or MLX; the losses are written once for all three.
Array = Any
# What the environment says to some actions, each with the trajectory that it ends. A tool looks at
# the action alone; a simulator may look at whose question it serves.
Search = Callable[[list[str], list[Trajectory]], list[Observation]]

# In place of a search: the policy writes the observation itself (RL-1).
Imagine = Literal["imagine"]
IMAGINE: Imagine = "imagine"


# ---- 1. Reward and advantage ---------------------------------------------------------------------
def reward(
    codec: Codec,
    trajectory: Trajectory,
    golden: list[str],
    format_penalty: float = 0.5,
    call_cost: float = 0.0,
    score: Callable[[str, list[str]], float] = exact_match,
) -> float:
    """Return 1 for an exact match and 0 otherwise (paper 3.3), less two penalties.

    format_penalty: taken off where the policy left a tag out of place or had to be forced.
    call_cost: taken off for each call of the tool.
    score: of data/scores.py, in place of an exact match.
    """
    value = score(codec.answer(trajectory), golden)
    if not codec.is_well_formed(trajectory):
        value -= format_penalty
    return value - call_cost * len(trajectory.queries)


def group_advantages(
    rewards: np.ndarray, divide_by_std: bool = False, leave_one_out: bool = False
) -> np.ndarray:
    """Return each reward less the mean of its group (paper 3.3): (questions, rollouts), as rewards.

    divide_by_std: divide by the group's sample deviation too, as the authors' code does. It
        inflates groups whose rollouts nearly agree.
    leave_one_out: take off the mean of the *other* rollouts (RLOO, arXiv 2402.14740), which does
        not depend on the rollout itself.
    """
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    if leave_one_out:
        # What a reward is above the mean of all, it is n / (n - 1) times as far above the others'.
        rollouts = rewards.shape[1]
        advantages = advantages * rollouts / (rollouts - 1)
    if divide_by_std:
        advantages = advantages / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    return advantages


# ---- 2. Losses -----------------------------------------------------------------------------------
# xp is numpy, torch or mlx.core. A micro-batch holds texts as tries (data/batches.py), in which a
# token that several texts begin with stands once: a node. logp (nodes,) is the log-probability of
# each. The batch holds `mask` (nodes,), 0 where nothing is learned, 1 where a token is, and less
# where it has less weight (SFT-3's observations). `norm` makes micro-batches add up to the mean of
# a whole optimizer step. A batch of SFT has no more than that: the tokens of some chains, one after
# the other, with the mask that was written with them. All losses are called alike, so nll_loss has
# xp too.
def nll_loss(xp: Any, logp: Array, batch: Batch) -> Array:
    """Return the next-token loss of SFT-2 and SFT-3, a mean over the tokens that are learned."""
    return -(logp * batch["mask"]).sum() / batch["norm"]


def contrastive_loss(xp: Any, logp: Array, batch: Batch) -> Array:
    """Return the loss of SFT-1: -log sigmoid(P(chosen|c) - P(rejected|c)) - alpha P(chosen|c).

    The paper's P (3.2) is the mean log-probability of a continuation's tokens. Without the last
    term both fall together where the learning rate is high (docs/ablations.md).

    batch: `path_weights` (2 n, nodes), each the mean over one continuation's nodes: n chosen ones,
    then the rejected ones of the same pairs.
    """
    score = batch["path_weights"] @ logp  # (2 n,)
    pairs = score.shape[0] // 2
    gap = score[:pairs] - score[pairs:]
    # logaddexp(0, -gap) is -log sigmoid(gap), without overflow; it takes arrays alone, so 0 * gap.
    preference = xp.logaddexp(0 * gap, -gap)
    return (preference - batch["alpha"] * score[:pairs]).sum() / batch["norm"]


def grpo_loss(xp: Any, logp: Array, batch: Batch) -> Array:
    """Return the clipped policy gradient, token by token, and the penalties.

    How tokens are averaged is decided by the batch's weights and its `norm`, which differ between
    --loss=dapo, grpo and dr_grpo (token_weight in train_rl.py).

    A token's loss is -min(r A, clip(r) A), where r is the ratio of its new to its old probability,
    and A the advantage of its rollout. That is -A min(r, 1 + clip_high) where A is positive, and
    -A max(r, 1 - clip_low) where it is negative. So for a node that several rollouts share, the
    sums of their positive and of their negative advantages are all that counts.

    With one optimizer step a batch the ratio is 1 and nothing is clipped: it is the plain policy
    gradient. Clipping acts from the second minibatch on.

    batch: `mask`, 1 for tokens of the policy; `old`, log-probs that the decoder gave when it
    sampled them; `positive` and `negative`, the sums of weighted advantages, 0 where nothing is
    learned; `clip_low`, `clip_high`, `norm`; what add_auxiliary_terms reads.
    """
    ratio = xp.exp((logp - batch["old"]) * batch["mask"])  # (nodes,)
    raised = xp.clip(ratio, None, 1 + batch["clip_high"])
    lowered = xp.clip(ratio, 1 - batch["clip_low"], None)
    gain = batch["positive"] * raised + batch["negative"] * lowered
    loss = -(gain * batch["mask"]).sum() / batch["norm"]
    return add_auxiliary_terms(xp, loss, logp, batch)


def sequence_loss(xp: Any, logp: Array, batch: Batch) -> Array:
    """Return the policy gradient of whole rollouts, clipped or not, and the penalties.

    A rollout has one ratio. For --loss=gspo (arXiv 2507.18071) it is the geometric mean of its
    tokens' ratios, and is clipped; for --loss=reinforce it is their product, the ratio of the
    probabilities of the rollout, and is not.

    batch: `mask` and `old` as for grpo_loss; `path_weights` (rollouts, nodes), the weights with
    which a rollout adds up its tokens' log-ratios: 1 / its length, or 1; `advantages` (rollouts,);
    `clip_low`, `clip_high`, `norm`; what add_auxiliary_terms reads.
    """
    ratio = xp.exp(batch["path_weights"] @ ((logp - batch["old"]) * batch["mask"]))  # (rollouts,)
    clipped = xp.clip(ratio, 1 - batch["clip_low"], 1 + batch["clip_high"])
    gain = xp.minimum(ratio * batch["advantages"], clipped * batch["advantages"])
    loss = -gain.sum() / batch["norm"]
    return add_auxiliary_terms(xp, loss, logp, batch)


def add_auxiliary_terms(xp: Any, loss: Array, logp: Array, batch: Batch) -> Array:
    """Return a loss of the policy with KL to the reference, and with what the tool said.

    batch: `mask`; `beta`, the weight of KL, and where it is not 0 `ref`, the log-probs of the
    reference, `count`, the weights of all rollouts that share a node, and `kl_norm`;
    `observation_coef`, the weight of observation_loss.
    """
    if batch["beta"]:
        log_ratio = (batch["ref"] - logp) * batch["mask"]
        penalty = k3(xp, log_ratio) * batch["count"] * batch["mask"]
        loss = loss + batch["beta"] * penalty.sum() / batch["kl_norm"]
    if batch["observation_coef"]:
        loss = loss + batch["observation_coef"] * observation_loss(xp, logp, batch)
    return loss


def observation_loss(xp: Any, logp: Array, batch: Batch) -> Array:
    """Return the next-token loss on what the real tool said (ECHO, arXiv 2605.24517, auxiliary).

    It is a mean over rollouts' tokens, with the normaliser `observation_norm` of the whole step.
    The policy stays a model of its world while it learns to act.

    batch: `observation_count` (nodes,), how many rollouts the tool said this token to.
    """
    return -(logp * batch["observation_count"]).sum() / batch["observation_norm"]


def k3(xp: Any, log_ratio: Array) -> Array:
    """Return Schulman's k3 estimate of KL(policy || reference) for each token; never negative.

    log_ratio: log-probabilities of the policy's tokens under the reference, less the policy's own.
    """
    return xp.exp(log_ratio) - log_ratio - 1


# ---- 3. Algorithm 1 ------------------------------------------------------------------------------
@dataclass
class Row:
    """One rollout that is being written, and what it does next."""

    trajectory: Trajectory
    state: Role = Role.THINK  # the role of what it writes now
    # What was appended and the network must still read. What it sampled itself is not in here: the
    # decoder reads that by itself, together with what comes next.
    new_ids: list[int] = field(default_factory=list)
    query: str | None = None  # the action whose observation it waits for
    finished: bool = False
    answer_end: int = 0  # length of the trajectory at which a forced answer must end
    observation_start: int = 0  # where the observation that it imagines begins
    stream: np.ndarray | None = None  # (max_len,), the number that draws the token of each place
    workflow: Any = None  # what a workflow remembers of it (workflows/react.py)

    def append(self, ids: list[int], role: Role) -> None:
        """Add tokens that the policy did not write; the network still has to read them."""
        self.trajectory.add(ids, role, 0)
        self.new_ids = self.new_ids + ids


class Controller(Protocol):
    """What happens around the model's own writing: `Agent` here, `ReAct` in workflows/react.py."""

    writing_share: float  # a turn ends when no more than this share of the rows is still writing

    def stops(self, row: Row) -> list[int]:
        """Return the ids at which this row pauses."""

    def budget(self, row: Row) -> int:
        """Return how many tokens this row may write before it pauses."""

    def continue_row(self, row: Row, ids: list[int], logprobs: list[float], spent: bool) -> None:
        """Take in what a row wrote, and decide what it does next.

        spent: whether it has used up its budget.
        """

    def read_observation(self, row: Row, observation: Observation) -> None:
        """Take in what the tool said."""


def rollout(
    make_decoder: Callable[[list[list[int]]], Any],
    codec: Codec,
    prompts: Sequence[list[int]],
    search: Search | Imagine | None,
    settings: RolloutSettings,
    temperature: float = 0.0,
    streams: Sequence[np.ndarray] = (),
    report: Callable[[int], Any] | None = None,
) -> list[Trajectory]:
    """Roll out an agent on each prompt: Algorithm 1 of the paper, `batch_rows` at a time.

    make_decoder: makes a backend's Decoder for some prompts; rollouts that are one text are
        computed once.
    search: answers actions, or IMAGINE: the policy writes the observation as well,
        greedily, and it still counts as the environment's (role OBSERVATION, mask 0). None where
        max_actions is 0.
    temperature: 0 is greedy.
    streams: a random_stream for each prompt; none where it is greedy. What a rollout writes depends
        on its own stream, and not on what is rolled out beside it.
    report: is told how many have ended, whenever some have.
    Returns a trajectory for each prompt, in order.
    Raises UserError for a prompt that leaves no room for an answer.
    """
    if not prompts:
        return []
    rows = []
    for number, prompt in enumerate(prompts):
        row = open_row(prompt, settings)
        if temperature:
            row.stream = streams[number]
        rows.append(row)
    agent = Agent(codec, settings, imagines=search == IMAGINE)
    first = next_rows(rows, settings.batch_rows, decoder_is_empty=True)
    waiting = rows[len(first) :]
    decoder = make_decoder(list(prompts[: len(first)]))
    run_rows(agent, decoder, first, search, temperature, waiting, settings.batch_rows, report)
    return [row.trajectory for row in rows]


def open_row(prompt: Sequence[int], settings: RolloutSettings) -> Row:
    """Return the row of a prompt, before anything is written after it.

    Raises UserError for a prompt that leaves no room for an answer.
    """
    if len(prompt) > settings.longest_prompt:
        raise UserError(
            f"max_len: {settings.max_len} leaves no room for a prompt of {len(prompt)} tokens "
            "and an answer; raise --max_len"
        )
    row = Row(Trajectory())
    row.trajectory.add(list(prompt), Role.PROMPT, 0)
    return row


def random_stream(length: int, *numbers: int) -> np.ndarray:
    """Return the random numbers of one rollout, (length,) in [0, 1): one for each token's place.

    numbers: what tells it from all other rollouts: seed, stage, step, question, rollout.
    """
    return np.random.default_rng(numbers).random(length)


def run_rows(
    controller: Controller,
    decoder: Any,
    rows: list[Row],
    search: Search | Imagine | None,
    temperature: float = 0.0,
    waiting: Sequence[Row] = (),
    at_once: int = 0,
    report: Callable[[int], Any] | None = None,
) -> None:
    """Write all rows to their ends: the loop of Algorithm 1. Row i of the decoder is rows[i].

    waiting: rows that begin where others have ended, so that the last ones do not go on alone.
    at_once: rows that are written at a time, where some wait.
    report: as for `rollout`.
    """
    while rows:
        # 1. Think, act, imagine or answer.
        write_until_pause(controller, decoder, rows, temperature)
        # 2. What was asked for is searched for.
        call_tool(controller, rows, search)

        # 3. Rows that have ended make room for others.
        going_on = [number for number, row in enumerate(rows) if not row.finished]
        if report is not None:
            report(len(rows) - len(going_on))
        starting = next_rows(waiting, at_once - len(going_on), decoder_is_empty=not going_on)
        waiting = waiting[len(starting) :]
        decoder_rows = going_on + add_rows(decoder, starting, len(rows))
        rows = [*(rows[number] for number in going_on), *starting]

        # 4. The network reads what was appended, and the prompts of rows that start.
        if rows:
            decoder.keep(decoder_rows)
            feed_new_tokens(decoder, rows)


def next_rows(waiting: Sequence[Row], room: int, decoder_is_empty: bool) -> list[Row]:
    """Return the rows that start now, `room` at most.

    Rows of one prompt start together where they can, since they share what they read.
    """
    starting: list[Row] = []
    for _, same_prompt in groupby(waiting, key=lambda row: row.trajectory.ids):
        group = list(same_prompt)
        if len(starting) + len(group) > room:
            break
        starting += group
    if not starting and decoder_is_empty:
        # More rows than there is room for have this prompt.
        return list(waiting[:room])
    return starting


def add_rows(decoder: Any, rows: Sequence[Row], decoder_rows: int) -> list[int]:
    """Add some rows to the decoder, which read their prompts next; return their places in it.

    decoder_rows: how many rows it has.
    """
    if not rows:
        return []
    decoder.add(len(rows))
    for row in rows:
        row.new_ids = list(row.trajectory.ids)
    return list(range(decoder_rows, decoder_rows + len(rows)))


def write_until_pause(
    controller: Controller, decoder: Any, rows: list[Row], temperature: float
) -> None:
    """Let the model write on every row until most of them wait for something."""
    # The decoder takes limits of 1 or more.
    budgets = [max(1, controller.budget(row)) for row in rows]
    stops = [controller.stops(row) for row in rows]
    # An imagined observation is greedy: one text gets one observation, as from a tool.
    temperatures = [0.0 if row.state == Role.OBSERVATION else temperature for row in rows]
    uniforms = None
    if any(temperatures):
        uniforms = np.zeros((len(rows), max(budgets)))
        for number, row in enumerate(rows):
            assert row.stream is not None, "sampling needs a stream"
            length = len(row.trajectory.ids)
            own = row.stream[length : length + budgets[number]]
            uniforms[number, : len(own)] = own
    ids, logprobs = decoder.decode(
        stops, budgets, temperatures, uniforms, writing_share=controller.writing_share
    )
    for number, row in enumerate(rows):
        spent = len(ids[number]) == budgets[number]
        controller.continue_row(row, ids[number], logprobs[number], spent)


def call_tool(controller: Controller, rows: list[Row], search: Search | Imagine | None) -> None:
    """Run the actions of all rows that wait for the tool, as one batch."""
    calling = [row for row in rows if row.query is not None]
    if not calling:
        return
    assert callable(search)
    queries = [row.query or "" for row in calling]
    observations = search(queries, [row.trajectory for row in calling])
    for row, observation in zip(calling, observations, strict=True):
        row.query = None
        controller.read_observation(row, observation)


def feed_new_tokens(decoder: Any, rows: list[Row]) -> None:
    """Let the network read what was appended to each row. Row i of the decoder is rows[i]."""
    decoder.feed([row.new_ids for row in rows])
    for row in rows:
        row.new_ids = []


class Agent:
    r"""The policy decides by itself when to call a tool, and how (paper, Algorithm 1).

    When max_actions or max_len is spent before an answer, `</think>\boxed{` is appended and the
    model answers: a forced answer.
    """

    # A turn does not wait for its slowest rows, which go on in the next one: most are done with a
    # short action or answer while a few write long.
    writing_share = 0.6

    def __init__(self, codec: Codec, settings: RolloutSettings, imagines: bool) -> None:
        self.codec = codec
        self.settings = settings
        self.imagines = imagines
        self.stop_ids = [*codec.eos_ids, codec.end_search_id]
        if imagines:
            self.stop_ids.append(codec.end_result_id)

    def stops(self, row: Row) -> list[int]:
        """Pause at the end of an action, of an imagined observation, and of the text."""
        return self.stop_ids

    def budget(self, row: Row) -> int:
        """Return how many tokens this row may still write in this turn."""
        if row.state == Role.OBSERVATION:
            return self._observation_budget(row)
        if row.trajectory.forced:
            return row.answer_end - len(row.trajectory.ids)
        return self._room(row)

    def _room(self, row: Row) -> int:
        """Return the tokens left before a forced answer, with its tags, must begin."""
        return self.settings.max_len - self.settings.forced_answer_room - len(row.trajectory.ids)

    def _observation_budget(self, row: Row) -> int:
        imagined = len(row.trajectory.ids) - row.observation_start
        return min(self.settings.max_observation - imagined, self._room(row))

    def continue_row(self, row: Row, ids: list[int], logprobs: list[float], spent: bool) -> None:
        """Give each new token its role and mask, and decide what the row does next."""
        if row.state == Role.OBSERVATION:
            self._continue_imagination(row, ids)
            return
        self._add_policy_tokens(row, ids, logprobs)
        last = row.trajectory.ids[-1]
        if (
            last == self.codec.end_search_id
            and row.state == Role.ACTION
            and not row.trajectory.forced
        ):
            self._act(row)
        elif last in (*self.codec.eos_ids, self.codec.end_search_id):
            # It has answered, or closed an action that it never opened, which ends it too.
            row.finished = True
        elif spent and (row.trajectory.forced or row.state == Role.ANSWER):
            row.finished = True
        elif spent:
            self._force_answer(row)
        # Else the turn ended for other rows' sake, and this one goes on with what it has begun.

    def _add_policy_tokens(self, row: Row, ids: list[int], logprobs: list[float]) -> None:
        """Add what the policy wrote, mask 1; a tag changes the role from its own token on."""
        start = 0
        for place, token in enumerate(ids):
            if token in (self.codec.search_id, self.codec.boxed_id):
                row.trajectory.add(ids[start:place], row.state, 1, logprobs[start:place])
                start = place
                row.state = Role.ACTION if token == self.codec.search_id else Role.ANSWER
        row.trajectory.add(ids[start:], row.state, 1, logprobs[start:])

    def _act(self, row: Row) -> None:
        """Ask for the observation of the action that has ended; force an answer if calls are spent.

        The tool is asked for all rows at once, by the loop.
        """
        row.state = Role.THINK
        if len(row.trajectory.queries) >= self.settings.max_actions:
            self._force_answer(row)
            return
        query = self.codec.last_query(row.trajectory.ids)
        row.trajectory.queries.append(query)
        if self.imagines:
            row.append([self.codec.result_id], Role.OBSERVATION)
            row.state = Role.OBSERVATION
            row.observation_start = len(row.trajectory.ids)
        else:
            row.query = query

    def _continue_imagination(self, row: Row, ids: list[int]) -> None:
        """Add what the policy imagined: its words, but the environment's tokens (mask 0)."""
        trajectory = row.trajectory
        trajectory.add(ids, Role.OBSERVATION, 0)
        if trajectory.ids[-1] != self.codec.end_result_id and self._observation_budget(row) < 1:
            row.append([self.codec.end_result_id], Role.OBSERVATION)
        if trajectory.ids[-1] == self.codec.end_result_id:
            text = self.codec.decode(trajectory.ids[row.observation_start : -1]).strip()
            trajectory.observations.append(Observation(text, Provenance.IMAGINED))
            row.state = Role.THINK

    def read_observation(self, row: Row, observation: Observation) -> None:
        """Add what the tool said; where it does not fit, force an answer instead of cutting it.

        What the tool said stays in the trajectory's observations, also where no token shows it.
        """
        text = self.codec.fit(observation.text, self.settings.max_observation)
        row.trajectory.observations.append(Observation(text, observation.provenance))
        ids = self.codec.wrap_observation(text)
        if len(ids) > self._room(row):
            self._force_answer(row)
        else:
            row.append(ids, Role.OBSERVATION)

    def _force_answer(self, row: Row) -> None:
        """Close the thought and open the box for the policy: these two tokens are not its own."""
        row.trajectory.forced = True
        row.state = Role.ANSWER
        row.append([self.codec.end_think_id, self.codec.boxed_id], Role.ANSWER)
        row.answer_end = len(row.trajectory.ids) + self.settings.max_answer


# ---- 4. One question -----------------------------------------------------------------------------
@dataclass(kw_only=True)
class AskSettings(TaskRunSettings, ModelSettings, RolloutSettings):
    """The settings of autocoa.py."""

    ask: str = ""  # the question to answer
    start: str = ""  # the stage that answers; empty: the last one that is trained


def ask(settings: AskSettings) -> None:
    """Answer one question with a trained stage, and print what was written."""
    if not settings.ask:
        raise UserError('--ask: no question; write --ask "Who ..?"')
    runs.settle_by_device(settings)
    root = runs.run_folder(settings)
    stages = [*reversed(runs.RL_STAGES), *reversed(runs.SFT_STAGES[1:])]
    trained = [stage for stage in stages if (root / stage / "config.json").is_file()]
    last_stage = trained[0] if trained else "sft3"
    folder = runs.find_start(root, settings.start or last_stage, stages)
    lm = model.load(folder, settings)
    if settings.dry_run:
        memory.report(lm, settings, "eval", None)
        return
    task = open_task(settings)
    prompt = lm.codec.prompt(settings.ask)
    (trajectory,) = rollout(lm.decoder, lm.codec, [prompt], task.eval_search, settings)
    if sys.stdout.isatty():
        print(colored(lm.codec, trajectory), file=own_output())
    else:
        print(lm.codec.decode(trajectory.ids))
    answer = lm.codec.answer(trajectory)
    print(f"answer: {answer}  ({len(trajectory.queries)} calls, {folder.name})")


if __name__ == "__main__":
    main(ask, AskSettings, __doc__)
