"""The hybrid engine (paper section 3.4): one answer, one KV cache, switching by itself between serial and parallel.

    prefill -> serial text ->  titles -> prefixes -> all branches, a token each a pass -> serial text -> ... -> end
               ^ a token a pass          ^ one pass  ^ until the longest branch ends

The n-th token fed takes slot n of the cache, and is fed exactly once. owner[slot] says which live branch a slot belongs
to; when the block ends its slots become everybody's. Nothing is moved, copied or computed again.

    python decode.py --prompt "Tell me about Mars and Venus."  # in Python: generate(load("out"), "...")"""
import argparse
import json
import os
import shutil
import sys
import time
from collections import namedtuple

import numpy as np
import torch
from tqdm import tqdm

from aspd import branch_positions, check, is_block, plain
from data import MAX_BRANCHES, Tokenizer, cli, published_tokenizer, read_prompts, write_whole
from model import KVCache, check_device, from_checkpoint, from_published, read_checkpoint

MODES = ("adaptive", "branchwise", "serial")
TITLE_CAP = 32   # tokens of a title at most
MIN_BRANCH = 8   # tokens that every branch can count on after its title

# ---- a model ready to decode: grammar, sampling, one pass -------------------
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
    """One token a row: logits (L, V), u (L,) uniform in [0, 1) -> (L,). temperature 0 is greedy, top_k 0 is off."""
    if temperature == 0:
        return logits.argmax(-1)
    k = min(top_k or logits.size(-1), logits.size(-1))
    values, indices = torch.topk(logits / temperature, k)  # sorted, best first
    p = values.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0) if top_p < 1 else p  # the fewest tokens that reach top_p
    cdf = p.cumsum(-1)  # inverted at u: a branch draws the same tokens in whatever order the branches are decoded
    chosen = (cdf < u[:, None] * cdf[:, -1:]).sum(-1, keepdim=True).clamp(max=k - 1)
    return indices.gather(-1, chosen)[:, 0]

def forward_pass(model, cache, allow, uniform, feed, seen, lanes, sampling):
    """The step of all modes -> chosen tokens (lanes,), their logits (lanes, V) before the grammar. feed: (6, W) int64,
    rows token, position, slot, branch, pick, state; the first `lanes` columns of the last two say which of the W tokens
    to continue and in which grammar state. uniform: (branches, positions) random numbers."""
    token, position, slot, branch, pick, state = feed
    pick, state = pick[:lanes], state[:lanes]
    cache.owner[slot] = branch
    logits = model(token[None], position[None], cache.mask(slot, branch, seen), cache, slot, pick)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    allowed = logits.masked_fill(~allow[state], -torch.inf)
    return sample(allowed, uniform[branch[pick], position[pick]], *sampling), logits

bucket = lambda n, least=1: max(least, 1 << (n - 1).bit_length())  # n or more, a power of two: few shapes

class LM:
    """A model, its tokenizer and what outlives an answer: grammar, cache and step (forward_pass, perhaps compiled)."""
    def __init__(self, model, tokenizer, compile=False):
        self.model, self.tokenizer, self.compiled = model.eval().requires_grad_(False), tokenizer, compile
        self.device, self.cache, self.step, self.warm = model.wte.weight.device, None, forward_pass, set()
        self.allow = grammar(tokenizer, model.config.vocab_size).to(self.device)
        if compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else None  # CUDA graphs
            self.step = torch.compile(forward_pass, fullgraph=True, dynamic=True, mode=mode)

    def warm_up(self, sampling, n):
        """Compiles the step and runs it, once, at every shape that n slots can need: the buckets of W and seen."""
        shapes = {(1 << w, 1 << s, sampling) for s in range(8, bucket(n, 256).bit_length()) for w in range(s + 1)}
        new = sorted(shapes - self.warm)
        for W, seen, _ in tqdm(new, "compiling", leave=False, disable=not new or None):
            engine = Engine(self, [], "serial", seen, sampling, 0, MAX_BRANCHES, None)
            for _ in range(3):  # CUDA graphs: warm-up, recording, replay
                engine.slot = seen - W
                engine.feed([0] * W, [0] * W, [0] * W, [0], [TEXT_ONLY])
        self.warm |= shapes

def load(path="out", device="cpu", dtype=None, compile=False):
    """An LM from a train.py folder or a published Llama or Qwen2 folder. dtype: "float32", "bfloat16", "float64"; by
    default bfloat16 on CUDA, else float32. ValueError when there is no usable checkpoint."""
    check_device(device)
    if os.path.exists(os.path.join(path, "config.json")) and not os.path.exists(os.path.join(path, "ckpt.pt")):
        model, tokenizer = from_published(path), published_tokenizer(path)
    else:
        state = read_checkpoint(path)
        model, tokenizer = from_checkpoint(state, path), Tokenizer(**state["tokenizer"])
    ids, rows = tokenizer.vocab_size, model.config.vocab_size
    check(ids <= rows, f"{path}: the tokenizer has {ids} ids, the model {rows}")
    dtype = dtype or ("bfloat16" if str(device).startswith("cuda") else "float32")
    return LM(model.to(device, getattr(torch, dtype)), tokenizer, compile)

# ---- the engine -------------------------------------------------------------
# What generate() returns. text, tokens: the plain answer; steps: passes after prefill; seconds: wall-clock, with it;
# ttft: seconds to the first token; blocks: tokens of each branch, tags aside; finish: "stop" or, cut, "length".
Answer = namedtuple("Answer", "prompt text mode tokens steps seconds ttft blocks finish segments")

class Engine:
    """The state of one answer being decoded. Its methods follow the states of the picture above."""
    def __init__(self, lm, prompt, mode, max_new_tokens, sampling, seed, max_branches, watch):
        self.lm, self.mode, self.sampling, self.max_branches, self.watch = lm, mode, sampling, max_branches, watch
        self.prompt, self.tags, self.config = prompt, lm.tokenizer.special, lm.model.config
        self.budget = min(len(prompt) + max_new_tokens, self.config.block_size)  # row tokens that may still be fed
        slots = bucket(self.config.block_size if lm.compiled else self.budget, 256)  # one size for all
        if lm.cache is None or lm.cache.slots < slots:
            lm.cache = KVCache(self.config, slots, lm.model.wte.weight.dtype, lm.device)
            for tensor in (*lm.cache.k, *lm.cache.v, lm.cache.owner, lm.allow) if lm.compiled else ():
                torch._dynamo.mark_static_address(tensor)  # CUDA graphs use it in place instead of copying it
        lm.cache.owner.zero_()
        shape, draw = (MAX_BRANCHES + 1, self.config.block_size), torch.Generator().manual_seed(seed)
        self.uniform = (torch.rand(shape, generator=draw) if sampling[0] > 0 else torch.zeros(shape)).to(lm.device)
        self.slot, self.position, self.steps = 0, 0, -1  # next slot; next serial position; passes, without prefill
        self.segments, self.cut = [[]], False            # tokenised; whether the budget or the context cut anything

    def feed(self, tokens, positions, branches, pick, states):
        """One pass: feeds tokens at the next slots; returns the tokens chosen after those at `pick`, a list."""
        lm, n, lanes, start = self.lm, len(tokens), len(pick), self.slot
        self.slot, self.steps = start + n, self.steps + 1
        W, seen, L = n, self.slot, lanes
        if lm.compiled:  # padded, so that there are few shapes
            W, seen, L = bucket(n), bucket(self.slot, 256), min(bucket(n), MAX_BRANCHES)
        feed = np.zeros((6, W), dtype=np.int64)  # rows as in forward_pass
        feed[2], feed[3] = lm.cache.slots, -1    # padding writes to the reserved slot, as a branch that nobody is
        feed[:4, :n] = tokens, positions, range(start, self.slot), branches
        feed[4:, :lanes] = pick, states
        feed = torch.from_numpy(feed).to(lm.device)
        chosen, _ = lm.step(lm.model, lm.cache, lm.allow, self.uniform, feed, seen, L, self.sampling)
        if self.watch:
            self.watch(self)
        return chosen[:lanes].tolist()  # the one synchronisation of a pass

    def serial(self, tokens, state=None):
        """Feeds serial tokens; returns the next, chosen in a grammar state: by default text or, with room, a block."""
        start, n = self.position, len(tokens)
        self.position, self.budget = start + n, self.budget - n
        if state is None:
            state = SERIAL if self.mode != "serial" and self.room([]) else TEXT_ONLY
        return self.feed(tokens, range(start, start + n), [0] * n, [n - 1], [state])[0]

    def run(self):
        """Prefill, then serial text and blocks until end-of-text or until nothing is left."""
        token = self.serial(self.prompt)
        self.ttft = time.perf_counter()
        while token != self.lm.tokenizer.eos and min(self.budget, self.config.block_size - self.position) > 0:
            if self.tags and token == self.tags.title:
                token = self.block()
            else:
                self.segments[-1].append(token)
                token = self.serial([token])
        self.cut |= token != self.lm.tokenizer.eos

    def room(self, block):
        """Whether one more title may start (the first: two): every branch must still get MIN_BRANCH tokens after it."""
        new, c = 1 if block else 2, self.config
        n, titles = len(block) + new, sum(len(title) for title, _ in block) + new * TITLE_CAP
        serial = new * (TITLE_CAP + 2) + 2  # titles with their tags, <|para|> and <|/para|>
        fits = n <= self.max_branches and self.budget >= serial + titles + n * (MIN_BRANCH + 2)
        if c.positions == "stride":  # a branch must fit its stride, and positions run ahead of the row
            fits &= c.stride >= TITLE_CAP + MIN_BRANCH + 2 and self.position + serial + n * c.stride <= c.block_size
        return fits

    def block(self):
        """Titles, then branches. Returns the first serial token after the block."""
        tags, token, block = self.tags, self.tags.title, []
        self.segments.append(block)
        while len(block) < 2 or token == tags.title and self.room(block):  # at least two: the second is forced
            title = []
            block.append((title, []))
            token = self.serial([tags.title], TITLE_START)
            while token != tags.title_end and len(title) < TITLE_CAP:
                title.append(token)
                token = self.serial([token], TITLE)
            token = self.serial([tags.title_end], AFTER_TITLE)
        self.cut |= token == tags.title and len(block) < self.max_branches  # one more was wanted: no room
        self.branches(block)
        self.segments.append([])
        return self.serial([tags.para_end])

    def branches(self, block):
        """Feeds <|para|> with all prefixes in one pass, then one token of every live branch a pass."""
        n, tags, scheme = len(block), self.tags, (self.config.positions, self.config.stride)
        prefixes = [[tags.branch] + title for title, _ in block]
        sizes = [len(prefix) for prefix in prefixes]
        quota = (self.budget - 2 - sum(sizes)) // n - 1  # tokens a branch, less <|para|>, <|/para|> and <|/branch|>
        if self.config.positions == "stride":
            quota = min(quota, self.config.stride - max(sizes) - 1)
        starts, _ = branch_positions(self.position + 1, sizes, *scheme)
        positions = [start + j for start, size in zip(starts, sizes) for j in range(size)]
        chosen = self.feed([tags.para, *sum(prefixes, [])], [self.position, *positions],
                           np.repeat(range(n + 1), [1, *sizes]), np.cumsum(sizes), [BRANCH] * n)
        token, position = np.array(chosen), np.add(starts, sizes)  # the next of each branch
        for live in np.arange(n).reshape(1 if self.mode == "adaptive" else n, -1):  # a row: side by side
            while len(live):
                for i in live:  # end-of-text ends a branch, and so does its quota
                    ends = token[i] in (tags.branch_end, tags.eos)
                    if ends or len(block[i][1]) == quota:
                        self.cut |= not ends
                        token[i] = tags.branch_end
                    else:
                        block[i][1].append(int(token[i]))
                goes_on, lanes = token[live] != tags.branch_end, len(live)
                token[live] = self.feed(token[live], position[live], live + 1, range(lanes), [BRANCH] * lanes)
                position[live] += 1
                live = live[goes_on]
        self.lm.cache.owner.zero_()  # the block's slots become shared
        sizes = (position - starts).tolist()
        _, self.position = branch_positions(self.position + 1, sizes, *scheme)
        self.budget -= 1 + sum(sizes)

@torch.no_grad()
def generate(lm, prompt, mode=None, system=None, max_new_tokens=512, temperature=0.0, top_k=0, top_p=1.0, seed=0,
             max_branches=MAX_BRANCHES, watch=None):
    """Decodes one answer to a prompt (str, put into the model's chat form) -> Answer. mode: "adaptive" (the engine),
    "branchwise" (the same, branches one after the other) or "serial" (no blocks); None: adaptive where there are tags.
    max_new_tokens counts row tokens. watch: called with the Engine after every pass. ValueError: out of range."""
    mode = mode or ("adaptive" if lm.tokenizer.special else "serial")
    ids, context = lm.tokenizer.prompt(prompt, system), lm.model.config.block_size
    check(mode in MODES, f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    check(mode == "serial" or lm.tokenizer.special, f"a checkpoint without tags cannot decode in mode {mode!r}")
    check(prompt.strip(), "the prompt is empty")
    check(len(ids) < context, f"the prompt {prompt:.40}... has {len(ids)} tokens, too many for a context of {context}")
    check(max_new_tokens > 0, f"max-new-tokens must be 1 or more, not {max_new_tokens}")
    check(0 <= temperature < float("inf"), f"temperature must be 0 or more, not {temperature}")
    check(top_k >= 0, f"top-k must be 0 (off) or more, not {top_k}")
    check(0 < top_p <= 1, f"top-p must be over 0 and at most 1, not {top_p}")
    check(2 <= max_branches <= MAX_BRANCHES, f"max-branches must be 2 to {MAX_BRANCHES}, not {max_branches}")
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

# ---- command line, with a live view -----------------------------------------
class View:
    """Shows an answer as it grows: serial text and, while a block is being written, below it a line a branch."""
    def __init__(self, tokenizer, out):
        self.tokenizer, self.out, self.text, self.lines, self.shown = tokenizer, out, "", [], 0.0

    def __call__(self, engine):
        if time.perf_counter() - self.shown < 0.05:  # seconds
            return
        *done, block = engine.segments if is_block(engine.segments[-1]) else [*engine.segments, []]
        text, (columns, rows), lines = self.tokenizer.decode(plain(done)), shutil.get_terminal_size(), []
        for i, (title, rest) in enumerate(block[:rows - 2] if text[-1:] in ("", "\n") else []):  # on lines of their own
            title, rest = (" ".join(self.tokenizer.decode(ids).split()) for ids in (title, rest))
            room = (columns - 4) // (1 if (title + rest).isascii() else 2)  # other characters may be two columns wide
            title, bar = title[:room // 2], "|" if "NO_COLOR" in os.environ else f"\x1b[{31 + i % 6}m|\x1b[0m"
            lines.append(f"\n{bar} {title} {rest[-(room - len(title)):]}")
        self.write(text.rstrip("\ufffd"), lines)
        self.shown = time.perf_counter()

    def write(self, text, lines=()):
        """Takes the old branch lines away; writes what is new of the plain text, and the branch lines below it."""
        if self.lines:  # up, to the first column, and clear from there on
            self.out.write(f"\x1b[{len(self.lines)}A\x1b[G\x1b[J")
        self.out.write(text[len(self.text):] + "".join(lines))
        self.out.flush()
        self.text, self.lines = text, lines

def main():
    """The command line."""
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
    args, results = p.parse_args(), []
    prompts = [{"category": None, "prompt": args.prompt}] if args.prompts is None else read_prompts(args.prompts)
    lm = load(args.ckpt, args.device, args.dtype, args.compile)
    for record in prompts:
        view = View(lm.tokenizer, sys.stdout)
        try:
            answer = generate(lm, record["prompt"], args.mode, args.system, args.max_new_tokens, args.temperature,
                              args.top_k, args.top_p, args.seed, args.max_branches, sys.stdout.isatty() and view)
            view.write(answer.text)
        finally:  # after Ctrl-C, too, no branch lines are left
            view.write(view.text + "\n")
        print(f"\n{answer.tokens} tokens in {answer.steps} steps, branches {[len(b) for b in answer.blocks]}, "
              f"{answer.tokens / answer.seconds:.0f} tokens/s, first after {1000 * answer.ttft:.0f} ms, finish: "
              f"{answer.finish}\n", file=sys.stderr)
        results.append({**record, **{k: v for k, v in answer._asdict().items() if k != "segments"}})
    if args.json:
        write_whole(args.json, [json.dumps({"results": results}, ensure_ascii=False, indent=1)])

if __name__ == "__main__":
    cli(main)
