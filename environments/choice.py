"""Which environment a stage of RL has: the settings, and what they open."""

from collections.abc import Sequence
from dataclasses import dataclass

from common import runs
from common.errors import UserError
from common.settings import AboveZero, ChosenBy, EnvironmentName, PoolName, ShareOrAll
from data.questions import Question
from data.sft_data import read_chains_of_action
from data.trajectory import Codec
from environments.distilled import read_examples
from environments.environment import (
    Environment,
    confident_environment,
    distilled_environment,
    internal_environment,
    real_environment,
    scheduled_environment,
    simulated_environment,
)
from environments.examples import calls_of
from environments.mixed import entropy_threshold
from environments.simulator import SimulatorLibrary, questions_by_prompt
from tasks import Task
from world_model import (
    DistillSettings,
    ensure_world_model,
    held_out_entropies,
    load_world_model,
)


@dataclass(kw_only=True)
class EnvironmentSettings(DistillSettings):
    """Who answers in the two stages of RL, and whose questions they ask."""

    # Steps of RL-1.
    rl1_steps: int = 80
    # Steps of RL-2.
    rl2_steps: int = 16
    # Who answers in RL-1: internal (the policy imagines), distilled (a separate world model), real
    # (the tool), mixed (world model and tool).
    rl1_environment: EnvironmentName = "distilled"
    # Who answers in RL-2, likewise.
    rl2_environment: EnvironmentName = "real"
    # Whose questions RL-1 asks. rl1 (nano): about the world that SFT-3 read about. rl2: those of
    # RL-2, which then goes on after them.
    rl1_pool: PoolName = "rl2"
    # What chooses between world model and tool in a mixed environment: a schedule over the steps,
    # or the world model's confidence.
    mixed_by: ChosenBy = "confidence"
    # Share of the searches that the tool answers in a mixed environment. By schedule it is a mean,
    # and the share rises over the steps; by confidence, it is the share of held-out searches of
    # which the world model is least sure.
    real_share: ShareOrAll = 1 / 6
    # Searches that the tool of a mixed stage may answer in all; after them the world model answers
    # alone. 0: any number.
    max_real_calls: int = 0
    # Questions of each stage's pool.
    rl_questions: AboveZero = 4608


def prepare_environments(stages: Sequence[str], settings: EnvironmentSettings, task: Task) -> None:
    """Distill a world model where a stage needs one and the run has none.

    Raises UserError for settings that do not go with the environments of the stages.
    """
    _refuse_contradictions(stages, settings, task)
    names = [environment_name(stage, settings) for stage in stages]
    if "distilled" in names or "mixed" in names:
        ensure_world_model(settings)


def environment_name(stage: str, settings: EnvironmentSettings) -> EnvironmentName:
    """Return who answers in a stage."""
    return settings.rl1_environment if stage == "rl1" else settings.rl2_environment


def pool_name(stage: str, settings: EnvironmentSettings) -> PoolName:
    """Return whose questions a stage asks."""
    return settings.rl1_pool if stage == "rl1" else "rl2"


def open_environment(
    stage: str,
    settings: EnvironmentSettings,
    task: Task,
    codec: Codec,
    validation: Sequence[Question] = (),
) -> Environment:
    """Return the environment of a stage, with the answers of the tool that cost nothing to know.

    They are the calls that a world model was distilled from; of a policy that imagines SFT's world,
    those of SFT's chains.

    validation: questions that the stage asks beside its pool.
    """
    environment = _choose_environment(stage, settings, task, codec, validation)
    name = environment_name(stage, settings)
    calls: dict[str, str] = {}
    if name in ("distilled", "mixed") and not settings.gold_facts:
        calls = read_examples(runs.run_folder(settings) / settings.world_model)
    chains_file = runs.run_folder(settings) / "data" / "coa.jsonl"
    imagines_sfts_world = name == "internal" and stage == "rl1" and settings.rl1_pool == "rl1"
    if imagines_sfts_world and chains_file.is_file():
        for chain in read_chains_of_action(runs.run_folder(settings)):
            calls |= calls_of(codec, chain)
    environment.known_answers = {
        query: codec.fit(observation, settings.max_observation)
        for query, observation in calls.items()
    }
    return environment


def _choose_environment(
    stage: str,
    settings: EnvironmentSettings,
    task: Task,
    codec: Codec,
    validation: Sequence[Question],
) -> Environment:
    """Return the environment of a stage, with the tools of the world that it asks about."""
    library = task.rl_search
    if stage == "rl1" and settings.rl1_pool == "rl1":
        library = task.search
    name = environment_name(stage, settings)
    if name == "internal":
        return internal_environment(library)
    if name == "real":
        return real_environment(library)
    imagined = load_world_model(settings)
    steps = settings.rl1_steps if stage == "rl1" else settings.rl2_steps
    if settings.gold_facts:
        pool = task.questions(pool_name(stage, settings), settings.rl_questions)
        question_of_prompt = questions_by_prompt(codec, [*pool, *validation])
        simulator = SimulatorLibrary(
            library, imagined, question_of_prompt, settings.noise_share, steps
        )
        return simulated_environment(simulator, library["search"])
    if name == "distilled":
        return distilled_environment(library, imagined)
    if settings.mixed_by == "schedule":
        return scheduled_environment(
            library, imagined, settings.real_share, steps, settings.max_real_calls
        )
    entropies = held_out_entropies(settings)
    threshold = entropy_threshold(entropies, settings.real_share)
    return confident_environment(library, imagined, threshold, settings.max_real_calls)


def _refuse_contradictions(
    stages: Sequence[str], settings: EnvironmentSettings, task: Task
) -> None:
    """Raise UserError for settings that do not go with the environments of the stages."""
    names = [environment_name(stage, settings) for stage in stages]
    environments = (settings.rl1_environment, settings.rl2_environment)
    if settings.max_real_calls and "mixed" not in environments:
        raise UserError(
            "--max_real_calls: only a mixed environment can go on without the tool; "
            "take --rl1_environment=mixed or --rl2_environment=mixed"
        )
    if settings.gold_facts and "mixed" in names:
        raise UserError(
            "--gold_facts: a simulator that is told the facts is not mixed with the tool; "
            "take --rl1_environment=distilled"
        )
    asks_about_sfts_world = settings.rl1_pool == "rl1" and task.search is not task.rl_search
    imitates_a_tool = settings.rl1_environment in ("distilled", "mixed") and not settings.gold_facts
    if "rl1" in stages and asks_about_sfts_world and imitates_a_tool:
        raise UserError(
            "--rl1_pool=rl1: its questions are about SFT's world, and the world model imitates the "
            "tool of RL-2's; take --rl1_pool=rl2, or --rl1_environment=internal or real"
        )
