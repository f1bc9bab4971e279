"""Print some articles of an evaluation world, a question of each set, and how hard the world is.

python -m nano.show --seed=7
"""

import random
import sys

from common.errors import UserError, run_guarded
from common.terminal import asks_for_help
from nano.questions import SETS, draw_questions
from nano.world import World, measure_hardness
from services.bm25 import BM25

USAGE = (
    "usage: python -m nano.show --seed=N; shows articles and questions of that seed's "
    "evaluation world [0]"
)


def show(world: World, seed: int) -> None:
    """Print a few articles, a question of each set with its facts, and the hardness."""
    for title in list(world.articles)[120:900:130]:
        print(f"{title}\n    {world.articles[title]}")
    for set_name in SETS:
        question = draw_questions(world, set_name, 1, random.Random(seed))[0]
        print(f"\n{set_name}: {question.question} -> {question.golden_answers[0]}")
        for fact in question.facts:
            query = fact.lookups[0].queries[0]
            print(f"    {fact.ask} search: {query} -> {fact.answers[0]}")
    print(measure_hardness(world, BM25(world.passages(), top_k=2).titles))


def main(arguments: list[str]) -> None:
    """Show the world of --seed=N. Raises UserError for anything else."""
    if asks_for_help(arguments):
        print(__doc__)
        return
    seed = arguments[0].removeprefix("--seed=") if arguments else "0"
    if not seed.isdecimal():
        raise UserError(USAGE)
    show(World(int(seed), "eval"), int(seed))


if __name__ == "__main__":
    run_guarded(lambda: main(sys.argv[1:]))
