"""
The hybrid engine (paper section 3.4): one answer, one KV cache, switching by itself between serial and parallel.

    prefill -> serial text ->  titles -> prefixes -> all branches, a token each a pass -> serial text -> ... -> end
               ^ a token a pass          ^ one pass  ^ until the longest branch ends

The n-th token fed takes slot n of the cache, and is fed exactly once. owner[slot] says which live branch a slot belongs
to; when the block ends its slots become everybody's. Nothing is moved, copied or computed again.

    python decode.py --prompt "Tell me about Mars and Venus."
    python decode.py --prompts FILE.jsonl --json answers.json --temperature 0.7

    from decode import load, generate
    answer = generate(load("out"), "Tell me about Mars and Venus.")
"""
import argparse
import json
import os
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from aspd import branch_positions, is_block, plain
from data import Tokenizer, cli, published_tokenizer, read_prompts, write_whole
from model import KVCache, check_device, from_checkpoint, from_published, read_checkpoint

MODES = ("adaptive", "branchwise", "serial")
TITLE_CAP = 32   # tokens of a title at most
MIN_BRANCH = 8   # tokens that every branch can count on after its title
MAX_BRANCHES = 16

# -----------------------------------------------------------------------------
# one pass: grammar, model, sampling

TEXT_ONLY, SERIAL, TITLE_START, TITLE, AFTER_TITLE, BRANCH = range(6)  # states of the grammar


def grammar(tokenizer, vocab_size):
    """(6, V) bool: the ids allowed in each state, a row a state. Ids without a token are allowed nowhere."""
    allow = torch.zeros(6, vocab_size, dtype=torch.bool)
    allow[[TEXT_ONLY, SERIAL, TITLE_START, TITLE, BRANCH], torch.tensor(sorted(tokenizer.bytes))[:, None]] = True
    allow[TEXT_ONLY, tokenizer.eos] = True
    if tags := tokenizer.special:
        allow[SERIAL, [tags.eos, tags.title]] = True
        allow[TITLE, tags.title_end] = True
        allow[AFTER_TITLE, [tags.title, tags.para]] = True
        allow[BRANCH, [tags.eos, tags.branch_end]] = True  # end-of-text in a branch only ends the branch
    return allow


def sample(logits, u, temperature, top_k, top_p):
    """
    One token a row by the inverse CDF: logits (L, V), u (L,) uniform in [0, 1) -> (L,). temperature 0 is greedy.
    The randomness comes in as a number, so the same branch draws the same token in whatever order branches are decoded.
    """
    if temperature == 0:
        return logits.argmax(-1)
    k = min(top_k or logits.size(-1), logits.size(-1))
    values, indices = torch.topk(logits / temperature, k)  # sorted, best first
    p = values.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0) if top_p < 1 else p  # the fewest tokens that reach top_p
    cdf = p.cumsum(-1)
    chosen = (cdf < u[:, None] * cdf[:, -1:]).sum(-1, keepdim=True).clamp(max=k - 1)
    return indices.gather(-1, chosen)[:, 0]


def forward_pass(model, cache, allow, uniform, feed, seen, lanes, sampling):
    """
    The one step of all modes. feed: (6, W) int64, rows token, position, slot, branch, pick, state; the first `lanes`
    columns of the last two say which of the W tokens to continue and in which grammar state. uniform: (branches,
    positions). Returns the chosen tokens (lanes,) and their logits (lanes, V) before the grammar.
    """
    token, position, slot, branch, pick, state = feed
    pick, state = pick[:lanes], state[:lanes]
    cache.owner[slot] = branch
    logits = model(token[None], position[None], cache.mask(slot, branch, seen), cache, slot, pick)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    allowed = logits.masked_fill(~allow[state], -torch.inf)
    return sample(allowed, uniform[branch[pick], position[pick]], *sampling), logits


# -----------------------------------------------------------------------------
# a model ready to decode

class LM:
    """
    A model, its tokenizer and what is kept from answer to answer: the grammar's table, the cache and the step, which is
    forward_pass, perhaps compiled. Compiled, shapes come in buckets, and each is compiled and run once ahead.
    """

    def __init__(self, model, tokenizer, compile=False):
        self.model, self.tokenizer, self.compiled = model.eval().requires_grad_(False), tokenizer, compile
        self.device, self.cache, self.step, self.warm = model.wte.weight.device, None, forward_pass, set()
        self.allow = grammar(tokenizer, model.config.vocab_size).to(self.device)
        if compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else None  # CUDA graphs
            self.step = torch.compile(forward_pass, fullgraph=True, dynamic=True, mode=mode)
            self.reserve(model.config.block_size)  # once: CUDA graphs keep its address

    def reserve(self, slots):
        """An empty cache of at least so many slots."""
        if self.cache is None or self.cache.slots < slots:
            self.cache = KVCache(self.model.config, bucket(slots, 256), self.model.wte.weight.dtype, self.device)
        self.cache.owner.zero_()
        return self.cache

    def uniform(self, sampling, seed):
        """The random numbers of an answer, drawn ahead: one for each branch (0 is the serial stream) and position."""
        shape = MAX_BRANCHES + 1, self.model.config.block_size
        draw = torch.Generator().manual_seed(seed)
        return (torch.rand(shape, generator=draw) if sampling[0] > 0 else torch.zeros(shape)).to(self.device)

    def warm_up(self, sampling, slots):
        """Compiles the step and runs it at every shape that so many slots can need, once."""
        shapes = {(1 << w, 256 << s, sampling) for s in range(bucket(slots, 256).bit_length() - 8) for w in range(9 + s)}
        for W, seen, _ in tqdm(sorted(shapes - self.warm), "compiling", leave=False):
            for _ in range(3):  # CUDA graphs: warm-up, recording, replay
                self.run([[]] * 6, W, seen, self.uniform(sampling, 0), sampling)
        self.warm |= shapes

    def run(self, rows, W, seen, uniform, sampling):
        """One pass. rows: the six lists that forward_pass calls feed, padded here to W columns -> chosen tokens, a list."""
        feed = np.zeros((6, W), dtype=np.int64)
        feed[2], feed[3] = self.cache.slots, -1  # padding writes to the reserved slot, as a branch that nobody is
        for whole, row in zip(feed, rows):
            whole[:len(row)] = row
        lanes = min(W, MAX_BRANCHES) if self.compiled else len(rows[4])
        feed = torch.from_numpy(feed).to(self.device)
        chosen, _ = self.step(self.model, self.cache, self.allow, uniform, feed, seen, lanes, sampling)
        return chosen[:len(rows[4])].tolist()  # the one synchronisation of a pass


def load(path="out", device="cpu", dtype=None, compile=False):
    """
    An LM from a train.py folder or a published Llama or Qwen2 folder. dtype: "float32", "bfloat16" or "float64"; by
    default bfloat16 on CUDA, else float32. ValueError when there is no usable checkpoint.
    """
    check_device(device)
    if Path(path, "config.json").exists():
        model, tokenizer = from_published(path), published_tokenizer(path)
    else:
        state = read_checkpoint(path)
        model, tokenizer = from_checkpoint(state, path), Tokenizer(**state["tokenizer"])
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
    dtype = dtype or ("bfloat16" if str(device).startswith("cuda") else "float32")
    return LM(model.to(device, getattr(torch, dtype)), tokenizer, compile)


def bucket(n, least=1):
    """The next power of two that is at least n, and at least `least`: few shapes."""
    return max(least, 1 << (n - 1).bit_length())


# -----------------------------------------------------------------------------
# the engine

# What generate() returns. text: the plain answer; tokens: of the plain answer; steps: forward passes after prefill;
# seconds: wall-clock, prefill included; ttft: seconds to the first token; blocks: for each block the tokens of each
# branch, tags aside; finish: "stop", or "length" when the budget or the context cut anything; segments: tokenised.
Answer = namedtuple("Answer", "prompt text mode tokens steps seconds ttft blocks finish segments")


class Engine:
    """The state of one answer being decoded. Its methods follow the states of the picture above."""

    def __init__(self, lm, prompt, mode, max_new_tokens, sampling, seed, max_branches, watch):
        self.lm, self.mode, self.sampling, self.max_branches, self.watch = lm, mode, sampling, max_branches, watch
        self.tags, self.config, self.prompt = lm.tokenizer.special, lm.model.config, prompt
        self.budget = min(max_new_tokens, self.config.block_size - len(prompt))  # row tokens that may still be fed
        self.cache = lm.reserve(len(prompt) + self.budget)
        self.uniform = lm.uniform(sampling, seed)
        self.slot, self.position = 0, len(prompt)  # the next slot; the position of the next serial token
        self.segments, self.in_block = [[]], False
        self.steps, self.cut = -1, False           # prefill is no step; whether budget or context cut anything

    def feed(self, tokens, positions, branches, pick, states):
        """One pass: feeds W tokens at the next W slots; returns the tokens chosen after those at `pick`."""
        W, seen = len(tokens), self.slot + len(tokens)
        rows = tokens, positions, range(self.slot, seen), branches, pick, states
        self.slot, self.steps = seen, self.steps + 1
        if self.lm.compiled:  # few shapes
            W, seen = bucket(W), bucket(seen, 256)
        chosen = self.lm.run(rows, W, seen, self.uniform, self.sampling)
        if self.watch:
            self.watch(self)
        return chosen

    def run(self):
        """Prefill, then serial text and blocks until end-of-text or until nothing is left."""
        T = len(self.prompt)
        token, = self.feed(self.prompt, range(T), [0] * T, [T - 1], [self.serial_state()])
        self.ttft = time.perf_counter()
        while token != self.lm.tokenizer.eos:
            if min(self.budget, self.config.block_size - self.position) < 1:
                self.cut = True
                break
            if self.tags and token == self.tags.title:
                token = self.block()
            else:
                self.segments[-1].append(token)
                token = self.serial(token)

    def serial(self, token, state=None):
        """Feeds one serial token; returns the next, chosen in the given grammar state (by default: serial text)."""
        self.budget -= 1
        self.position += 1
        state = self.serial_state() if state is None else state
        return self.feed([token], [self.position - 1], [0], [0], [state])[0]

    def serial_state(self):
        """Serial text, with or without the choice to open a block."""
        return SERIAL if self.mode != "serial" and self.room([]) else TEXT_ONLY

    def room(self, titles):
        """Whether one more title may start (the first: two): every branch must still get MIN_BRANCH tokens after it."""
        new = 1 if titles else 2
        prefixes = [1 + len(t) for t in titles] + [1 + TITLE_CAP] * new
        n, serial = len(prefixes), new * (TITLE_CAP + 2) + 2  # titles with their tags, <|para|> and <|/para|>
        fits = n <= self.max_branches and self.budget >= serial + sum(prefixes) + n * (MIN_BRANCH + 1)
        if self.config.positions == "stride":  # positions run ahead of the row, and a branch must fit its stride
            fits &= self.position + serial + n * self.config.stride <= self.config.block_size
            fits &= self.config.stride >= 1 + TITLE_CAP + MIN_BRANCH + 1
        return fits

    def block(self):
        """Titles, then branches. Returns the first serial token after the block."""
        block, token, self.in_block = [], self.tags.title, True
        self.segments += [block, []]
        while token == self.tags.title:
            title = []
            block.append((title, []))
            token = self.serial(self.tags.title, TITLE_START)
            while token != self.tags.title_end:
                title.append(token)
                token = self.serial(token, TITLE)
                if len(title) == TITLE_CAP:
                    token = self.tags.title_end
            token = self.serial(self.tags.title_end, AFTER_TITLE)
            if len(block) == 1:
                token = self.tags.title
            elif token == self.tags.title and not self.room([t for t, _ in block]):
                self.cut |= len(block) < self.max_branches
                token = self.tags.para
        self.branches(block)
        self.in_block = False
        return self.serial(self.tags.para_end)

    def branches(self, block):
        """Feeds <|para|> with all prefixes in one pass, then one token of every live branch a pass."""
        n, tags, config = len(block), self.tags, self.config
        prefixes = [[tags.branch] + title for title, _ in block]
        sizes = [len(p) for p in prefixes]
        quota = (self.budget - 2 - sum(sizes)) // n - 1  # tokens a branch, less <|para|>, <|/para|> and <|/branch|>
        if config.positions == "stride":
            quota = min(quota, config.stride - max(sizes) - 1)
        starts, _ = branch_positions(self.position + 1, sizes, config.positions, config.stride)
        positions = [self.position] + [start + j for start, size in zip(starts, sizes) for j in range(size)]
        owners = [0] + [i + 1 for i, size in enumerate(sizes) for _ in range(size)]
        token = self.feed([tags.para] + sum(prefixes, []), positions, owners, np.cumsum(sizes), [BRANCH] * n)
        for live in [range(n)] if self.mode == "adaptive" else [[i] for i in range(n)]:
            while live:
                for i in live:  # end-of-text ends a branch, and so does its quota
                    over = len(block[i][1]) == quota and token[i] not in (tags.branch_end, tags.eos)
                    self.cut |= over
                    token[i] = tags.branch_end if over or token[i] == tags.eos else token[i]
                fed = [token[i] for i in live]
                chosen = self.feed(fed, [starts[i] + sizes[i] for i in live], [i + 1 for i in live], range(len(live)),
                                   [BRANCH] * len(live))
                for i, old, new in zip(live, fed, chosen):
                    sizes[i] += 1
                    token[i] = new
                    block[i][1].extend([old] if old != tags.branch_end else [])
                live = [i for i, old in zip(live, fed) if old != tags.branch_end]
        self.cache.owner.zero_()  # the block's slots become shared
        _, self.position = branch_positions(self.position + 1, sizes, config.positions, config.stride)
        self.budget -= 1 + sum(sizes)


@torch.no_grad()
def generate(lm, prompt, mode=None, system=None, max_new_tokens=512, temperature=0.0, top_k=0, top_p=1.0, seed=0,
             max_branches=MAX_BRANCHES, watch=None):
    """
    Decodes one answer to a prompt (str, put into the model's chat form) -> Answer.
    mode: "adaptive" (the engine), "branchwise" (the same, branches one after the other) or "serial" (no blocks); by
    default adaptive where the checkpoint has tags. max_new_tokens counts row tokens. temperature 0 is greedy, top_k 0
    and top_p 1 are off. watch: called with the Engine after every pass. ValueError for arguments out of range.
    """
    mode = mode or ("adaptive" if lm.tokenizer.special else "serial")
    ids, context = lm.tokenizer.prompt(prompt, system), lm.model.config.block_size
    for ok, message in (
        (mode in MODES, f"mode must be one of {', '.join(MODES)}, not {mode!r}"),
        (mode == "serial" or lm.tokenizer.special, f"a checkpoint without tags cannot decode in mode {mode!r}"),
        (prompt.strip(), "the prompt is empty"),
        (len(ids) < context, f"the prompt has {len(ids)} tokens, too many for a context of {context}"),
        (max_new_tokens > 0, f"max-new-tokens must be 1 or more, not {max_new_tokens}"),
        (0 <= temperature < float("inf"), f"temperature must be 0 or more, not {temperature}"),
        (top_k >= 0, f"top-k must be 0 (off) or more, not {top_k}"),
        (0 < top_p <= 1, f"top-p must be over 0 and at most 1, not {top_p}"),
        (2 <= max_branches <= MAX_BRANCHES, f"max-branches must be 2 to {MAX_BRANCHES}, not {max_branches}"),
    ):
        if not ok:
            raise ValueError(message)
    sampling = temperature, top_k, top_p
    if lm.compiled:
        lm.warm_up(sampling, min(len(ids) + max_new_tokens, context))
    start = time.perf_counter()
    engine = Engine(lm, ids, mode, max_new_tokens, sampling, seed, max_branches, watch)
    engine.run()
    seconds, segments = time.perf_counter() - start, [s for s in engine.segments if s]
    blocks = [[len(title + rest) for title, rest in s] for s in segments if is_block(s)]
    return Answer(prompt, lm.tokenizer.decode(plain(segments)), mode, len(plain(segments)), engine.steps, seconds,
                  engine.ttft - start, blocks, "length" if engine.cut else "stop", segments)


# -----------------------------------------------------------------------------
# the live view

class View:
    """
    Shows an answer on a terminal as it grows: serial text as it comes and, while a block is being written, a line a
    branch. When the block ends its lines give way to the plain text.
    """

    def __init__(self, tokenizer, out):
        self.tokenizer, self.out, self.text, self.lines, self.shown = tokenizer, out, "", 0, 0.0

    def __call__(self, engine):
        if time.perf_counter() - self.shown < 0.05:  # seconds
            return
        block = engine.segments[-2] if engine.in_block else []
        self.write(self.tokenizer.decode(plain(engine.segments[:-2] if block else engine.segments)).rstrip("\ufffd"))
        columns, rows = shutil.get_terminal_size()
        for i, (title, rest) in enumerate(block[:rows - 2]):
            title, rest = (" ".join(self.tokenizer.decode(ids).split()) for ids in (title, rest))
            room = (columns - 4) // (1 if (title + rest).isascii() else 2)  # other characters may be two columns wide
            title, bar = title[:room // 2], "|" if "NO_COLOR" in os.environ else f"\x1b[{31 + i % 6}m|\x1b[0m"
            self.out.write(f"\n{bar} {title} {rest[-(room - len(title)):]}")
        self.lines, self.shown = len(block[:rows - 2]), time.perf_counter()
        self.out.flush()

    def write(self, text):
        """Takes the branch lines away and writes what is new of the plain text."""
        if self.lines:  # up, to the column behind the text, and clear from there on
            column = len(self.text.rpartition("\n")[2]) % shutil.get_terminal_size().columns
            self.out.write(f"\x1b[{self.lines}A\x1b[{column + 1}G\x1b[J")
        self.out.write(text[len(self.text):])
        self.out.flush()
        self.text, self.lines = text, 0


# -----------------------------------------------------------------------------
# command line

def parse_args():
    p = argparse.ArgumentParser(description="Decodes answers, several branches at a time. First: python train.py",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what, add = p.add_mutually_exclusive_group(required=True), p.add_argument
    what.add_argument("--prompt", metavar="TEXT", help="one prompt")
    what.add_argument("--prompts", metavar="FILE", help='many: JSON or JSON Lines of {"prompt", "category"}')
    add("--ckpt", default="out", metavar="DIR", help="train.py's --out-dir, or a published Llama or Qwen2 folder")
    add("--mode", choices=MODES, help="none: adaptive where the checkpoint has tags, else serial")
    add("--system", metavar="TEXT", help="system text; none: the model's own")
    add("--max-new-tokens", type=int, default=512, help="tokens after the prompt, tags included")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="sample from the k best tokens; 0 is off")
    add("--top-p", type=float, default=1.0, help="sample from the best tokens that together reach p; 1 is off")
    add("--max-branches", type=int, default=MAX_BRANCHES, help="branches of a block at most")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("float32", "bfloat16", "float64"), help="none: bfloat16 on CUDA, else float32")
    add("--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)")
    add("--json", metavar="FILE", help="also write the answers and their figures here")
    return p.parse_args()


def main():
    args, results = parse_args(), []
    prompts = [{"category": None, "prompt": args.prompt}] if args.prompts is None else read_prompts(args.prompts)
    lm = load(args.ckpt, args.device, args.dtype, args.compile)
    options = {k: getattr(args, k) for k in ("mode", "system", "max_new_tokens", "temperature", "top_k", "top_p",
                                             "max_branches", "seed")}
    for record in prompts:
        view = View(lm.tokenizer, sys.stdout)
        try:
            answer = generate(lm, record["prompt"], watch=view if sys.stdout.isatty() else None, **options)
            view.write(answer.text + "\n")
        except KeyboardInterrupt:
            view.write(view.text + "\n")
            raise
        print(f"\n{answer.tokens} tokens in {answer.steps} steps, branches {[len(b) for b in answer.blocks]}, "
              f"{answer.tokens / answer.seconds:.0f} tokens/s, first after {1000 * answer.ttft:.0f} ms, finish: "
              f"{answer.finish}\n", file=sys.stderr)
        results.append({**record, **{k: v for k, v in answer._asdict().items() if k != "segments"}})
    if args.json:
        write_whole(args.json, [json.dumps({"results": results}, ensure_ascii=False, indent=1)])


if __name__ == "__main__":
    cli(main)
