"""The nano task: questions on encyclopedias that are made from a seed."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import model
import tools
from backends.config import nano_config
from common.errors import UserError
from common.progress import tqdm
from common.settings import NewModelSettings, TaskRunSettings
from data.passages import split_observation, title_on_line
from data.questions import Fact, Lookup, Question, short_questions, sixteenth
from data.trajectory import Codec, Trajectory
from model import LM
from nano.pretraining import made_up_chain, pretraining_trajectories
from nano.questions import SETS, draw_question, draw_questions
from nano.tokenizer import tokenizer_texts, train_tokenizer
from nano.world import World, read_values

# Seeds of the encyclopedias that pretraining reads about; none is the world of training.
PRETRAINING_SEEDS = range(1000, 1040)
# Shares of the sets in a pool of training questions; none is of the set `compose`.
MIX = {"single": 0.1, "typed": 0.1, "bridge": 0.3, "compare": 0.2, "chain": 0.3}
EASY_MIX = {"single": 0.3, "typed": 0.3, "bridge": 0.2, "compare": 0.1, "chain": 0.1}

# A world is out of new questions for a pool after so many draws without one.
MOST_DRAWS = 10_000


@dataclass(frozen=True)
class Pool:
    """How the training questions for one purpose are drawn."""

    mix: dict[str, float]  # the share of each set
    head_share: float  # how many of the questions start at a head entity, see draw_questions
    parts: range  # the sixteenths of all questions that it draws from, see data.questions.sixteenth
    world: Literal["sft", "rl2"] = "sft"  # the encyclopedia that they are about


# Pools about one world own different parts of its questions.
POOLS = {
    "coa": Pool(MIX, head_share=0.05, parts=range(0, 5)),
    # Chains of thought, and pairs in which thinking is chosen, need facts that the model knows.
    "cot": Pool(MIX, head_share=1.0, parts=range(5, 7)),
    "think": Pool(MIX, head_share=1.0, parts=range(7, 10)),
    # Pairs in which acting is chosen need questions that the ReAct workflow solves.
    "act": Pool(EASY_MIX, head_share=0.10, parts=range(10, 11)),
    "sample": Pool(MIX, head_share=0.10, parts=range(11, 12)),
    # Where a model knows a fact, recalling it beats a search whose result it has to make up.
    "rl1": Pool(MIX, head_share=0.0, parts=range(12, 16)),
    "rl2": Pool(MIX, head_share=0.10, parts=range(0, 14), world="rl2"),
    # Questions about RL-2's world that no stage asks: world models are measured on them.
    "held_out": Pool(MIX, head_share=0.10, parts=range(14, 16), world="rl2"),
}


class NanoTask:
    """Three encyclopedias: of SFT, of RL, and of evaluation.

    RL has one of its own, where what SFT learned by heart is of no use, as it will be of none in
    evaluation. (RL-1 asks about SFT's by --rl1_pool=rl1.) Evaluation's is one that training never
    sees.
    """

    # The base model's ReAct workflow solves questions, so its outcomes make the pairs of SFT-1.
    base_model_acts = True

    def __init__(self, settings: TaskRunSettings) -> None:
        self.settings = settings
        # Whether a question's prompt is short enough; see leave_out_long_questions.
        self._fits: Callable[[str], bool] = lambda question: True
        self.worlds = {
            "sft": World(settings.seed, "train", settings.train_scale),
            "rl2": World(f"{settings.seed} rl", "train"),
        }
        eval_world = World(settings.seed, "eval")
        rng = random.Random(f"evaluation {settings.seed}")
        self.evaluation = {
            name: draw_questions(eval_world, name, settings.eval_questions, rng) for name in SETS
        }
        self.search = tools.library(self.worlds["sft"].passages(), settings.top_k)
        self.rl_search = tools.library(self.worlds["rl2"].passages(), settings.top_k)
        self.eval_search = tools.library(eval_world.passages(), settings.top_k)

    def questions(self, pool: str, count: int) -> list[Question]:
        """Return the first questions of a pool; see tasks.Task."""
        mix = POOLS[pool].mix
        rng = random.Random(f"{pool} {self.settings.seed}")
        texts: set[str] = set()
        questions: list[Question] = []
        for number in range(count):
            (set_name,) = rng.choices(list(mix), list(mix.values()))
            question = self._draw_new_question(pool, set_name, rng, texts)
            question.id = f"{pool}_{set_name}_{number}"
            texts.add(question.question)
            questions.append(question)
        return questions

    def leave_out_long_questions(self, codec: Codec, longest_prompt: int) -> None:
        """Leave them out of evaluation, and of all pools that are drawn from here on."""

        def prompt_tokens(question: str) -> int:
            return len(codec.prompt(question))

        for name, questions in self.evaluation.items():
            self.evaluation[name] = short_questions(questions, prompt_tokens, longest_prompt)
        self._fits = lambda question: prompt_tokens(question) <= longest_prompt

    def _draw_new_question(
        self, pool_name: str, set_name: str, rng: random.Random, texts: set[str]
    ) -> Question:
        """Return a question that belongs to a pool and is none of `texts`."""
        pool = POOLS[pool_name]
        world = self.worlds[pool.world]
        for _ in range(MOST_DRAWS):
            question = draw_question(world, set_name, rng, pool.head_share)
            if question is None or question.question in texts:
                continue
            if sixteenth(question.question) in pool.parts and self._fits(question.question):
                return question
        raise UserError(
            f"this world has no more than about {len(texts)} different questions for {pool_name!r};"
            " ask for fewer (--coa, --cot, --pairs, --rl_questions; of bench.py --questions), or "
            "make the world larger with --train_scale"
        )

    def sweep_queries(self) -> list[list[str]]:
        """Return the names of each article of RL-2's world, as the first two queries for a fact."""
        world = self.worlds["rl2"]
        queries = []
        for title in world.articles:
            entity = world.by_title.get(title)
            if entity is None:
                # An article about a distractor.
                queries.append([title])
                continue
            names = [entity.name, f"{entity.name} {entity.qualifier}"]
            if entity.former_name:
                names += [entity.former_name, f"once called {entity.former_name}"]
            queries.append(names)
        return queries

    def stated_values(self, fact: Fact, lookup: Lookup, observation: str) -> list[str]:
        """Return the values that the passage of the look-up's title states for the fact."""
        relation = fact.id.partition("|")[2]
        return [
            value
            for passage in split_observation(observation)
            if passage.title == title_on_line(lookup.title, passage.number)
            for value in read_values(passage.text, relation)
        ]

    def practice_chains(self, codec: Codec, rng: random.Random, count: int) -> list[Trajectory]:
        """Return made-up chains: three fifths of the chains of thought that SFT wants.

        Without these the model forgets the relations that its chains never combine.
        """
        practice_count = count * 3 // 5
        return [made_up_chain(codec, self.worlds["sft"], rng) for _ in range(practice_count)]

    def new_model(self, settings: NewModelSettings) -> LM:
        """Return a nano model with random weights, and a tokenizer trained on the nano world."""
        # A device that is not there is refused before the tokenizer is trained.
        model.choose_backend(settings.backend).pick_device(settings.device)
        world = World(PRETRAINING_SEEDS[0], "train")
        tokenizer = train_tokenizer(settings.vocab_size, tokenizer_texts(world))
        config = nano_config(
            len(tokenizer),
            tokenizer.eos_token_id,
            tokenizer.bos_token_id,
            settings.width,
            settings.layers,
        )
        return model.new(config, tokenizer, self.settings.seed, settings)

    def pretraining_texts(self, codec: Codec, rng: random.Random, tokens: int) -> list[Trajectory]:
        """Return the texts that the base model is pretrained on, in the order of training."""
        seeds = tqdm(
            PRETRAINING_SEEDS, desc="encyclopedias to read about", unit="world", leave=False
        )
        worlds = [World(seed, "train") for seed in seeds]
        searches = [tools.library(world.passages(), self.settings.top_k) for world in worlds]
        return pretraining_trajectories(codec, worlds, searches, rng, tokens)
