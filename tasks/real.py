"""The task of real questions: question files, and a tool that searches real passages."""

import random
import re

import model
import tools
from common.errors import UserError
from common.settings import NewModelSettings, TaskRunSettings
from data.passages import split_passage
from data.question_files import read_question_sets
from data.questions import Fact, Lookup, Question, short_questions, sixteenth
from data.teacher import find_evidence
from data.trajectory import Codec, Trajectory
from model import LM
from services.bm25 import BM25

# The sixteenths of all questions (data.questions.sixteenth) that each part of the training draws
# from. The pools of SFT share one part: what the model knows decides what becomes of a question.
PARTS = {
    "sft": range(0, 8),
    "rl1": range(8, 11),
    "rl2": range(11, 15),
    "held_out": range(15, 16),
}


class RealTask:
    """Question files to learn from and to be judged on, with one search tool for everything."""

    # A small checkpoint's ReAct workflow hardly solves anything; the teacher's searches make the
    # pairs of SFT-1.
    base_model_acts = False

    def __init__(self, settings: TaskRunSettings, question_files: list[str] | None = None) -> None:
        """Read the questions and open the corpus.

        question_files: to be judged on, in place of eval_data; then there is nothing to learn from.
        Raises UserError for settings that are missing, and for files that can't be read.
        """
        has_questions = question_files or (settings.train_data and settings.eval_data)
        if not settings.corpus or not has_questions:
            message = (
                "train_data, eval_data, corpus: a run with --model needs all three; "
                "see config/smollm2.py"
            )
            if not settings.train_data:
                message += "; eval.py alone can do with --data and --corpus"
            raise UserError(message)
        self.settings = settings
        self._questions: list[Question] = []  # to learn from
        if not question_files:
            for questions in read_question_sets(settings.train_data, "--train_data").values():
                self._questions += questions
        self.evaluation = {
            name: _sample(questions, name, settings)
            for name, questions in read_question_sets(
                question_files or settings.eval_data, "--data, --eval_data"
            ).items()
        }
        self.search = tools.open_library(
            settings.corpus, settings.top_k, settings.language, settings.cache
        )
        self.rl_search = self.search
        self.eval_search = self.search

    def questions(self, pool: str, count: int) -> list[Question]:
        """Return the first questions of a pool, the sets mixed; see tasks.Task.

        Raises UserError where no question of the files falls to a pool.
        """
        part = pool if pool in PARTS else "sft"
        members = [
            question for question in self._questions if sixteenth(question.question) in PARTS[part]
        ]
        if self._questions and not members:
            raise UserError(
                f"train_data: of {len(self._questions)} questions none falls to {part!r}, which "
                f"takes {len(PARTS[part])} of 16; give more questions"
            )
        random.Random(f"{part} {self.settings.seed}").shuffle(members)
        return members[:count]

    def leave_out_long_questions(self, codec: Codec, longest_prompt: int) -> None:
        """Leave out what is too long to learn from or to be judged on; see tasks.Task."""

        def prompt_tokens(question: str) -> int:
            return len(codec.prompt(question))

        self._questions = short_questions(self._questions, prompt_tokens, longest_prompt)
        for name, questions in self.evaluation.items():
            self.evaluation[name] = short_questions(questions, prompt_tokens, longest_prompt)

    def sweep_queries(self) -> list[list[str]]:
        """Return each passage's title, and without what stands in parentheses after it."""
        tool = self.rl_search["search"]
        if not isinstance(tool, BM25):
            return []
        titles = [split_passage(passage["contents"]).title for passage in tool.passages]
        return [
            list(dict.fromkeys([title, re.sub(r"\s*\(.*\)$", "", title)]))
            for title in dict.fromkeys(titles)
            if title
        ]

    def stated_values(self, fact: Fact, lookup: Lookup, observation: str) -> list[str]:
        """Return the golden answer where the observation holds the look-up's evidence."""
        return fact.answers[:1] if find_evidence(lookup, observation) else []

    def practice_chains(self, codec: Codec, rng: random.Random, count: int) -> list[Trajectory]:
        """Return nothing: a checkpoint needs no practice on made-up facts."""
        return []

    def new_model(self, settings: NewModelSettings) -> LM:
        """Return the checkpoint from elsewhere, with the tags added."""
        # A device that is not there is refused before the checkpoint is read.
        model.choose_backend(settings.backend).pick_device(settings.device)
        return model.load_pretrained(self.settings.model, settings)

    def pretraining_texts(self, codec: Codec, rng: random.Random, tokens: int) -> list[Trajectory]:
        """Return nothing: the checkpoint is the base model as it is."""
        return []


def _sample(questions: list[Question], name: str, settings: TaskRunSettings) -> list[Question]:
    """Return a set's sample; it does not depend on which other sets are asked.

    A larger sample only goes on where a smaller one ends, so that rows of both can be compared.
    """
    members = list(questions)
    random.Random(f"evaluation {settings.seed} {name}").shuffle(members)
    return members[: settings.eval_questions]
