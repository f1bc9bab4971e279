"""Who writes the observations of an RL stage: the policy, a world model, the tool, or both.

internal    the policy itself (SFT-3 taught it to), inside its own trajectory
distilled   a separate network that imitates the tool (world_model.py distill); with --gold_facts
            a simulator, which is told what it should know (simulator.py)
real        the tool
mixed       the world model, and for a part of the queries the tool

Whoever searches, the calculator is the real one, and is not counted. Only a policy that imagines
makes up its sums too.
"""

from dataclasses import dataclass, field

from autocoa import IMAGINE, Imagine, Search
from environments.counted import CountedTool
from environments.distilled import WorldModel
from environments.mixed import Confidence, MixedSearch, Schedule
from environments.simulator import SimulatorLibrary
from tools import Library, Tool


@dataclass
class Environment:
    """The environment of one stage of RL."""

    search: Search | Imagine  # what a rollout asks
    tool: CountedTool  # the real tool and its counts; an imagined environment never asks it
    # What changes from step to step: the tool's share of a mixed environment, or the share of noise
    # of a simulator.
    changes_by_step: Schedule | SimulatorLibrary | None = None
    # What the tool is known to say without a new call, query -> observation: on these queries
    # imagined observations are checked while RL runs.
    known_answers: dict[str, str] = field(default_factory=dict)

    def begin_step(self, step: int) -> None:
        """Prepare for the rollouts of a step."""
        self.tool.step = step
        if self.changes_by_step is not None:
            self.changes_by_step.step = step

    def begin_validation(self, step: int) -> None:
        """Prepare for validation questions, which a step asks before its rollouts.

        They always meet the environment of the first step, so that none of their rewards is lower
        for a world that has become harder.
        """
        self.begin_step(0)
        self.tool.step = step


def internal_environment(library: Library) -> Environment:
    """Return the environment that the policy writes itself."""
    return Environment(IMAGINE, CountedTool(library["search"]))


def real_environment(library: Library) -> Environment:
    """Return the tools as they are, with calls counted."""
    tool = CountedTool(library["search"])
    return Environment(_with_search(library, tool), tool)


def distilled_environment(library: Library, world_model: WorldModel) -> Environment:
    """Return an environment in which a world model answers all searches."""
    return Environment(_with_search(library, world_model), CountedTool(library["search"]))


def simulated_environment(library: SimulatorLibrary, tool: Tool) -> Environment:
    """Return an environment in which a simulator answers all searches. tool: is never asked."""
    return Environment(library, CountedTool(tool), library)


def scheduled_environment(
    library: Library, world_model: WorldModel, real_share: float, steps: int, max_real_calls: int
) -> Environment:
    """Return a mixed environment in which the tool's share of the queries grows over the steps.

    real_share: the mean over the stage. max_real_calls: raw calls at most; 0: any number.
    """
    tool = CountedTool(library["search"], max_real_calls)
    schedule = Schedule(real_share, steps)
    search = MixedSearch(tool, world_model, schedule)
    return Environment(_with_search(library, search), tool, schedule)


def confident_environment(
    library: Library, world_model: WorldModel, threshold: float, max_real_calls: int
) -> Environment:
    """Return a mixed environment in which the tool answers what the world model is unsure of.

    threshold: entropy, in nats a token. max_real_calls: raw calls at most; 0: any number.
    """
    tool = CountedTool(library["search"], max_real_calls)
    search = MixedSearch(tool, world_model, Confidence(world_model, threshold))
    return Environment(_with_search(library, search), tool)


def _with_search(library: Library, search: Tool) -> Library:
    """Return the tools of a library with another search."""
    return Library({**library, "search": search})
