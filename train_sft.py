"""Supervised training: the base model (nano path only), then the three SFT stages of AutoCoA (paper 3.2).

    python train_sft.py                                        # nano, 11 to 20 minutes on two cores
    python train_sft.py config/smollm2.py --model=.. --train_data=.. --eval_data=.. --corpus=..      # a real checkpoint, real questions

base    nano: pretraining from scratch on head articles and single skills, so that there is a reasoning model to start from
sft1    when to act: pairs that part inside the reasoning, one side acts, the other goes on thinking
sft2    how to act: whole trajectories, observations masked
sft3    the same without the mask: the policy learns what the tool would say, and becomes its own world model

Without `--stage=` all are trained anew, or with `--resume` from where an interrupted run stands. `--stage=` runs one of
them on its predecessor; `--start=` and `--out=` name other folders, for ablations.
Each stage leaves a Hugging Face folder, log.jsonl and rollouts.jsonl in out/<run>/<stage>/.
"""
import json
import math
import random
import shutil
import time
from pathlib import Path

import autocoa
import data
import estimate
import miniwiki
import model
import skills
import tools
import workflows
from common import Log, Problem, by_tokens, main, place, start_folder, tqdm, write, write_jsonl
from formats import read_sft, read_trajectories

STAGES = ("base", "sft1", "sft2", "sft3")
MAKES_DATA = ("seed", "model", "train_data", "corpus", "sft_files", "coa", "cot", "pairs",
              "train_scale", "top_k", "max_observation", "max_len")
READING = range(1000, 1040)     # seeds of the encyclopedias that pretraining reads about: not the world of training


def train(lm, s, task, stage, steps, loss_fn, make_batches, scale=1.0):
    """The loop that all supervised stages share. steps: optimizer steps, each a list of items for make_batches.

    The rate warms up over 5% of the steps and falls linearly to a tenth. A loss that is not finite stops the run before
    the weights change.
    """
    lm.model.recompute = s.checkpointing
    if stage != "base":
        lm.adapt(s, stage)
    folder, optimizer, mean = Path("out", s.run, stage), lm.backend.Optimizer(lm.model, s.muon, s.seed), None
    checkpoint = Checkpoint(lm, optimizer, folder, s)
    log = Log(folder, checkpoint.done)
    bar = tqdm(steps[checkpoint.done:], desc=stage, unit="step", smoothing=0.05, initial=checkpoint.done, total=len(steps))
    for i, items in enumerate(bar, checkpoint.done):
        start = time.time()
        rate = scale * min(1.0, (i + 1) / (0.05 * len(steps) + 1)) * (1 - 0.9 * i / len(steps))
        batches = make_batches(items)
        figures = lm.backend.train_step(lm.model, optimizer, loss_fn, batches, s.lr * rate, s.muon_lr * rate)
        if not math.isfinite(figures["loss"] + figures["grad_norm"]):
            raise Problem(f"{stage}: loss is {figures['loss']} at step {i}; the stage before is kept; lower --lr and --muon_lr")
        mean = figures["loss"] if mean is None else 0.95 * mean + 0.05 * figures["loss"]
        tokens = int(sum((b["ids"] > 0).sum() for b in batches))
        speed = tokens / (time.time() - start)
        log.write(step=i, **figures, lr=s.lr * rate, tokens=tokens, tokens_per_second=speed)
        bar.set_postfix_str(f"loss {mean:.3f}, {speed:,.0f} tok/s")
        estimate.after_two(bar, i)
        checkpoint.after(i + 1)
    log.append("rollouts.jsonl", workflows.sampled(lm, task.train(20, "sample")[:s.batch_rows // 4], task.search, s))
    checkpoint.finish()


class Checkpoint:
    """Weights and optimizer of a stage that is not finished, in <folder>.checkpoint, now and then; `done`: the steps behind the one that
    --resume found there."""

    def __init__(self, lm, optimizer, folder, s):
        self.lm, self.optimizer, self.folder, self.seconds, self.merge = lm, optimizer, folder, 60 * s.save_minutes, s.lora_merge
        self.path, self.time = folder.with_name(folder.name + ".checkpoint"), time.time()
        self.done = lm.resume(self.path, optimizer) if self.path.is_dir() else 0

    def after(self, steps):
        """Called after each step, with how many there were."""
        if time.time() - self.time >= self.seconds:
            self.lm.save(self.path, self.optimizer, steps)
            self.time = time.time()

    def finish(self):
        """The stage is complete: its folder takes the place of the checkpoint."""
        if self.merge and self.lm.model.lora:
            self.lm.backend.merge(self.lm.model)
        self.lm.save(self.folder)
        shutil.rmtree(self.path, ignore_errors=True)


def to_do(s, stages, start):
    """The folders of stages that are still to be made, in order: with --resume not those that are complete and younger
    than what they are made from, `start` first."""
    root, left = Path("out", s.run), list(stages)

    def made(stage):
        config = root / stage / "config.json"
        return config.stat().st_mtime if config.is_file() else math.inf
    began = made(start) if start else 0
    while s.resume and left and not (root / f"{left[0]}.partial").exists() and began <= made(left[0]) < math.inf:
        began = made(left.pop(0))
    return left


def clear(s, stages, start):
    """Remove what an interrupted run left of these folders; called when nothing can refuse the run any more. With --resume a
    checkpoint stays where it is of the first of them and younger than what that is made from, `start`."""
    root = Path("out", s.run)
    for i, stage in enumerate(stages):
        ours, old, begin = (root / name / "config.json" for name in (f"{stage}.checkpoint", f"{stage}.checkpoint.old", start or ""))
        if s.resume and old.is_file() and not ours.is_file():           # stopped between two renames
            old.parent.rename(ours.parent)
        going_on = s.resume and i == 0 and ours.is_file() and (not start or begin.stat().st_mtime <= ours.stat().st_mtime)
        for leftover in ["checkpoint.partial", "checkpoint.old"] + ["checkpoint"] * (not going_on) + ["partial"] * (not s.resume):
            shutil.rmtree(root / f"{stage}.{leftover}", ignore_errors=True)


def language_batches(trajectories, micro_tokens):
    """One optimizer step of next-token loss as micro-batches that share one normalizer."""
    norm = float(sum(sum(t.mask[1:]) for t in trajectories))
    groups = by_tokens([len(t.ids) for t in trajectories], micro_tokens)
    return [dict(data.pad([trajectories[i] for i in g]), norm=norm) for g in groups]


def pair_batches(pairs, micro_tokens, alpha):
    """One optimizer step of SFT-1: chosen rows first, rejected rows after."""
    longest = [max(len(c.ids), len(r.ids)) * 2 for c, r in pairs]
    groups = [[pairs[i] for i in g] for g in by_tokens(longest, micro_tokens)]
    return [dict(data.pad([c for c, _ in g] + [r for _, r in g]), alpha=alpha, norm=float(len(pairs))) for g in groups]


def unmask(trajectories):
    """SFT-3: the same ids, with loss on observations too."""
    return [autocoa.Trajectory(t.ids, [int(m or r == autocoa.OBSERVATION) for m, r in zip(t.mask, t.role)], t.role) for t in trajectories]


def recall(lm, questions, s):
    """Ask the model, without a tool, for every fact that the questions need. -> (facts it answered right in every wording,
    fact -> its answer to the first wording)"""
    facts = data.facts_of(questions)

    def tell(which, i):
        asked = [{"question": facts[f][0][i]} for f in which]
        return [a for a, _ in workflows.closed_book(lm, asked, s, workflows.CLOSED_BOOK,
                                                    desc=f"what the base model knows, wording {i + 1}")]
    said = dict(zip(facts, tell(facts, 0)))
    known = [f for f in facts if autocoa.exact_match(said[f], facts[f][1])]
    for i in range(1, max(len(w) for w, _ in facts.values())):
        known = [f for f, answer in zip(known, tell(known, i)) if autocoa.exact_match(answer, facts[f][1])]
    return set(known), said


def make_data(lm, task, s, folder):
    """The three data sets of SFT, kept as token ids:
    read from --sft_files, or built by asking the base model and searching with the real tool."""
    if s.sft_files:
        coa, cot, pairs, odd = read_sft(lm.codec, s.sft_files)
        if odd:
            print(f"{len(odd)} rows are no trajectories and are left out, the first at {odd[0]}")
        return keep_data(lm, s, folder, coa, cot, pairs, f"from {', '.join(s.sft_files)}: ")
    rng = random.Random(f"sft {s.seed}")
    # without these the model forgets the relations that its chains never combine
    made_up = [skills.made_up(lm.codec, task.world, rng) for _ in range(s.cot * 3 // 5)] if task.world else []
    chains, thoughts = task.train(s.coa, "coa", p_head=0.05), task.train(s.cot - len(made_up), "cot", p_head=1.0)
    contrast = list({q["id"]: q for q in task.train(s.pairs, "act") + task.train(s.pairs, "think", p_head=1.0)}.values())
    known, said = recall(lm, chains + thoughts + contrast, s)
    coa, counts = data.teach(lm.codec, chains, known, task.search, s.max_observation)
    cot = made_up + [data.cot(lm.codec, q) for q in thoughts if all(step["fact"] in known for step in q["metadata"]["steps"])]
    if s.model:         # what the teacher's searches find: a small checkpoint's ReAct hardly solves anything
        acted = {q["id"] for q, _ in data.teach(lm.codec, contrast, set(), task.search, s.max_observation)[0]}
    else:
        found = workflows.react(lm, contrast, task.search, s, max_actions=4, desc="where acting and thinking part")
        acted = {q["id"] for q, (answer, _) in zip(contrast, found) if autocoa.exact_match(answer, q["golden_answers"])}
    act, think = data.pairs(lm.codec, contrast, said, acted)
    half = s.pairs // 2                                 # both directions weigh the same, where there are enough of each
    pairs = rng.sample(act, min(half, len(act))) + rng.sample(think, min(half, len(think)))
    rng.shuffle(pairs)
    facts = data.facts_of(chains)
    keep_data(lm, s, folder, [t for _, t in coa], cot, pairs,
              f"base model knows {len(known & set(facts))} of {len(facts)} facts; {counts['searches']} searches, "
              f"{counts['misses']} missed, {counts['dropped']} chains dropped; "
              f"of {len(act)} pairs where acting was right and {len(think)} where thinking was: ")


def keep_data(lm, s, folder, coa, cot, pairs, said):
    """Write what is not longer than max_len."""
    long = [len(t.ids) for t in coa + cot + [t for p in pairs for t in p] if len(t.ids) > s.max_len]
    if long:
        print(f"{len(long)} trajectories are longer than max_len {s.max_len} (the longest has {max(long)} tokens) and are left out")
    coa, cot = ([t for t in rows if len(t.ids) <= s.max_len] for rows in (coa, cot))
    pairs = [p for p in pairs if max(len(t.ids) for t in p) <= s.max_len]
    print(f"{said}{len(coa)} chains of action, {len(cot)} chains of thought, {len(pairs)} pairs", flush=True)
    for split, rows in (("coa", coa), ("cot", cot), ("pairs", [t for p in pairs for t in p])):
        write_jsonl(folder / f"{split}.jsonl", [{"ids": t.ids, "mask": t.mask, "role": t.role} for t in rows])


def untrained(s):
    """The network to start from: a checkpoint from elsewhere with the tags added, or a new one (nano)."""
    # a device that is not there is said before anything is made
    model.backend(s.backend).pick_device(s.device)
    if s.model:
        return model.load_pretrained(s.model, s.device, s.backend, s.dtype, frozen=s.lora_rank > 0)
    tok = skills.nano_tokenizer(s.vocab_size, skills.nano_text(miniwiki.World(READING[0], "train")))
    return model.new(model.nano_config(len(tok), tok.eos_token_id, tok.bos_token_id, s.width, s.layers), tok,
                     s.seed, s.device, s.backend, s.dtype)


def make_base(lm, s, task):
    """The base model: pretrained here (nano), or the checkpoint as it is."""
    if s.model:
        return lm.save(Path("out", s.run, "base"))
    seeds = tqdm(READING, desc="encyclopedias to read about", unit="world", leave=False)
    worlds, searches = zip(*[(world, tools.library(world.passages(), s.top_k))
                             for world in (miniwiki.World(seed, "train") for seed in seeds)])
    rng = random.Random(f"base {s.seed}")
    texts = skills.base_data(lm.codec, worlds, searches, rng, s.base_tokens)
    train(lm, s, task, "base", data.steps_of(texts, s.batch_tokens, rng), autocoa.nll_loss, lambda b: language_batches(b, s.micro_tokens))


def run(s):
    if s.stage not in ("", *STAGES):
        raise Problem(f"--stage: {s.stage!r} is not one of {', '.join(STAGES)}")
    if s.bits < 16 and not s.lora_rank:
        raise Problem(f"--bits={s.bits}: weights of {s.bits} bits can't be trained; train an adapter on them with --lora_rank=16")
    if (s.start or s.out) and not s.stage:
        raise Problem("--start, --out: they go with one stage; say which with --stage")
    if s.stage == "base" and s.out:
        raise Problem("--out: a run has one base, which its data is made with; give another one a --run of its own")
    before = dict(zip(STAGES[1:], STAGES))
    todo = to_do(s, STAGES, None)
    if s.stage:
        todo = [s.stage] if to_do(s, [s.out or s.stage], s.start or before.get(s.stage)) else []
    root, task = Path("out", s.run), data.load_task(s)
    if not todo:
        return print(f"{s.out or s.stage or 'all stages'}: in {root} already")
    lm = untrained(s) if "base" in todo else model.load(start_folder(root, s.start or before[todo[0]], STAGES), **place(s))
    made, now = root / "data" / "made_from.json", {name: getattr(s, name) for name in MAKES_DATA}
    anew = "base" in todo or not (root / "data" / "pairs.jsonl").is_file()
    there = now if anew or not made.is_file() else json.loads(made.read_text())
    if odd := [name for name, value in there.items() if value != now.get(name)]:
        raise Problem(f"--{odd[0]}: {made.parent} was made with another value (see {made.name}); "
                      "repeat that, or remove the folder to have the data made anew")
    if "base" not in todo:
        lm.adapt(s, todo[0])        # here, since it may refuse
    if not estimate.show(lm, s, "sft"):
        return
    clear(s, [s.out] if s.out else todo, s.start or before.get(todo[0]))
    if "base" in todo:
        make_base(lm, s, task)
        for old in (root / "data").glob("*.jsonl"):     # of another base model
            old.unlink()
    if anew:
        # with --bits=4 too the base is asked as it is: that of an interrupted run says what that of a whole one says
        base = lm if "base" in todo else model.load(start_folder(root, "base", STAGES), **dict(place(s), bits=16))
        make_data(base, task, s, root / "data")
        write(made, json.dumps(now, indent=1))
    coa, cot, flat = (read_trajectories(root / "data" / f"{split}.jsonl") for split in ("coa", "cot", "pairs"))
    if "sft1" in todo:      # when to act
        pairs = list(zip(flat[0::2], flat[1::2]))
        steps = [pairs[i:i + 16] for i in range(0, len(pairs), 16)]
        if not pairs:
            print("no question was solved by exactly one of recalling and acting, so there are no pairs: SFT-1 leaves the model as it is")
        train(lm, s, task, s.out or "sft1", steps, autocoa.contrastive_loss,
              lambda b: pair_batches(b, s.micro_tokens, s.alpha), s.sft1_scale)
    for stage, scale, view in (("sft2", s.sft2_scale, lambda b: b), ("sft3", s.sft3_scale, unmask)):
        if stage in todo:   # how to act, observations masked; then the world model, observations learned too
            rng = random.Random(f"{stage} {s.seed}")
            steps = [step for _ in range(s.epochs) for step in data.steps_of(rng.sample(coa + cot, len(coa + cot)), s.batch_tokens, rng)]
            train(lm, s, task, s.out or stage, steps, autocoa.nll_loss, lambda b: language_batches(view(b), s.micro_tokens), scale)
    print(task.search.report())


if __name__ == "__main__":
    main(run, __doc__)
