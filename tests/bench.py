"""Measures ASPD: against serial decoding, and against what the machine can do.

    python tests/bench.py --baseline base                        # the built-in corpus
    python tests/bench.py --prompts FILE.jsonl --baseline base   # your prompts
    python tests/bench.py --held-out FILE.jsonl --baseline base  # loss, by place
    python tests/bench.py --extract FILE.jsonl                         # what is parallel in a file
    python tests/bench.py --replay FILE.jsonl --shape smollm2-135m     # given answers, any weights
    python tests/bench.py --step --shape qwen2.5-7b                    # a step by width, bandwidth
    python tests/bench.py --train                                      # training, beside nanoGPT
    python tests/bench.py --all-gpu FILE.jsonl                         # the last three, two shapes
    python tests/bench.py --transformers FILE.jsonl --ckpt DIR --published FOLDER
                                                                       # against that library

Prints tables; --json writes the same figures. The sides of a comparison take turns, answer by
answer or step by step. Seconds are wall-clock with prefill and grammar, the device is synchronised
before every reading; only tokens of the plain answer count as tokens.
"""
import argparse
import copy
import itertools
import json
import platform
import re
import resource
import shlex
import sys
import time
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aspd import (IGNORE, MAX_BRANCHES, BadInput, Block, Row, check, layout, plain,
                  steps, tokenize)
from data import (Tokenizer, batches, cli, collate, corpus, extract, learn_tokenizer, make_rows,
                  printable, read_objects, read_records, split_held_out)
from decode import BRANCH, LM, TEXT_ONLY, TITLE_CAP, Engine, generate, load
from model import GPT, GPTConfig, check_device, fast_dtype, from_checkpoint, read_checkpoint
from script import script
from train import held_out_loss, train_step

SHAPES = {  # published models, to be filled with random weights; tiny: to try this file
    "tiny": dict(block_size=4096, vocab_size=4096, n_layer=2, n_head=4, n_kv_head=2, n_embd=64,
                 n_inner=128, head_size=16),
    "smollm2-135m": dict(block_size=8192, vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3,
                         n_embd=576, n_inner=1536),
    "qwen2.5-7b": dict(block_size=32768, vocab_size=152064, n_layer=28, n_head=28, n_kv_head=4,
                       n_embd=3584, n_inner=18944, head_size=128, qkv_bias=True, tied=False),
}
WIDTHS = (1, 2, 4, 8, 16)  # tokens a step
FIGURES = {  # key in the JSON: heading and format in the tables, meaning
    "answers": ("n", "d", "answers"),
    "parallel": ("par.", ".0%", "share of answers with a block"),
    "ideal": ("ideal", ".2f", "plain tokens / steps"),
    "fewer_steps": ("steps", ".2f", "the serial side's steps / ASPD's"),
    "branchwise": ("branchw.", ".2f", "times faster a token than branch after branch"),
    "speedup": ("speed", ".2f", "times faster a token than the serial side, over all tokens"),
    "average": ("mean", ".2f", "the same answer by answer, mean"),
    "low": ("low", ".2f", "95% interval of this mean, over resampled prompts: from"),
    "high": ("high", ".2f", "to"),
    "best": ("best", ".2f", "the largest of one answer"),
    "realised": ("real.", ".2f", "speed / ideal"),
    "tokens": ("tokens", ".0f", "plain tokens an answer; here and below, base: the serial side"),
    "ttft": ("ttft", ".0f", "milliseconds to the first token, median"),
    "cut": ("cut", ".0%", "share of answers that the budget cut"),
    "facts": ("facts", ".1%", "share of facts right"),
    "duplicates": ("dup.", ".0%", "share of blocks with branches that repeat each other"),
    "repeats": ("rep.", ".0%", "share of answers with lines that repeat each other"),
}
HEADLINES = {  # key of the summary: of which group it is which figure
    "parallel_steps_ratio": ("parallel", "fewer_steps"),
    "parallel_speedup": ("parallel", "speedup"),
    "parallel_ideal": ("parallel", "ideal"),
    "ideal_realised": ("parallel", "realised"),
    "serial_opened": ("serial", "parallel"),
    "serial_speed": ("serial", "speedup"),
    "all_speed": ("all", "speedup"),
    "all_average": ("all", "average"),
    "all_best": ("all", "best"),
    "facts": ("all", "facts"),
    "facts_baseline": ("all", "facts_baseline"),
}


# ---- tools ------------------------------------------------------------------

def is_cuda(device):
    return torch.device(device).type == "cuda"


def clock(device):
    """Seconds, once the device has done all it was asked to."""
    if is_cuda(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turn(runs, rounds, device, first=0):
    """Runs functions, {name: function}, in turn, each `rounds` times -> {name: median seconds},
    {name: what it returned}. first: whose turn it is."""
    seconds = defaultdict(list)
    results = {}
    names = list(runs)
    for k in range(first, first + rounds):
        turn = k % len(names)
        for name in names[turn:] + names[:turn]:
            began = clock(device)
            results[name] = runs[name]()
            seconds[name].append(clock(device) - began)
    return {name: float(np.median(seconds[name])) for name in names}, results


def memory(device):
    """Peak memory in GB: of the GPU's tensors, or of this process."""
    if is_cuda(device):
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def count(model):
    """Parameters; a tied head counts once."""
    return sum(p.numel() for p in model.parameters())


def table(title, headings, rows, formats):
    """Prints rows, the first cell of each a name, under their headings; None as a dash."""
    lines = [headings]
    for name, *values in rows:
        lines.append([str(name)])
        lines[-1] += ["-" if v is None else format(v, f) for v, f in zip(values, formats)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for name, *cells in lines:
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])]
        print(" ".join([f"{name:<{widths[0]}}", *right]))


def evenly(items, n):
    """n of the items, spread evenly; all of them where n is None or larger."""
    n = min(n or len(items), len(items))
    return [items[i] for i in np.linspace(0, len(items) - 1, n).astype(int)]


def read_model(folder, device, dtype):
    """-> the model and the tokenizer of a folder with a ckpt.pt. The model is not frozen, as an
    LM's is: it can be trained, and run in autocast."""
    state = read_checkpoint(folder)
    model = from_checkpoint(state).to(device, getattr(torch, dtype))
    return model, Tokenizer(**state["tokenizer"])


def random_model(shape, tokenizer, device, dtype):
    """A model of one of the SHAPES, with random weights and room for the tokenizer's ids."""
    config = GPTConfig(**SHAPES[shape])
    config.vocab_size = max(config.vocab_size, tokenizer.vocab_size)
    with torch.device("meta"):  # 7B parameters never pass through the CPU
        model = GPT(config).to(getattr(torch, dtype))
    model.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.02)
            else:
                p.fill_(1.0)
    return model


def read_prompts(path, limit):
    """So many records of a file, spread evenly. BadInput if one of them has no prompt."""
    records = evenly(list(read_objects(path)), limit)
    check(records, f"{path}: no prompts")
    for r in records:
        check(str(r.get("prompt", "")).strip(), f"{path}: no prompt in the record {r}")
    return records


def get_model(args, texts, dtype=None):
    """A model and its tokenizer, of --ckpt or of a --shape. texts: to learn words from. A model that
    never learnt to branch can be fed the tags."""
    dtype = dtype or args.dtype or ("bfloat16" if is_cuda(args.device) else "float32")
    if not args.shape:
        model, tokenizer = read_model(args.ckpt, args.device, dtype)
        model.config.positions = model.config.positions or "aspd"
        return model, tokenizer
    if args.tokenizer:
        tokenizer = Tokenizer(**read_checkpoint(args.tokenizer)["tokenizer"])
    else:
        tokenizer = learn_tokenizer(texts)
    return random_model(args.shape, tokenizer, args.device, dtype), tokenizer


def get_lm(args, texts):
    """The same, ready to decode."""
    return LM(*get_model(args, texts), args.compile)


@torch.no_grad()
def feed(engine, width, end):
    """One pass that feeds `width` tokens and fills the cache up to `end`."""
    engine.slot = end - width
    branches = range(1, width + 1) if width > 1 else [0]
    fed = [(0, 0, branch) for branch in branches]
    engine.feed(fed, list(range(width)), BRANCH if width > 1 else TEXT_ONLY)


@torch.no_grad()  # as generate() has it: else compiled steps would be compiled anew
def warm_up(lm, slots, args, widths=WIDTHS):
    """Gives the model a cache of so many slots, and feeds a prompt and three steps of each width:
    that compiles, and chooses kernels. -> the Engine."""
    if lm.model.owner is not None and len(lm.model.owner) >= 2 * slots:
        lm.model.owner = None  # too large, of a bench before: compiled steps read all of it
    *settings, seed = args.sampling.values()
    engine = Engine(lm, "serial", slots - 1, settings, seed, None)
    engine.serial([0] * 8)
    for width in widths:
        for _ in range(3):
            feed(engine, width, slots)
    return engine


# ---- comparing sides, answer by answer --------------------------------------

def compare(records, sides, args, judge=None):
    """Answers every record on every side ({name: function of a record -> its answer})
    --repeats times, in turn -> a result a record. judge: function of an answer and its record -> figures."""
    results = []
    for n, record in enumerate(tqdm(records, desc="answers", leave=False, disable=None)):
        runs = {name: partial(side, record) for name, side in sides.items()}
        seconds, answers = in_turn(runs, args.repeats, args.device, first=n)
        result = {"category": record.get("category") or "other", "prompt": record["prompt"]}
        for name, a in answers.items():
            result[name] = {"seconds": seconds[name], "pace": seconds[name] / max(a.tokens, 1)}
            for key in ("ttft", "tokens", "steps", "blocks", "finish", "text"):
                result[name][key] = getattr(a, key)
            if judge:
                result[name] |= judge(a, record)
        results.append(result)
    return results


def interval(values):
    """The middle 95% of the means of 10,000 resamples (bootstrap), always with the same seed."""
    rng = np.random.default_rng(0)
    n = len(values)
    means = [values[rng.integers(n, size=(100, n))].mean(1) for _ in range(100)]
    return np.percentile(np.concatenate(means), (2.5, 97.5)).tolist()


def figures(results):
    """FIGURES of some results with the sides "aspd", "serial" and, where it ran, "branchwise"."""
    def total(side, key):
        return float(sum(r[side][key] for r in results))

    def faster(side):
        return total(side, "seconds") / total(side, "tokens") / pace

    n = len(results)
    pace = total("aspd", "seconds") / max(total("aspd", "tokens"), 1)  # seconds a token
    each = np.array([r["serial"]["pace"] / r["aspd"]["pace"] for r in results])
    f = {
        "answers": n,
        "parallel": sum(bool(r["aspd"]["blocks"]) for r in results) / n,
        "ideal": total("aspd", "tokens") / max(total("aspd", "steps"), 1),
        "fewer_steps": total("serial", "steps") / max(total("aspd", "steps"), 1),
        "speedup": faster("serial"),
        "average": float(each.mean()),
        "best": float(each.max()),
    }
    f["low"], f["high"] = interval(each)
    f["realised"] = f["speedup"] / f["ideal"]
    if "branchwise" in results[0]:
        f["branchwise"] = faster("branchwise")
    for side, suffix in (("aspd", ""), ("serial", "_baseline")):
        f["tokens" + suffix] = total(side, "tokens") / n
        f["ttft" + suffix] = 1000 * float(np.median([r[side]["ttft"] for r in results]))
        f["cut" + suffix] = sum(r[side]["finish"] == "length" for r in results) / n
        if "facts" in results[0][side]:
            f["facts" + suffix] = total(side, "right") / total(side, "facts")
        if "repeats" in results[0][side]:
            f["repeats" + suffix] = total(side, "repeats") / n
    flags = [flag for r in results for flag in r["aspd"].get("duplicates", [])]
    if flags:
        f["duplicates"] = sum(flags) / len(flags)
    return f


def report(results, has_block, keys):
    """Prints these FIGURES of every kind (category) and of groups -> the summary: all figures of
    the groups and "kinds", and headlines. A kind is parallel if more than a tenth of its flags in
    has_block, a bool a result, are set."""
    flags = defaultdict(list)
    for r, flag in zip(results, has_block):
        flags[r["category"]].append(flag)
    members = defaultdict(list)
    groups = {"parallel": [], "serial": [], "uncut": [], "distinct": [], "all": results}
    for r in results:
        members[r["category"]].append(r)
        is_parallel = np.mean(flags[r["category"]]) > 0.1
        groups["parallel" if is_parallel else "serial"].append(r)
        if r["aspd"]["finish"] == r["serial"]["finish"] == "stop":
            groups["uncut"].append(r)
        if not any(r["aspd"].get("duplicates", [])):  # no branches that repeat each other
            groups["distinct"].append(r)
    kinds = {kind: figures(found) for kind, found in members.items()}
    groups = {name: figures(found) for name, found in groups.items() if found}

    columns = {}  # key: heading, format
    for key in keys:
        heading, form, _ = FIGURES[key]
        columns[key] = heading, form
        if key + "_baseline" in groups["all"]:
            columns[key + "_baseline"] = "base", form
    rows = list(kinds.items()) + [(f"= {name}", f) for name, f in groups.items()]
    table("", ["kind"] + [heading for heading, _ in columns.values()],
          [[name] + [f.get(key) for key in columns] for name, f in rows],
          [form for _, form in columns.values()])
    print()
    for key in keys:
        print(f"  {FIGURES[key][0]:<9} {FIGURES[key][2]}")

    summary = {}
    for name, (group, key) in HEADLINES.items():
        summary[name] = groups.get(group, {}).get(key)
    return summary | groups | {"kinds": kinds}


# ---- prompts ----------------------------------------------------------------

def decoders(args, prompts):
    """The sides for compare(), warm: "aspd" and "branchwise" (--ckpt), "serial" (--baseline); and
    the tokenizer."""
    lm = load(args.ckpt, args.device, args.dtype, args.compile)
    check(lm.model.config.positions, f"--ckpt {args.ckpt} is no ASPD model: it cannot branch")
    twin = lm
    if args.baseline:
        twin = load(args.baseline, args.device, args.dtype, args.compile)
    print(f"serial side: {args.baseline or 'the same weights, blocks forbidden'}")
    for each, widths in ((twin, WIDTHS[:1]), (lm, WIDTHS)):
        longest = max(len(each.tokenizer.prompt(prompt)) for prompt in prompts)
        row_tokens = min(longest + args.max_new_tokens, each.model.config.block_size)
        warm_up(each, row_tokens + 1, args, widths)

    def side(lm, mode):
        def answer(record):
            return generate(lm, record["prompt"], mode, max_new_tokens=args.max_new_tokens,
                            **args.sampling)
        return answer

    sides = {"aspd": side(lm, "adaptive"), "branchwise": side(lm, "branchwise"),
             "serial": side(twin, "serial")}
    return sides, lm.tokenizer


def mark(answer, record):
    """Counts the facts that an answer states, whatever its line breaks."""
    text = " ".join(answer.text.split())
    right = sum(fact in text for fact in record["facts"])
    return {"right": right, "facts": len(record["facts"])}


def bench_corpus(args):
    """Held-out prompts of the built-in corpus; parallel are the kinds whose answers there are."""
    records = corpus(args.n, split="val")
    sides, _ = decoders(args, [r["prompt"] for r in records])
    results = compare(records, sides, args, mark)
    has_block = [len(extract(r["response"], r["prompt"])[0]) > 1 for r in records]
    keys = ("answers", "parallel", "ideal", "fewer_steps", "branchwise", "speedup", "average",
            "low", "high", "realised", "facts")
    return report(results, has_block, keys), results


def alike(texts):
    """Do two of the texts repeat each other: are over 0.8 of their three-word sequences common?"""
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    grams = [set(zip(w, w[1:], w[2:])) or {tuple(w)} for w in words if w]
    return any(len(a & b) > 0.8 * len(a | b) for a, b in itertools.combinations(grams, 2))


def bench_prompts(args):
    """A file of prompts; parallel are the categories in which ASPD opens blocks."""
    records = read_prompts(args.prompts, args.limit)
    sides, tokenizer = decoders(args, [r["prompt"] for r in records])
    del sides["branchwise"]

    def judge(answer, record):
        blocks = [s for s in answer.segments if isinstance(s, Block)]
        rests = [[tokenizer.decode(rest) for _, rest in block] for block in blocks]
        lines = [line for line in answer.text.split("\n") if len(line.split()) > 4]
        return {"duplicates": [alike(texts) for texts in rests], "repeats": alike(lines)}

    results = compare(records, sides, args, judge)
    has_block = [bool(r["aspd"]["blocks"]) for r in results]
    keys = ("answers", "parallel", "ideal", "speedup", "average", "low", "high", "best", "tokens",
            "ttft", "cut", "duplicates", "repeats")
    return report(results, has_block, keys), results


def bench_transformers(args):
    """Our serial greedy decoding of a published model against that library's: speed and text.
    --ckpt is what tests/convert.py has made of the --published folder."""
    check(args.published, "--transformers: add --published, the folder that --ckpt was made of")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise BadInput("--transformers: that library is not installed") from None
    lm = load(args.ckpt, args.device, args.dtype, args.compile)
    dtype = lm.model.model.embed_tokens.weight.dtype
    model = AutoModelForCausalLM.from_pretrained(args.published, dtype=dtype)
    model.to(args.device).eval()
    records = read_prompts(args.transformers, args.limit)
    stop = sorted(lm.tokenizer.stop)

    def ours(record):
        return generate(lm, record["prompt"], "serial", max_new_tokens=args.max_new_tokens)

    @torch.no_grad()
    def theirs(record):
        ids = torch.tensor([lm.tokenizer.prompt(record["prompt"])], device=args.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             max_new_tokens=args.max_new_tokens, eos_token_id=stop,
                             pad_token_id=stop[0])
        new = [i for i in out[0, ids.size(1):].tolist() if i not in stop]
        text = lm.tokenizer.decode(new)
        return SimpleNamespace(text=text, mode="serial", tokens=len(new), steps=len(new), seconds=0,
                               ttft=0, blocks=[], finish="", segments=[new])

    longest = max(len(lm.tokenizer.prompt(r["prompt"])) for r in records)
    warm_up(lm, longest + args.max_new_tokens + 1, args, WIDTHS[:1])
    theirs(records[0])
    results = compare(records, {"ours": ours, "theirs": theirs}, args)
    tokens = {side: sum(r[side]["tokens"] for r in results) for side in ("ours", "theirs")}
    pace = {side: n / sum(r[side]["seconds"] for r in results) for side, n in tokens.items()}
    same = float(np.mean([r["ours"]["text"] == r["theirs"]["text"] for r in results]))
    ratio = pace["ours"] / pace["theirs"]
    table(f"serial greedy decoding of {args.published}, {len(results)} prompts, {dtype}",
          ["side", "tokens", "tokens/s"], [[side, tokens[side], pace[side]] for side in pace],
          ["d", ".1f"])
    print(f"ours / theirs {ratio:.2f}; the same text in {same:.0%} of the answers")
    return {"tokens_s": pace, "ratio": ratio, "same_text": same}, results


# ---- held-out loss ----------------------------------------------------------

def places(ids, tagged):
    """Where each plain token stands, in the order of a tagged or of an untagged row: names."""
    names = []
    for segment in ids:
        if not isinstance(segment, Block):
            names += ["outside"] * len(segment)
            continue
        titles = [["titles"] * len(title) for title, _ in segment]
        rests = [["later branches"] * len(rest) for _, rest in segment]
        rests[0] = ["first branches"] * len(rests[0])
        pairs = zip(titles, rests)
        ordered = titles + rests if tagged else itertools.chain(*pairs)
        names += itertools.chain(*ordered)
    return names


def hidden_row(prompt, ids, eos):
    """The Row of an untagged answer under the branch mask: no branch sees a sibling or its title,
    and each starts where its block does. What a serial model loses on the branches' tokens after
    their titles is what it would have read off the siblings."""
    parts = [(prompt, 0, 0)]  # tokens, block, branch
    for n, segment in enumerate(ids, start=1):
        if isinstance(segment, Block):
            parts += [(b.title + b.rest, n, i) for i, b in enumerate(segment, start=1)]
        else:
            parts.append((segment, 0, 0))
    token, block, branch, position = [], [], [], []
    for tokens, in_block, in_branch in parts:
        if in_branch < 2:
            start = len(token)
        token += tokens
        block += [in_block] * len(tokens)
        branch += [in_branch] * len(tokens)
        position += range(start, start + len(tokens))
    target = [IGNORE] * (len(prompt) - 1) + token[len(prompt):] + [eos]
    return Row(*map(torch.tensor, (token, block, branch, position, target)))


@torch.no_grad()
def loss_by_place(model, tokenizer, records, side, args):
    """{place: (mean loss, tokens)} of a side: "aspd", "serial" or "hidden" (serial, as hidden_row
    has it), all cut into the same tokens. A title counts where it is first written."""
    eos, tags = tokenizer.eos, tokenizer.tags
    not_text = torch.tensor([IGNORE, eos, *tags], device=args.device)
    found = defaultdict(list)
    for r in tqdm(records, desc="by place", leave=False, disable=None):
        segments, _ = extract(r["response"], r["prompt"])
        ids = tokenize(segments, tokenizer.encode)
        prompt = tokenizer.prompt(r["prompt"])
        if side == "aspd":
            row = layout(prompt, ids, eos, tags, model.config.positions)
        elif side == "serial":
            row = layout(prompt, [plain(ids)], eos)
        else:
            row = hidden_row(prompt, ids, eos)
        idx, position, mask, target = collate([row], args.device)
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(idx, position, mask)  # (1, T, V)
        losses = F.cross_entropy(logits[0].float(), target[0], reduction="none")
        losses = losses[~torch.isin(target[0], not_text)].tolist()
        for place, loss in zip(places(ids, side == "aspd"), losses, strict=True):
            found[place].append(loss)
            found["all"].append(loss)
    return {place: (float(np.mean(losses)), len(losses)) for place, losses in found.items()}


def bench_held_out(args):
    """Loss a plain token on a file's held-out answers, of ASPD and of its serial twin."""
    check(args.baseline, "--held-out compares two models: add --baseline, the serial twin's folder")
    args.dtype = args.dtype or fast_dtype(args.device)
    sides = {"aspd": read_model(args.ckpt, args.device, "float32"),
             "serial": read_model(args.baseline, args.device, "float32")}
    for model, _ in sides.values():
        model.config.block_size = min(args.block_size, model.config.block_size)
    ours, tokenizer = sides["aspd"]
    check(ours.config.positions, f"--ckpt {args.ckpt} is no ASPD model: it cannot branch")
    _, held_out = split_held_out(read_records(args.held_out))
    records = []
    for r in evenly(held_out, args.limit):
        rows = make_rows([r], tokenizer, ours.config)
        records += [r] * len(rows)  # none where it is too long
    check(records, f"{args.held_out}: no held-out answer fits {args.block_size} tokens")

    losses, by_place = {}, {}
    for side, (model, tokenizer) in sides.items():
        positions = ours.config.positions if side == "aspd" else None
        rows = make_rows(records, tokenizer, replace(model.config, positions=positions))
        losses[side] = held_out_loss(model, rows, tokenizer, args)
        by_place[side] = loss_by_place(model, tokenizer, records, side, args)
    hidden = loss_by_place(*sides["serial"], records, "hidden", args)
    of_serial = losses["aspd"] / losses["serial"]
    print(f"\nheld-out loss of {len(records)} answers: aspd {losses['aspd']:.4f}, serial "
          f"{losses['serial']:.4f}, ratio {of_serial:.4f}")
    found = []
    for place in ("outside", "titles", "first branches", "later branches", "all"):
        if place in by_place["aspd"]:
            aspd, n = by_place["aspd"][place]
            serial, _ = by_place["serial"][place]
            found.append({"place": place, "tokens": n, "aspd": aspd, "serial": serial,
                          "of_serial": aspd / serial,
                          "hidden": hidden[place][0] if "branches" in place else None})
    table("by place, all sides cut into the same tokens; hidden: the serial side, siblings hidden",
          ["place", "tokens", "aspd", "serial", "of serial", "hidden"],
          [row.values() for row in found], ["d", ".4f", ".4f", ".4f", ".4f"])
    return {"held_out_loss": losses, "of_serial": of_serial, "answers": len(records)}, found


# ---- extraction: the paper's figures ----------------------------------------

def paper_figures(answers):
    """The figures of the paper's section 4.1, over answers, lists of segments of ids. Tags never
    count as tokens, a title counts once."""
    widths, inside, after_titles, speedups = [], [], [], []
    for ids in answers:
        tokens = len(plain(ids))
        speedups.append(tokens / max(steps(ids), 1))  # as if a wide pass took no longer
        blocks = [segment for segment in ids if isinstance(segment, Block)]
        if blocks:
            in_branches = len(plain(blocks))
            in_titles = sum(len(title) for block in blocks for title, _ in block)
            widths += map(len, blocks)
            inside.append(in_branches / tokens)
            after_titles.append(1 - in_titles / in_branches)

    def mean(values):
        return sum(values) / max(len(values), 1)

    return {"answers": len(answers), "PPD": len(inside) / max(len(answers), 1),
            "ABN": mean(widths), "APD": mean(inside), "APE": mean(after_titles),
            "speedup": mean(speedups), "best": max(speedups, default=0)}


def bench_extract(args):
    """What extract() finds in a file of answers: the paper's figures, and why it refused the
    rest."""
    records = read_records(args.extract)
    if Path(args.ckpt, "ckpt.pt").exists():
        tokenizer = Tokenizer(**read_checkpoint(args.ckpt)["tokenizer"])
        unit = "the tokens of --ckpt"
    else:
        tokenizer = learn_tokenizer(r["response"] for r in records)
        unit = "tokens learnt from the file"
    kinds = defaultdict(list)
    refused = Counter()
    results = []
    for r in tqdm(evenly(records, args.limit), desc="answers", leave=False, disable=None):
        segments, refusals = extract(r["response"], r["prompt"])
        ids = tokenize(segments, tokenizer.encode)
        kind = str(r.get("category") or "other")
        kinds[kind].append(ids)
        refused.update(reason for reason, *_ in refusals)
        blocks = [len(segment) for segment in ids if isinstance(segment, Block)]
        results.append({"id": r["id"], "category": kind, "tokens": len(plain(ids)),
                        "steps": steps(ids), "blocks": blocks})
    every = paper_figures(list(itertools.chain(*kinds.values())))
    kinds = {kind: paper_figures(answers) for kind, answers in kinds.items()}
    rows = [[printable(kind), *f.values()] for kind, f in kinds.items()]
    table(f"what is parallel, counted in {unit}", ["kind", *every],
          [*rows, ["= all", *every.values()]], ["d", ".0%", ".2f", ".0%", ".0%", ".2f", ".2f"])
    print("PPD: answers with a block. ABN: branches a block. APD: tokens in branches; APE: of\n"
          "these, those after titles. Speedup: ideally, tokens / passes, mean and best of all.")
    table("refused", ["reason", "runs"], refused.most_common(), ["d"])
    summary = {"all": every, "kinds": kinds, "refused": dict(refused), "counted_in": unit}
    return summary, results


# ---- replay: given answers through the engine -------------------------------

def replay(lm, record, mode, args, keep=None):
    """Decodes with the tokens of record["ids"] in place of the chosen ones; the step runs as ever.
    keep: a list that takes the logits. BadInput where the engine does not give the answer back, in
    exactly the steps that aspd.steps predicts."""
    ids = record["ids"] if mode == "adaptive" else [plain(record["ids"])]
    passes = iter(script(ids, lm.tokenizer.tags, lm.tokenizer.eos))

    def follow(step):
        def scripted(*step_args):
            chosen, logits = step(*step_args)
            chosen.cpu()  # the synchronisation that reading the tokens costs
            tokens = next(passes)
            if keep is not None:
                keep.append(logits[:len(tokens)].float().cpu())
            return torch.tensor(tokens), logits
        return scripted

    scripted = copy.copy(lm)
    scripted.step = follow(lm.step)
    scripted.compiled_step = lm.compiled_step and follow(lm.compiled_step)
    answer = generate(scripted, record["prompt"], mode, max_new_tokens=record["budget"],
                      **args.sampling)
    expected = steps(ids)
    check(answer.segments == ids and answer.steps == expected and answer.finish == "stop",
          f"replay, {mode}: {answer.steps} steps, {expected} expected, finish {answer.finish!r}, "
          f"for the answer to {record['prompt'][:60]!r}")
    return answer


def to_replay(records, lm):
    """Adds "ids" and "budget" (row tokens that let every branch end by itself) to the answers;
    leaves out those that the engine would have to cut."""
    kept = []
    tokenizer = lm.tokenizer
    for r in records:
        segments, _ = extract(r["response"], r["prompt"])
        ids = tokenize(segments, tokenizer.encode)
        budget = len(layout([], ids, tokenizer.eos, tokenizer.tags).token)
        budget += 200  # before each title has_room asks for the longest one
        fits = bool(r["prompt"].strip())
        for block in ids:
            if isinstance(block, Block):
                longest = max(len(rest) for _, rest in block)
                budget += sum(longest - len(rest) for _, rest in block)  # shares are equal
                fits &= max(len(title) for title, _ in block) <= TITLE_CAP
                fits &= len(block) <= MAX_BRANCHES
        row_tokens = len(tokenizer.prompt(r["prompt"])) + budget
        if fits and row_tokens <= lm.model.config.block_size:
            kept.append(r | {"ids": ids, "budget": budget, "row_tokens": row_tokens})
    return kept


def count_shapes(lm, records, args, padded):
    """How many shapes (tokens fed, choices, slots) the passes have in a replay that are never
    compiled: prefill and prefixes. A GPU sets its kernels up for each, which takes it long. padded:
    as where another step is compiled. No model runs here."""
    shapes = set()

    def step(model, fed, pick, allowed, u, sampling, n_slots):
        if fed.size(1) > len(pick):
            shapes.add((fed.size(1), len(pick), n_slots))
        return torch.zeros_like(pick), None

    counting = copy.copy(lm)
    counting.step = step
    counting.compiled_step = step if padded else None
    for record in records:
        replay(counting, record, "adaptive", args)
    return len(shapes)


def compiled_against_eager(lm, record, args):
    """Replays one answer both ways and compares the logits of every choice."""
    eager = copy.copy(lm)
    eager.compiled_step = None
    logits = {"compiled": [], "eager": []}
    replay(lm, record, "adaptive", args, keep=logits["compiled"])
    replay(eager, record, "adaptive", args, keep=logits["eager"])
    a, b = map(torch.cat, logits.values())
    difference = float((a - b).abs().max() / b.abs().max())
    same = float((a.argmax(-1) == b.argmax(-1)).float().mean())
    print(f"\ncompiled against eager: logits differ by {difference:.1e} of the largest at most;\n"
          f"the best token is the same in {same:.2%}")
    return {"compiled_difference": difference, "compiled_same": same}


def bench_replay(args, lm=None):
    """Given answers: decoded by the engine, and serially, with the same weights and tokens."""
    given = read_records(args.replay)
    lm = lm or get_lm(args, (r["response"] for r in given))
    given = evenly(given, args.limit)
    records = to_replay(given, lm)
    check(records, f"{args.replay}: no answer fits {lm.model.config.block_size} tokens")
    warm_up(lm, max(r["row_tokens"] for r in records) + 1, args)

    def aspd(record):
        return replay(lm, record, "adaptive", args)

    def serial(record):
        return replay(lm, record, "serial", args)

    results = compare(records, {"aspd": aspd, "serial": serial}, args)
    has_block = [bool(r["aspd"]["blocks"]) for r in results]
    keys = ("answers", "parallel", "ideal", "speedup", "average", "low", "high", "best", "realised")
    summary = report(results, has_block, keys)
    summary |= {"left_out": len(given) - len(records), "memory_gb": memory(args.device),
                "shapes": count_shapes(lm, records, args, padded=False),
                "shapes_padded": count_shapes(lm, records, args, padded=True)}
    if lm.compiled_step:
        summary |= compiled_against_eager(lm, records[0], args)
    print(f"\n{len(records)} answers, each in exactly the steps that aspd.steps predicts; "
          f"{summary['left_out']} left out (a title\nover {TITLE_CAP} tokens, over {MAX_BRANCHES} "
          f"branches, or too long); peak memory {summary['memory_gb']:.2f} GB")
    print(f"prefill and prefixes have {summary['shapes']} shapes; padded, as where a step is "
          f"compiled, {summary['shapes_padded']}")
    return summary, results


# ---- the machine: a step ----------------------------------------------------

def bench_step(args, lm=None):
    """Time of an engine pass by context and width, and the memory bandwidth it reaches, beside a
    copy's: weights and cache are read once. The summary is about the first of --contexts."""
    lm = lm or get_lm(args, (r["response"] for r in corpus(500)))
    c = lm.model.config
    embedding = lm.model.model.embed_tokens.weight
    size = 2**30 if is_cuda(args.device) else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=lm.device)
    target = torch.empty_like(source)
    found = []
    for context in args.contexts:
        check(max(WIDTHS) <= context <= c.block_size,
              f"--contexts must be {max(WIDTHS)} to the model's {c.block_size}, not {context}")
        engine = warm_up(lm, context, args)
        runs = {width: partial(feed, engine, width, context) for width in WIDTHS}
        runs["copy"] = partial(target.copy_, source)
        seconds, _ = in_turn(runs, args.repeats, args.device)
        copied = 2 * size / seconds["copy"]
        read = count(lm.model) + 2 * context * c.n_layer * c.n_kv_head * c.head_size
        if not c.tied:
            read -= embedding.numel()  # of which only some rows are read
        for width in WIDTHS:
            ms = 1000 * seconds[width]
            speed = read * embedding.element_size() / seconds[width]
            found.append({"context": context, "width": width, "ms": ms,
                          "ratio": seconds[width] / seconds[1], "ms_a_token": ms / width,
                          "gb_s": speed / 1e9, "of_copy": speed / copied})
    table("a step", ["context", "width", "ms", "x width 1", "ms a token", "GB/s", "of a copy"],
          [row.values() for row in found], ["d", ".3f", ".2f", ".3f", ".1f", ".0%"])
    summary = {"copy_gb_s": copied / 1e9, "memory_gb": memory(args.device)}
    for name, key in (("step_ms", "ms"), ("step_ratio", "ratio"), ("bandwidth_share", "of_copy")):
        summary[name] = {str(row["width"]): row[key] for row in found[:len(WIDTHS)]}
    return summary, found


# ---- the machine: training --------------------------------------------------

class NanoBlock(nn.Module):
    """A stand-in for nanoGPT's block; its MLP is about 4x, as wide as makes both models equal."""

    def __init__(self, C, n_head, n_inner):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(C, bias=False)
        self.c_attn = nn.Linear(C, 3 * C, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.ln_2 = nn.LayerNorm(C, bias=False)
        self.mlp = nn.Sequential(nn.Linear(C, n_inner, bias=False), nn.GELU(),
                                 nn.Linear(n_inner, C, bias=False))

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """A stand-in for nanoGPT, of the size of `model`; like nanoGPT, not counting positions."""

    def __init__(self, model):
        super().__init__()
        c = model.config
        C = c.n_embd
        n_inner = (count(model.model.layers[0]) - 4 * C * C) // (2 * C)
        self.wte = nn.Embedding(c.vocab_size, C)
        self.wpe = nn.Embedding(c.block_size, C)
        self.h = nn.Sequential(*[NanoBlock(C, c.n_head, n_inner) for _ in range(c.n_layer)])
        self.ln_f = nn.LayerNorm(C, bias=False)

    def forward(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))  # (B, T, C)
        return F.linear(self.ln_f(self.h(x)), self.wte.weight)                      # (B, T, V)


def training_steps(model, args):
    """{name: function that makes one step on a batch} of what bench_train() compares."""
    nano = NanoGPT(model).to(args.device)
    print(f"{count(model) / 1e6:.2f}M parameters; the stand-in for nanoGPT "
          f"{(count(nano) - nano.wpe.weight.numel()) / 1e6:.2f}M, positions aside")
    optimizer, nano_optimizer = [
        torch.optim.AdamW(net.parameters(), 1e-5, weight_decay=0.1, fused=True)
        for net in (model, nano)]
    autocast = (torch.device(args.device).type, torch.bfloat16, args.dtype == "bfloat16")

    def ours(rows):
        train_step(model, [rows], optimizer, args)

    def bare(batch):
        idx, position, pick, target = batch
        T = idx.size(1)
        causal = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
        with torch.autocast(*autocast):
            logits = model(idx, position, causal, pick=pick)
        F.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    def nanogpt(tokens):
        with torch.autocast(*autocast):
            logits = nano(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(nano.parameters(), 1.0)
        nano_optimizer.step()
        nano_optimizer.zero_grad()

    return {"aspd": ours, "serial": ours, "bare": bare, "untagged": ours, "nanogpt": nanogpt}


def training_batches(tagged, untagged, device):
    """{name: what its step gets} for one batch of rows."""
    serial = []
    for row in tagged:
        zeros = torch.zeros_like(row.block)
        position = torch.arange(len(zeros))
        serial.append(row._replace(block=zeros, branch=zeros, position=position))
    idx, position, _, target = collate(serial, device)
    pick = (target.flatten() != IGNORE).nonzero()[:, 0]
    bare = (idx, position, pick, target.flatten()[pick])
    stream = torch.cat([row.token for row in tagged])
    T = len(stream) // len(tagged)  # as many tokens, cut without padding
    nanogpt = F.pad(stream[:T * len(tagged)].view(-1, T), (0, 1)).to(device)
    return {"aspd": tagged, "serial": serial, "bare": bare, "untagged": untagged,
            "nanogpt": nanogpt}


def bench_train(args):
    """Our training step on tagged rows, beside: "serial", the same rows plain causal; "bare", these
    in a bare loop (batches made before, no mask, no clipping); "untagged", the same answers without
    tags; "nanogpt", a stand-in of equal size on as many tokens, never padded."""
    records = read_records(args.data) if args.data else corpus(500)
    model, tokenizer = get_model(args, (r["response"] for r in records), "float32")
    model.config.block_size = min(args.block_size, model.config.block_size)
    args.dtype = args.dtype or fast_dtype(args.device)
    rows = make_rows(records, tokenizer, model.config)
    untagged = make_rows(records, tokenizer, replace(model.config, positions=None))
    check(rows, f"none of the {len(records)} answers fits {model.config.block_size} tokens")
    twins = {id(row): twin for row, twin in zip(rows, untagged, strict=True)}
    made, tokens = [], defaultdict(int)
    for batch in itertools.islice(batches(rows, args.batch_size, seed=0), args.batches):
        sides = batch, [twins[id(row)] for row in batch]
        made.append(training_batches(*sides, args.device))
        tokens["aspd"] += sum(len(row.token) for row in sides[0])
        tokens["untagged"] += sum(len(row.token) for row in sides[1])

    sides = training_steps(model, args)
    found = []
    for n in range(len(made)):
        runs = {name: partial(step, made[n][name]) for name, step in sides.items()}
        in_turn(runs, 1, args.device)  # a warm-up
        seconds, _ = in_turn(runs, args.repeats, args.device, first=n)
        found.append({"batch": n, "seconds": seconds})
    seconds = {name: sum(row["seconds"][name] for row in found) for name in sides}
    pace = {name: tokens.get(name, tokens["aspd"]) / s for name, s in seconds.items()}
    summary = {"tokens_s": pace, "memory_gb": memory(args.device)}
    summary |= {f"of_{name}": pace["aspd"] / pace[name] for name in sides if name != "aspd"}
    summary["extra_tokens"] = tokens["aspd"] / tokens["untagged"] - 1
    summary["extra_time"] = seconds["aspd"] / seconds["untagged"] - 1
    table(f"training in {args.dtype}, {len(made)} batches of {args.batch_size} answers, "
          f"{tokens['aspd']} tokens; nanogpt is a stand-in", ["side", "tokens/s", "aspd / this"],
          [[name, p, pace["aspd"] / p] for name, p in pace.items()], [",.0f", ".3f"])
    print("against the same answers untagged: {extra_tokens:+.1%} tokens, {extra_time:+.1%} time a "
          "step; peak memory {memory_gb:.2f} GB".format(**summary))
    return summary, found


def bench_all(args):
    """--step, --replay and, below a billion parameters, --train, for SmolLM2's shape and a 7B one,
    or for --shape alone; compiled on CUDA."""
    summary, results = {}, []
    for shape in [args.shape] if args.shape else ["smollm2-135m", "qwen2.5-7b"]:
        print(f"\n=== {shape}")
        args = Namespace(**vars(args) | {"shape": shape, "replay": args.all_gpu})
        args.compile |= is_cuda(args.device)
        many = Namespace(**vars(args) | {"repeats": max(args.repeats, 5), "data": args.all_gpu})
        lm = get_lm(args, (r["response"] for r in read_records(args.all_gpu)))
        parts = {"step": partial(bench_step, many, lm), "replay": partial(bench_replay, args, lm)}
        if count(lm.model) < 1e9:
            parts["train"] = partial(bench_train, many)  # a model of its own
        for name, bench in parts.items():
            if is_cuda(args.device):
                torch.cuda.reset_peak_memory_stats(args.device)
            summary[f"{shape} {name}"], found = bench()
            results += [{"bench": f"{shape} {name}"} | row for row in found]
        del lm, parts, bench  # the next model needs their memory
        torch._dynamo.reset()
    return summary, results


# ---- command line -----------------------------------------------------------

def parse_args(argv=None):
    """The command line's arguments."""
    p = argparse.ArgumentParser(description="Measures ASPD; by default on the built-in corpus.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = p.add_mutually_exclusive_group()
    add = what.add_argument
    add("--prompts", metavar="FILE", help='decode JSON Lines of {"prompt", "category"}')
    add("--held-out", metavar="FILE", help="loss on the answers of a file that train.py holds out")
    add("--extract", metavar="FILE", help="what is parallel in these answers: PPD, ABN, APD, APE")
    add("--transformers", metavar="FILE", help="decode these prompts, beside that library")
    add("--replay", metavar="FILE", help="feed these answers through the engine")
    add("--step", action="store_true", help="time a step by width and context")
    add("--train", action="store_true", help="time training, beside a stand-in for nanoGPT")
    add("--all-gpu", metavar="FILE", help="the last three, on these answers, for two shapes")
    add = p.add_argument
    add("--ckpt", default="out", metavar="DIR", help="a folder with a ckpt.pt")
    add("--baseline", metavar="DIR", help="the serial twin's; none: --ckpt with blocks forbidden")
    add("--shape", choices=SHAPES, help="instead of --ckpt: random weights of a published shape")
    add("--tokenizer", metavar="DIR",
        help="with --shape: of a folder with a ckpt.pt; none: learnt from the texts")
    add("--published", metavar="DIR", help="with --transformers: the folder --ckpt was made of")
    add("--data", metavar="FILE", help="with --train: answers; none: the built-in corpus")
    add("--n", type=int, default=240, help="prompts of the built-in corpus")
    add("--limit", type=int, help="only so many prompts or answers, spread evenly over the file")
    add("--repeats", type=int, help="runs to take the median of; none: 1, --step 30, --train 5")
    add("--contexts", type=int, nargs="+", default=[512, 128, 2048], help="--step: filled slots")
    add("--batch-size", type=int, default=4, help="with --train, --held-out: answers in memory")
    add("--batches", type=int, default=8, help="with --train: different batches")
    add("--block-size", type=int, default=1024, help="--train, --held-out: of rows, at most")
    add("--max-new-tokens", type=int, default=1024, help="after a prompt; tags and titles count")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="sample from the k best tokens; 0 is off")
    add("--top-p", type=float, default=1.0, help="from the best that together reach p; 1 is off")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--dtype", choices=("float32", "bfloat16", "float64"),
        help="none: float32, bfloat16 on CUDA; --train, --held-out: as train.py")
    add("--compile", action="store_true", help="torch.compile the step of decoding")
    add("--json", metavar="FILE", help="also write the figures here")
    args = p.parse_args(argv)
    args.repeats = args.repeats or (30 if args.step else 5 if args.train else 1)
    names = ("temperature", "top_k", "top_p", "seed")
    args.sampling = {name: getattr(args, name) for name in names}  # as generate() takes them
    check_device(args.device)
    check(args.dtype != "float64" or not (args.held_out or args.train or args.all_gpu),
          "--dtype float64: training and its loss are computed in float32 or bfloat16")
    return args


def machine(device):
    """The hardware, in words."""
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{name[1] if name else platform.machine()}, {torch.get_num_threads()} threads"


def main(argv=None):
    """The command line."""
    args = parse_args(argv)
    command = shlex.join(["python", "tests/bench.py", *(sys.argv[1:] if argv is None else argv)])
    about = {"machine": machine(args.device), "torch": torch.__version__, "command": command}
    if args.json:
        open(args.json, "a").close()  # fails now, if it fails, and not after the work
    for name, value in about.items():
        print(f"{name}: {value}")
    benches = {"prompts": bench_prompts, "held_out": bench_held_out, "extract": bench_extract,
               "replay": bench_replay, "transformers": bench_transformers, "step": bench_step,
               "train": bench_train, "all_gpu": bench_all}
    chosen = [bench for name, bench in benches.items() if getattr(args, name)]
    summary, results = (chosen or [bench_corpus])[0](args)
    if args.json:
        found = {"summary": about | summary, "results": results}
        found = json.dumps(found, ensure_ascii=False, indent=1)
        Path(args.json).write_text(found + "\n", "utf-8", "backslashreplace")


if __name__ == "__main__":
    cli(main)
