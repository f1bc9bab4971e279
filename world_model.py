"""Networks that stand for the search tool while a policy practises, and how far they are right.

    python world_model.py distill       # train a separate network to imitate the tool
    python world_model.py fidelity      # how well each model of a run knows what the tool would say

`distill` learns from real calls: a sweep over the titles of the corpus, the calls that a run has
logged, or Wikipedia's cache (--sources). It writes a Hugging Face folder, out/<run>/world_model,
with cost.json beside the weights: the calls it took, and the seconds. train_rl.py distills one by
itself where an environment needs it and there is none.

`fidelity` lets the world models and stages of a run imagine what the tool says to searches whose
answers are known (environments/fidelity.py). It prints a table and writes out/<run>/fidelity.json,
figures/fidelity.png and figures/imagined.html, imagined observations beside the real ones.
"""

# Imported first: from here on Ctrl-C is one line, and not a traceback.
from common.errors import UserError, run_guarded

# isort: split
import dataclasses
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

import model
from autocoa import nll_loss
from backends.adapter_files import CONFIG_FILE
from common import memory, runs
from common.run_record import read_run_record
from common.runs import COST_FILE, StageRun
from common.settings import (
    AboveZero,
    CallSources,
    CommaList,
    NewModelSettings,
    OptimizerSettings,
    RolloutSettings,
    ShareOrAll,
    TaskRunSettings,
    TrainingSettings,
    main,
)
from data.passages import neutralize
from data.sft_data import read_chains_of_action
from data.trajectory import Trajectory
from environments.distilled import (
    ANSWERED_AT_ONCE,
    EXAMPLES_FILE,
    Example,
    WorldModel,
    read_cost,
    read_examples,
    training_trajectory,
    write_examples,
)
from environments.examples import Examples, ask_tool, gather_examples
from environments.simulator import simulator_examples
from model import LM
from tasks import Task, open_task
from train_sft import SFTSettings, shuffled_epochs, train_on_texts

USAGE = "usage: python world_model.py distill  or  python world_model.py fidelity"
CHECKED_EXAMPLES = 200  # of those it learned from, on which a world model is checked
HELD_OUT_QUESTIONS = 60  # whose searches calibrate a world model's entropy
# Other values of these would make another world model.
WORLD_MODEL_SETTINGS = (
    "seed",
    "model",
    "corpus",
    "language",
    "top_k",
    "max_observation",
    "gold_facts",
)
# So would other values of these; where a command gives none, it takes the world model there is.
DISTILLING_SETTINGS = (
    "sources",
    "logs_of",
    "sweep_share",
    "world_model_from",
    "world_model_width",
    "world_model_layers",
    "world_model_epochs",
    "world_model_scale",
)


# ---- 1. Settings ---------------------------------------------------------------------------------
@dataclass(kw_only=True)
class DistillSettings(
    TrainingSettings, TaskRunSettings, NewModelSettings, OptimizerSettings, RolloutSettings
):
    """The settings of `world_model.py distill`, which train_rl.py has too."""

    # Folder of the run that holds the distilled world model.
    world_model: str = "world_model"
    # Real calls that it learns from: sweep, logs, cache. Only a sweep makes new ones.
    sources: CallSources = field(default_factory=lambda: ["sweep"])
    # Stages of the run whose logged calls it learns from. Empty: all of them.
    logs_of: CommaList = field(default_factory=list)
    # Share of the corpus' titles that a sweep asks for.
    sweep_share: ShareOrAll = 1.0
    # Checkpoint that it begins with. Empty: a new network (nano), or the base of the run.
    world_model_from: str = ""
    # Hidden size of a new network.
    world_model_width: AboveZero = 128
    # Transformer blocks of a new network.
    world_model_layers: AboveZero = 4
    # Passes over the calls.
    world_model_epochs: AboveZero = 12
    # Learning-rate multiplier of a distilled world model.
    world_model_scale: float = 1.0
    # ZeroSearch's form: it learns from SFT's chains alone, and is told the gold facts of the
    # question that a search serves.
    gold_facts: bool = False
    # Share of noisy passages at the end of a stage in that form; it rises from 0.
    noise_share: ShareOrAll = 0.25


# ---- 2. Distilling -------------------------------------------------------------------------------
@dataclass
class HeldOutCall:
    """A query that a world model has not learned from, and how it fared."""

    query: str
    is_exact: bool  # it wrote what the tool said, to the letter
    entropy: float  # of what it wrote, nats a token


@dataclass
class Cost:
    """What a world model cost, and how well it imitates the tool: cost.json."""

    sources: list[str]
    calls: int  # of the tool, made to distill it; those that calibrate it are among them
    examples: int  # different queries that it learned from
    exact_on_learned: float  # share of observations written to the letter
    exact_on_held_out: float
    held_out: list[HeldOutCall]
    tokens: int = 0  # of one pass over the examples
    seconds_of_calls: float = 0.0
    seconds_of_training: float = 0.0


def distill(settings: DistillSettings) -> None:
    """Train a network to say what the tool says, query -> observation."""
    folder = runs.run_folder(settings) / settings.world_model
    refuse_other_folder(folder)
    if settings.resume and (folder / COST_FILE).is_file():
        print(f"{settings.world_model}: in {folder.parent} already")
        return
    runs.refuse_other_seed(settings, folder)
    runs.settle_by_device(settings)
    task = open_task(settings)
    lm = new_world_model(settings, task)
    if not memory.report(lm, memory_settings(settings), "sft", nll_loss):
        return
    runs.prepare_stage_folders(settings, [folder.name], "")

    # 1. What the tool says, and what asking it costs.
    started = time.time()
    examples = examples_to_learn(settings, task, lm)
    held_out: list[Example] = []
    if not settings.gold_facts:
        held_out = held_out_examples(task)
    called = time.time()

    # 2. The queries carry no loss; the observations do.
    texts = [
        training_trajectory(lm.codec, example, settings.max_observation)
        for example in examples.examples
    ]
    stage = train_world_model(lm, settings, texts, folder)
    trained = time.time()

    # 3. How well it does, on what it has learned and on what it has not.
    cost = measure_cost(WorldModel(lm, settings), settings, examples, held_out)
    cost.tokens = sum(len(text.ids) for text in texts)
    cost.seconds_of_calls = round(called - started, 1)
    cost.seconds_of_training = round(trained - called, 1)
    stage.keep_text(COST_FILE, json.dumps(asdict(cost), indent=1))
    stage.keep_text(EXAMPLES_FILE, write_examples(examples.examples))
    stage.finish()
    print(
        f"{folder}: {cost.calls:,} calls of the tool, {cost.examples:,} different queries to learn "
        f"from, {cost.seconds_of_calls:.0f} s of calls and {cost.seconds_of_training:.0f} s of "
        f"training; written to the letter: {cost.exact_on_learned:.1%} of what it learned, "
        f"{cost.exact_on_held_out:.1%} of {len(held_out)} other searches"
    )


def is_new_network(settings: DistillSettings) -> bool:
    """Return whether a world model begins with random weights, all of which are then trained."""
    return not (settings.world_model_from or settings.model)


def memory_settings(settings: DistillSettings) -> DistillSettings:
    """Return the settings by which memory is estimated."""
    if is_new_network(settings):
        # It has nothing that an adapter could go onto.
        return dataclasses.replace(settings, lora_rank=0, bits=16)
    return settings


def train_world_model(
    lm: LM, settings: DistillSettings, texts: Sequence[Trajectory], folder: Path
) -> StageRun:
    """Train a network on queries and observations; return the stage, which is not saved yet."""
    if is_new_network(settings):
        lm.network.recompute = settings.checkpointing
    else:
        lm.begin_stage(settings, settings.seed, folder.name)
    optimizer = lm.backend.Optimizer(lm.network, muon=settings.muon, seed=settings.seed)
    rng = random.Random(f"world model {settings.seed}")
    steps = shuffled_epochs(texts, settings.world_model_epochs, settings.batch_tokens, rng)
    stage = StageRun(lm, optimizer, folder, settings, len(steps))
    train_on_texts(stage, settings, steps, settings.world_model_scale)
    return stage


def measure_cost(
    world_model: WorldModel,
    settings: DistillSettings,
    examples: Examples,
    held_out: Sequence[Example],
) -> Cost:
    """Return what a world model cost but for time, and how well it imitates the tool."""
    rng = random.Random(settings.seed)
    learned = rng.sample(examples.examples, min(CHECKED_EXAMPLES, len(examples.examples)))
    held_out_calls = check_examples(world_model, held_out)
    return Cost(
        sources=list(settings.sources),
        calls=examples.calls + len(held_out),
        examples=len(examples.examples),
        exact_on_learned=exact_share(check_examples(world_model, learned)),
        exact_on_held_out=exact_share(held_out_calls),
        held_out=held_out_calls,
    )


def new_world_model(settings: DistillSettings, task: Task) -> LM:
    """Return the network that is to become a world model."""
    if settings.world_model_from:
        lm, _ = model.load_any(settings.world_model_from, settings)
        if settings.lora_rank and lm.folder is None:
            raise UserError(
                f"--world_model_from={settings.world_model_from}: an adapter needs the folder of a "
                "run's stage under it; train all weights with --lora_rank=0"
            )
        return lm
    if settings.model:
        # A run that began with a checkpoint has it as its base.
        root = runs.run_folder(settings)
        return model.load(runs.find_start(root, "base", ["base"]), settings)
    size = dataclasses.replace(
        settings, width=settings.world_model_width, layers=settings.world_model_layers
    )
    return task.new_model(size)


def examples_to_learn(settings: DistillSettings, task: Task, lm: LM) -> Examples:
    """Return the real calls that a world model learns from, and how many were made for it."""
    root = runs.run_folder(settings)
    if not settings.gold_facts:
        return gather_examples(
            settings.sources,
            settings.sweep_share,
            settings.logs_of,
            task,
            lm.codec,
            root,
            settings.seed,
        )
    # The SFT data may be of another size than the settings of this command say.
    chains = read_chains_of_action(root)
    record = read_run_record(settings.run).stages.get("data")
    count = record.settings["coa"] if record else SFTSettings.coa
    questions = task.questions("coa", count)
    return Examples(simulator_examples(lm.codec, chains, questions), calls=0)


def held_out_examples(task: Task) -> list[Example]:
    """Return the searches of a teacher for questions that no stage asks.

    They are real calls. Most of their queries are in a full sweep too, as most of a policy's are:
    what the entropy is calibrated on must look like what it will be asked.
    """
    questions = task.questions("held_out", HELD_OUT_QUESTIONS)
    queries = dict.fromkeys(
        lookup.queries[0]
        for question in questions
        for lookup in question.lookups
        if lookup.is_search
    )
    answers = ask_tool(task.rl_search["search"], list(queries))
    return [Example(query, neutralize(observation)) for query, observation in answers.items()]


def check_examples(world_model: WorldModel, examples: Sequence[Example]) -> list[HeldOutCall]:
    """Return how a world model fares on some real calls."""
    queries = [example.query for example in examples]
    hints = [example.hint for example in examples]
    entropies = world_model.entropies(queries, hints)
    codec = world_model.lm.codec
    budget = world_model.settings.max_observation
    checked = []
    for example, imagined, entropy in zip(
        examples, world_model.imagine(queries, hints), entropies, strict=True
    ):
        is_exact = imagined.text == codec.fit(example.observation, budget)
        checked.append(HeldOutCall(example.query, is_exact, float(entropy)))
    return checked


def exact_share(calls: Sequence[HeldOutCall]) -> float:
    """Return the share of observations that were written to the letter."""
    return float(np.mean([call.is_exact for call in calls])) if calls else 0.0


# ---- 3. The world model of a run -----------------------------------------------------------------
def ensure_world_model(settings: DistillSettings) -> None:
    """Distill the world model of a run where it is not there.

    Raises UserError where it was made with settings that make another one.
    """
    folder = runs.run_folder(settings) / settings.world_model
    record = read_run_record(settings.run).stages.get(folder.name)
    if record is None or not (folder / COST_FILE).is_file():
        distill(settings)
        return
    given = [name for name in DISTILLING_SETTINGS if name in settings.given]
    for name in (*WORLD_MODEL_SETTINGS, *given):
        if name in record.settings and record.settings[name] != getattr(settings, name):
            raise UserError(
                f"--{name}: {folder} was distilled with {record.settings[name]!r}; repeat that, or "
                "have another one distilled: --world_model=NAME"
            )


def load_world_model(settings: DistillSettings) -> WorldModel:
    """Return the world model of a run, as a tool."""
    folder = runs.run_folder(settings) / settings.world_model
    if not (folder / CONFIG_FILE).is_file():
        # The settings of an adapter are not those of whole weights.
        settings = dataclasses.replace(settings, lora_rank=0, bits=16)
    world_model = WorldModel(model.load(folder, settings), settings)
    if not settings.gold_facts:
        learned = list(read_examples(folder))
        if len(learned) <= ANSWERED_AT_ONCE:
            world_model(learned)
    return world_model


def held_out_entropies(settings: DistillSettings) -> list[float]:
    """Return how unsure the world model of a run is of held-out searches, nats a token each."""
    cost = read_cost(runs.run_folder(settings) / settings.world_model)
    return [call["entropy"] for call in cost["held_out"]]


def refuse_other_folder(folder: Path) -> None:
    """Raise UserError where a folder holds a stage, which a world model would replace."""
    if (folder / "config.json").is_file() and not (folder / COST_FILE).is_file():
        raise UserError(
            f"--world_model: {folder} holds a stage of the run; choose a name that is free"
        )


# ---- 4. Commands ---------------------------------------------------------------------------------
def command(arguments: list[str]) -> None:
    """Run one of the two commands; the word that names it is taken out of the arguments."""
    word = arguments.pop(1) if len(arguments) > 1 else ""
    if word == "distill":
        main(distill, DistillSettings, __doc__)
    elif word == "fidelity":
        # It draws, and training, which imports this file, does not.
        from environments.fidelity_report import FidelitySettings, fidelity

        main(fidelity, FidelitySettings, __doc__)
    elif word in ("-h", "--help"):
        print(f"{__doc__}\nThe settings: python world_model.py distill --help, and fidelity --help")
    else:
        raise UserError(USAGE)


if __name__ == "__main__":
    run_guarded(lambda: command(sys.argv))
