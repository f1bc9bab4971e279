"""The settings of bench.py."""

from dataclasses import dataclass, field

from common.settings import (
    AboveZero,
    AboveZeroFloat,
    CommaList,
    ModelSettings,
    RolloutSettings,
    TaskRunSettings,
)


@dataclass(kw_only=True)
class BenchSettings(ModelSettings, TaskRunSettings, RolloutSettings):
    """The settings of bench.py."""

    # The stage of the run whose network is timed; empty: rl2. It may not hold an adapter.
    start: str = ""
    # Questions of a step. Agents get as many different ones as --questions times --rollouts.
    questions: AboveZero = 48
    # Rollouts of a question.
    rollouts: AboveZero = 5
    # Temperature of sampling.
    temperature: AboveZeroFloat = 1.0
    # Tokens of an optimizer step of SFT.
    batch_tokens: AboveZero = 2000
    # Compare with this commit of the project instead of other libraries.
    against: str = ""
    # What to measure, such as sampling,sft; none: all.
    only: CommaList = field(default_factory=list)
    # Pairs of which median, lowest and highest ratio are given.
    repeats: AboveZero = 5
    # Number type of the other side; empty: as ours.
    other_dtype: str = ""
