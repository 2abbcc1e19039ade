"""The hybrid engine (paper section 3.4): one answer, one KV cache, serial and parallel by turns.

    prefill -> serial text -> titles -> prefixes -> branches side by side -> serial text -> ...
               ^ a token a pass         ^ one pass  ^ a token of each a pass

The model decides when: it announces a block by choosing <|title|>. The n-th token fed takes slot n
of the cache, and is fed exactly once. While a block is written, owner[slot] says which branch a
slot belongs to; when it ends, its slots become everybody's. Nothing is moved, copied or computed
again.

    python decode.py --prompt "Write a guide to bears and goats."
    >>> generate(load("out"), "Write a guide to bears and goats.").text
"""
import argparse
import json
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from aspd import (BRANCH_TAGS, MAX_BRANCHES, POSITIONS, BadInput, Block, Branch, branch_lengths,
                  cache_mask, check, naming, plain)
from data import Tokenizer, cli, printable, read_objects, write_text
from model import check_device, from_checkpoint, pack, read_checkpoint

MODES = ("adaptive", "branchwise", "serial")
TITLE_CAP = 32  # tokens of a title at most; in real answers one of two thousand has more
MIN_BRANCH = 8  # tokens that every branch can count on after its title

# ---- grammar and sampling ---------------------------------------------------

TEXT_ONLY = 0    # in serial text, where no block may open
SERIAL = 1       # in serial text, where one may
TITLE_START = 2  # before the first token of a title
TITLE = 3        # before a further one, or its end
AFTER_TITLE = 4  # after <|/title|>
BRANCH = 5       # in a branch


def grammar(tokenizer, vocab_size):
    """(6, V) bool: which of the V ids are allowed in each of the six states. Those that only pad
    the vocabulary are allowed nowhere."""
    text = list(tokenizer.bytes)
    stop = list(tokenizer.stop)
    tags = tokenizer.tags
    allow = torch.zeros(6, vocab_size, dtype=torch.bool, device="cpu")
    allow[TEXT_ONLY, text + stop] = True
    allow[SERIAL, text + stop + [tags.title]] = True
    allow[TITLE_START, text] = True
    allow[TITLE, text + [tags.title_end]] = True
    allow[AFTER_TITLE, [tags.title, tags.para]] = True
    # Where a model chooses end-of-text in a branch, that only ends the branch.
    allow[BRANCH, text + stop + [tags.branch_end]] = True
    return allow


def sample(logits, u, temperature, top_k, top_p):
    """One token a row: logits (N, V) -> (N,). u (N,): a random number in (0, 1] for each.
    temperature, top_p: tensors of one number, as torch.compile would compile again for every other
    float; top_k: an int, 1 is greedy, 0 takes all tokens, unsorted: only with a top_p of 1."""
    if top_k == 1:
        return logits.argmax(-1)
    if top_k > 0:
        logits, ids = logits.topk(min(top_k, logits.size(-1)))  # the best first
    # In float64, for on a GPU each sum of the cdf below is rounded in its own order: in float32 it
    # could grow over tokens whose p is 0, and one of these be drawn.
    p = (logits.to(torch.float64) / temperature).softmax(-1)
    # The fewest tokens that together reach top_p. For 0.7 and p = 0.6, 0.3, 0.1 the sums before
    # each are 0, 0.6, 0.9: the third goes. For 0 all go, and the first, the best, will be chosen.
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    # The distribution is inverted at u. Every position of every branch has a u of its own, so what
    # a branch draws does not depend on the others.
    cdf = p.cumsum(-1)
    chosen = (cdf < u[:, None] * cdf[:, -1:]).sum(-1, keepdim=True)
    return (ids.gather(-1, chosen) if top_k > 0 else chosen)[:, 0]


def forward_pass(model, fed, pick, allowed, u, sampling, n_slots):
    """The step of all modes -> (tokens chosen (N,), their logits (N, V), which tests look at).

    fed: (4, T) int64, one tensor for one copy to the device: token, position, branch and slot of
    the T tokens fed; branch becomes the owner of slot. pick: (N,), after which of them to choose a
    token, among those allowed, (V,) bool. u, and sampling = (temperature, top_k, top_p): see
    sample(). n_slots: how many slots attention reads. A token is -1 where logits are not finite.
    """
    token, position, branch, slot = fed
    model.owner[slot] = branch
    mask = cache_mask(slot, branch, model.owner[:n_slots])
    logits = model(token[None], position[None], mask, slot, pick)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # or float64
    chosen = sample(logits.masked_fill(~allowed, -torch.inf), u, *sampling)
    return torch.where(logits.isfinite().all(-1), chosen, -1), logits


# ---- a model ready to decode ------------------------------------------------

class LM:
    """A model, which is frozen, its tokenizer and what they need to decode: grammar and step. It
    decodes one answer at a time."""

    def __init__(self, model, tokenizer, compile=False):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = model.model.embed_tokens.weight.device
        self.allow = grammar(tokenizer, model.config.vocab_size).to(self.device)
        self.step = forward_pass  # tests put theirs in its place
        self.compiled_step = compile_step(self) if compile else None
        pack(self.model)
        self.lock = threading.Lock()


def load(path="out", device="cpu", dtype=None, compile=False):
    """An LM from a folder with a ckpt.pt. dtype: "float32", "bfloat16" or "float64"; None: bfloat16
    on CUDA, else float32. BadInput without a usable checkpoint."""
    check_device(device)
    state = read_checkpoint(path)
    dtype = dtype or ("bfloat16" if str(device).startswith("cuda") else "float32")
    model = from_checkpoint(state).to(device, getattr(torch, dtype))
    return LM(model, Tokenizer(**state["tokenizer"]), compile)


# ---- the engine -------------------------------------------------------------

def quota(left, block):
    """Tokens that each branch may have after its title, where `left` tokens of the budget are left
    before <|para|>: an equal share, whatever the order in which the branches are decoded."""
    # <|para|> and <|/para|>, and the prefixes with their <|/branch|>
    forced = 1 + 1 + sum(len(title) + BRANCH_TAGS for title, _ in block)
    return (left - forced) // len(block)


def has_room(left, block):
    """Is there room for one more branch (in a new block, two), with the longest title and at least
    MIN_BRANCH tokens after the title for every branch? A new block needs 154 tokens."""
    new = [Branch([None] * TITLE_CAP, [])] * (1 if block else 2)
    left -= len(new) * (1 + TITLE_CAP + 1)  # in series; quota() counts the prefixes
    longer = [*block, *new]
    return len(longer) <= MAX_BRANCHES and quota(left, longer) >= MIN_BRANCH


@dataclass
class Lane:
    """A branch that is being written."""
    number: int    # 1, 2, ... within its block
    rest: list     # the tokens after its title; the same list object as its Branch's
    position: int  # of the first token to feed next
    next: list     # to feed next: its prefix, then one token a pass, then <|/branch|>, then nothing


class Engine:
    """The state of one answer being decoded. Its methods follow the picture at the head."""

    def __init__(self, lm, mode, left, sampling, seed, watch):
        self.lm = lm
        self.tags = lm.tokenizer.tags
        self.mode = mode
        self.left = left  # how many row tokens may still be fed, the prompt included
        self.watch = watch
        temperature, top_k, top_p = sampling
        # To sort all tokens is slow, and 4096 nearly always reach top_p.
        top_k = top_k or (4096 if top_p < 1 else 0)
        top_k = 1 if temperature < 1e-6 else top_k
        temperature, top_p = torch.tensor(
            [temperature, top_p], dtype=torch.float32, device=lm.device)
        self.sampling = (temperature, top_k, top_p)  # of sample()
        # The last slot is never used by a token of the row: it is for pad().
        lm.model.setup_cache(power_of_two(max(left + 1, 256)))
        draw = torch.Generator().manual_seed(seed % 2**63)
        # A random number for every [position, branch]; positions stay below `left`, see POSITIONS.
        shape = (left, MAX_BRANCHES + 1)
        self.uniform = 1 - torch.rand(shape, generator=draw, dtype=torch.float32, device="cpu")
        self.slot = 0      # the next slot
        self.position = 0  # the next position of the serial stream
        self.steps = -1    # passes; the prefill makes it 0
        self.segments = [[]]
        self.cut = False   # has the budget or the context cut anything?

    def feed(self, triples, pick, state):
        """Feeds (token, position, branch) triples at the next slots, in one pass. Returns the
        tokens chosen after those at the indices `pick`, a list, in a state of the grammar."""
        lm = self.lm
        n = len(pick)
        fed = [(*triple, slot) for slot, triple in enumerate(triples, start=self.slot)]
        self.slot += len(fed)
        self.steps += 1
        step = lm.step
        n_slots = self.slot
        if lm.compiled_step:
            # A prompt or prefixes have too many shapes to compile. But they, too, are padded, for
            # a GPU is slow on a new shape.
            if n == len(fed):  # one after each token: serial text, or a token a branch
                step = lm.compiled_step
            n_slots = len(lm.model.owner)
            fed, pick = pad(fed, pick, n_slots - 1)
        fed = torch.tensor(fed, device="cpu").t()  # (4, T)
        pick = torch.tensor(pick, device="cpu")    # (N,)
        _, position, branch, _ = fed[:, pick]      # where a token is chosen
        u = self.uniform[position, branch]
        fed, pick, u = (x.to(lm.device) for x in (fed, pick, u))
        chosen, _ = step(lm.model, fed, pick, lm.allow[state], u, self.sampling, n_slots)
        chosen = chosen.tolist()  # the one synchronisation of a pass
        if min(chosen) < 0:
            lm.model.owner = None  # the next answer makes a new cache: even masked, 0 * NaN is NaN
            raise BadInput(f"the logits of step {self.steps} are not finite")
        if self.watch:
            self.watch(self)
        return chosen[:n]

    def serial(self, tokens, state=None):
        """Feeds serial tokens -> the next one. state None: text, or a block if there is room."""
        fed = [(token, self.position + i, 0) for i, token in enumerate(tokens)]
        self.position += len(tokens)
        self.left -= len(tokens)
        if state is None:
            state = SERIAL if self.mode != "serial" and has_room(self.left, []) else TEXT_ONLY
        return self.feed(fed, [len(fed) - 1], state)[0]

    def run(self, prompt):
        """Prefill, then serial text and blocks until end-of-text or until nothing is left."""
        token = self.serial(prompt)
        self.first_token_at = time.perf_counter()
        while token not in self.lm.tokenizer.stop and self.left > 0:
            if token == self.tags.title:
                token = self.block()
            else:
                self.segments[-1].append(token)
                token = self.serial([token])
        self.cut |= token not in self.lm.tokenizer.stop

    def block(self):
        """Titles, then branches. Returns the first serial token after the block."""
        block = Block()
        self.segments.append(block)
        token = self.tags.title
        # The second title is forced, whatever the model chooses: a block has two branches at least.
        while len(block) < 2 or (token == self.tags.title and has_room(self.left, block)):
            title = []
            block.append(Branch(title, []))  # grows in place, so that a View can show it
            token = self.serial([self.tags.title], TITLE_START)
            while token != self.tags.title_end and len(title) < TITLE_CAP:
                title.append(token)
                token = self.serial([token], TITLE)
            token = self.serial([self.tags.title_end], AFTER_TITLE)
        # If it wanted another branch, the budget has cut it, unless MAX_BRANCHES was the reason.
        self.cut |= token == self.tags.title and len(block) < MAX_BRANCHES
        self.branches(block)
        self.segments.append([])
        return self.serial([self.tags.para_end])

    def branches(self, block):
        """Feeds <|para|> and all prefixes in one pass, then a token of every live branch a pass; in
        mode branchwise one branch after the other."""
        start = self.position + 1  # behind <|para|>
        lanes = []
        for number, (title, rest) in enumerate(block, start=1):
            lanes.append(Lane(number, rest, start, [self.tags.branch] + title))
        most = quota(self.left, block)
        self.advance(lanes, most, before=[(self.tags.para, self.position, 0)])
        groups = [lanes] if self.mode == "adaptive" else [[lane] for lane in lanes]
        for live in groups:
            while live:
                self.advance(live, most)
                live = [lane for lane in live if lane.next]

        self.lm.model.owner.zero_()  # the block's slots become shared
        lengths = branch_lengths(block)
        self.position = start + POSITIONS[self.lm.model.config.positions](lengths)
        self.left -= 1 + sum(lengths)  # <|para|> and the branches

    def advance(self, lanes, most, before=()):
        """One pass: feeds what every lane has next, and puts there what the model then chooses, or
        <|/branch|> where the branch has ended, by itself or by its quota, `most`."""
        fed = list(before)
        last = []  # of each lane, the index of the last token it feeds
        for lane in lanes:
            fed += [(token, lane.position + i, lane.number) for i, token in enumerate(lane.next)]
            last.append(len(fed) - 1)
            lane.position += len(lane.next)
        for lane, token in zip(lanes, self.feed(fed, last, BRANCH), strict=True):
            has_ended = token == self.tags.branch_end or token in self.lm.tokenizer.stop
            if lane.next == [self.tags.branch_end]:  # which has just been fed
                lane.next = []  # what was chosen after it is not used
            elif has_ended or len(lane.rest) == most:
                self.cut |= not has_ended
                lane.next = [self.tags.branch_end]
            else:
                lane.rest.append(token)
                lane.next = [token]


# ---- for speed alone --------------------------------------------------------

def power_of_two(n):
    """The next power of two, n itself included."""
    return 1 << (n - 1).bit_length()


def pad(fed, pick, last_slot):
    """Fills Engine.feed()'s tokens and choices up to powers of two, so that few shapes occur.
    Surplus tokens are written to the last slot, for a branch that there is not: nobody sees them.
    Surplus choices are not used."""
    fed = fed + [(0, 0, -1, last_slot)] * (power_of_two(len(fed)) - len(fed))
    return fed, pick + [len(fed) - 1] * (power_of_two(len(pick)) - len(pick))


def compile_step(lm):
    """forward_pass, compiled by torch.compile for few static shapes."""
    mode = "reduce-overhead" if lm.device.type == "cuda" else None  # CUDA graphs
    return torch.compile(forward_pass, fullgraph=True, dynamic=False, mode=mode,
                         recompile_limit=64)  # for widths, cache sizes, kinds of sampling


# ---- from Python ------------------------------------------------------------

def prompt_ids(lm, prompt):
    """The token ids of a prompt in the model's chat form. BadInput if it is no text or too long."""
    check(isinstance(prompt, str) and prompt.strip(), f"the prompt is {prompt!r}: no text")
    ids = lm.tokenizer.prompt(prompt)
    context = lm.model.config.block_size
    check(len(ids) < context, f"{prompt[:40]!r} has {len(ids)} tokens, the context only {context}")
    return ids


@torch.no_grad()
def generate(lm, prompt, mode=None, *, max_new_tokens=512, temperature=0.0, top_k=200, top_p=1.0,
             seed=0, watch=None):
    """Decodes one answer to a prompt, a str, which is put into the model's chat form.

    mode: "adaptive" (the engine), "branchwise" (the same, one branch after the other) or "serial"
    (no blocks); None: adaptive if the model has learnt to branch. max_new_tokens: after the prompt,
    with tags and repeated titles. temperature 0 is greedy; top_k 0 takes all tokens, with a top_p
    the best 4096; top_p 1 takes all of these. watch: called with the Engine after every pass.
    BadInput for a value out of range, for a prompt that is empty or too long, and while the same LM
    already decodes.

    -> an answer with: prompt, text, mode; tokens, of the plain answer; steps, passes after the
    prompt; seconds, wall-clock, prefill included; ttft, seconds to the first token; blocks, of each
    how many tokens every branch has, tags aside; finish, "stop", or "length" if the budget or the
    context cut something; segments, of ids.
    """
    can_branch = lm.model.config.positions is not None
    mode = mode or ("adaptive" if can_branch else "serial")
    check(mode in MODES, f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    check(mode == "serial" or can_branch, f"mode {mode!r}: this model never learnt to branch")
    check(max_new_tokens > 0, f"max-new-tokens must be 1 or more, not {max_new_tokens}")
    check(0 <= temperature <= 1e6, f"temperature must be 0 (greedy) to 1e6, not {temperature}")
    check(top_k >= 0, f"top-k must be 0 (off) or more, not {top_k}")
    check(0 <= top_p <= 1, f"top-p must be 0 (greedy) to 1 (off), not {top_p}")
    ids = prompt_ids(lm, prompt)
    check(lm.lock.acquire(blocking=False), "this model is already decoding")
    try:
        start = time.perf_counter()
        left = min(len(ids) + max_new_tokens, lm.model.config.block_size)
        engine = Engine(lm, mode, left, (temperature, top_k, top_p), seed, watch)
        with torch.autocast(lm.device.type, enabled=False):  # if somebody has switched it on
            engine.run(ids)
    finally:
        lm.lock.release()
    segments = [segment for segment in engine.segments if segment]
    tokens = plain(segments)
    blocks = [[len(b.title + b.rest) for b in s] for s in segments if isinstance(s, Block)]
    return SimpleNamespace(
        prompt=prompt, text=lm.tokenizer.decode(tokens), mode=mode, tokens=len(tokens),
        steps=engine.steps, seconds=time.perf_counter() - start, ttft=engine.first_token_at - start,
        blocks=blocks, finish="length" if engine.cut else "stop", segments=segments)


# ---- command line, with a live view -----------------------------------------

class View:
    """Shows an answer as it grows: its text and, below, a line for every branch of a block until
    the block has ended."""

    text = ""   # what has been written
    lines = ()  # the branch lines below it

    def __call__(self, engine):
        """Shows the engine's answer so far."""
        decode = engine.lm.tokenizer.decode
        *done, last = engine.segments
        block = last if isinstance(last, Block) else []
        # Half a character decodes to U+FFFD.
        text = decode(plain(done if block else engine.segments)).rstrip("\ufffd")
        columns, rows = shutil.get_terminal_size()
        lines = []
        # To take branch lines away, the cursor goes up by whole lines, within the window. So they
        # are shown only below a finished line, and only where a few characters have room.
        if text[-1:] in ("", "\n") and columns > 7 and rows > 2:
            lines = [branch_line(*map(decode, branch), columns) for branch in block[:rows - 2]]
        self.write(text, lines)

    def write(self, text, lines=()):
        """Takes the old branch lines away, writes what is new of the text, and lines below it."""
        if self.lines:  # up, and clear from there on
            sys.stdout.write(f"\x1b[{len(self.lines)}A\x1b[J")
        sys.stdout.write(printable(text[len(self.text):]) + "".join(lines))
        sys.stdout.flush()
        self.text = text
        self.lines = lines


def branch_line(title, rest, columns):
    """The line of a branch in so many columns: how its title begins, and its latest words."""
    title, rest = (" ".join(printable(text).split()) for text in (title, rest))
    # Half of the columns for each; a character that is not ASCII may take two.
    room = (columns - 4) // (2 if (title + rest).isascii() else 4)
    return f"| {title[:room]} {rest[-room:]}\n"


def main():
    """The command line."""
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="one prompt")
    what.add_argument("--prompts", metavar="FILE", help='JSON (Lines) of {"prompt", "category"}')
    add = p.add_argument
    add("--ckpt", default="out", metavar="DIR", help="a folder with a ckpt.pt")
    add("--mode", choices=MODES, help="none: adaptive if the model has learnt to branch")
    add("--max-new-tokens", type=int, default=512, help="after the prompt; tags and titles count")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=200, help="sample from the k best; 0: from all, or 4096")
    add("--top-p", type=float, default=1.0, help="and of these from the best that reach p")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="or cuda:1, ...")
    add("--dtype", choices=("float32", "bfloat16", "float64"), help="none: what suits the device")
    add("--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)")
    add("--json", metavar="FILE", help="also write the answers and their figures here")
    args = p.parse_args()

    records = [{"prompt": args.prompt}]
    if args.prompts is not None:
        records = list(read_objects(args.prompts))
        check(records, f"{args.prompts}: no prompts")
    lm = load(args.ckpt, args.device, args.dtype, args.compile)
    for n, record in enumerate(records, start=1):
        with naming(f"{args.prompts}, record {n}" if args.prompts else "--prompt"):
            prompt_ids(lm, record.get("prompt"))  # a bad one is told now, not after the work
    if args.json is not None:
        open(args.json, "a").close()          # and so is a file that cannot be written
    results = []
    try:
        for record in records:
            view = View()
            answer = generate(
                lm, record["prompt"], args.mode, max_new_tokens=args.max_new_tokens,
                temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
                watch=view if sys.stdout.isatty() else None)
            del answer.segments  # token ids, of no use in a file
            results.append({"category": record.get("category")} | vars(answer))
            view.write(answer.text + "\n")
            print(f"\n{answer.tokens} tokens in {answer.steps} steps, "
                  f"branches {[len(block) for block in answer.blocks]}, "
                  f"{answer.tokens / answer.seconds:.0f} tokens/s, first after "
                  f"{1000 * answer.ttft:.0f} ms, finish: {answer.finish}\n", file=sys.stderr)
    finally:  # after an error or Ctrl-C, too: what there is, and no branch lines
        if args.json and results:
            results = json.dumps({"results": results}, ensure_ascii=False, indent=1)
            write_text(args.json, results + "\n")
        view.write(view.text)


if __name__ == "__main__":
    cli(main)
