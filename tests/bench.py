"""
Measures ASPD: against serial decoding, and against what the machine can do. Prints tables; --json keeps the figures.

    python tests/bench.py --baseline out-serial                        # the built-in corpus: speed and facts
    python tests/bench.py --prompts FILE.jsonl --baseline out-serial   # your prompts
    python tests/bench.py --held-out FILE.jsonl --baseline out-serial  # loss on the answers that train.py held out
    python tests/bench.py --transformers FILE.jsonl --ckpt DIR         # a published model, against that library
    python tests/bench.py --replay FILE.jsonl --shape smollm2-135m     # given answers, whatever the weights know
    python tests/bench.py --step --shape qwen2.5-7b                    # a step's time by width, memory bandwidth
    python tests/bench.py --train --shape smollm2-135m                 # training against a bare loop
    python tests/bench.py --all-gpu FILE.jsonl                         # the last three for two shapes, compiled

After a warm-up the sides of a comparison take turns, answer by answer or step by step. Seconds are wall-clock with
prefill and grammar, the device synchronised before every reading; only plain-answer tokens count as tokens.
"""
import argparse
import json
import platform
import re
import resource
import shlex
import sys
import time
from argparse import Namespace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aspd import IGNORE, Row, Special, is_block, layout, plain, stats, tokenize
from data import (cli, collate, corpus, extract, make_rows, make_tokenizer, micro_batches,
                  read_prompts, read_records, split_held_out, write_whole)
from decode import BRANCH, LM, MAX_BRANCHES, SERIAL, TITLE_CAP, Answer, Engine, forward_pass, generate, load
from model import GPT, GPTConfig, fast_dtype
from train import held_out_loss, make_optimizer, train_step

SHAPES = {  # published models, to be filled with random weights
    "tiny": dict(block_size=4096, vocab_size=4096, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_inner=128,
                 head_size=16),
    "smollm2-135m": dict(block_size=8192, vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536,
                         head_size=64),
    "qwen2.5-7b": dict(block_size=32768, vocab_size=152064, n_layer=28, n_head=28, n_kv_head=4, n_embd=3584,
                       n_inner=18944, head_size=128, qkv_bias=True, tied=False),
    "llama-2-7b": dict(block_size=4096, vocab_size=32000, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096,
                       n_inner=11008, head_size=128, tied=False),
}
WIDTHS = (1, 2, 4, 8, 16)
PLACES = ("outside", "titles", "first branches", "later branches")
FIGURES = {  # key in the JSON: heading and format in the tables, meaning
    "answers": ("n", "d", "answers"),
    "parallel": ("par.", ".0%", "share of answers with a block"),
    "branches": ("br.", ".1f", "branches a block"),
    "ideal": ("ideal", ".2f", "plain tokens / steps"),
    "fewer_steps": ("steps", ".2f", "the serial side's steps / ASPD's"),
    "branchwise": ("branchw.", ".2f", "times faster a token than branch after branch with the same weights"),
    "speedup": ("speed", ".2f", "times faster a token than the serial side: all seconds / all tokens"),
    "average": ("average", ".2f", "the same answer by answer, mean"),
    "best": ("best", ".2f", "the same answer by answer, largest"),
    "realised": ("real.", ".2f", "speed / ideal"),
    "tokens_s": ("tok/s", ".1f", "tokens a second"),
    "tokens_s_serial": ("serial", ".1f", "tokens a second, serial side"),
    "ttft": ("ttft", ".0f", "milliseconds to the first token, median"),
    "ttft_serial": ("serial", ".0f", "the same, serial side"),
    "cut": ("cut", ".0%", "share of answers that the budget cut"),
    "facts": ("facts", ".1%", "share of facts right"),
    "facts_baseline": ("serial", ".1%", "the same, serial side"),
    "exact": ("exact", ".1%", "share of answers that are, to the character, as the corpus would have them"),
    "exact_baseline": ("serial", ".1%", "the same, serial side"),
    "duplicates": ("dup.", ".0%", "share of blocks with branches that repeat each other"),
    "speedup_without": ("w/o dup.", ".2f", "speed without the answers that have such a block"),
}


def clock(device):
    """Seconds, once the device has done all it was asked to."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(device):
    """Peak memory in GB: of the GPU's tensors, or of this process."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def count(model):
    """Parameters; a tied head counts once."""
    return sum(p.numel() for p in model.parameters())


def table(title, headings, rows, formats):
    """Prints rows, the first cell of each a name, under their headings; None as a dash."""
    cells = [[row[0]] + ["-" if v is None else format(v, f) for v, f in zip(row[1:], formats)] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells)]
    print(f"\n{title}")
    for name, *values in [headings, *cells]:
        print("  ".join([f"{name:<{widths[0]}}"] + [f"{v:>{w}}" for v, w in zip(values, widths[1:])]))


def evenly(items, n):
    """n of the items, spread evenly; all of them where n is None."""
    return items if n is None else [items[i] for i in sorted(set(np.linspace(0, len(items) - 1, n).astype(int)))]


def sampling(args):
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}


def get_lm(args, texts, dtype=None):
    """The model to measure, with tags: --ckpt, or random weights of a published --shape."""
    dtype = dtype or args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if not args.shape:
        lm = load(args.ckpt, args.device, dtype, args.compile)
        if not lm.tokenizer.special:  # tags that the model does not know, so that tagged answers can be fed to it
            tokenizer = lm.tokenizer.add_tags()
            lm.model.grow(tokenizer.vocab_size, list(tokenizer.special[:6]))
            return LM(lm.model, tokenizer, args.compile)
        return lm
    tokenizer, config = make_tokenizer(args.tokenizer, iter(texts)), GPTConfig(**SHAPES[args.shape])
    config.vocab_size = max(config.vocab_size, tokenizer.vocab_size)
    with torch.device("meta"):
        model = GPT(config).to(getattr(torch, dtype))
    model = model.to_empty(device=args.device).eval().requires_grad_(False)  # 7B parameters never pass through the CPU
    for p in model.parameters():
        p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1.0)
    return LM(model, tokenizer, args.compile)


def facts_right(answer, facts):
    """Share of the facts that the answer states, whatever its line breaks."""
    answer = " ".join(answer.split())
    return sum(" ".join(fact.split()) in answer for fact in facts) / len(facts)


# -----------------------------------------------------------------------------
# comparing sides, answer by answer

def compare(records, sides, args, judge=lambda answer, record: {}):
    """
    Answers every record on every side ({name: function of a record -> Answer}), the sides taking turns -> a result a
    record. judge adds figures to a side. With --compile a first round is not timed: it may meet a new shape.
    """
    results, names = [], list(sides)
    for run in tqdm(sides.values(), desc="warm-up", leave=False, disable=None):
        run(records[0])
    for n, r in enumerate(tqdm(records, desc="answers", leave=False, disable=None)):
        seconds, answers = {name: [] for name in names}, {}
        for k in range(args.repeats + args.compile):
            turn = (n + k) % len(names)
            for name in names[turn:] + names[:turn]:
                began = clock(args.device)
                answers[name] = sides[name](r)
                seconds[name].append(clock(args.device) - began)
        results.append({"category": r.get("category") or "other", "prompt": r["prompt"]})
        for name, a in answers.items():
            results[-1][name] = {"seconds": float(np.median(seconds[name][args.compile:])), "ttft": a.ttft,
                                 "tokens": a.tokens, "steps": a.steps, "blocks": a.blocks, "finish": a.finish,
                                 "text": a.text, **judge(a, r)}
    return results


def figures(results):
    """FIGURES of some results, whose sides are "aspd", "serial" and, where it ran, "branchwise"."""
    get = lambda side, key: np.array([r[side][key] for r in results], dtype=float)
    ran = [side for side in ("aspd", "serial", "branchwise") if side in results[0]]
    seconds, tokens = ({side: np.maximum(get(side, key), 1e-9) for side in ran} for key in ("seconds", "tokens"))
    pace = {side: seconds[side].sum() / tokens[side].sum() for side in ran}
    each = seconds["serial"] / tokens["serial"] / (seconds["aspd"] / tokens["aspd"])
    blocks = [len(b) for r in results for b in r["aspd"]["blocks"]]
    f = {"answers": len(results), "parallel": np.mean([bool(r["aspd"]["blocks"]) for r in results]),
         "branches": np.mean(blocks) if blocks else None, "ideal": tokens["aspd"].sum() / get("aspd", "steps").sum(),
         "fewer_steps": get("serial", "steps").sum() / get("aspd", "steps").sum(),
         "speedup": pace["serial"] / pace["aspd"], "average": each.mean(), "best": each.max(),
         "tokens_s": 1 / pace["aspd"], "tokens_s_serial": 1 / pace["serial"],
         "ttft": 1000 * np.median(get("aspd", "ttft")), "ttft_serial": 1000 * np.median(get("serial", "ttft")),
         "cut": np.mean([r["aspd"]["finish"] == "length" for r in results])}
    f["realised"] = f["speedup"] / f["ideal"]
    if "branchwise" in ran:
        f["branchwise"] = pace["branchwise"] / pace["aspd"]
    if "facts" in results[0]["aspd"]:
        for side, suffix in (("aspd", ""), ("serial", "_baseline")):
            right, stated = get(side, "right"), get(side, "facts")
            f |= {"facts" + suffix: right.sum() / stated.sum(), "exact" + suffix: np.mean(get(side, "exact"))}
    if "duplicates" in results[0]["aspd"]:
        repeated = [d for r in results for d in r["aspd"]["duplicates"]]
        keep = np.array([not any(r["aspd"]["duplicates"]) for r in results])
        kept = {side: seconds[side][keep].sum() / tokens[side][keep].sum() for side in ran} if keep.any() else None
        f |= {"duplicates": np.mean(repeated) if repeated else None,
              "speedup_without": kept and kept["serial"] / kept["aspd"]}
    return {key: v if v is None or isinstance(v, int) else float(v) for key, v in f.items()}


def report(results, is_parallel, leave_out):
    """
    Prints a row a kind (category), and one each for the parallel kinds, the serial kinds and all -> the summary:
    {"all", "parallel", "serial": FIGURES, "kinds": {kind: FIGURES}} and headline figures. is_parallel: kind -> bool.
    """
    kinds = {}
    for r in results:
        kinds.setdefault(r["category"], []).append(r)
    groups = {"parallel": [r for r in results if is_parallel(r["category"])],
              "serial": [r for r in results if not is_parallel(r["category"])], "all": results}
    kinds, groups = ({name: figures(rs) for name, rs in parts.items() if rs} for parts in (kinds, groups))
    keys = [key for key in FIGURES if key in groups["all"] and key not in leave_out]
    rows = [*kinds.items(), *((f"= {name}" + " kinds" * (name != "all"), f) for name, f in groups.items())]
    table("", ["kind"] + [FIGURES[key][0] for key in keys], [[name, *map(f.get, keys)] for name, f in rows],
          [FIGURES[key][1] for key in keys])
    print("\n" + "\n".join(f"  {FIGURES[key][0]:<9} {FIGURES[key][2]}" for key in keys))
    parallel, serial, everything = (groups.get(name, {}) for name in ("parallel", "serial", "all"))
    return {"parallel_steps_ratio": parallel.get("fewer_steps"), "parallel_speedup": parallel.get("speedup"),
            "parallel_ideal": parallel.get("ideal"), "ideal_realised": parallel.get("realised"),
            "serial_opened": serial.get("parallel"), "serial_speed": serial.get("speedup"),
            "all_speed": everything["speedup"], "all_average": everything["average"], "all_best": everything["best"],
            **{key: everything[key] for key in ("facts", "facts_baseline", "exact", "exact_baseline")
               if key in everything}, **groups, "kinds": kinds}


def opens_blocks(results):
    """A function: whether more than a tenth of ASPD's answers to a kind of prompt have a block."""
    return lambda kind: np.mean([bool(r["aspd"]["blocks"]) for r in results if r["category"] == kind]) > 0.1


def decoders(args, names):
    """The sides "aspd" and "branchwise" (--ckpt) and "serial" (--baseline) for compare(), and the tokenizer."""
    lm = load(args.ckpt, args.device, args.dtype, args.compile)
    twin = load(args.baseline, args.device, args.dtype, args.compile) if args.baseline else lm
    print(f"serial side: {args.baseline or 'the same weights, blocks forbidden'}")
    side = lambda lm, mode: lambda r: generate(lm, r["prompt"], mode=mode, max_new_tokens=args.max_new_tokens,
                                               **sampling(args))
    sides = {"aspd": side(lm, "adaptive"), "branchwise": side(lm, "branchwise"), "serial": side(twin, "serial")}
    return {name: sides[name] for name in names}, lm.tokenizer


def bench_corpus(args):
    """Held-out prompts of the built-in corpus. A kind is parallel where most of the corpus' answers have a block."""
    records, has_block = corpus(args.n, split="val"), {}
    for r in records:
        segments, _ = extract(r["response"], r["prompt"])
        has_block.setdefault(r["category"], []).append(not all(isinstance(s, str) for s in segments))
    sides, _ = decoders(args, ("aspd", "branchwise", "serial"))
    judge = lambda a, r: {"right": round(facts_right(a.text, r["facts"]) * len(r["facts"])), "facts": len(r["facts"]),
                          "exact": a.text == r["response"]}
    results = compare(records, sides, args, judge)
    leave_out = ("average", "best", "cut", "tokens_s", "tokens_s_serial")
    return report(results, lambda kind: np.mean(has_block[kind]) > 0.5, leave_out), results


def alike(texts):
    """Whether two of the texts repeat each other: over 0.8 of their distinct three-word sequences are common."""
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    grams = [set(zip(w, w[1:], w[2:])) or {tuple(w)} for w in words if w]
    return any(len(a & b) > 0.8 * len(a | b) for a, b in combinations(grams, 2))


def bench_prompts(args):
    """A file of prompts. A category is parallel where more than a tenth of ASPD's answers have a block."""
    sides, tokenizer = decoders(args, ("aspd", "serial"))
    judge = lambda a, r: {"duplicates": [alike([tokenizer.decode(rest) for _, rest in s])
                                         for s in a.segments if is_block(s)]}
    results = compare(evenly(read_prompts(args.prompts), args.limit), sides, args, judge)
    for r in evenly(results, args.show):
        a = r["aspd"]
        print(f"\n--- {r['category']}: {r['prompt']}\n{a['text']}\n[{a['tokens']} tokens in {a['steps']} steps, tokens "
              f"of the branches {a['blocks']}, repeating each other {a['duplicates']}, finish: {a['finish']}]")
    return report(results, opens_blocks(results), ("fewer_steps",)), results


def hidden_row(prompt, ids):
    """
    (Row, places) of an untagged answer under the branch mask: no branch sees a sibling or its title, and each starts
    where the block does. Targets are the branches' tokens after their titles: what a serial model loses on them is
    what it would have read off the siblings.
    """
    pieces, at, n_block, places = [(prompt, 0, 0, 0, None)], len(prompt), 0, []
    for s in ids:
        start, n_block = at, n_block + is_block(s)
        for i, (title, rest) in enumerate(s if is_block(s) else [([], s)]):
            place = ("later branches" if i else "first branches") if is_block(s) else None
            branch = (n_block, i + 1) if is_block(s) else (0, 0)
            pieces += [(title, *branch, start, None), (rest, *branch, start + len(title), place)]
            at += len(title) + len(rest)
            start = start if is_block(s) else at
    token = np.array([t for tokens, *_ in pieces for t in tokens])
    block, branch = (np.repeat([piece[k] for piece in pieces], [len(piece[0]) for piece in pieces]) for k in (1, 2))
    position = np.concatenate([piece[3] + np.arange(len(piece[0])) for piece in pieces])
    places = [place for tokens, *_, place in pieces for _ in tokens]
    known = np.append([place is not None for place in places[1:]], False)
    return (Row(token, block, branch, position, np.where(known, np.roll(token, -1), IGNORE)),
            [place for place in places if place])


@torch.no_grad()
def loss_by_place(lm, records, block_size, side, dtype):
    """
    {place in the answer: [summed loss, plain tokens]} of a side: "aspd", "serial" or "hidden" (serial, as hidden_row
    has it), all cut into the same tokens. A title counts where it is first written.
    """
    tokenizer, total = lm.tokenizer, {place: [0.0, 0] for place in PLACES}
    special, device = tokenizer.special or Special(*[tokenizer.eos] * 7), torch.device(lm.device)
    for r in tqdm(records, desc="by place", leave=False, disable=None):
        ids = tokenize(extract(r["response"], r["prompt"])[0], tokenizer.encode)
        prompt = tokenizer.prompt(r["prompt"])
        row = layout(prompt, ids, special, lm.model.config.positions, lm.model.config.stride)
        if max(row.position.max() + 1, len(row.token)) > block_size:
            continue
        places = []
        for s in ids:
            if is_block(s):
                titles = [["titles"] * len(title) for title, _ in s]
                rests = [["later branches" if i else "first branches"] * len(rest) for i, (_, rest) in enumerate(s)]
                ordered = titles + rests if side == "aspd" else [part for pair in zip(titles, rests) for part in pair]
                places += sum(ordered, [])
            else:
                places += ["outside"] * len(s)
        row = row if side == "aspd" else layout(prompt, [plain(ids)], special)
        if side == "hidden":
            row, places = hidden_row(prompt, ids)
        if not places:
            continue
        idx, position, mask, pick, target = collate([row], lm.device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = lm.model(idx, position, mask, pick=pick)
        losses = F.cross_entropy(logits.float(), target, reduction="none").tolist()
        losses = [loss for loss, t in zip(losses, target.tolist()) if t not in (IGNORE, tokenizer.eos, *special)]
        for place, loss in zip(places, losses, strict=True):
            total[place][0] += loss
            total[place][1] += 1
    return total


def bench_held_out(args):
    """Loss a plain token on the file's held-out answers: ASPD under its mask, its serial twin on the same, untagged."""
    if not args.baseline:
        raise ValueError("--held-out compares two models: add --baseline, the serial twin's folder")
    _, records = split_held_out(list(read_records(args.held_out)))
    dtype = args.dtype or fast_dtype(args.device)
    settings = Namespace(device=args.device, dtype=dtype, micro_tokens=4096, no_branch_mask=False)
    losses, counts, by_place = {}, {}, {}
    for mode, path in (("aspd", args.ckpt), ("serial", args.baseline)):
        lm = load(path, args.device, "float32")
        if mode == "aspd" and not lm.tokenizer.special:
            raise ValueError(f"--held-out: --ckpt {path} has no tags, so it is not an ASPD model")
        rows, _ = make_rows(evenly(records, args.limit), lm.tokenizer, lm.model.config, mode, args.block_size)
        if not rows:
            raise ValueError(f"{args.held_out}: no held-out answer fits {args.block_size} tokens")
        counts[mode] = [len(rows), sum(len(r.token) for r in rows)]
        not_text = [lm.tokenizer.eos, *(lm.tokenizer.special or ())]
        losses[mode] = float(held_out_loss(lm.model, rows, not_text, settings))
        limit = min(args.block_size or lm.model.config.block_size, lm.model.config.block_size)
        for side in ("aspd",) if mode == "aspd" else ("serial", "hidden"):
            by_place[side] = loss_by_place(lm, evenly(records, args.limit), limit, side, dtype)
    table("held-out loss", ["side", "answers", "row tokens", "loss", "of serial"],
          [[mode, *counts[mode], loss, loss / losses["serial"]] for mode, loss in losses.items()],
          ["d", "d", ".4f", ".4f"])
    sums = {mode: sum(loss for loss, _ in places.values()) for mode, places in by_place.items()}
    found = [{"place": place, "tokens": n, "aspd": loss / n, "serial": by_place["serial"][place][0] / n,
              "hidden": by_place["hidden"][place][0] / n or None, "of_serial": loss / by_place["serial"][place][0],
              "share": (loss - by_place["serial"][place][0]) / (sums["aspd"] - sums["serial"] or 1)}
             for place, (loss, n) in by_place["aspd"].items() if n]
    table("by place, the answers cut into the same tokens on all sides; hidden: the serial side, its siblings hidden",
          ["place", "tokens", "aspd", "serial", "hidden", "of serial", "of the difference"],
          [list(row.values()) for row in found], ["d", ".4f", ".4f", ".4f", ".4f", ".0%"])
    summary = {"held_out_loss": losses, "of_serial": losses["aspd"] / losses["serial"], "answers": counts["aspd"][0]}
    return summary, found


def bench_transformers(args):
    """Our serial greedy decoding of a published model against the transformers library's: logits, text, speed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError("--transformers needs that library beside (pip install transformers)") from None
    lm = load(args.ckpt, args.device, args.dtype, args.compile)
    dtype, eos = lm.model.wte.weight.dtype, lm.tokenizer.eos
    model = AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=dtype).to(args.device).eval()
    errors = []

    def ours(r):
        return generate(lm, r["prompt"], mode="serial", max_new_tokens=args.max_new_tokens)

    @torch.no_grad()
    def theirs(r):
        ids = torch.tensor([lm.tokenizer.prompt(r["prompt"])], device=args.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens,
                             do_sample=False, eos_token_id=eos, pad_token_id=eos)
        new = [i for i in out[0, ids.size(1):].tolist() if i != eos]
        return Answer(r["prompt"], lm.tokenizer.decode(new), "serial", len(new), len(new), 0, 0, [], "", [new])

    records = evenly(read_prompts(args.transformers), args.limit)
    for r in records[:10]:
        ids = torch.tensor([lm.tokenizer.prompt(r["prompt"])], device=args.device)
        with torch.no_grad():
            a, b = lm.model(ids, torch.arange(ids.size(1), device=args.device)[None]).float(), model(ids).logits.float()
        errors.append(float((a - b).abs().max() / b.abs().max()))
    results = compare(records, {"ours": ours, "theirs": theirs}, args)
    total = lambda side, key: sum(r[side][key] for r in results)
    pace = {side: total(side, "tokens") / total(side, "seconds") for side in ("ours", "theirs")}
    same = np.mean([r["ours"]["text"] == r["theirs"]["text"] for r in results])
    table(f"serial greedy decoding of {args.ckpt}, {len(results)} prompts, {dtype}", ["side", "tokens", "tokens/s"],
          [[side, total(side, "tokens"), pace[side]] for side in pace], ["d", ".1f"])
    print(f"ours / theirs {pace['ours'] / pace['theirs']:.2f}; the same text in {same:.0%} of the answers; "
          f"logits of the prompts differ by {max(errors):.1e} of the largest at most")
    return {"tokens_s": pace, "ratio": pace["ours"] / pace["theirs"], "same_text": same,
            "logits_difference": max(errors)}, results


# -----------------------------------------------------------------------------
# replay: given answers through the engine

def script(ids, special):
    """
    What a model must choose to write this tokenised answer: a list of tokens for the prefill and for every step. A
    branch chooses its tokens up to <|/branch|>, and takes part in one more pass, which feeds that.
    """
    passes, end = [], special.branch_end
    for s in ids:
        if not is_block(s):
            passes += [[i] for i in s]
            continue
        passes += [[i] for title, _ in s for i in (special.title, *title, special.title_end)] + [[special.para]]
        rests = [rest + [end] for _, rest in s]
        passes += [[(rest + [end])[k] for rest in rests if k <= len(rest)] for k in range(max(map(len, rests)) + 1)]
    return passes + [[special.eos]]


def replay(lm, record, mode, options, keep=None):
    """
    Decodes with the script's tokens put in place of the chosen ones; the step runs as ever. keep: takes the logits.
    Raises ValueError where the engine does not give the answer back, in exactly the steps that aspd.stats predicts.
    """
    ids, real = record["ids"] if mode == "adaptive" else [plain(record["ids"])], lm.step
    passes = iter(script(ids, lm.tokenizer.special))

    def step(*args):
        chosen, logits = real(*args)
        chosen.cpu()  # the synchronisation that reading the tokens costs
        tokens = next(passes)
        if keep is not None:
            keep.append(logits[:len(tokens)].float().cpu().clone())
        return torch.tensor(tokens), logits

    lm.step = step
    try:
        answer = generate(lm, record["prompt"], mode=mode, max_new_tokens=record["budget"], **options)
    finally:
        lm.step = real
    if answer.segments != ids or answer.steps != stats(ids).steps or answer.finish != "stop":
        raise ValueError(f"replay, {mode}: {answer.steps} steps, {stats(ids).steps} expected, finish "
                         f"{answer.finish!r}, for the answer to {record['prompt'][:60]!r}")
    return answer


def to_replay(records, lm):
    """Adds "ids" and "budget" (row tokens that let every branch end by itself); leaves out what would be cut."""
    out, special, context = [], lm.tokenizer.special, lm.model.config.block_size
    for r in records:
        ids = tokenize(extract(r["response"], r["prompt"])[0], lm.tokenizer.encode)
        blocks = [s for s in ids if is_block(s)]
        budget = len(layout([], ids, special).token)
        budget += sum(len(b) * (max(len(title) + len(rest) for title, rest in b) + 100) for b in blocks)
        titles = [len(title) for b in blocks for title, _ in b]
        if r["prompt"].strip() and len(lm.tokenizer.prompt(r["prompt"])) + budget <= context \
                and max(titles, default=0) <= TITLE_CAP and max(map(len, blocks), default=0) <= MAX_BRANCHES:
            out.append({**r, "ids": ids, "budget": budget})
    return out


def bench_replay(args, lm=None):
    """Given answers: adaptive against our own serial decoding of the same tokens with the same weights."""
    given = list(read_records(args.replay))
    lm = lm or get_lm(args, (r["response"] for r in given))
    given, options = evenly(given, args.limit), sampling(args)
    records = to_replay(given, lm)
    if not records:
        raise ValueError(f"{args.replay}: no answer fits a context of {lm.model.config.block_size} tokens")
    side = lambda mode: lambda r: replay(lm, r, mode, options)
    results = compare(records, {"aspd": side("adaptive"), "serial": side("serial")}, args)
    summary = report(results, opens_blocks(results), ("fewer_steps", "cut"))
    summary |= {"left_out": len(given) - len(records), "memory_gb": memory(args.device)}
    if args.compile:
        summary |= compiled_against_eager(lm, records[0], options)
        print("\ncompiled against eager: logits differ by {compiled_difference:.1e} of the largest at most, the best "
              "token is the same in {compiled_same:.2%}".format(**summary))
    print(f"\n{len(records)} answers; {summary['left_out']} left out (a title over {TITLE_CAP} tokens, over "
          f"{MAX_BRANCHES} branches, or too long for the context); peak memory {summary['memory_gb']:.2f} GB")
    return summary, results


def compiled_against_eager(lm, record, options):
    """Replays one answer compiled and eager, and compares the logits of every choice."""
    compiled, logits = lm.step, {True: [], False: []}
    for lm.compiled, lm.step in ((False, forward_pass), (True, compiled)):
        replay(lm, record, "adaptive", options, logits[lm.compiled])
    a, b = map(torch.cat, logits.values())
    return {"compiled_difference": float((a - b).abs().max() / b.abs().max()),
            "compiled_same": float((a.argmax(-1) == b.argmax(-1)).float().mean())}


# -----------------------------------------------------------------------------
# the machine: steps and training

def time_steps(lm, contexts, rounds, args):
    """Median seconds of an engine pass that fills a context up, {(context, width): s}, and a large copy's bytes/s."""
    source = torch.ones(2**30 if lm.device.type == "cuda" else 2**28, dtype=torch.uint8, device=lm.device)
    target, times, warm = torch.empty_like(source), {"copy": []}, 3
    choose = tuple(sampling(args).values())[:3]
    if lm.compiled:
        lm.warm_up(choose, max(contexts))
    engine = Engine(lm, [], "adaptive", max(contexts), choose, 0, MAX_BRANCHES, None)
    for _ in tqdm(range(warm + rounds), desc="rounds", leave=False, disable=None):
        for n in contexts:
            for W in WIDTHS:
                engine.slot = n - W
                branches, state = ([0], SERIAL) if W == 1 else (range(1, W + 1), BRANCH)
                began = clock(lm.device)
                engine.feed([0] * W, [n - 1] * W, branches, range(W), [state] * W)
                times.setdefault((n, W), []).append(clock(lm.device) - began)
        began = clock(lm.device)
        target.copy_(source)
        times["copy"].append(clock(lm.device) - began)
    times = {key: float(np.median(seconds[warm:])) for key, seconds in times.items()}
    return times, 2 * len(source) / times.pop("copy")


def bench_step(args, lm=None):
    """Step time by width and by context, and the memory bandwidth reached: weights once and the cache, over time."""
    lm = lm or get_lm(args, (r["response"] for r in corpus(500)))
    model, c = lm.model, lm.model.config
    if not max(WIDTHS) <= args.context <= c.block_size:
        raise ValueError(f"--context must be {max(WIDTHS)} to the model's {c.block_size}, not {args.context}")
    contexts = sorted({n for n in (*args.contexts, args.context) if max(WIDTHS) <= n <= c.block_size})
    times, copy = time_steps(lm, contexts, args.repeats, args)
    size = model.wte.weight.element_size()
    read = size * (count(model) + 2 * args.context * c.n_layer * c.n_kv_head * c.head_size
                   - (0 if c.tied else model.wte.weight.numel()))  # an untied embedding is read a row a token
    steps = {str(W): times[args.context, W] for W in WIDTHS}
    rows = {W: [1000 * t, t / steps["1"], 1000 * t / int(W), read / t / 1e9, read / t / copy] for W, t in steps.items()}
    table(f"a step at context {args.context} reads {read / 1e9:.3f} GB; a copy reads and writes {copy / 1e9:.1f} GB/s",
          ["width", "ms a step", "x width 1", "ms a token", "GB/s", "of copy"], [[W, *row] for W, row in rows.items()],
          [".3f", ".2f", ".3f", ".1f", ".0%"])
    per_token = {str(n): {str(W): 1000 * times[n, W] / W for W in WIDTHS} for n in contexts}
    table("ms a token by context and number of branches", ["context", *map(str, WIDTHS)],
          [[n, *row.values()] for n, row in per_token.items()], [".3f"] * len(WIDTHS))
    column = lambda k: {W: row[k] for W, row in rows.items()}
    return {"step_ms": column(0), "step_ratio": column(1), "bandwidth_share": column(4), "copy_gb_s": copy / 1e9,
            "memory_gb": memory(lm.device)}, [{"context": int(n), "ms_a_token": row} for n, row in per_token.items()]


def bench_train(args, lm=None):
    """
    Our training step on tagged rows, on plain causal rows of the same tokens, and on the same answers untagged, against
    a bare loop: the same model, tokens and optimizer, but batches made ready before, no mask, no clipping. All train
    the same weights.
    """
    records, size = list(read_records(args.data)) if args.data else corpus(500), 8192
    dtype = args.dtype or fast_dtype(args.device)
    lm = lm or get_lm(Namespace(**vars(args) | {"compile": False}), (r["response"] for r in records), "float32")
    model, B = lm.model.float().train().requires_grad_(True), args.batch_size
    make = lambda mode: make_rows(records, lm.tokenizer, model.config, mode, args.block_size)[0]
    tagged, untagged = (evenly(make(mode), args.batches * B) for mode in ("aspd", "serial"))
    batches, plain_batches = ([rows[n:n + B] for n in range(0, len(rows), B)] for rows in (tagged, untagged))
    serial = [[r._replace(block=0 * r.block, branch=0 * r.branch, position=np.arange(len(r.token))) for r in batch]
              for batch in batches]
    ready = [[collate(group, args.device) for group in micro_batches(batch, size)] for batch in serial]
    net = torch.compile(model, dynamic=True) if args.compile else model
    settings = Namespace(device=args.device, dtype=dtype, micro_tokens=size, no_branch_mask=False)
    optimizer = make_optimizer(model, 1e-5)

    def bare(groups):
        for idx, position, _, pick, target in groups:
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = net(idx, position, None, pick=pick)
            F.cross_entropy(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    step = lambda batch: train_step(net, batch, optimizer, settings)
    sides = {"aspd": (step, batches), "serial": (step, serial), "bare": (bare, ready),
             "untagged": (step, plain_batches)}
    times, peaks = {name: [[] for _ in batches] for name in sides}, []
    for k in tqdm(range(1 + args.repeats), desc="rounds", leave=False, disable=None):  # the first warms up
        for n in range(len(batches)):
            for name in [*sides, *sides][(n + k) % len(sides):][:len(sides)]:
                run, made = sides[name]
                began = clock(args.device)
                run(made[n])
                times[name][n].append(clock(args.device) - began)
        peaks.append(memory(args.device))
    seconds = {name: sum(float(np.median(t[1:])) for t in ts) for name, ts in times.items()}
    tokens = dict.fromkeys(sides, sum(len(r.token) for r in tagged))
    tokens["untagged"] = sum(len(r.token) for r in untagged)
    pace = {name: tokens[name] / s for name, s in seconds.items()}
    summary = {"tokens_s": pace, "of_bare": pace["aspd"] / pace["bare"], "memory_first_gb": peaks[0],
               "aspd_step": pace["serial"] / pace["aspd"], "memory_gb": peaks[-1],
               "extra_tokens": tokens["aspd"] / tokens["untagged"] - 1,
               "extra_time": seconds["aspd"] / seconds["untagged"] - 1}
    table(f"training on {len(batches)} batches of {B} answers, {tokens['aspd']} tokens",
          ["side", "tokens/s", "of bare"], [[name, p, p / pace["bare"]] for name, p in pace.items()], [",.0f", ".3f"])
    print("an ASPD step takes {aspd_step:.3f} of a serial step's time at the same tokens\n"
          "against the same answers untagged: {extra_tokens:+.1%} tokens, {extra_time:+.1%} time a step\n"
          "peak memory {memory_first_gb:.2f} GB after the first round, {memory_gb:.2f} after all".format(**summary))
    return summary, [{"side": name, "batch": n, "seconds": t[1:]} for name in sides for n, t in enumerate(times[name])]


def all_gpu(args):
    """--step, --replay and, below a billion parameters, --train, for SmolLM2 and a 7B shape (or --shape alone)."""
    summary, results = {}, []
    for shape in [args.shape] if args.shape else ["smollm2-135m", "qwen2.5-7b"]:
        print(f"\n=== {shape}")
        cuda = args.device.startswith("cuda")
        args = Namespace(**vars(args) | {"shape": shape, "replay": args.all_gpu, "compile": args.compile or cuda})
        lm = get_lm(args, (r["response"] for r in read_records(args.replay)))
        many = Namespace(**vars(args) | {"repeats": max(args.repeats, 5), "contexts": [512, 2048], "data": args.replay})
        for bench, a in ((bench_step, many), (bench_replay, args), (bench_train, many)):
            if bench is not bench_train or count(lm.model) < 1e9:
                if cuda:
                    torch.cuda.reset_peak_memory_stats(args.device)
                name = f"{shape} {bench.__name__.removeprefix('bench_')}"
                summary[name], found = bench(a, lm)
                results += [{"bench": name, **r} for r in found]
        del lm  # the next model needs its memory
        torch._dynamo.reset()
    return summary, results


# -----------------------------------------------------------------------------
# command line

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Measures ASPD; by default on the built-in corpus' held-out prompts.")
    add, what = p.add_argument, p.add_mutually_exclusive_group()
    what.add_argument("--prompts", metavar="FILE", help='decode these prompts: JSON Lines of {"prompt", "category"}')
    what.add_argument("--held-out", metavar="FILE", help="loss on the answers of a file that train.py holds out")
    what.add_argument("--transformers", metavar="FILE", help="decode these prompts, beside the transformers library")
    what.add_argument("--replay", metavar="FILE", help="feed these answers through the engine (any format of data.py)")
    what.add_argument("--step", action="store_true", help="time a step by width and context")
    what.add_argument("--train", action="store_true", help="time training against a bare loop")
    what.add_argument("--all-gpu", metavar="FILE", help="--step, --replay FILE and --train, compiled, for two shapes")
    add("--ckpt", default="out", help="a train.py folder, or a published model's (%(default)s)")
    add("--baseline", metavar="DIR", help="the serial twin's folder; default: --ckpt with blocks forbidden")
    add("--shape", choices=SHAPES, help="instead of --ckpt: random weights of a published shape")
    add("--tokenizer", default="bpe", help="with --shape: bpe (learnt from the answers), a tiktoken name or a folder")
    add("--data", metavar="FILE", help="with --train: answers to train on; default: the built-in corpus")
    add("--n", type=int, default=240, help="prompts of the built-in corpus (%(default)s)")
    add("--limit", type=int, help="with --prompts, --held-out, --replay: only so many, spread evenly over the file")
    add("--show", type=int, default=0, help="with --prompts: print so many answers, spread evenly (%(default)s)")
    add("--repeats", type=int, help="runs to take the median of (default: 1; --step 30, --train 5)")
    add("--context", type=int, default=512, help="with --step: filled slots of the cache (%(default)s)")
    add("--contexts", type=int, nargs="*", default=[128, 256, 512, 1024, 2048], help="with --step: of the second table")
    add("--batch-size", type=int, default=8, help="with --train: answers a step (%(default)s)")
    add("--batches", type=int, default=4, help="with --train: different batches (%(default)s)")
    add("--block-size", type=int, default=1024, help="with --train, --held-out: leave longer answers out (%(default)s)")
    add("--max-new-tokens", type=int, default=1024, help="tokens after a prompt, tags included (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 = greedy (%(default)s)")
    add("--top-k", type=int, default=0, help="sample from the k best tokens; 0 = all (%(default)s)")
    add("--top-p", type=float, default=1.0, help="sample from the best tokens that reach p (%(default)s)")
    add("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float64"),
        help="default: float32, on CUDA bfloat16; in --train and --held-out as in train.py")
    add("--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)")
    add("--json", metavar="FILE", help="also write the figures here")
    args = p.parse_args(argv)
    args.repeats = args.repeats or (30 if args.step else 5 if args.train else 1)
    return args


def machine(device):
    """The hardware, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)|$", info)[1] or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def main(argv=None):
    args = parse_args(argv)
    if args.dtype == "float64" and (args.held_out or args.train):
        raise ValueError("--held-out and --train compute in float32 or bfloat16, not in float64")
    if args.compile and args.device == "cpu" and (args.train or args.all_gpu):
        raise ValueError("--compile: torch fails to compile training on cpu")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: CUDA is not available")
    command = "python " + shlex.join(sys.argv if argv is None else ["tests/bench.py", *argv])
    about = {"machine": machine(args.device), "torch": torch.__version__, "command": command}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    benches = dict(prompts=bench_prompts, held_out=bench_held_out, transformers=bench_transformers,
                   replay=bench_replay, step=bench_step, train=bench_train, all_gpu=all_gpu)
    summary, results = next((run for name, run in benches.items() if getattr(args, name)), bench_corpus)(args)
    if args.json:
        report = {"summary": about | summary, "results": results}
        write_whole(args.json, [json.dumps(report, ensure_ascii=False, indent=1)])


if __name__ == "__main__":
    cli(main)
