"""What a world model is distilled from: real calls, and what the tool said to them.

sweep   asks the tool for every title of its corpus, in the ways in which a policy might write it
logs    the calls that RL made (calls.jsonl of its stages) and, where SFT had the same tool, those
        of the teacher's chains
cache   what Wikipedia's cache holds

Only a sweep costs calls.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import read_log
from common.run_record import read_run_record
from data.passages import neutralize
from data.sft_data import read_chains_of_action
from data.trajectory import Codec, Provenance, Role, Trajectory
from environments.distilled import Example
from services.wikipedia import Wikipedia
from tasks import Task
from tools import Tool, split_action

MAKE_CALLS = "train a stage with the tool first, or take --sources=sweep"


@dataclass
class Examples:
    """Examples to learn from, and what they cost."""

    examples: list[Example]  # of different queries
    calls: int  # of the tool, made for this


def gather_examples(
    sources: Iterable[str],
    sweep_share: float,
    logs_of: Sequence[str],
    task: Task,
    codec: Codec,
    root: Path,
    seed: int,
) -> Examples:
    """Return the examples of some sources; of one query the first source's counts.

    sweep_share: of the titles that a sweep asks for.
    logs_of: stages whose logs are read; none: all.
    root: folder of the run, whose logs are read.
    Raises UserError where a source has none.
    """
    known: dict[str, str] = {}
    calls = 0
    tool = task.rl_search["search"]
    for source in sources:
        if source == "sweep":
            queries = sweep_queries(task, sweep_share, seed)
            found = ask_tool(tool, queries)
            calls += len(queries)
        elif source == "logs":
            found = logged_calls(root, codec, logs_of, task.search is task.rl_search)
        else:
            found = cached_calls(tool)
        for query, observation in found.items():
            known.setdefault(query, neutralize(observation))
    return Examples([Example(query, text) for query, text in known.items()], calls)


def sweep_queries(task: Task, share: float, seed: int) -> list[str]:
    """Return the queries of a sweep over some of a corpus' titles, each once.

    Raises UserError for a tool whose titles nobody can list.
    """
    queries_of_titles = task.sweep_queries()
    if not queries_of_titles:
        raise UserError(
            "--sources=sweep: this corpus can't list its titles; take --sources=logs or cache"
        )
    count = max(1, round(share * len(queries_of_titles)))
    chosen = random.Random(f"sweep {seed}").sample(queries_of_titles, count)
    return list(dict.fromkeys(query for queries in chosen for query in queries))


def ask_tool(tool: Tool, queries: list[str]) -> dict[str, str]:
    """Return what a tool says to each query, without searches that failed."""
    observations = tool(queries)
    return {
        query: observation.text
        for query, observation in zip(queries, observations, strict=True)
        if not observation.is_lost
    }


def logged_calls(
    root: Path, codec: Codec, stages: Sequence[str], sft_has_same_tool: bool
) -> dict[str, str]:
    """Return the real calls that the stages of a run have logged.

    stages: folders of RL stages; none: all, and the chains of SFT where its tool was the same.
    Raises UserError for a stage that logged nothing, and where there is no call.
    """
    calls: dict[str, str] = {}
    paths = [root / stage / "calls.jsonl" for stage in stages]
    if not stages:
        paths = [
            path
            for path in sorted(root.glob("*/calls.jsonl"))
            if sft_has_same_tool or not _asked_about_sfts_world(root, path.parent.name)
        ]
    for path in paths:
        for row in read_log(path, "--logs_of", "query"):
            if row.get("provenance") == Provenance.REAL:
                calls[row["query"]] = row["text"]
    if sft_has_same_tool and not stages:
        for trajectory in read_chains_of_action(root):
            calls |= calls_of(codec, trajectory)
    if not calls:
        raise UserError(f"--sources=logs: no call is logged in {root}; {MAKE_CALLS}")
    return calls


def _asked_about_sfts_world(root: Path, stage: str) -> bool:
    """Whether the questions of an RL stage were those of RL-1's own pool."""
    record = read_run_record(root.name).stages.get(stage)
    if record is None or record.settings.get("rl1_pool") != "rl1":
        return False
    return record.settings["stage"] == "rl1" or stage == "rl1"


def calls_of(codec: Codec, trajectory: Trajectory) -> dict[str, str]:
    """Return the searches of a trajectory of real observations: query -> observation."""
    calls = {}
    query = ""
    for role, ids in parts_by_role(trajectory):
        if role == Role.ACTION:
            name, query = split_action(codec.last_query(ids))
            if name != "search":
                query = ""
        elif role == Role.OBSERVATION and query:
            # Between the tags.
            calls[query] = codec.decode(ids[1:-1]).strip()
    return calls


def parts_by_role(trajectory: Trajectory) -> list[tuple[int, list[int]]]:
    """Return (role, ids) of each run of tokens that have one role."""
    parts: list[tuple[int, list[int]]] = []
    for token, role in zip(trajectory.ids, trajectory.role, strict=True):
        if not parts or parts[-1][0] != role:
            parts.append((role, []))
        parts[-1][1].append(token)
    return parts


def cached_calls(tool: Tool) -> dict[str, str]:
    """Return what Wikipedia's cache holds. Raises UserError for another tool, and for nothing."""
    if not isinstance(tool, Wikipedia):
        raise UserError("--sources=cache: it is Wikipedia's; give --corpus=wikipedia")
    calls = tool.cached_observations()
    if not calls:
        raise UserError(f"--sources=cache: {tool.cache.path} holds no answer; {MAKE_CALLS}")
    return calls
