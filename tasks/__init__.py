"""What a run is about: its questions, the tools that answer them, and the model to begin with."""

import random
from typing import Protocol

from common.settings import NewModelSettings, TaskRunSettings
from data.questions import Fact, Lookup, Question
from data.trajectory import Codec, Trajectory
from model import LM
from tasks.nano import NanoTask
from tasks.real import RealTask
from tools import Library


class Task(Protocol):
    """All that the scripts ask of a task; tasks/nano.py and tasks/real.py are the two there are."""

    evaluation: dict[str, list[Question]]  # questions to be judged on, by the name of their set
    search: Library  # the tools of SFT
    rl_search: Library  # the tools of RL, the real environment
    eval_search: Library  # the tools of evaluation
    # Whether the base model solves questions in a ReAct workflow. If so, the pairs of SFT-1 are
    # made of what it solves that way; else of what the teacher's searches find.
    base_model_acts: bool

    def questions(self, pool: str, count: int) -> list[Question]:
        """Return the first `count` training questions of a pool; a task may have fewer.

        A pool is a function of the run's seed and its name: it does not depend on which other
        pools were asked for, and a larger count only goes on where a smaller one ends.

        pool: what they are for: "sample"; "coa", "cot", "act", "think" in SFT; "rl1", "rl2"; and
            "held_out", which no stage learns from.
        """
        ...

    def leave_out_long_questions(self, codec: Codec, longest_prompt: int) -> None:
        """Leave out the questions whose prompts are too long, here, before anything is trained.

        longest_prompt: tokens of a prompt at most.
        Raises UserError where no question is left.
        """
        ...

    def sweep_queries(self) -> list[list[str]]:
        """Return for each title of rl_search's corpus some queries that ask for it.

        There are none where the tool can't list its titles.
        """
        ...

    def stated_values(self, fact: Fact, lookup: Lookup, observation: str) -> list[str]:
        """Return what an observation says where a look-up of a fact would read it, right or wrong.

        A real question's passages have no fixed form: there it is the golden answer where one of
        the look-up's pieces of evidence is in the observation, and nothing elsewhere.
        """
        ...

    def practice_chains(self, codec: Codec, rng: random.Random, count: int) -> list[Trajectory]:
        """Return chains of thought for SFT that practise planning; there may be none.

        count: how many chains of thought SFT wants in all.
        """
        ...

    def new_model(self, settings: NewModelSettings) -> LM:
        """Return the model that a run begins with."""
        ...

    def pretraining_texts(self, codec: Codec, rng: random.Random, tokens: int) -> list[Trajectory]:
        """Return texts to make the base model of; none where the model is the base model already.

        tokens: how many tokens they have in all, about.
        """
        ...


def open_task(settings: TaskRunSettings, question_files: list[str] | None = None) -> Task:
    """Return the nano task, or the real one where the settings name a model.

    question_files: real questions to be judged on, in place of eval_data.
    """
    if settings.model:
        return RealTask(settings, question_files)
    return NanoTask(settings)
