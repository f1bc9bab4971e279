"""Speed: beside other libraries, beside another commit, and how cost grows.

    python bench.py                         # beside transformers and TRL, by the agent in out/nano
    python bench.py --backend=mlx           # beside mlx_lm
    python bench.py --against=COMMIT        # this tree beside another commit, stage by stage
    python bench.py growth                  # by rows, context, calls of the tool, group size
    python bench.py sharing                 # what rollouts share, by temperature and group size
    python bench.py index 10000 1000000     # what an index of so many made-up passages costs

Both sides have the same weights, texts, budgets and number type, and run in turns: ours, theirs,
ours, .. Each pair gives a ratio, and the figure is the median of the ratios, with the lowest and
the highest. Beside it stand the GFLOP/s of each side, padding not counted, and their share of what
a large matrix product reaches here. --only chooses among:

answer      a prompt and 128 tokens, greedily
sampling    rollouts of up to 130 tokens in groups (--questions, --rollouts), the policy alone
agents      as many different questions as --questions times --rollouts, with tool calls, greedily;
            the library keeps its caches over the calls, and leaves out answers that are forced
sft         tokens with loss, of all weights (MLX: of a LoRA adapter, by mlx_lm's own trainer)
rl          steps of RL-2 by the token that is sampled, beside TRL's GRPOTrainer without a tool

and with --against, where each side runs its own train_rl.py and train_sft.py:

rl2, rl1    a step of RL with the tool, and of a policy that imagines
sft         tokens of SFT-2
whole       CPU seconds of all scripts of run.sh; only where --only asks for it

Every command prints one line of JSON at its end, adds it to out/<run>/bench.jsonl, and draws:
out/<run>/figures/bench.png, against.png, growth.png or sharing.png.
"""

# Imported first: from here on Ctrl-C is one line, and not a traceback.
from common.errors import UserError, run_guarded

# isort: split
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import model
from common.files import append_jsonl
from common.runs import RL_STAGES, SFT_STAGES, find_start, run_folder, settle_by_device
from common.settings import main
from speed.against import compare_with_commit
from speed.flops import measure_ceiling
from speed.growth import Curve, lines_of, measure_growth
from speed.index import index_command
from speed.libraries import compare_with_libraries
from speed.ours import Ours
from speed.pairs import HEADING, Ceilings, Comparison, line_of, to_json
from speed.settings import BenchSettings
from speed.sharing import HEADING as SHARING_HEADING
from speed.sharing import SharedTokens, measure_sharing
from speed.sharing import line_of as sharing_line
from speed.trees import commit_name
from tasks import open_task


# ---- commands ------------------------------------------------------------------------------------
def compare(settings: BenchSettings) -> None:
    """Compare with other libraries, or with another commit."""
    # What draws is slow to import, and --help does without; so in the other commands.
    from plot import save_figure
    from speed.drawing import draw_comparisons

    ours = open_stage(settings, "sft3" if settings.against else "rl2")
    ceiling = ceiling_of(ours, ours.dtype)
    ceilings = Ceilings(ceiling, ceiling)
    if ours.other_dtype != ours.dtype:
        ceilings = Ceilings(ceiling, ceiling_of(ours, ours.other_dtype))
    comparisons: list[Comparison] = []
    print(HEADING)

    def report(comparison: Comparison) -> None:
        comparisons.append(comparison)
        print(line_of(comparison, ceilings), flush=True)

    if settings.against:
        compare_with_commit(ours, report)
    else:
        compare_with_libraries(ours, report)
    if comparisons:
        rows = [to_json(comparison, ceilings) for comparison in comparisons]
        keep(ours, ceiling, {"comparisons": rows})
        name = "against.png" if settings.against else "bench.png"
        save_figure(draw_comparisons(comparisons), figures_folder(settings) / name)


def grow(settings: BenchSettings) -> None:
    """Measure how cost grows."""
    from plot import save_figure
    from speed.drawing import draw_growth

    ours = open_stage(settings)
    curves: list[Curve] = []

    def report(curve: Curve) -> None:
        curves.append(curve)
        print(lines_of(curve), flush=True)

    measure_growth(ours, open_task(settings), report)
    keep(ours, ceiling_of(ours, ours.dtype), {"curves": [asdict(curve) for curve in curves]})
    save_figure(draw_growth(curves), figures_folder(settings) / "growth.png")


def share(settings: BenchSettings) -> None:
    """Measure what rollouts share."""
    from plot import save_figure
    from speed.drawing import draw_sharing

    ours = open_stage(settings)
    shares: list[SharedTokens] = []
    print(SHARING_HEADING)

    def report(shared: SharedTokens) -> None:
        shares.append(shared)
        print(sharing_line(shared), flush=True)

    measure_sharing(ours, open_task(settings), report)
    keep(ours, ceiling_of(ours, ours.dtype), {"sharing": [asdict(shared) for shared in shares]})
    save_figure(draw_sharing(shares), figures_folder(settings) / "sharing.png")


# ---- what they have in common --------------------------------------------------------------------
def open_stage(settings: BenchSettings, default: str = "rl2") -> Ours:
    """Return the network of the stage that is timed. Raises UserError where it is an adapter.

    default: the stage where --start names none.
    """
    settle_by_device(settings)
    folder = find_start(run_folder(settings), settings.start or default, [*SFT_STAGES, *RL_STAGES])
    lm = model.load(folder, settings)
    if lm.network.lora:
        raise UserError(
            f"{folder} holds an adapter; compare with --lora_merge, whose stages are whole networks"
        )
    return Ours(lm, folder, settings)


def ceiling_of(ours: Ours, dtype: str) -> float:
    """Return the GFLOP/s of a large matrix product in a number type."""
    backend = ours.lm.backend
    ceiling = measure_ceiling(backend, dtype, backend.pick_device(ours.settings.device))
    print(f"a large matrix product: {ceiling:,.0f} GFLOP/s in {dtype}")
    return ceiling


def keep(ours: Ours, ceiling: float, measured: dict[str, Any]) -> None:
    """Print what was measured as one line of JSON, and add it to the run's bench.jsonl."""
    row = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit_name(),
        "run": ours.settings.run,
        "stage": ours.folder.name,
        "backend": ours.lm.backend.NAME,
        "dtype": ours.dtype,
        "cpus": os.cpu_count(),
        "ceiling_gflops": ceiling,
        "repeats": ours.settings.repeats,
        **measured,
    }
    print(json.dumps(row))
    append_jsonl(run_folder(ours.settings) / "bench.jsonl", [row])


def figures_folder(settings: BenchSettings) -> Path:
    """Return where the figures of a run lie."""
    return run_folder(settings) / "figures"


def command(arguments: list[str]) -> None:
    """Run one of the commands; the word that names it is taken out of the arguments."""
    word = arguments[1] if len(arguments) > 1 else ""
    if word == "index":
        index_command(arguments[2:])
    elif word in ("growth", "sharing"):
        arguments.pop(1)
        main(grow if word == "growth" else share, BenchSettings, __doc__)
    else:
        main(compare, BenchSettings, __doc__)


if __name__ == "__main__":
    run_guarded(lambda: command(sys.argv))
