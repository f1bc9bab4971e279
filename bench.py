"""Speed, side by side with what one would take instead: mlx_lm (--backend=mlx), or transformers (--backend=torch).

    python bench.py                     # with the agent in out/nano; --start= names another stage
    python bench.py --backend=mlx
    python bench.py index 10000 1000000         # what an index of so many made-up passages of 85 words costs

one answer      a prompt, 128 tokens
agents          as many different questions as questions x rollouts, with tool calls, greedy; the library decodes all rows of a
                turn together and keeps its caches over the calls (but for answers that are forced, which it leaves out)
training        optimizer steps of a LoRA adapter (MLX: that library's own trainer) or of all weights (torch)

Both sides have the same weights, texts and budgets and run in turns; the figure is the median of the ratios.
"""
import contextlib
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import autocoa
import data
import model
import tools
from common import Problem, main, place, start_folder
from train_sft import language_batches, read_trajectories

ROUNDS = 5


def with_tool_calls(generate, codec, prompts, search, s):
    """Tool calls around a library's batched generate: (rows, the ids that each has to read, how many it may write) -> new ids of each,
    its stop token included. -> whole texts"""
    texts, fresh = [list(p) for p in prompts], dict(enumerate(prompts))
    for _ in range(s.max_actions + 1):
        rooms = [s.max_len - s.max_answer - 8 - len(texts[i]) for i in fresh]
        queries = {}
        for i, ids in zip(fresh, generate(list(fresh), list(fresh.values()), rooms)):
            texts[i] += ids
            if ids[-1] == codec.end_search and codec.search in ids:
                queries[i] = codec.last_query(ids)
        fresh = {}
        for i, said in zip(queries, search(list(queries.values())) if queries else []):
            feed = [codec.result] + codec.encode(codec.fit(said, s.max_observation)) + [codec.end_result]
            if len(texts[i]) + len(feed) < s.max_len - s.max_answer - 8:
                texts[i] += feed
                fresh[i] = feed
        if not fresh:
            break
    return texts


def mlx_lm_side(folder, base, codec, s):
    """-> (generate one, generate many, a function that times n optimizer steps of a LoRA adapter on some rows)"""
    import mlx.optimizers
    import mlx_lm
    from mlx import core as mx
    from mlx_lm.generate import BatchGenerator, generate_step
    from mlx_lm.tuner import trainer, utils
    network, _ = mlx_lm.load(str(folder))
    stops = [codec.eos, codec.end_search]

    def one(prompt, n):
        return [int(t) for t, _ in zip((t for t, _ in generate_step(mx.array(prompt), network, max_tokens=n)), range(n))]

    def batched():
        caches = {}

        def generate(rows, fresh, rooms):
            generator = BatchGenerator(network, stop_tokens=[[t] for t in stops],
                                       completion_batch_size=len(rows), prefill_batch_size=len(rows))
            uids = dict(zip(generator.insert(fresh, rooms, [caches.get(i) for i in rows]), rows))
            out = {i: [] for i in rows}
            while responses := generator.next_generated():
                for r in responses:
                    out[uids[r.uid]].append(r.token)
                    if r.finish_reason:
                        caches[uids[r.uid]] = r.prompt_cache
            generator.close()
            return list(out.values())
        return generate

    def learn(rows, steps):
        student, _ = mlx_lm.load(str(base))
        student.freeze()
        utils.linear_to_lora_layers(student, len(student.layers), {
            "rank": s.lora_rank, "scale": s.lora_alpha / s.lora_rank, "dropout": 0.0,
            "keys": ["self_attn." + t if t[0] in "qkvo" else "mlp." + t for t in s.lora_targets]})
        times = []

        class Clock(trainer.TrainingCallback):
            def on_train_loss_report(self, info):
                times.append(time.perf_counter())
        with tempfile.TemporaryDirectory() as there, contextlib.redirect_stdout(io.StringIO()):
            args = trainer.TrainingArgs(batch_size=len(rows), iters=steps + 2, steps_per_report=1, max_seq_length=s.max_len,
                                        adapter_file=os.path.join(there, "a.safetensors"))
            trainer.train(student, mlx.optimizers.Adam(1e-5), [(r, 0) for r in rows], args=args, training_callback=Clock())
        return times[-1] - times[1]             # the first steps compile
    return one, batched, learn


def transformers_side(folder, base, codec, s):
    import torch
    from transformers import AutoModelForCausalLM
    network = AutoModelForCausalLM.from_pretrained(folder).eval().to(model.backend("torch").pick_device(s.device))
    device = network.device

    def write(ids, mask, n, stops, cache=None):
        with torch.no_grad():
            return network.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=n, do_sample=False,
                                    eos_token_id=stops, pad_token_id=0, return_dict_in_generate=True)

    def one(prompt, n):
        network.generation_config.eos_token_id = None
        ids = torch.tensor([prompt], device=device)
        return write(ids, torch.ones_like(ids), n, None).sequences[0, len(prompt):].tolist()

    def batched():
        kept = {}           # rows, ids, mask and cache of the turn before

        def generate(rows, fresh, rooms):
            longest, cache = max(map(len, fresh)), None
            ids = torch.tensor([[0] * (longest - len(t)) + t for t in fresh], device=device)
            mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in fresh], device=device)
            if kept:
                cache, at = kept["cache"], torch.tensor([kept["rows"].index(i) for i in rows], device=device)
                cache.batch_select_indices(at)
                ids, mask = torch.cat([kept["ids"][at], ids], 1), torch.cat([kept["mask"][at], mask], 1)
            out = write(ids, mask, max(rooms), [codec.eos, codec.end_search], cache)
            written = out.sequences[:, ids.shape[1]:]
            stopped = (written == codec.eos) | (written == codec.end_search)
            own = (stopped.cumsum(1) - stopped.long() == 0).long()              # up to the first stop; then it pads
            kept.update(rows=rows, ids=out.sequences, mask=torch.cat([mask, own], 1), cache=out.past_key_values)
            return [row[:n][:room] for row, n, room in zip(written.tolist(), own.sum(1).tolist(), rooms)]
        return generate

    def learn(rows, steps):
        student = AutoModelForCausalLM.from_pretrained(base).to(device).train()
        optimizer = torch.optim.AdamW(student.parameters(), 1e-5)
        longest = max(map(len, rows))
        ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)
        for step in range(steps + 1):
            if step == 1:
                start = time.perf_counter()
            optimizer.zero_grad()
            loss = student(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            loss.item()             # a trainer logs it; and a GPU is waited for, as on our side
        return time.perf_counter() - start
    return one, batched, learn


def timed(f):
    start = time.perf_counter()
    out = f()
    return time.perf_counter() - start, out


def run(s):
    root, task = Path("out", s.run), data.load_task(s)
    folder = start_folder(root, s.start or "rl2", ["rl2"])
    lm, backend = model.load(folder, **place(s)), model.backend(s.backend)
    if lm.model.lora:
        raise Problem(f"{folder} holds an adapter; compare with --lora_merge, whose stages are whole networks")
    s.lora_rank = s.lora_rank or 8
    theirs, side = ("mlx_lm", mlx_lm_side) if backend.__name__ == "model_mlx" else ("transformers", transformers_side)
    one, batched, learn = side(folder, root / "base", lm.codec, s)
    prompts = [lm.codec.prompt(q["question"]) for q in task.train(s.questions * s.rollouts, "rl2")]
    chains = sorted(read_trajectories(root / "data" / "coa.jsonl")[:400], key=lambda t: len(t.ids))
    rows = chains[max(0, len(chains) // 2 - 8):len(chains) // 2 + 8]
    if not rows:
        raise Problem(f"{root / 'data'} holds no chains; train with a larger --coa")

    def our_one():
        return lm.decoder([prompts[0]]).decode([], [128], 0.0)[0][0]

    def our_many():
        return [t.ids for t in autocoa.rollout(lm.decoder, lm.codec, prompts, task.rl_search,
                                               s.max_actions, s.max_len, s.max_answer, s.max_observation)]

    def our_learn(steps=6):
        student = model.load(root / "base", **dict(place(s), frozen=theirs == "mlx_lm"))
        if theirs == "mlx_lm":
            student.adapt(s)
        optimizer = student.backend.Optimizer(student.model, muon=False)
        whole = language_batches([autocoa.Trajectory(t.ids, [1] * len(t.ids), t.role) for t in rows], 10 ** 9)
        for step in range(steps + 1):
            if step == 1:
                start = time.perf_counter()
            student.backend.train_step(student.model, optimizer, autocoa.nll_loss, whole, 1e-5, 0.0)
        return time.perf_counter() - start

    def same(a, b):
        return f"{sum(x == y for x, y in zip(a, b))} of {len(a)} texts are the same"
    print(f"{'':14}{'ours':>9}{theirs:>15}{'ratio':>8}")
    for name, ours, others in (
            ("one answer", lambda: timed(our_one), lambda: timed(lambda: one(prompts[0], 128))),
            ("agents", lambda: timed(our_many), lambda: timed(lambda: with_tool_calls(batched(), lm.codec, prompts, task.rl_search, s))),
            ("training", lambda: (our_learn(), None), lambda: (learn([t.ids for t in rows], 6), None))):
        pairs = [(ours(), others()) for _ in range(ROUNDS)]
        (_, mine), (_, other) = pairs[-1]
        note = same([mine], [other]) if name == "one answer" else same(mine, other) if mine else f"6 steps of {len(rows)} rows"
        print(f"{name:14}{statistics.median(a for (a, _), _ in pairs):8.2f}s{statistics.median(b for _, (b, _) in pairs):14.2f}s"
              f"{statistics.median(b / a for (a, _), (b, _) in pairs):7.1f}x  {note}", flush=True)


def index_cost(n):
    """Seconds to build and to load an index of n passages, ms a query in a batch of 200, bytes on disk, peak memory.
    Words by Zipf's law."""
    rng, start = np.random.default_rng(n), time.time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "passages.jsonl")
        with open(path, "w") as f:
            for i in range(n):
                words = [f"w{w}" for w in np.minimum(rng.zipf(1.2, 85), 500_000)]
                f.write(json.dumps({"id": str(i), "contents": f'"{" ".join(words[:3])}"\n{" ".join(words[3:])}'}) + "\n")
        made, start = time.time() - start, time.time()
        index = tools.open_index(path, 3, folder)
        built, start = time.time() - start, time.time()
        index = tools.open_index(path, 3, folder)
        loaded = time.time() - start
        queries = [" ".join(f"w{w}" for w in np.minimum(rng.zipf(1.2, 12), 500_000)) for _ in range(200)]
        start = time.time()
        index(queries)
        size = sum(p.stat().st_size for p in Path(folder, "index").rglob("*") if p.is_file())
        print(f"{n:,} passages (made in {made:.0f} s): built in {built:.1f} s, loaded in {loaded:.2f} s, "
              f"{1000 * (time.time() - start) / 200:.2f} ms a query, {size / 1e6:,.0f} MB on disk, "
              f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == 'darwin' else 1e6):,.1f} GB "
              "of memory at most", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["index"]:
        for n in sys.argv[2:]:
            index_cost(int(n))
    else:
        main(run, __doc__)
