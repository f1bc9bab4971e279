"""How good a search engine the policy is: what it imagines an observation to be, against what the tool says.

    python world_model.py               # SFT-2 (never trained on observations) against SFT-3 and after, on out/nano

RL-1 runs in an environment that the policy writes itself (autocoa.rollout with IMAGINE). How far that environment can be
trusted is measured here, on the teacher's real chains: at each search the policy imagines the observation in context.

    nll         per token of the real observation, lower is better
    title       the share of imagined observations whose first title is the real one's
    words       word-overlap F1 of the imagined with the real observation
"""
import json
from pathlib import Path

import numpy as np

import autocoa
import data
import estimate
import model
from common import by_tokens, main, place, start_folder
from formats import read_trajectories


def fidelity(lm, trajectories, s):
    """-> {"nll", "title", "words", "searches"} over every observation of some real trajectories."""
    contexts, real = [], []
    for t in trajectories:
        for i, token in enumerate(t.ids):
            if token == lm.codec.result:
                contexts.append(t.ids[:i + 1])
                real.append(t.ids[i + 1:t.ids.index(lm.codec.end_result, i)])
    imagined = []
    for at in range(0, len(contexts), s.batch_rows):
        dec = lm.decoder(contexts[at:at + s.batch_rows])
        ids, _ = dec.decode([lm.codec.end_result, lm.codec.eos], [s.max_observation] * len(contexts[at:at + s.batch_rows]), 0.0)
        imagined += ids
    texts = [(lm.codec.decode(a).replace(autocoa.TAGS["end_result"], "").strip(), lm.codec.decode(b).strip())
             for a, b in zip(imagined, real)]
    seen = [autocoa.Trajectory(t.ids, [int(r == autocoa.OBSERVATION) for r in t.role], t.role) for t in trajectories]
    total, count = 0.0, 0.0
    for group in by_tokens([len(t.ids) for t in seen], s.micro_tokens):
        b = data.pad([seen[i] for i in group])
        total -= float(lm.backend.score(lm.model, b).sum())
        count += float(b["mask"][:, 1:].sum())
    return {"nll": total / count, "title": float(np.mean([a.split(":")[0] == b.split(":")[0] for a, b in texts])),
            "words": float(np.mean([autocoa.f1(a, [b]) for a, b in texts])), "searches": len(texts)}


def run(s):
    root, task = Path("out", s.run), data.load_task(s)
    lm = model.load(start_folder(root, "sft3", ["sft3"]), **place(s))
    if not estimate.show(lm, s, "eval"):
        return
    chains = read_trajectories(root / "data" / "coa.jsonl")[:200]
    fresh = data.teach(lm.codec, [q for rows in task.evaluation.values() for q in rows[:30]], set(), task.eval_search, s.max_observation)[0]
    rows = {}
    print(f"{'':8}{'training questions':>30}{'unseen questions':>30}\n{'':8}" + f"{'nll':>10}{'title':>10}{'words':>10}" * 2)
    for stage in ("sft2", "sft3", "rl1", "rl2"):
        if (root / stage / "config.json").is_file():
            lm = model.load(root / stage, **place(s))
            rows[stage] = {"training": fidelity(lm, chains, s), "unseen": fidelity(lm, [t for _, t in fresh], s)}
            print(f"{stage:8}" + "".join(f"{r['nll']:10.2f}{r['title']:10.2f}{r['words']:10.2f}" for r in rows[stage].values()), flush=True)
    (root / "world_model.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(run, __doc__)
