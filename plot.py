"""Figures and the trajectory viewer, from the logs of a run alone: no model is loaded and nothing is computed again.

    python plot.py                          # reads out/nano, writes out/nano/figures
    python plot.py config/smollm2.py        # the same for a real checkpoint
    python plot.py --run=quick

training.png         loss of the SFT stages; reward, exact match, actions, entropy, malformed share and length over RL
table.png            exact match of each row of the table, with its 95% interval
search.png           when each row acts: how often it searches for facts that the base model knows, and does not know,
                     and EM on both (appendix A)
actions.png          agent models by number of actions: share of the correct answers, and success rate (paper Fig. 3)
trajectories.html    what the policy wrote, token by token, coloured by who wrote it

Stages that are not there are left out; a stage that is still training (`<stage>.partial`) is not there.
"""
import html
import itertools
import json
from pathlib import Path

import matplotlib
import numpy as np

from autocoa import ROLE_NAMES
from common import Problem, main, read_jsonl
from eval import WORKFLOWS

matplotlib.use("Agg")       # draws to files, needs no screen
import matplotlib.pyplot as plt  # noqa: E402

SFT = {"base": "base: pretraining", "sft1": "SFT-1: when to act", "sft2": "SFT-2: how to act",
       "sft3": "SFT-3: world model", "sft2_alone": "SFT-2 alone"}
RL = {"rl1": "RL-1, imagined environment", "rl2": "RL-2, real environment", "rl2_alone": "RL-2 alone", "rl2_from_sft2": "SFT-1&2 + RL-2"}
PANELS = {"reward": "Reward of a trajectory", "em": "Exact match", "actions": "Actions of a trajectory",
          "entropy": "Entropy of the policy, nats a token", "malformed": "Malformed trajectories", "length": "Tokens of a trajectory"}
GREY, BLUE, ORANGE, GREEN, PURPLE = "#8c8c8c", "#0072b2", "#d55e00", "#009e73", "#cc79a7"    # Okabe and Ito: apart for every eye
FEW = 10                    # questions under which a success rate is shown pale
SHOWN = 20                  # trajectories of a stage in the viewer

plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left",
                     "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
                     "xtick.color": "#444444", "ytick.color": "#444444",
                     "figure.dpi": 150, "figure.constrained_layout.use": True})


def rows_of(path):
    """The objects of a jsonl file; none where it is missing or empty (a stage of 0 steps)."""
    return [row for _, row in read_jsonl(path, "a log", "plot.py")] if path.is_file() and path.stat().st_size else []


def curve(ax, log, key, color, width, start=0, label=None):
    """One series: the figures pale, on top their moving mean over `width` steps (at the ends over what is there). -> its last point"""
    x, y = [start + row["step"] for row in log], [row[key] for row in log]
    window = np.ones(min(width, len(y)))
    mean = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
    ax.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
    ax.plot(x, mean, color=color, linewidth=1.8, label=label)
    return x[-1], mean[-1]


def training(logs):
    sft, rl = [s for s in SFT if s in logs], [s for s in RL if s in logs]
    fig = plt.figure(figsize=(11, 2.7 * bool(sft) + 5 * bool(rl)))
    parts = iter(fig.subfigures(bool(sft) + bool(rl), 1, height_ratios=[2.7] * bool(sft) + [5] * bool(rl),
                                squeeze=False, hspace=0.04)[:, 0])
    if sft:
        part = next(parts)
        part.suptitle("Supervised stages: training loss over optimizer steps (each stage has its own loss)",
                      x=0.01, ha="left", weight="bold")
        for ax, stage in zip(part.subplots(1, len(sft), squeeze=False)[0], sft):
            end = curve(ax, logs[stage], "loss", BLUE, 11)
            ax.annotate(f"{end[1]:.2f}", end, (0, 6), textcoords="offset points", ha="right", color=BLUE, weight="bold")
            # the few highest may leave the picture: one spike would flatten the rest
            ax.set(title=SFT[stage], xlabel="step", ylim=(0, 1.1 * np.percentile([row["loss"] for row in logs[stage]], 99)))
    if rl:
        part = next(parts)
        part.suptitle("Reinforcement learning: what the rollouts of each step looked like", x=0.01, ha="left", weight="bold")
        turn = logs["rl1"][-1]["step"] + 1 if "rl1" in logs else 0
        axes = part.subplots(2, 3, sharex=True)
        for ax, (key, title) in zip(axes.flat, PANELS.items()):
            for stage, color in zip(RL, (BLUE, ORANGE, GREEN, PURPLE)):
                if stage in logs:       # RL-2 goes on where RL-1 ended; the ablations start from another model, at 0
                    curve(ax, logs[stage], key, color, 5, turn if stage == "rl2" else 0, RL[stage])
            if turn and "rl2" in logs:
                ax.axvline(turn - 0.5, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
                ax.annotate("real", (turn, 1), (3, -9), ("data", "axes fraction"), "offset points", color=GREY, fontsize=8)
            if key in ("em", "malformed"):
                ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
                ax.set_ylim(bottom=0)
            ax.set(title=title, xlabel="step" if ax in axes[1] else "")
        part.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=len(rl), frameon=False)
    return fig


def table(rows):
    fig, ax = plt.subplots(figsize=(7.5, 0.9 + 0.36 * len(rows)))
    for y, (name, row) in enumerate(rows.items()):
        a = row["avg"]
        color = GREY if name in WORKFLOWS else ORANGE if "RL" in name or name.startswith("rl") else BLUE        # rl..: a folder of --out
        ax.barh(y, a["em"], 0.64, color=color, alpha=0.75)
        ax.hlines(y, a["em_low"], a["em_high"], color="#222222", linewidth=1.2)
        ax.annotate(f"{a['em']:.1f}", (a["em_high"], y), (5, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.1 * max(row["avg"]["em_high"] for row in rows.values()) or 1)
    ax.set_xlabel("exact match, %: average over the question sets; the line is the 95% interval over questions")
    fig.suptitle("Exact match without training for action (grey), after SFT (blue), after RL (orange)", x=0.01, ha="left", weight="bold")
    return bare(fig, ax)


def search(rates):
    """rates: {row: (search rate on known facts, on unknown ones, EM in percent where all facts are known, where not)}"""
    fig, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.45 * len(rates)), sharey=True)
    for ax, first, scale, unit in ((axes[0], 0, 100, "% of"), (axes[1], 2, 1, " EM,")):
        for offset, k, color, word in ((-0.2, 0, GREEN, "known"), (0.2, 1, PURPLE, "unknown")):
            for y, rate in enumerate(rates.values()):
                if np.isfinite(value := scale * rate[first + k]):
                    ax.barh(y + offset, value, 0.36, color=color, alpha=0.8)
                    ax.annotate(f"{value:.0f}{unit} {word}", (value, y + offset), (5, 0),
                                textcoords="offset points", va="center", fontsize=8)
        ax.set(xlim=(0, 125), xticks=range(0, 101, 20))
        bare(fig, ax)
    axes[0].set_yticks(range(len(rates)), rates)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("facts that a question needs, searched for, %")
    axes[1].set_xlabel("exact match where all facts are known, and where not, %")
    fig.suptitle("When to act: searches for what the base model knows and does not know, and what comes of it (paper appendix A)",
                 x=0.01, ha="left", weight="bold")
    return fig


def bare(fig, ax):
    """Bars with names and numbers on them need no frame."""
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return fig


def actions(records):
    """records: {row: predictions}. Both sides share the rows, so that any number of models can be told apart."""
    most = max(r["actions"] for rs in records.values() for r in rs)
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 1.5 + 0.5 * len(records)), sharey=True)
    shades = plt.get_cmap("Blues")(np.linspace(0.12, 0.95, most + 1))
    for y, rs in enumerate(records.values()):
        counts = np.bincount([r["actions"] for r in rs], minlength=most + 1)
        correct = np.bincount([r["actions"] for r in rs], [r["em"] for r in rs], most + 1)
        share, start = 100 * correct / max(1, correct.sum()), 0
        for n in range(most + 1):
            ink = "white" if n > most / 2 else "black"
            left.barh(y, share[n], 0.7, start, color=shades[n], edgecolor="white", linewidth=0.8,
                      label=f"{n}" + " actions" * (n == most) if y == 0 else None)
            if share[n] >= 6:
                left.text(start + share[n] / 2, y, f"{share[n]:.0f}", ha="center", va="center", color=ink)
            start += share[n]
            if counts[n]:
                rate, sure = correct[n] / counts[n], counts[n] >= FEW
                right.barh(y, 0.94, 0.7, n - 0.47, color=plt.get_cmap("Blues")(0.08 + 0.87 * rate) if sure else "#f2f2f2")
                ink = GREY if not sure else "white" if rate > 0.62 else "black"
                right.text(n, y - 0.08, f"{100 * rate:.0f}%", ha="center", va="center", color=ink)
                right.text(n, y + 0.2, f"of {counts[n]}", ha="center", va="center", color=ink, fontsize=6.5)
    left.set_yticks(range(len(records)), records)
    left.set(xlim=(0, 100), ylim=(len(records) - 0.5, -0.5), xlabel="% of the row's correct answers; shade: number of actions")
    left.set_title("Share of the correct answers", pad=22)
    left.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.97), ncols=most + 2, frameon=False,
                handlelength=1, handleheight=1, columnspacing=1.3, handletextpad=0.4)
    right.set_title(f"Success rate (grey: fewer than {FEW} questions)", pad=22)
    right.set(xlim=(-0.6, most + 0.6), xticks=range(most + 1), xlabel="number of actions")
    fig.suptitle("Agent models by the number of actions that they took (paper Fig. 3)", x=0.01, ha="left", weight="bold")
    bare(fig, left)
    return bare(fig, right)


# ---- the viewer: one page, nothing loaded from anywhere; the policy line forbids scripts even if the escaping were wrong ---------
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Trajectories</title><style>
:root{color-scheme:light dark;--page:#fff;--ink:#1c1c1c;--line:#ddd;--prompt:#666;--think:#1c1c1c;--action:#b34700;--observation:#00694d;--answer:#0063a0}
@media(prefers-color-scheme:dark){:root{--page:#161616;--ink:#e4e4e4;--line:#383838;--prompt:#9a9a9a;--think:#e4e4e4;--action:#ff9a5c;--observation:#4fd0a5;--answer:#6cb8f5}}
body{background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
article{border-top:1px solid var(--line);padding:.7rem 0}p{margin:.2rem 0}pre{margin:.5rem 0 0;font:13px/1.65 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.key{position:sticky;top:0;background:var(--page);padding:.4rem 0}.key span{margin-right:1.2em}.facts{color:var(--prompt)}
pre span{unicode-bidi:isolate}.prompt{color:var(--prompt)}.think{color:var(--think)}.action{color:var(--action)}.observation{color:var(--observation)}
.answer{color:var(--answer)}.action,.answer{font-weight:600}.free{opacity:.66;font-weight:400}
</style><h1>Trajectories</h1>
"""


def trajectories(rollouts):
    """rollouts: {stage: rows of rollouts.jsonl}. Every text in it came from a model or a corpus: all of it is escaped."""
    key = "".join(f'<span class="{name}">{name}</span>' for name in ROLE_NAMES)
    page = [PAGE, f'<p class="key">{key}<span class="free">pale: mask 0, not written as the policy</span></p>']
    for stage, rows in rollouts.items():
        picked = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, SHOWN).round().astype(int))]     # spread over steps
        page.append(f"<h2>{RL.get(stage, SFT.get(stage))}</h2><p class=facts>{len(picked)} of {len(rows)} kept trajectories</p>")
        page += [one_trajectory(row) for row in picked]
    return "\n".join(page)


def one_trajectory(row):
    spans = []
    for (role, mask), run in itertools.groupby(zip(row["role"], row["mask"], row["tokens"]), lambda t: t[:2]):
        text = html.escape("".join(token for _, _, token in run))
        spans.append(f'<span class="{ROLE_NAMES[role]}{"" if mask else " free"}" title="{ROLE_NAMES[role]}">{text}</span>')
    step = f"step {row['step']:d} · " if "step" in row else ""
    gold = html.escape(" / ".join(row["golden_answers"]))
    return (f'<article><p><b>{html.escape(row["question"])}</b></p><p class=facts>{step}gold: {gold} · reward {row["reward"]:g} · '
            f'{len(row["tokens"])} tokens</p><pre>{"".join(spans)}</pre></article>')


def run(s):
    root = Path("out", s.run)
    stages = [*SFT, *RL]
    logs = {stage: log for stage in stages if (log := rows_of(root / stage / "log.jsonl"))}
    rollouts = {stage: rows for stage in stages if (rows := [r for r in rows_of(root / stage / "rollouts.jsonl") if "tokens" in r])}
    rows = json.loads((root / "eval.json").read_text())["rows"] if (root / "eval.json").is_file() else {}
    rates = {name: np.array([row["avg"][k] for k in ("search_known", "search_unknown", "em_known", "em_unknown")], float)
             for name, row in rows.items()}    # None becomes nan
    rates = {name: rate for name, rate in rates.items() if np.isfinite(rate[:2]).any()}
    agents = {}
    for r in rows_of(root / "predictions.jsonl"):
        if r["row"] not in WORKFLOWS:       # there a script acts, not the model
            agents.setdefault(r["row"], []).append(r)
    if not (logs or rollouts or rows or agents):
        raise Problem(f"{root}: no finished stage and no evaluation to draw; "
                      "make them with: python train_sft.py, python train_rl.py and python eval.py")
    (root / "figures").mkdir(exist_ok=True)
    for name, draw, material in (("training.png", training, logs), ("table.png", table, rows), ("search.png", search, rates),
                                 ("actions.png", actions, agents), ("trajectories.html", trajectories, rollouts)):
        path, drawn = root / "figures" / name, draw(material) if material else None
        if isinstance(drawn, str):
            path.write_text(drawn, encoding="utf-8")
        elif drawn:
            drawn.savefig(path)
        if drawn:
            print(path)


if __name__ == "__main__":
    main(run, __doc__)
