"""AutoCoA: the method, without a framework (arXiv 2503.06580).

    python autocoa.py --ask "Who directed Lost Story?"        # one question, by the last trained stage of out/nano
    python autocoa.py --start=sft2 --ask ".."                  # the same by another stage

Top to bottom: what a trajectory is, how an answer is scored, the losses, and Algorithm 1 as one batched loop.

A trajectory is one sequence of token ids. Its parts were written by different hands, and each token carries that with
it from the moment it is made:

    Who directed Silver River? <think> director of Silver River? <begin_search> Silver River</end_search>
    |------- PROMPT -----------------| |------- THINK ----------| |------------- ACTION -----------------|
    <search_result> Silver River 1: A film. ... </search_result> Silver River 1 says director Eva Moss.</think>\\boxed{ Eva Moss}<eos>
    |---------------------- OBSERVATION -----------------------| |------------------- THINK ------------------||------ ANSWER ------|

Tags are single tokens and observations are encoded as plain text, so no retrieved text can open or close one.
"""
import functools
import json
import re
import string
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from common import Problem, main, place, start_folder

PROMPT, THINK, ACTION, OBSERVATION, ANSWER = range(5)
ROLE_NAMES = ("prompt", "think", "action", "observation", "answer")
IMAGINE = "imagine"     # in place of a search tool: the policy writes the observation itself (RL stage 1)

TAGS = {"think": "<think>", "end_think": "</think>", "search": "<begin_search>", "end_search": "</end_search>",
        "result": "<search_result>", "end_result": "</search_result>", "boxed": "\\boxed{"}


# ---- trajectories -------------------------------------------------------------------------------------------------------
@dataclass
class Trajectory:
    """ids, mask (1: the policy wrote this token as policy) and role have one entry a token (logprobs too, where it was sampled);
    queries and observations one a call."""
    ids: list = field(default_factory=list)
    mask: list = field(default_factory=list)
    role: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)    # of sampled tokens, at the sampling temperature; 0 for all others
    queries: list = field(default_factory=list)     # text of each action that was run
    observations: list = field(default_factory=list)
    forced: bool = False                            # a budget ran out and the answer tag was appended for it

    def add(self, ids, role, mask, logprobs=None):
        self.ids += ids
        self.role += [role] * len(ids)
        self.mask += [mask] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs


def fit(observation, budget, size):
    """An observation (passages, one a line) of at most `budget` by `size`, text -> a number: passages leave from the
    last one on and only their titles stay; then those leave. The first, if it alone is too long, ends with its last
    whole sentence, or else word, that fits beside the titles.

    >>> fit("Silver River 1: A film.\\n Iron Hill 2: A band of four.", 40, len)
    'Silver River 1: A film.\\n Iron Hill 2:'
    """
    if size(observation) <= budget:
        return observation
    lines = observation.split("\n ")
    for n in range(len(lines) - 1, 0, -1):
        lines[n] = lines[n].partition(f" {n + 1}: ")[0] + f" {n + 1}:"
        if size("\n ".join(lines)) <= budget:
            return "\n ".join(lines)
    if size(lines[0]) <= budget:
        while size("\n ".join(lines)) > budget:
            lines.pop()
        return "\n ".join(lines)
    for rest in (lines[1:], []) if lines[1:] else ([],):
        for ends in (r"(?<=[.!?]) ", " ", ""):
            pieces = [piece for piece in re.split(f"({ends})", lines[0]) if piece] if ends else list(lines[0])
            low, high = 0, len(pieces)          # the most pieces that fit, by bisection: a passage may be long
            while low < high:
                middle = (low + high + 1) // 2
                fits = size("\n ".join(["".join(pieces[:middle]).strip(), *rest])) <= budget
                low, high = (middle, high) if fits else (low, middle - 1)
            first = "".join(pieces[:low]).strip()
            if first and (not rest or " 1: " in first):
                return "\n ".join([first, *rest])
    return ""


class Codec:
    """A tokenizer and the ids of the tags: text to trajectories and back. `tok` is a transformers fast tokenizer."""

    def __init__(self, tok):
        self.tok = tok
        ids = tok.convert_tokens_to_ids(list(TAGS.values()))
        if None in ids or tok.unk_token_id in ids:
            raise Problem("model: this tokenizer lacks the tags; run train_sft.py, which adds them")
        for name, i in zip(TAGS, ids):
            setattr(self, name, i)
        self.close = tok.convert_tokens_to_ids("}")     # ends the answer; an ordinary token in every byte-level vocabulary
        self.eos = tok.eos_token_id
        raw = json.loads(tok.backend_tokenizer.to_str())
        for token in raw["added_tokens"]:       # some checkpoints have <think> as a token like any other
            token["special"] = True
        self.plain = Tokenizer.from_str(json.dumps(raw))                    # ten times the speed of tok.encode
        self.plain.encode_special_tokens = True                             # the spelling of a tag is not a tag
        self.ids_of = functools.lru_cache(100_000)(lambda text: self.plain.encode(text, add_special_tokens=False).ids)

    def encode(self, text):
        """Plain text to ids, with one leading space; the spelling of a tag in it is plain text too."""
        return list(self.ids_of(" " + text.strip()))

    def fit(self, observation, budget):
        """`fit` in tokens."""
        return fit(observation, budget, lambda text: len(self.plain.encode(" " + text.strip(), add_special_tokens=False).ids))

    def last_query(self, ids):
        """The text of the action that these ids end with."""
        return self.decode(ids[len(ids) - ids[::-1].index(self.search):-1]).strip()

    def decode(self, ids):
        return self.tok.decode(ids, skip_special_tokens=False)

    def pieces(self, ids):
        """Each id as text; a character that several ids spell stands at the last of them."""
        out, held = [], []
        for n, i in enumerate(ids, 1):
            held.append(i)
            text = self.decode(held)
            whole = not text.endswith("\ufffd") or len(held) == 4 or n == len(ids)
            out.append(text if whole else "")
            held = [] if whole else held
        return out

    def around(self):
        """What stands before and after the question in a prompt:
        a chat template's turns where the tokenizer has one, then the opening of the thought."""
        if self.tok.chat_template:
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "QUESTION"}]
            before, _, after = self.tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).rpartition("QUESTION")
            after = re.sub(rf"{TAGS['think']}\s*\Z", "", after)         # R1's template opens the thought itself
            return self.tok.encode(before, add_special_tokens=False), self.tok.encode(after, add_special_tokens=False) + [self.think]
        return [] if self.tok.bos_token_id is None else [self.tok.bos_token_id], [self.think]

    def prompt(self, question):
        """Question to prompt ids. The template's own tags are tags, a tag spelled in the question is not."""
        before, after = self.around()
        return (before
                + (self.plain.encode(question, add_special_tokens=False).ids if self.tok.chat_template else self.encode(question))
                + after)

    def build(self, question, parts):
        """[("think", text), ("search", query), ("result", text), ("answer", text)] after a question -> Trajectory. "given" is a
        thought that is not learned, "conclude" what is said between the end of the thoughts and the answer.

        >>> codec.build("Who?", [("think", "Hm."), ("answer", "Eva")]).mask     # prompt 0, all that the policy writes 1
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
        """
        t = Trajectory()
        t.add(self.prompt(question), PROMPT, 0)
        for kind, text in parts:
            if kind in ("think", "given"):
                t.add(self.encode(text), THINK, int(kind == "think"))
            elif kind == "search":
                t.add([self.search] + self.encode(text) + [self.end_search], ACTION, 1)
                t.queries.append(text)
            elif kind == "result":
                t.add([self.result] + self.encode(text) + [self.end_result], OBSERVATION, 0)
                t.observations.append(text)
            elif kind == "conclude":
                t.add([self.end_think] + self.encode(text), THINK, 1)
            elif kind == "answer":
                if "conclude" not in dict(parts):
                    t.add([self.end_think], THINK, 1)
                t.add([self.boxed] + self.encode(text) + [self.close, self.eos], ANSWER, 1)
        return t

    def pair(self, question, prefix, sides):
        """A trajectory for each of two sides, parts that go on from one beginning, which carries no loss."""
        shared, pair = len(self.build(question, prefix).ids), [self.build(question, prefix + side) for side in sides]
        for t in pair:
            t.mask[:shared] = [0] * shared
        return pair

    def answer(self, t):
        """The text in the last box of a trajectory, "" where there is none."""
        boxes = [i for i, (token, role) in enumerate(zip(t.ids, t.role)) if token == self.boxed and role == ANSWER]
        if not boxes:
            return ""
        ids = t.ids[boxes[-1] + 1:]
        ends = [i for i, token in enumerate(ids) if token in (self.close, self.eos)]
        # \boxed{\text{..}}, as reasoning models write it
        return self.decode(ids[:ends[0]] if ends else ids).strip().removeprefix("\\text{").strip()

    def well_formed(self, t):
        """Whether the policy closed every step in order and answered by itself: (think | action observation)* conclusion answer eos.

        Roles say whose tokens these are; the tags are read from ids, never from text. What the policy imagines inside an
        observation is the environment's, tags too.
        """
        letter = {self.think: "!", self.end_think: "K", self.search: "S", self.end_search: "E", self.result: "[",
                  self.end_result: "]", self.boxed: "A", self.eos: "$"}
        around = zip([PROMPT] + t.role[:-1], t.role, t.role[1:] + [PROMPT], t.ids)
        shape = "".join("o" if before == r == after == OBSERVATION else letter.get(i, "x") for before, r, after, i in around if r != PROMPT)
        return (not t.forced and re.fullmatch(r"(x*Sx+E\[o*\])*x*Kx*Axx+\$", shape) is not None
                and t.ids[-2] == self.close)


SYSTEM = ("Think step by step. When you need a fact, search: write <begin_search> query </end_search> and read the "
          "<search_result>. Then give the answer as \\boxed{answer}.")


# ---- scores -------------------------------------------------------------------------------------------------------------
def normalize(text):
    """Lower case, no punctuation, no articles, single spaces: as the SQuAD and HotpotQA scripts do."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


DIGITS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine".split())}


def exact_match(answer, golden):
    return float(normalize(answer) in [normalize(g) for g in golden])


def cover_match(answer, golden):
    """Whether the answer, which may say more, holds a golden one word for word (cover-EM)."""
    return float(any(f" {normalize(g)} " in f" {normalize(answer)} " for g in golden))


def overlap_match(answer, golden):
    """What the authors' code rewards: an exact match, or 70% of the golden answer's words; but not an answer that merely holds the
    golden one, or is a part of it. Numbers below ten are digits to it, and words that say nothing are left out."""
    def plain(text):
        text = re.sub(r"\b(well|so|basically|actually|literally|simply|just|um|uh)\b", " ", normalize(text))
        return " ".join(DIGITS.get(word, word) for word in text.split())

    def one(a, g):
        words = set(g.split())
        return a == g or (g not in a and a not in g and len(words & set(a.split())) >= 0.7 * len(words))
    return float(any(one(plain(answer), plain(g)) for g in golden))


def f1(answer, golden):
    """Word-overlap F1, the best over the golden answers. Yes and no are right or wrong, as in HotpotQA's script."""
    def one(a, g):
        a, g = normalize(a).split(), normalize(g).split()
        if a != g and {"yes", "no", "noanswer"} & {" ".join(a), " ".join(g)}:
            return 0.0
        same = sum((Counter(a) & Counter(g)).values())
        return 2 * same / (len(a) + len(g)) if same else float(a == g)
    return max(one(answer, g) for g in golden)


def reward(codec, t, golden, format_penalty=0.5, call_cost=0.0):
    """Exact match (paper 3.3), less a penalty for a malformed trajectory and, if set, a small cost a call."""
    return exact_match(codec.answer(t), golden) - format_penalty * (not codec.well_formed(t)) - call_cost * len(t.queries)


def group_advantages(rewards, std=False):
    """(questions, rollouts) -> the same: r - mean of the group (paper eq. for GRPO). std: also divide by the group's
    deviation, as the authors' code does; it inflates groups that nearly agree."""
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    return advantages / (rewards.std(axis=1, keepdims=True) + 1e-6) if std else advantages


# ---- losses, once for every array library: xp is numpy, torch or mlx.core ---------------------------------------------
def nll_loss(xp, logp, b):
    """Next-token loss of SFT-2 and SFT-3. logp (B, T), b["mask"] (B, T): 1 where a token is learned; b["norm"]: how many
    such tokens the whole optimizer step holds, so that micro-batches add up to the mean over tokens."""
    return -(logp * b["mask"]).sum() / b["norm"]


def contrastive_loss(xp, logp, b):
    """SFT-1: -log sigmoid(P(chosen|c) - P(rejected|c)) - alpha P(chosen|c), P the mean log-probability of the tokens.

    Rows 0..n-1 are chosen, rows n..2n-1 the rejected of the same pairs; b["mask"] marks the continuations.
    """
    score = (logp * b["mask"]).sum(1) / b["mask"].sum(1)                # (2n,)
    n = score.shape[0] // 2
    gap = score[:n] - score[n:]
    # logaddexp(0, -gap) = -log sigmoid(gap)
    return (xp.logaddexp(0 * gap, -gap) - b["alpha"] * score[:n]).sum() / b["norm"]


def grpo_loss(xp, logp, b):
    """Clipped policy gradient, mean over the policy's own tokens (observations have mask 0), and k3 KL to a reference.

    With one optimizer step a batch (--minibatches=1, the default) the ratio is 1 and nothing is clipped: the plain policy
    gradient. Clipping acts from the second minibatch on.

    b: mask, old (log-probs when sampled), advantage (B, 1), clip_low, clip_high, norm; ref and beta where KL is on.
    """
    ratio = xp.exp((logp - b["old"]) * b["mask"])                       # (B, T)
    clipped = xp.clip(ratio, 1 - b["clip_low"], 1 + b["clip_high"])
    loss = -xp.minimum(ratio * b["advantage"], clipped * b["advantage"])
    if b["beta"]:
        loss = loss + b["beta"] * k3(xp, logp, b)
    return (loss * b["mask"]).sum() / b["norm"]


def k3(xp, logp, b):
    """Schulman's k3 estimate of KL(policy || reference), per token, never negative: exp(d) - d - 1, d = ref - logp."""
    d = (b["ref"] - logp) * b["mask"]
    return xp.exp(d) - d - 1


# ---- Algorithm 1 --------------------------------------------------------------------------------------------------------
@dataclass
class Row:
    """A rollout that is still being written."""
    t: Trajectory
    state: int = THINK              # the role of what it writes now
    end: int = 0                    # the length at which a forced answer must end
    opened: int = 0                 # where the observation that it imagines begins
    followers: list = field(default_factory=list)       # still the same text: they wait for what this one imagines


def rollout(decoder, codec, prompts, search, max_actions=6, max_len=400, max_answer=16, max_observation=128,
            temperature=0.0, rng=None):
    """Algorithm 1 for a batch: generate until an action ends, append its observation, go on until the answer ends.

    decoder: a twin's `Decoder` class bound to a model, `decoder(prompts)`.
    prompts: list of id lists; equal ones share their prefill.
    search: list of action texts -> list of observations, or IMAGINE: the policy writes the observation as well, greedily, and
    it still counts as the environment's (role OBSERVATION, mask 0).
    When max_actions or max_len is spent before an answer, `</think>\\boxed{` is appended and the model answers.
    Returns a Trajectory for each prompt, in order. temperature 0 is greedy.
    """
    done = [Trajectory() for _ in prompts]
    for t, p in zip(done, prompts):
        if len(p) + max_answer + 8 >= max_len:
            raise Problem(f"max_len: {max_len} leaves no room for a prompt of {len(p)} tokens and an answer; raise --max_len")
        t.add(list(p), PROMPT, 0)
    live = [Row(t) for t in done]                           # row i of the decoder is live[i]
    dec = decoder(prompts)
    stops = [codec.eos, codec.end_search] + [codec.end_result] * (search is IMAGINE)

    def room(t):                                            # tokens left before the forced answer, with its tags, must begin
        return max_len - max_answer - 8 - len(t.ids)

    def force(r):                                           # close the thought and open the box: not the policy's tokens
        r.t.forced, r.state = True, ANSWER
        r.t.add([codec.end_think, codec.boxed], ANSWER, 0)
        r.end = len(r.t.ids) + max_answer
        return [codec.end_think, codec.boxed]

    def open_observation(r):                                # what is left of it, where the policy is to imagine it
        return min(max_observation - (len(r.t.ids) - r.opened), room(r.t))

    while live:
        limits = [max(1, open_observation(r) if r.state == OBSERVATION else r.end - len(r.t.ids) if r.t.forced else room(r.t)) for r in live]
        temperatures = [0.0 if r.state == OBSERVATION else temperature for r in live]      # one text gets one observation, as from a tool
        # a turn ends when four tenths of the rows wait for something: what the rest have begun, they go on with
        ids, logps = dec.decode(stops, limits, temperatures, rng, leave=0.6)
        turn, leads = [], {}                                # who goes on: (rollout, its row, what it is fed; None: what the tool says)
        for row, r in enumerate(live):
            t = r.t
            if r.state == OBSERVATION:                      # imagined: the policy's words, the environment's tokens
                feed = []
                t.add(ids[row], OBSERVATION, 0)
                if t.ids[-1] != codec.end_result and open_observation(r) < 1:
                    feed = [codec.end_result]
                    t.add(feed, OBSERVATION, 0)
                turn.append((r, row, feed))
                if t.ids[-1] == codec.end_result:
                    for one in r.followers:
                        one.t.add(t.ids[len(one.t.ids):], OBSERVATION, 0)
                        turn.append((one, row, feed))
                    for one in [r, *r.followers]:
                        one.t.observations.append(codec.decode(t.ids[r.opened:-1]).strip())
                        one.state = THINK
                    r.followers = []
                continue
            for token, logp in zip(ids[row], logps[row]):
                if token == codec.search:
                    r.state = ACTION
                elif token == codec.boxed:
                    r.state = ANSWER
                t.add([token], r.state, 1, [logp])
            last = t.ids[-1]
            if last == codec.end_search and r.state == ACTION and not t.forced:
                r.state = THINK
                if len(t.queries) >= max_actions:
                    turn.append((r, row, force(r)))
                    continue
                t.queries.append(codec.last_query(t.ids))
                if search is not IMAGINE:
                    turn.append((r, row, None))
                    continue
                t.add([codec.result], OBSERVATION, 0)
                r.state, r.opened = OBSERVATION, len(t.ids)
                lead = leads.setdefault(tuple(t.ids), r)
                if lead is r:
                    turn.append((r, row, [codec.result]))
                else:
                    lead.followers.append(r)
            elif last in (codec.eos, codec.end_search) or len(ids[row]) == limits[row] and (t.forced or r.state == ANSWER):
                continue                                    # answered, or beyond repair
            else:                                           # cut by its limit, or still writing: it goes on in the next turn
                turn.append((r, row, force(r) if len(ids[row]) == limits[row] else []))
        if not turn:
            break
        calls = [r.t.queries[-1] for r, _, feed in turn if feed is None]
        said = iter(search(calls) if calls else [])
        firsts, order, index = [], [], {}                   # rollouts that are still one text read an observation as one row
        for r, row, feed in turn:
            t = r.t
            if feed is None:
                t.observations.append(codec.fit(next(said), max_observation))
                feed = [codec.result] + codec.encode(t.observations[-1]) + [codec.end_result]
                if len(feed) > room(t):                     # never cut an observation silently: it does not fit, so answer now
                    feed = force(r)
                else:
                    t.add(feed, OBSERVATION, 0)
            n = index.setdefault(tuple(t.ids) if feed else id(r), len(firsts))
            if n == len(firsts):
                firsts.append((row, feed))
            order.append(n)
        dec.keep([row for row, _ in firsts])
        dec.feed([feed for _, feed in firsts])
        dec.keep(order)
        live = [r for r, _, _ in turn]
    return done


COLORS = {PROMPT: "\033[90m", THINK: "\033[0m", ACTION: "\033[1;34m", OBSERVATION: "\033[33m", ANSWER: "\033[1;32m"}


def colored(codec, t):
    """A trajectory as text for a terminal, each role in its colour, a line a step."""
    out = []
    for i, (text, role) in enumerate(zip(codec.pieces(t.ids), t.role)):
        if i == 0 or role != t.role[i - 1]:
            out.append("\033[0m" + ("\n" if i else "") + COLORS[role])
        out.append(text)
    return "".join(out) + "\033[0m"


def ask(s):
    """--ask: answer one question with the last stage that is trained."""
    import data
    import estimate
    import model
    if not s.ask:
        raise Problem('--ask: no question; write --ask "Who ..?"')
    stages = ["rl2", "rl1", "sft3", "sft2", "sft1"]
    there = [x for x in stages if Path("out", s.run, x, "config.json").is_file()]
    folder = start_folder(Path("out", s.run), s.start or (there or ["sft3"])[0], stages)
    lm = model.load(folder, **place(s))
    if s.dry_run:
        return estimate.show(lm, s, "eval")
    t, = rollout(lm.decoder, lm.codec, [lm.codec.prompt(s.ask)], data.load_task(s).eval_search,
                 s.max_actions, s.max_len, s.max_answer, s.max_observation)
    print(colored(lm.codec, t) if sys.stdout.isatty() else lm.codec.decode(t.ids))
    print(f"answer: {lm.codec.answer(t)}  ({len(t.queries)} searches, {folder.name})")


if __name__ == "__main__":
    main(ask, __doc__)
