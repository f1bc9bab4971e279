"""ZeroSearch's form of a world model (arXiv 2505.04588): it is told what it should know.

The simulator sees the gold facts of the question that a search serves, and is asked for a useful
passage or a noisy one. So it need not know the world: it has learned what an observation looks
like, and copies the fact that it is told. The share of noise grows while the policy learns.

    useful Who directed Silver River? Eva Moss<begin_search> Silver River</end_search>

It learns from the searches of SFT's chains, which cost nothing new: one whose observation held the
evidence of a fact was useful, and any other noisy.
"""

from collections.abc import Iterable, Mapping, Sequence

from data.questions import Question
from data.teacher import find_evidence
from data.trajectory import Codec, Observation, Provenance, Role, Trajectory
from environments.distilled import Example, WorldModel, uniform
from environments.examples import calls_of
from tools import Library

USEFUL = "useful"
NOISY = "noisy"


def hint_of(question: Question, kind: str) -> str:
    """Return what a simulator is told: which kind of passage is wanted, and the gold facts."""
    facts = [f"{fact.wordings[0]} {fact.answers[0]}" for fact in question.facts]
    return " ".join([kind, *facts])


def simulator_examples(
    codec: Codec, chains: Sequence[Trajectory], questions: Sequence[Question]
) -> list[Example]:
    """Return the searches of SFT's chains as a simulator learns them.

    questions: those that the chains may be about; chains about others are left out.
    """
    question_of_prompt = questions_by_prompt(codec, questions)
    examples = []
    for chain in chains:
        question = question_of_prompt.get(prompt_of(chain))
        if question is None:
            continue
        for query, observation in calls_of(codec, chain).items():
            is_useful = any(find_evidence(lookup, observation) for lookup in question.lookups)
            hint = hint_of(question, USEFUL if is_useful else NOISY)
            examples.append(Example(query, observation, hint))
    return examples


def questions_by_prompt(
    codec: Codec, questions: Iterable[Question]
) -> dict[tuple[int, ...], Question]:
    """Return questions by the ids of the prompts that ask them."""
    return {tuple(codec.prompt(question.question)): question for question in questions}


def prompt_of(trajectory: Trajectory) -> tuple[int, ...]:
    """Return the ids of a trajectory's prompt."""
    return tuple(
        token
        for token, role in zip(trajectory.ids, trajectory.role, strict=True)
        if role == Role.PROMPT
    )


class SimulatorLibrary(Library):
    """Tools whose search is a simulator that is told the gold facts."""

    def __init__(
        self,
        library: Library,
        simulator: WorldModel,
        question_of_prompt: Mapping[tuple[int, ...], Question],
        noise_share: float,
        steps: int,
    ) -> None:
        """Take the other tools of a library.

        question_of_prompt: the question of each prompt that a search may serve.
        noise_share: of the searches at the last of the steps; it rises evenly from 0.
        """
        super().__init__({**library, "search": simulator})
        self.simulator = simulator
        self.question_of_prompt = question_of_prompt
        self.noise_share = noise_share
        self.steps = steps
        self.step = 0

    def kind_of(self, query: str) -> str:
        """Return which kind of passage a query gets in this step, the same for all rollouts."""
        share = self.noise_share * self.step / max(1, self.steps - 1)
        return NOISY if uniform(f"{self.step} {query}") < share else USEFUL

    def _run_tool(
        self, name: str, calls: list[tuple[int, str]], trajectories: Sequence[Trajectory]
    ) -> list[Observation]:
        if name != "search":
            return super()._run_tool(name, calls, trajectories)
        queries = [query for _, query in calls]
        hints = []
        for index, query in calls:
            question = self.question_of_prompt[prompt_of(trajectories[index])]
            hints.append(hint_of(question, self.kind_of(query)))
        imagined = self.simulator.imagine(queries, hints)
        return [Observation(answer.text, Provenance.IMAGINED) for answer in imagined]
