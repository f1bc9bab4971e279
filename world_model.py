"""How good a search engine the policy is: what it imagines, against what the tool says.

    python world_model.py       # SFT-2, never trained on observations, beside SFT-3 and after

RL-1 runs in an environment that the policy writes itself (autocoa.rollout with IMAGINE). How far
that environment can be trusted is measured here, on a teacher's real chains: at each search the
policy imagines the observation in its context.

    nll     nats a token of the real observation; lower is better
    title   share of imagined observations whose first title is the real one's
    words   word-overlap F1 of the imagined with the real observation
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

import model
from common import memory, runs
from common.batching import group_by_tokens
from common.files import write_text
from common.settings import ModelSettings, RolloutSettings, TaskRunSettings, main
from data.batches import pad
from data.scores import f1
from data.sft_data import read_trajectories
from data.teacher import write_chains
from data.trajectory import TAGS, Role, Trajectory
from model import LM
from tasks import Task, open_task

STAGES = ("sft2", "sft3", "rl1", "rl2")
TRAINING_CHAINS = 200  # chains of the SFT data on which fidelity is measured
QUESTIONS_OF_A_SET = 30  # evaluation questions of each set whose chains are the unseen ones


@dataclass(kw_only=True)
class FidelitySettings(TaskRunSettings, ModelSettings, RolloutSettings):
    """The settings of world_model.py."""


@dataclass
class Fidelity:
    """How close what a model imagines comes to what the tool says."""

    nll: float  # nats a token of the real observation
    title: float  # share of first titles that are right
    words: float  # word-overlap F1
    searches: int


def measure_fidelity(
    lm: LM, trajectories: Sequence[Trajectory], settings: FidelitySettings
) -> Fidelity:
    """Let a model imagine every observation of some real trajectories, and compare."""
    contexts, real = _searches_of(lm, trajectories)
    imagined = _imagine(lm, contexts, settings)
    texts = [
        (_observation_text(lm, imagined_ids), lm.codec.decode(real_ids).strip())
        for imagined_ids, real_ids in zip(imagined, real, strict=True)
    ]
    right_titles = [guess.split(":")[0] == truth.split(":")[0] for guess, truth in texts]
    overlaps = [f1(guess, [truth]) for guess, truth in texts]
    return Fidelity(
        nll=_observation_nll(lm, trajectories, settings),
        title=float(np.mean(right_titles)),
        words=float(np.mean(overlaps)),
        searches=len(texts),
    )


def _searches_of(
    lm: LM, trajectories: Sequence[Trajectory]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return for each search the ids up to its opened observation, and the observation's own."""
    contexts = []
    observations = []
    for trajectory in trajectories:
        for position, token in enumerate(trajectory.ids):
            if token == lm.codec.result_id:
                end = trajectory.ids.index(lm.codec.end_result_id, position)
                contexts.append(trajectory.ids[: position + 1])
                observations.append(trajectory.ids[position + 1 : end])
    return contexts, observations


def _imagine(lm: LM, contexts: Sequence[list[int]], settings: FidelitySettings) -> list[list[int]]:
    """Return what the model writes after each opened observation, greedily."""
    imagined: list[list[int]] = []
    stops = [lm.codec.end_result_id, lm.codec.eos_id]
    for start in range(0, len(contexts), settings.batch_rows):
        batch = list(contexts[start : start + settings.batch_rows])
        budgets = [settings.max_observation] * len(batch)
        ids, _ = lm.decoder(batch).decode(stops, budgets, 0.0)
        imagined += ids
    return imagined


def _observation_text(lm: LM, ids: list[int]) -> str:
    return lm.codec.decode(ids).replace(TAGS["end_result"], "").strip()


def _observation_nll(
    lm: LM, trajectories: Sequence[Trajectory], settings: FidelitySettings
) -> float:
    """Return the mean negative log-likelihood of the observations, nats a token."""
    observed = []
    for trajectory in trajectories:
        mask = [int(role == Role.OBSERVATION) for role in trajectory.role]
        observed.append(Trajectory(trajectory.ids, mask, trajectory.role))
    total = 0.0
    tokens = 0.0
    lengths = [len(trajectory.ids) for trajectory in observed]
    for group in group_by_tokens(lengths, settings.micro_tokens):
        batch = pad([observed[row] for row in group])
        total -= float(lm.backend.score(lm.network, batch).sum())
        tokens += float(batch["mask"][:, 1:].sum())
    return total / tokens


def unseen_chains(lm: LM, task: Task, settings: FidelitySettings) -> list[Trajectory]:
    """Return a teacher's chains for evaluation questions, every fact looked up."""
    questions = [
        question
        for questions in task.evaluation.values()
        for question in questions[:QUESTIONS_OF_A_SET]
    ]
    nothing_known: set[str] = set()
    chains, _ = write_chains(
        lm.codec, questions, nothing_known, task.eval_search, settings.max_observation
    )
    return [chain for _, chain in chains]


def run(settings: FidelitySettings) -> None:
    """Measure every stage that is trained, print a table, and write world_model.json."""
    root = runs.run_folder(settings)
    task = open_task(settings)
    lm = model.load(runs.find_start(root, "sft3", ["sft3"]), settings)
    if not memory.report(lm, settings, "eval", None):
        return
    seen = read_trajectories(root / "data" / "coa.jsonl")[:TRAINING_CHAINS]
    unseen = unseen_chains(lm, task, settings)

    print(f"{'':8}{'training questions':>30}{'unseen questions':>30}")
    print(f"{'':8}" + f"{'nll':>10}{'title':>10}{'words':>10}" * 2)
    results = {}
    for stage in STAGES:
        if not (root / stage / "config.json").is_file():
            continue
        lm = model.load(root / stage, settings)
        on_seen = measure_fidelity(lm, seen, settings)
        on_unseen = measure_fidelity(lm, unseen, settings)
        results[stage] = {"training": asdict(on_seen), "unseen": asdict(on_unseen)}
        line = f"{stage:8}"
        for fidelity in (on_seen, on_unseen):
            line += f"{fidelity.nll:10.2f}{fidelity.title:10.2f}{fidelity.words:10.2f}"
        print(line, flush=True)
    write_text(root / "world_model.json", json.dumps(results, indent=1))


if __name__ == "__main__":
    main(run, FidelitySettings, __doc__)
