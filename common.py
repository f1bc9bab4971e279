"""What all scripts share: settings, errors, logs and checkpoints."""
import contextlib
import dataclasses
import difflib
import fcntl
import json
import math
import os
import runpy
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not sys.stderr.isatty():                 # in a file, a line now and then
    os.environ.setdefault("TQDM_MININTERVAL", "20")
from tqdm import tqdm  # noqa: E402


class Problem(Exception):
    """Bad input: one line that names the file, line or setting and the way out. The scripts print it and exit with 2."""


AT_ONCE = 2048      # tokens that a decoder reads in one pass (model_torch.py, model_mlx.py)
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")        # of a block


@dataclass
class Settings:
    """Every setting of every script; the defaults are the nano path. A config file sets some, the command line wins:
    python train_sft.py config/smollm2.py --quick --seed=1"""
    # -- run
    run: str = "nano"                   # name of the run: all output goes to out/<run>/
    seed: int = 0                       # of everything random
    backend: str = "auto"               # torch or mlx; auto takes MLX on Apple silicon
    device: str = "auto"                # auto or cpu; with torch also cuda or mps
    quick: bool = False                 # the config file's short form: the same story, weaker numbers
    dry_run: bool = False               # stop behind the estimate of memory that train_sft.py, train_rl.py and eval.py begin with, and add one of time
    resume: bool = False                # go on with an interrupted run: finished stages are kept, the one that was begun goes on from its checkpoint
    save_minutes: float = 10.0          # between the checkpoints of a stage, which --resume needs
    # -- how weights are kept and trained
    dtype: str = "float32"              # of activations, float32 or bfloat16; weights that are trained stay float32
    checkpointing: bool = False         # compute each block again for its gradient: less memory, a third more time
    lora_rank: int = 0                  # of a low-rank adapter that is trained instead of all weights; 0: none
    lora_alpha: float = 32.0            # its scale is this over the rank
    lora_dropout: float = 0.0           # of what goes into it
    lora_targets: list = dataclasses.field(default_factory=lambda: list(MATRICES))  # matrices that get one
    lora_merge: bool = False            # put it into the weights at the end of each stage, or keep it apart as a PEFT folder
    bits: int = 16                      # 4: the frozen matrices under an adapter in 4 bits; torch needs bitsandbytes for that
    # -- model and data of the real path (empty: the nano path makes its own)
    model: str = ""                     # Hugging Face folder, hub id or GGUF file
    train_data: list = dataclasses.field(default_factory=list)  # FlashRAG question files to learn from
    eval_data: list = dataclasses.field(default_factory=list)   # FlashRAG question files to be judged on
    corpus: str = ""                    # where to search: a FlashRAG passage file (.jsonl, .jsonl.gz), wikipedia, leads, or a retrieval server's http address
    cache: str = "live"                 # of --corpus=wikipedia: live (ask for what it lacks), replay (never ask) or refresh (ask for all)
    language: str = "en"                # of --corpus=wikipedia
    sft_files: list = dataclasses.field(default_factory=list)   # AutoCoA's SFT files, jsonl and json, to learn from in place of the teacher's chains
    # -- the nano model and its base stage
    vocab_size: int = 2048              # of the nano tokenizer
    width: int = 128                    # hidden size
    layers: int = 4                     # blocks
    base_tokens: int = 2_700_000        # tokens of pretraining
    train_scale: int = 4                # size of the training world: too large to learn by heart, so that reading is learned
    # -- SFT (paper 3.2; counts are the authors')
    pairs: int = 1500                   # CoT+A pairs of SFT-1 at most, from twice as many questions, since only those that one of acting and thinking solves make one
    coa: int = 5000                     # questions for chain-of-action trajectories of SFT-2 and SFT-3; those that the teacher can't solve make none
    cot: int = 1000                     # questions for chain-of-thought trajectories mixed in; on the nano path three fifths practise planning, most of it on made-up facts
    epochs: int = 2                     # over them, in SFT-2 and in SFT-3; SFT-1 goes once over its pairs
    alpha: float = 0.2                  # weight of SFT-1's auxiliary term
    muon: bool = True                   # Muon for the matrices in base and SFT, never in RL; false: AdamW for all, as for pretrained models
    batch_tokens: int = 2000            # tokens of an optimizer step; SFT-1's holds 16 pairs
    micro_tokens: int = 1600            # tokens that go through the network at once
    lr: float = 6e-3                    # AdamW, in nano's base stage; SFT takes the parts of it below
    muon_lr: float = 1e-2               # Muon, likewise
    sft1_scale: float = 0.1             # SFT-1's rates are this part of them
    sft2_scale: float = 0.6             # SFT-2's
    sft3_scale: float = 0.5             # SFT-3's
    # -- RL (paper 3.3)
    rl1_steps: int = 80                 # in the imagined environment
    rl2_steps: int = 16                 # in the real one
    questions: int = 48                 # a step
    rollouts: int = 5                   # a question
    rl_questions: int = 4608            # of the pool of each stage
    temperature: float = 1.0            # of sampling; log-probs in the loss are at the same temperature
    rl_lr: float = 3e-4                 # AdamW for all weights: Muon would lift the noise of a policy gradient to the size of its signal
    rl1_scale: float = 0.03             # RL-1's rate is this part of it: what one imagines is a weak teacher
    minibatches: int = 1                # optimizer steps a batch of rollouts is cut into
    clip_low: float = 0.2               # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.28             # and above 1 + clip_high
    kl: float = 0.0                     # weight of the k3 KL to the policy that the command begins with: --start, else SFT-3, or RL-1 with --stage=rl2
    advantage_std: bool = False         # divide advantages by the group's standard deviation, as the authors' code does
    format_penalty: float = 0.5         # taken off the reward of a malformed trajectory
    call_cost: float = 0.1              # taken off the reward for each call of the real tool; 0.25 keeps RL-2 from searching for what it knows, at a price in EM
    # -- eval.py
    data: list = dataclasses.field(default_factory=list)        # FlashRAG question files on which to judge --model as it is, instead of the stages of a run
    rows: list = dataclasses.field(default_factory=list)        # of the table, by their names; none: all
    compare: list = dataclasses.field(default_factory=list)     # two rows: how much better the first is, over the predictions of --runs
    judge: str = ""                     # a language model that judges answers too: a folder, or an OpenAI-compatible endpoint (chat.py)
    runs: list = dataclasses.field(default_factory=list)        # of --compare, pooled; none: this run
    # -- teacher.py
    teacher: str = ""                   # the language model that writes chains
    tries: int = 4                      # chains of action for a question, until one is right
    # -- autocoa.py
    ask: str = ""                       # the question to answer
    # -- ablations
    stage: str = ""                     # run this stage only: base, sft1, sft2, sft3; rl1, rl2
    start: str = ""                     # .. from this folder of the run, instead of the stage before; of train_rl.py also without --stage; of autocoa.py and bench.py, what is asked
    out: str = ""                       # .. into this folder, instead of the stage's own; of teacher.py, where to write
    # -- rollouts and evaluation
    top_k: int = 2                      # passages an observation holds
    max_actions: int = 6                # calls of the tool
    max_len: int = 512                  # tokens of a trajectory, observations included
    max_answer: int = 12                # tokens of a forced answer
    max_thought: int = 48               # tokens that a workflow lets the model write at a time
    max_observation: int = 128          # tokens of an observation, imagined or real; passages that do not fit leave their titles
    eval_questions: int = 150           # of each set
    batch_rows: int = 256               # rollouts decoded together


def place(s):
    """Where and how the scripts load a network: the arguments of model.load."""
    return dict(device=s.device, framework=s.backend, dtype=s.dtype, bits=s.bits, frozen=s.lora_rank > 0)


def read_settings(doc):
    """[config file] [--key=value ..] -> Settings. Raises Problem for an unknown or ill-typed setting."""
    args, chosen, quick, given, files = sys.argv[1:], {}, {}, {}, []
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    if "-h" in args or "--help" in args:
        print(doc.strip() + "\n\nSettings, as --name=value:\n" + settings_help())
        sys.exit(0)
    while args:
        a = args.pop(0)
        if not a.startswith("--"):
            files.append(a)
            continue
        key, eq, text = a[2:].partition("=")
        key = key.replace("-", "_")
        check_name(fields, key, "--" + key)
        if not eq and fields[key].type is bool:
            text = "true"
        elif not eq:
            if not args:
                raise Problem(f"--{key}: no value; write --{key}=VALUE")
            text = args.pop(0)
        given[key] = parse(fields[key].type, key, text)
    for path in files or [str(Path(__file__).parent / "config" / "nano.py")]:
        if not path.endswith(".py") or not Path(path).is_file():
            raise Problem(f"{path}: no such config file; give one of config/*.py, and settings as --key=value")
        try:
            content = runpy.run_path(path)
        except Exception as e:
            raise Problem(f"{path}: can't be run as Python: {e}") from None
        for key, value in content.items():
            if key == "QUICK":
                quick = {k: check(fields, k, v, f"{path}: QUICK") for k, v in value.items()}
            elif not key.startswith("_"):
                chosen[key] = check(fields, key, value, path)
    if given.get("quick", chosen.get("quick")):
        chosen.update(quick)
    chosen.update(given)
    s = Settings(**chosen)
    for key, values in CHOICES.items():
        if getattr(s, key) not in values:
            raise Problem(f"--{key}: {getattr(s, key)!r} is not one of {', '.join(map(str, values))}")
    if odd := [t for t in s.lora_targets if t not in MATRICES]:
        raise Problem(f"--lora_targets: {odd[0]!r} is not one of {', '.join(MATRICES)}")
    for key, value in vars(s).items():
        if type(value) in (int, float) and not (math.isfinite(value) and (value > 0 or value == 0 and key not in POSITIVE)):
            raise Problem(f"--{key}: {value} is out of range; it must be {'above 0' if key in POSITIVE else '0 or more'}")
        if key == "lora_dropout" and value >= 1:
            raise Problem(f"--{key}: {value} is out of range; it must be below 1")
    shown = ", ".join(f"{k}={v}" for k, v in given.items())
    print(f"{Path(sys.argv[0]).name}: run {s.run}, seed {s.seed}" + (f"; set here: {shown}" if shown else ""), flush=True)
    return s


def command(script):
    """The command line that runs this script on the same run with the same settings, all its stages."""
    kept, skip = [], False
    for a in sys.argv[1:]:
        picks = a.partition("=")[0] in ("--stage", "--start", "--out", "--ask", "--dry_run", "--dry-run")
        if not (picks or skip):
            kept.append(a)
        skip = picks and "=" not in a
    return " ".join(["python", script, *kept])


def start_folder(root, start, stages):
    """The folder to go on from.
    Raises Problem where it is not there: with the command that makes a stage, or the folders that there are."""
    if not (root / start / "config.json").is_file():
        there = ", ".join(sorted(p.parent.name for p in root.glob("*/config.json")))
        raise Problem(f"{root / start} is missing; " + (
            f"make it with: {command('train_rl.py' if start.startswith('rl') else 'train_sft.py')}" if start in stages
            else f"--start can be one of: {there or 'nothing yet'}"))
    return root / start


def parse(kind, key, text):
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is list:
            return [p for p in text.split(",") if p]
        return kind(text)
    except (ValueError, KeyError):
        raise Problem(f"--{key}: {text!r} is not {KIND[kind]}") from None


POSITIVE = ("vocab_size", "width", "layers", "base_tokens", "train_scale", "epochs", "batch_tokens", "micro_tokens",
            "questions", "rollouts", "rl_questions", "temperature", "minibatches", "top_k", "max_actions", "tries",
            "max_len", "max_answer", "max_thought", "max_observation", "eval_questions", "batch_rows")
CHOICES = {"cache": ("live", "replay", "refresh"), "dtype": ("float32", "bfloat16"), "bits": (4, 16)}
KIND = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}


def check_name(fields, key, where):
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 1)
        raise Problem(f"{where}: unknown setting {key!r}; " + (f"did you mean {near[0]!r}?" if near else "--help lists them"))


def check(fields, key, value, where):
    check_name(fields, key, where)
    kind = fields[key].type
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise Problem(f"{where}: {key} must be {KIND[kind]}, not {value!r}")
    return value


def settings_help():
    """The fields of Settings with their comments, read from this file, so that help and code can't part."""
    source = Path(__file__).read_text().split("class Settings:")[1].split("def read_settings")[0].splitlines()
    out = []
    for line in source:
        if line.strip().startswith("# --"):
            out.append("\n " + line.strip()[5:])
        elif ": " in line and "=" in line:
            name, rest = line.strip().split(":", 1)
            default = getattr(Settings(), name)
            out.append(f"  --{name:<16} {rest.partition('#')[2].strip()} [{','.join(default) if type(default) is list else default}]")
    return "\n".join(out)


def main(run, doc):
    """Run a script with its settings, and print a Problem as one line and exit with 2."""
    guarded(lambda: run(read_settings(doc)))


def guarded(run):
    """Print a Problem as one line and exit with 2."""
    try:
        run()
    except Problem as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; what is finished is kept", file=sys.stderr)
        sys.exit(130)


def progress(total, desc, unit):
    """A tqdm bar, silent where there is nothing to call it."""
    return tqdm(total=total, desc=desc, unit=unit, disable=desc is None, leave=False, smoothing=0.1)


class Log:
    """JSON lines of a stage: log.jsonl, a line a step, and rollouts.jsonl; in <folder>.partial until the stage is
    complete. done: steps that a resumed stage has behind it, whose lines stay."""

    def __init__(self, folder, done=0):
        self.folder = folder.with_name(folder.name + ".partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {}
        for name in ("log.jsonl", "rollouts.jsonl"):
            path = self.folder / name
            lines = path.read_text().splitlines(keepends=True) if done and path.is_file() else []
            kept[name] = [row for line in lines if line.endswith("\n") and (row := json.loads(line)).get("step", done) < done]
            write_jsonl(path, kept[name])
        self.start = time.time() - (kept["log.jsonl"][-1]["seconds"] if kept["log.jsonl"] else 0)

    def write(self, **figures):
        figures["seconds"] = time.time() - self.start
        self.append("log.jsonl", [{k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()}])

    def append(self, name, rows):
        with open(self.folder / name, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


def write(path, text):
    """A file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".partial")
    part.write_text(text)
    part.rename(path)


def write_jsonl(path, rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def alone(path):
    """One process at a time, of those that ask for the same path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def weight_files(folder):
    """The .safetensors files of a Hugging Face folder, by its index where it has one. Raises Problem for one that is missing."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Problem(f"model: {index} can't be read: {e!r}; copy it again") from None
    for f in files:
        if not (folder / f).is_file():
            raise Problem(f"model: {folder / f} is missing" + (
                f", one of the {len(files)} files that {index.name} names; copy it again" if index.is_file()
                else "; give a folder with .safetensors weights"))
    return [folder / f for f in files]


def by_tokens(lengths, limit, waste=0.15):
    """Indices in order of length, cut where rows x longest would pass `limit`, or padding a share of `waste`."""
    groups, now, used = [], [], 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        area = (len(now) + 1) * lengths[i]
        if now and (area > limit or area - used - lengths[i] > max(waste * area, 64)):
            groups.append(now)
            now, used = [], 0
        now.append(i)
        used += lengths[i]
    return groups + [now] if now else groups


def read_jsonl(path, what, setting):
    """(line number, object) of a jsonl file. Raises Problem with file:line."""
    path = Path(path)
    if not path.is_file():
        raise Problem(f"{setting}: no such file: {path}; expected {what}")
    rows = []
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as e:
        raise Problem(f"{path}: not UTF-8 text: {e}; expected {what}, one a line") from None
    for n, line in enumerate(text.split("\n") if text else [], 1):      # not splitlines, which also cuts at U+2028
        try:
            rows.append((n, json.loads(line)))
        except (ValueError, RecursionError):
            raise Problem(f"{path}:{n}: not JSON; expected {what}, one a line") from None
    if not rows:
        raise Problem(f"{path}: empty; expected {what}, one a line")
    return rows
