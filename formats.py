"""Files of other projects, in and out: AutoCoA's SFT files, FlashRAG's question sets; and a trajectory to look at.

    python data.py get hotpotqa                 # FlashRAG's copy of a question set, by the package `datasets`, to hotpotqa_train.jsonl ..
    python data.py show out/nano/sft2/rollouts.jsonl 3      # the third trajectory of a file, its trained tokens in colour
    python data.py export out/nano/data FOLDER  # the SFT data of a run as AutoCoA's files: coa.jsonl, cot.jsonl, pairs.json

AutoCoA's files are jsonl of {"messages": [{"role", "content"} ..]} for chains of thought with or without action, and
json lists of {"conversation": [{"from", "value"}], "chosen": {"from", "value"}, "rejected": {"from", "value"}} for
pairs, whose one turn is the question, <think>, and how both begin (their template cuts it at the last <think>). In them
a trajectory is text:

    <think> .. <begin_search> query </end_search> <search_result> .. </search_result> .. </think> .. \\boxed{answer}
"""
import itertools
import json
import re
from pathlib import Path

from autocoa import PROMPT, TAGS, Codec, Trajectory, normalize
from common import Problem, command, read_jsonl, write, write_jsonl

CALL = re.compile("|".join(f"{re.escape(TAGS[a])}(?P<{a}>.*?){re.escape(TAGS[b])}"
                           for a, b in (("search", "end_search"), ("result", "end_result"))), re.S)
ASKS = "answer the user's question below:"      # what the authors' prompt ends with; ours (autocoa.SYSTEM) takes its place
SETS = {"hotpotqa": "hotpotqa", "nq": "nq", "triviaqa": "triviaqa", "popqa": "popqa",
        "2wiki": "2wikimultihopqa", "musique": "musique", "bamboogle": "bamboogle"}
SPLITS = ("train", "dev", "test", "validation")
TRAINED, OTHER, PLAIN = "\033[1;32m", "\033[90m", "\033[0m"


def read_trajectories(path):
    """The SFT data that a run keeps as token ids."""
    if not path.is_file():
        raise Problem(f"{path} is missing; make it with: {command('train_sft.py')}")
    out = []
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            out.append(Trajectory(**json.loads(line)))
        except (ValueError, TypeError):
            raise Problem(f"{path}:{n}: cut or damaged; remove {path.parent} and run train_sft.py again, which makes it anew") from None
    return out


def read_rows(path, what, setting):
    """[(number, row)] of a jsonl file, or of a json list. Raises Problem."""
    try:
        text = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
        return list(enumerate(json.loads(text), 1)) if text.lstrip().startswith("[") else read_jsonl(path, what, setting)
    except (ValueError, RecursionError) as e:
        raise Problem(f"{path}: not JSON: {e}; expected {what}") from None


# ---- AutoCoA's files ----------------------------------------------------------------------------------------------------
def parts_of(text, whole=True):
    """The text form of a trajectory -> parts for `Codec.build`. whole: it must end with an answer; else it is a
    beginning or a piece. Raises ValueError for text that is no trajectory."""
    text, parts, at = text.strip().removeprefix(TAGS["think"]), [], 0
    thought, closed, final = text.rpartition(TAGS["end_think"])
    if not closed:
        thought, final = text, ""
    for call in CALL.finditer(thought):
        if thought[at:call.start()].strip():
            parts.append(("think", thought[at:call.start()].strip()))
        parts.append((call.lastgroup, call[call.lastgroup].strip()))
        at = call.end()
    if thought[at:].strip():
        parts.append(("think", thought[at:].strip()))
    tags = [tag for name, tag in TAGS.items() if name != "boxed"]       # a thought may speak of the box; it is plain text there
    if any(tag in x for kind, x in parts if kind != "result" for tag in tags):
        raise ValueError("a tag that is not closed, or in the wrong place")
    kinds = [kind for kind, _ in parts]
    if (any(kind == "result" and kinds[i - 1:i] != ["search"] for i, kind in enumerate(kinds))
            or any(kind == "search" and kinds[i + 1:i + 2] != ["result"] for i, kind in enumerate(kinds if closed else kinds[:-1]))):
        raise ValueError("a search without its result, or a result without a search")
    if closed:
        said, boxed, answer = final.rpartition(TAGS["boxed"])
        # the brace that closes the box
        depth = next((i for i, c in enumerate(answer) if answer[:i + 1].count("}") > answer[:i + 1].count("{")), None)
        if not boxed or depth is None or not answer[:depth].strip():
            raise ValueError("no \\boxed{answer}")
        answer = re.sub(r"^\\text\{(.*)\}$", r"\1", answer[:depth].strip(), flags=re.S)          # as reasoning models write it
        parts += [("conclude", said.strip())] * bool(said.strip()) + [("answer", answer.strip())]
    elif whole:
        raise ValueError(f"no {TAGS['end_think']}")
    return parts


def turns(row, key, role, text):
    """[(whose, text)] of a conversation. Raises ValueError where it is none."""
    names = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
    try:
        return [(names[turn[role]], turn[text]) for turn in row[key] if names[turn[role]] != "system"]
    except (KeyError, TypeError):
        raise ValueError(f"{key} is not a list of turns with {role} and {text}") from None


def asked(text):
    """The question of a user's turn, without the authors' instructions before it."""
    return text.rpartition(ASKS)[2].strip()


def read_sft(codec, paths):
    """AutoCoA's files -> (chains of action, chains of thought, pairs (chosen, rejected)) as trajectories, and how many
    rows were no trajectories. Raises Problem for a file that is none of the two."""
    coa, cot, pairs, odd = [], [], [], []
    full = [path for path in paths if not Path(path).is_file() or Path(path).stat().st_size]        # a teacher may have kept none of a kind
    if not full:
        raise Problem(f"{', '.join(map(str, paths))}: empty; expected AutoCoA's SFT rows, messages or conversation")
    for path in full:
        for n, row in read_rows(path, "AutoCoA's SFT rows, messages or conversation", "sft_files"):
            try:
                if "messages" in row:
                    (_, question), (_, said) = turns(row, "messages", "role", "content")[:2]
                    t = codec.build(asked(question), parts_of(said))
                    (coa if t.queries else cot).append(t)
                elif "chosen" in row:
                    if len(said := turns(row, "conversation", "from", "value")) != 1:
                        raise ValueError("a conversation of more than one turn")
                    question, _, began = asked(said[0][1]).rpartition(TAGS["think"])
                    question, began = (question.strip(), began) if question else (began, "")
                    prefix = parts_of(began, False)
                    pair = codec.pair(question, prefix, [parts_of(row[side]["value"], False) for side in ("chosen", "rejected")])
                    if any(1 not in t.mask for t in pair):
                        raise ValueError("an empty side")
                    pairs.append(tuple(pair))
                else:
                    raise Problem(f"{path}:{n}: neither messages nor chosen and rejected; expected AutoCoA's SFT rows")
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                odd.append(f"{path}:{n}: {e}")
    return coa, cot, pairs, odd


def as_text(codec, t):
    """A trajectory -> (question, what the assistant says)."""
    start = t.role.index(next(r for r in t.role if r != PROMPT))
    before, after = (codec.decode(ids) for ids in codec.around())
    question = codec.decode(t.ids[:start]).removeprefix(before).removesuffix(after).strip()
    return question, TAGS["think"] + codec.decode([i for i in t.ids[start:] if i != codec.eos])


def export(codec, folder, coa, cot, pairs):
    """Trajectories -> AutoCoA's files in a folder, those that would not be empty."""
    for name, rows in (("coa", coa), ("cot", cot)):
        lines = [json.dumps({"messages": [{"role": role, "content": text}
                                          for role, text in zip(("user", "assistant"), as_text(codec, t))]})
                 for t in rows]
        if lines:
            write(folder / f"{name}.jsonl", "".join(line + "\n" for line in lines))
    out = []
    for sides in pairs:
        part = min(t.mask.index(1) for t in sides)      # where they part; an observation behind it has mask 0, but is of its side
        texts = [codec.decode([i for i in t.ids[part:] if i != codec.eos]) for t in sides]
        question, said = as_text(codec, sides[0])
        out.append({"conversation": [{"from": "human", "value": question + said.removesuffix(texts[0])}],
                    "chosen": {"from": "gpt", "value": texts[0]}, "rejected": {"from": "gpt", "value": texts[1]}})
    if out:
        write(folder / "pairs.json", json.dumps(out, indent=1))


# ---- FlashRAG's question sets -------------------------------------------------------------------------------------------
def set_names(paths, setting):
    """{set: path} of question files. A set is named by its file; where that says the split alone, as in FlashRAG's
    nq/dev.jsonl, or two files are called the same, by the folder too.
    Raises Problem where two names are the same all the same."""
    out, stems = {}, [Path(path).stem for path in paths]
    for path, stem in zip(paths, stems):
        folder = Path(path).absolute().parent.name
        name = f"{folder}_{stem}" if stem in SPLITS or stems.count(stem) > 1 else stem
        if name in out:
            raise Problem(f"{setting}: {out[name]} and {path} are both the set {name!r}; give each file once, or rename one")
        out[name] = path
    return out


def gold_titles(metadata, where):
    """Titles of the passages that a question's answer comes from, each once: `gold_titles`, or else FlashRAG's
    `supporting_facts`, {"title": [..], "sent_id": [..]} or [[title, sentence] ..].
    Raises Problem for what is neither."""
    titles = metadata.get("gold_titles") or metadata.get("supporting_facts") or []
    if isinstance(titles, dict):
        titles = titles.get("title") or []
    titles = [t[0] if isinstance(t, list) and t else t for t in titles] if isinstance(titles, list) else [None]
    if not all(isinstance(t, str) for t in titles):
        raise Problem(f"{where}: gold_titles must be a list of texts, and supporting_facts name titles")
    return list(dict.fromkeys(titles))


def question_rows(path):
    """A FlashRAG question file -> its rows, with `metadata.gold_titles`. Raises Problem with file:line for a malformed row."""
    out, lines = [], {}
    for n, q in read_jsonl(path, 'questions, {"id", "question", "golden_answers"}', "train_data, eval_data"):
        if not isinstance(q, dict) or not isinstance(q.get("question"), str) or not q["question"].strip() or "id" not in q:
            raise Problem(f"{path}:{n}: not a question; expected {{\"id\", \"question\", \"golden_answers\"}}")
        golden = q.get("golden_answers")
        if isinstance(golden, list):
            golden = [g for g in golden if not isinstance(g, str) or g.strip()]
            # to the scores of SQuAD, "the" is what no answer is, too
            golden = [g for g in golden if not isinstance(g, str) or normalize(g)] or golden
        if not isinstance(golden, list) or not golden or not all(isinstance(g, str) for g in golden):
            raise Problem(f"{path}:{n}: question {q['id']!r} has no answers; golden_answers must be a list of texts")
        try:
            " ".join([q["question"], *golden]).encode()
        except UnicodeEncodeError:
            raise Problem(f"{path}:{n}: question {q['id']!r} holds half a character (a lone surrogate); "
                          "write the file anew as UTF-8") from None
        if not isinstance(q.get("metadata") or {}, dict):
            raise Problem(f"{path}:{n}: metadata of question {q['id']!r} must be an object")
        q["golden_answers"], q["metadata"] = golden, dict(q.get("metadata") or {})
        q["metadata"]["gold_titles"] = gold_titles(q["metadata"], f"{path}:{n}")
        ids = q["metadata"].get("gold_ids") or []
        if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            raise Problem(f"{path}:{n}: gold_ids of question {q['id']!r} must be a list of texts")
        if (first := lines.setdefault(str(q["id"]), n)) != n:       # what is known of one question would pass for the other's
            raise Problem(f"{path}:{n}: question {q['id']!r} is in line {first} too; each needs an id of its own")
        out.append(q)
    return out


# ---- the command line of data.py ------------------------------------------------------------------------------------
def codec_of(folder):
    """The tokenizer of a run, from its base model's folder."""
    from transformers import PreTrainedTokenizerFast
    if not (folder / "tokenizer.json").is_file():
        raise Problem(f"{folder} has no tokenizer; give a file inside out/<run>/")
    return Codec(PreTrainedTokenizerFast.from_pretrained(folder))


def show(path, number):
    """One trajectory of a file, of any that this project writes or reads: what carries loss in green, the rest grey."""
    path, rows = Path(path), read_rows(path, "trajectories", "data.py show")
    if not 1 <= number <= len(rows):
        raise Problem(f"{path}: there is no trajectory {number}; it holds {len(rows)}")
    n, row = rows[number - 1]
    try:
        if "ids" in row:
            tokens = row.get("tokens") or codec_of(path.parent.parent / "base").pieces(row["ids"])
            pieces = list(zip(tokens, row["mask"]))
        elif "messages" in row:
            spans = re.split(f"({re.escape(TAGS['result'])}.*?{re.escape(TAGS['end_result'])})", row["messages"][-1]["content"], flags=re.S)
            pieces = [(m["content"] + "\n", 0) for m in row["messages"][:-1]] + [(x, int(not x.startswith(TAGS["result"]))) for x in spans]
        else:
            pieces = ([(turn["value"] + "\n", 0) for turn in row["conversation"]]
                      + [(f"+ {row['chosen']['value']}\n- {row['rejected']['value']}", 1)])
        runs = [("".join(token for token, _ in run), m) for m, run in itertools.groupby(pieces, key=lambda piece: piece[1])]
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError):
        raise Problem(f"{path}:{n}: not a trajectory; expected ids, mask and role, or AutoCoA's messages or pairs") from None
    # a file of others could steer the terminal
    print("".join((TRAINED if m else OTHER) + re.sub(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "", text) for text, m in runs) + PLAIN)


def get(name, folder="."):
    """FlashRAG's copy of a question set, one file a split, with the titles of its gold passages where the set marks them."""
    if name not in SETS:
        raise Problem(f"data.py get: {name!r} is not one of {', '.join(SETS)}")
    try:
        from datasets import load_dataset
    except ImportError:
        raise Problem("data.py get: it needs the package datasets; pip install datasets, or give question files of your own") from None
    try:
        splits = load_dataset("RUC-NLPIR/FlashRAG_datasets", SETS[name])
    except Exception as e:      # each way of being offline has its own
        raise Problem(f"data.py get: {name} can't be fetched ({type(e).__name__}: {(str(e).splitlines() or [''])[0]}); "
                      "try again online, or give question files of your own") from None
    for split, rows in splits.items():
        out = []
        for row in rows:
            more = dict(row.get("metadata") or {})
            more["gold_titles"] = gold_titles(more, f"data.py get: {name}, {row['id']}")
            out.append({"id": row["id"], "question": row["question"], "golden_answers": list(row["golden_answers"]), "metadata": more})
        path = Path(folder, f"{name}_{split}.jsonl")
        write_jsonl(path, out)
        print(f"{path}: {len(out):,} questions")


def main(args):
    usage = "usage: python data.py get SET [FOLDER]  or  show FILE [NUMBER]  or  export out/<run>/data FOLDER"
    if (len(args) < 2 or args[0] not in ("get", "show", "export")
            or (args[0] == "export") != (len(args) == 3 and not args[2].isdecimal() and args[0] != "get")):
        raise Problem(usage)
    if args[0] == "get":
        get(*args[1:3])
    elif args[0] == "show":
        show(args[1], int(args[2]) if args[2:] else 1)
    else:
        folder = Path(args[1])
        coa, cot, flat = (read_trajectories(folder / f"{name}.jsonl") for name in ("coa", "cot", "pairs"))
        export(codec_of(folder.parent / "base"), Path(args[2]), coa, cot, list(zip(flat[0::2], flat[1::2])))
        print(f"{args[2]}: {len(coa):,} chains of action, {len(cot):,} chains of thought, {len(flat) // 2:,} pairs")
