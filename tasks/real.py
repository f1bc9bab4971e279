"""The task of real questions: FlashRAG question files, and a tool that searches real passages."""

import random

import model
import tools
from common.errors import UserError
from common.settings import NewModelSettings, TaskRunSettings
from data.flashrag import name_sets, read_questions
from data.questions import Question
from data.trajectory import Codec, Trajectory
from model import LM


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
        self._pool: list[Question] = []
        if not question_files:
            for name, path in name_sets(settings.train_data, "--train_data").items():
                self._pool += read_questions(path, name)
        self.evaluation = {
            name: _sample(read_questions(path, name), name, settings)
            for name, path in name_sets(
                question_files or settings.eval_data, "--data, --eval_data"
            ).items()
        }
        self.search = tools.open_library(
            settings.corpus, settings.top_k, settings.language, settings.cache
        )
        self.rl_search = self.search
        self.eval_search = self.search

    def questions(self, pool: str, count: int, skip: int = 0) -> list[Question]:
        """Return training questions, the sets mixed; see tasks.Task.

        skip: where in the mixed order to begin; after the end it goes on at the start.
        pool: not needed here.
        """
        total = len(self._pool)
        order = random.Random(self.settings.seed).sample(range(total), total)
        return [self._pool[order[(skip + index) % total]] for index in range(min(count, total))]

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
    """Return a set's sample; it does not depend on which other sets are asked."""
    rng = random.Random(f"evaluation {settings.seed} {name}")
    return rng.sample(questions, min(settings.eval_questions, len(questions)))
