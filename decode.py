"""The hybrid engine (paper section 3.4): one answer, one KV cache, serial and parallel by turns.

    prefill -> serial text -> titles -> prefixes -> branches side by side -> serial text -> ...
               ^ a token a pass         ^ one pass  ^ a token of each a pass

The model decides when: it opens a block by choosing <|title|>. The n-th token fed takes slot n of
the cache, and is fed exactly once. While a block is written, owner[slot] says which branch a slot
belongs to; when it ends, its slots become everybody's. Nothing is moved, copied or computed again.

    python decode.py --prompt "Write a guide to bears and goats."
    >>> generate(load("out"), "Write a guide to bears and goats.").text
"""
import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from aspd import (BRANCH_TAGS, MAX_BRANCHES, POSITIONS, BadInput, Block, Branch, cache_mask, check,
                  plain)
from data import Tokenizer, cli, printable, published_tokenizer, read_prompts, write_whole
from model import check_device, from_checkpoint, from_published, read_checkpoint

MODES = ("adaptive", "branchwise", "serial")
TITLE_CAP = 32  # tokens of a title at most
MIN_BRANCH = 8  # tokens that every branch can count on after its title
# Options of the command line that main() hands to generate().
SETTINGS = "mode system max_new_tokens temperature top_k top_p seed max_branches".split()


# ---- grammar and sampling ---------------------------------------------------

# The grammar's states: in serial text, without and with room for a block; before the first token of
# a title, before the others, and after <|/title|>; in a branch.
TEXT_ONLY, SERIAL, TITLE_START, TITLE, AFTER_TITLE, BRANCH = range(6)


def grammar(tokenizer, vocab_size):
    """(6, V) bool: the ids allowed in each state. Ids without a token are allowed nowhere."""
    text = list(tokenizer.bytes)
    stop = list(tokenizer.stop)
    tags = tokenizer.tags
    allow = torch.zeros(6, vocab_size, dtype=torch.bool)
    allow[TEXT_ONLY, text + stop] = True
    if tags:
        allow[SERIAL, text + stop + [tags.title]] = True
        allow[TITLE_START, text] = True
        allow[TITLE, text + [tags.title_end]] = True
        allow[AFTER_TITLE, [tags.title, tags.para]] = True
        allow[BRANCH, text + stop + [tags.branch_end]] = True  # end-of-text only ends the branch
    return allow


def sampling_settings(temperature, top_k, top_p, device):
    """generate()'s settings -> (temperature, top_p, top_k) for sample(). The first two are tensors:
    with other numbers a compiled step would be compiled again."""
    if temperature == 0:
        top_k = 1
    temperature, top_p = torch.tensor([max(temperature, 1e-6), top_p], device=device)
    return temperature, top_p, top_k


def sample(logits, u, temperature, top_p, top_k):
    """One token a row: logits (L, V) -> (L,). u (L,): a random number in [0, 1) for each. top_k 1
    is greedy, 0 takes all."""
    if top_k == 1:
        return logits.argmax(-1)
    values, indices = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # best first
    p = ((values - values[:, :1]) / temperature).softmax(-1)  # the best is 0: no overflow
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the fewest tokens that together reach top_p
    cdf = p.cumsum(-1)  # inverted at u: what a branch draws does not depend on the others
    chosen = (cdf < u[:, None] * cdf[:, -1:]).sum(-1, keepdim=True)
    return indices.gather(-1, chosen)[:, 0]


def forward_pass(model, allow, fed, choose, u, sampling, n_slots):
    """The step of all modes -> (tokens chosen (L,), their logits (L, V), which tests look at).

    fed: (4, W) int64: token, position, branch and slot of the W tokens fed; branch becomes the
    owner of slot. choose: (2, L) int64: after which L of them to choose a token, and in which
    state. allow: (6, V), the grammar. u: (L,) and sampling, a tuple: see sample(). n_slots: how
    many slots attention reads. A token is -1 where the logits are not finite.
    """
    token, position, branch, slot = fed
    pick, state = choose
    model.owner[slot] = branch
    mask = cache_mask(slot, branch, model.owner[:n_slots])
    logits = model(token[None], position[None], mask, slot, pick)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # or float64
    chosen = sample(logits.masked_fill(~allow[state], -torch.inf), u, *sampling)
    return torch.where(logits.isfinite().all(-1), chosen, -1), logits


# ---- a model ready to decode ------------------------------------------------

class LM:
    """A model, which is frozen, its tokenizer and what they need to decode: grammar and step."""

    def __init__(self, model, tokenizer, compile=False):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = model.model.embed_tokens.weight.device
        self.allow = grammar(tokenizer, model.config.vocab_size).to(self.device)
        self.step = forward_pass   # tests put theirs in its place
        self.compiled_step = None  # for passes that choose after every token: static shapes
        if compile:
            torch._dynamo.config.recompile_limit = 64  # for widths, cache sizes, kinds of sampling
            torch._dynamo.mark_static_address(self.allow)  # CUDA graphs need not copy it
            # On a CPU oneDNN packs frozen weights once for all widths; in float32 it does not pay.
            weight = model.model.embed_tokens.weight
            packs = weight.is_cpu and weight.dtype == torch.bfloat16
            torch._inductor.config.freezing = packs
            torch._inductor.config.cpp.enable_concat_linear = packs  # q, k and v in one product
            mode = "reduce-overhead" if self.device.type == "cuda" else None  # CUDA graphs
            self.compiled_step = torch.compile(
                forward_pass, fullgraph=True, dynamic=False, mode=mode)


def load(path="out", device="cpu", dtype=None, compile=False):
    """An LM from a folder, of train.py or published. dtype: "float32", "bfloat16" or "float64";
    None: bfloat16 on CUDA, else float32, which on a CPU is as fast for few tokens (model.linear).
    ValueError without a usable checkpoint."""
    check_device(device)
    if Path(path, "config.json").exists() and not Path(path, "ckpt.pt").exists():
        model = from_published(path)
        tokenizer = published_tokenizer(path)
    else:
        state = read_checkpoint(path)
        model = from_checkpoint(state, path)
        tokenizer = Tokenizer(**state["tokenizer"])
    check(tokenizer.vocab_size <= model.config.vocab_size, f"{path}: more token ids than rows")
    dtype = dtype or ("bfloat16" if str(device).startswith("cuda") else "float32")
    return LM(model.to(device, getattr(torch, dtype)), tokenizer, compile)


# ---- the engine -------------------------------------------------------------

@dataclass
class Answer:
    """What generate() returns."""
    prompt: str
    text: str       # the plain answer
    mode: str
    tokens: int     # of the plain answer
    steps: int      # forward passes after prefill
    seconds: float  # wall-clock, prefill included
    ttft: float     # seconds to the first token
    blocks: list    # of each block, how many tokens each branch has, tags aside
    finish: str     # "stop", or "length": the budget or the context cut text, a branch or a block
    segments: list  # ids and Blocks of ids


@dataclass
class Budget:
    """How many row tokens may still be fed, the prompt included, and how a block divides them."""
    left: int
    max_branches: int

    def room(self, block):
        """Is there room for one more branch (in a new block, two), with the longest title and at
        least MIN_BRANCH tokens after the title for every branch?"""
        n_new = 1 if block else 2
        longest_title = [None] * TITLE_CAP
        longer = [*block, *[Branch(longest_title, [])] * n_new]
        after_titles = Budget(self.left - n_new * (1 + TITLE_CAP + 1), self.max_branches)
        return len(longer) <= self.max_branches and after_titles.quota(longer) >= MIN_BRANCH

    def quota(self, block):
        """Tokens that each branch may have after its title: an equal share of what is left, so that
        it does not depend on the order in which the branches are decoded."""
        # <|para|> and <|/para|>, and the titles again, as prefixes
        forced = 1 + 1 + sum(len(title) + BRANCH_TAGS for title, _ in block)
        return (self.left - forced) // len(block)


@dataclass
class Lane:
    """A branch that is being written."""
    number: int    # 1, 2, ... within its block
    rest: list     # what has been chosen, after its title; grows in place
    position: int  # of the first token in next
    next: list     # tokens to feed: the prefix, then one a pass, then <|/branch|>, at last none


class Engine:
    """The state of one answer being decoded. Its methods follow the picture at the head."""

    def __init__(self, lm, mode, budget, sampling, seed, watch):
        self.lm = lm
        self.tags = lm.tokenizer.tags
        self.mode = mode
        self.budget = budget
        self.sampling = sampling  # the last arguments of sample()
        self.watch = watch
        # The next power of two above budget.left, for few sizes; the last slot stays free for the
        # padding of feed().
        lm.model.setup_cache(1 << max(budget.left, 255).bit_length())
        draw = torch.Generator().manual_seed(seed % 2**63)
        # A random number for every [position, branch].
        self.uniform = torch.rand(budget.left, MAX_BRANCHES + 1, generator=draw)
        self.slot = 0      # the next slot
        self.position = 0  # the next position of the serial stream
        self.steps = -1    # passes; the prefill makes it 0
        self.segments = [[]]
        self.cut = False   # has the budget or the context cut anything?

    def feed(self, triples, pick, state):
        """One pass: feeds (token, position, branch) triples at the next slots -> the tokens chosen,
        in a state of the grammar, after those at the indices `pick`, a list."""
        lm = self.lm
        n = len(triples)
        fed = [(*triple, slot) for slot, triple in enumerate(triples, start=self.slot)]
        self.slot += n
        self.steps += 1
        step = lm.step
        n_slots = self.slot
        if lm.compiled_step and len(pick) == n:  # a token a stream: not for prefill and prefixes
            step = lm.compiled_step
            n_slots = len(lm.model.owner)  # a static shape, as is the width
            padding = (1 << (n - 1).bit_length()) - n  # to a power of two
            # In the last slot, which is never used, as tokens of a branch that there is not.
            fed += [(0, 0, -1, n_slots - 1)] * padding
            pick = range(n + padding)
        fed = torch.tensor(fed).t()                            # (4, W)
        choose = torch.tensor([(i, state) for i in pick]).t()  # (2, L)
        _, position, branch, _ = fed[:, choose[0]]             # where a token is chosen
        u = self.uniform[position, branch]  # so what a branch draws does not depend on the others
        fed, choose, u = (x.to(lm.device) for x in (fed, choose, u))
        chosen, _ = step(lm.model, lm.allow, fed, choose, u, self.sampling, n_slots)
        chosen = chosen.tolist()  # the one synchronisation of a pass
        if min(chosen) < 0:
            lm.model.owner = None  # a new cache for the next answer: masked or not, NaN spreads
            raise BadInput(f"the logits of step {self.steps} are not finite")
        if self.watch:
            self.watch(self)
        return chosen[:n]

    def serial(self, tokens, state=None):
        """Feeds serial tokens -> the next one. state None: text, or a block if there is room."""
        fed = [(token, self.position + i, 0) for i, token in enumerate(tokens)]
        self.position += len(tokens)
        self.budget.left -= len(tokens)
        if state is None:
            state = SERIAL if self.mode != "serial" and self.budget.room([]) else TEXT_ONLY
        return self.feed(fed, [len(fed) - 1], state)[0]

    def run(self, prompt):
        """Prefill, then serial text and blocks until end-of-text or until nothing is left."""
        stop = self.lm.tokenizer.stop
        token = self.serial(prompt)
        self.first_token_at = time.perf_counter()
        while token not in stop and self.budget.left > 0:
            if self.tags and token == self.tags.title:
                token = self.block()
            else:
                self.segments[-1].append(token)
                token = self.serial([token])
        self.cut |= token not in stop

    def block(self):
        """Titles, then branches. Returns the first serial token after the block."""
        block = Block()
        self.segments.append(block)
        token = self.tags.title
        # The second title is forced, whatever the model chooses: a block has two branches at least.
        while len(block) < 2 or (token == self.tags.title and self.budget.room(block)):
            title = []
            block.append(Branch(title, []))  # grows in place, so that a View can show it
            token = self.serial([self.tags.title], TITLE_START)
            while token != self.tags.title_end and len(title) < TITLE_CAP:
                title.append(token)
                token = self.serial([token], TITLE)
            token = self.serial([self.tags.title_end], AFTER_TITLE)
        # A title for which there is no room is a cut; one beyond max_branches is as asked for.
        self.cut |= token == self.tags.title and len(block) < self.budget.max_branches
        self.branches(block)
        self.segments.append([])
        return self.serial([self.tags.para_end])

    def branches(self, block):
        """Feeds <|para|> and all prefixes in one pass, then a token of every live branch a pass."""
        start = self.position + 1  # behind <|para|>
        lanes = []
        for number, (title, rest) in enumerate(block, start=1):
            lanes.append(Lane(number, rest, start, [self.tags.branch] + title))
        quota = self.budget.quota(block)
        self.advance(lanes, quota, before=[(self.tags.para, self.position, 0)])
        groups = [lanes] if self.mode == "adaptive" else [[lane] for lane in lanes]
        for live in groups:
            while live:
                self.advance(live, quota)
                live = [lane for lane in live if lane.next]

        self.lm.model.owner.zero_()  # the block's slots become shared
        lengths = [len(title + rest) + BRANCH_TAGS for title, rest in block]
        self.position = start + POSITIONS[self.lm.model.config.positions](lengths)
        self.budget.left -= 1 + sum(lengths)  # <|para|> and the branches

    def advance(self, lanes, quota, before=()):
        """One pass: feeds what every lane has next, and puts there what the model then chooses, or
        <|/branch|> where the branch has ended, by itself or by its quota."""
        fed = list(before)
        ends = []
        for lane in lanes:
            fed += [(token, lane.position + i, lane.number) for i, token in enumerate(lane.next)]
            ends.append(len(fed) - 1)
        for lane, token in zip(lanes, self.feed(fed, ends, BRANCH), strict=True):
            lane.position += len(lane.next)
            ended = token == self.tags.branch_end or token in self.lm.tokenizer.stop
            if lane.next == [self.tags.branch_end]:
                lane.next = []  # it is done; the choice after its end is not used
            elif ended or len(lane.rest) == quota:
                self.cut |= not ended
                lane.next = [self.tags.branch_end]
            else:
                lane.rest.append(token)
                lane.next = [token]


@torch.no_grad()
def generate(lm, prompt, mode=None, *, system=None, max_new_tokens=512, temperature=0.0, top_k=0,
             top_p=1.0, seed=0, max_branches=MAX_BRANCHES, watch=None):
    """Decodes one answer to a prompt, a str, which is put into the model's chat form -> Answer.

    mode: "adaptive" (the engine), "branchwise" (the same, one branch after the other) or "serial"
    (no blocks); None: adaptive where there are tags. system: None is the model's own.
    max_new_tokens: after the prompt, with tags and repeated titles. temperature 0 is greedy; top_k
    0 and top_p 1 are off. watch: called with the Engine after every pass, before its tokens are
    added.
    ValueError for a value out of range, and for a prompt that is too long.
    """
    tokenizer = lm.tokenizer
    mode = mode or ("adaptive" if tokenizer.tags else "serial")
    check(mode in MODES, f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    check(mode == "serial" or tokenizer.tags, f"a checkpoint without tags cannot decode {mode!r}")
    check(max_new_tokens > 0, f"max-new-tokens must be 1 or more, not {max_new_tokens}")
    check(0 <= temperature <= 1e6, f"temperature must be 0 (greedy) to 1e6, not {temperature}")
    check(top_k >= 0, f"top-k must be 0 (off) or more, not {top_k}")
    check(0 <= top_p <= 1, f"top-p must be 0 (greedy) to 1 (off), not {top_p}")
    check(2 <= max_branches <= MAX_BRANCHES,
          f"max-branches must be 2 to {MAX_BRANCHES}, not {max_branches}")
    check(prompt.strip(), "the prompt is empty")
    ids = tokenizer.prompt(prompt, system)
    context = lm.model.config.block_size
    check(len(ids) < context, f"{prompt[:40]!r} has {len(ids)} tokens, the context only {context}")

    start = time.perf_counter()
    budget = Budget(min(len(ids) + max_new_tokens, context), max_branches)
    sampling = sampling_settings(temperature, top_k, top_p, lm.device)
    engine = Engine(lm, mode, budget, sampling, seed, watch)
    engine.run(ids)
    segments = [segment for segment in engine.segments if segment]
    tokens = plain(segments)
    blocks = [[len(b.title + b.rest) for b in s] for s in segments if isinstance(s, Block)]
    return Answer(
        prompt=prompt, text=tokenizer.decode(tokens), mode=mode, tokens=len(tokens),
        steps=engine.steps, seconds=time.perf_counter() - start, ttft=engine.first_token_at - start,
        blocks=blocks, finish="length" if engine.cut else "stop", segments=segments)


# ---- command line, with a live view -----------------------------------------

@dataclass
class View:
    """Shows an answer as it grows: its text and, below, a line for every branch being written."""
    text: str = ""    # what has been written
    lines: list = ()  # the branch lines below it
    shown: float = 0  # when

    def __call__(self, engine):
        """Shows the engine's answer so far, at most twenty times a second."""
        if time.perf_counter() - self.shown < 0.05:
            return
        self.shown = time.perf_counter()
        decode = engine.lm.tokenizer.decode
        *done, block = engine.segments
        if not isinstance(block, Block):
            done, block = engine.segments, []
        text = decode(plain(done)).rstrip("\ufffd")  # half a character
        columns, rows = shutil.get_terminal_size()
        lines = []
        # Only below a whole line of text, and in a window that has room for them.
        if text[-1:] in ("", "\n") and columns > 7 and rows > 2:
            lines = [branch_line(*map(decode, branch), columns) for branch in block[:rows - 2]]
        self.write(text, lines)

    def write(self, text, lines=()):
        """Takes the old branch lines away, writes what is new of the text, and lines below it."""
        if self.lines:  # up, to the first column, and clear from there on
            sys.stdout.write(f"\x1b[{len(self.lines)}A\x1b[G\x1b[J")
        sys.stdout.write(printable(text[len(self.text):]) + "".join(lines))
        sys.stdout.flush()
        self.text = text
        self.lines = lines


def branch_line(title, rest, columns):
    """The line of a branch in so many columns: how its title begins, and its latest words."""
    title, rest = (" ".join(printable(text).split()) for text in (title, rest))
    # Half of the columns for each; a character that is not ASCII may take two.
    room = (columns - 4) // (2 if (title + rest).isascii() else 4)
    return f"\n| {title[:room]} {rest[-room:]}"


def main():
    """The command line."""
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="one prompt")
    what.add_argument("--prompts", metavar="FILE", help='JSON (Lines) of {"prompt", "category"}')
    add = p.add_argument
    add("--ckpt", default="out", metavar="DIR", help="of train.py, or a published Llama or Qwen2")
    add("--mode", choices=MODES, help="none: adaptive where the checkpoint has tags, else serial")
    add("--system", metavar="TEXT", help="system text; none: the model's own")
    add("--max-new-tokens", type=int, default=512, help="after the prompt; tags and titles count")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="sample from the k best tokens; 0 is off")
    add("--top-p", type=float, default=1.0, help="from the best that together reach p; 1 is off")
    add("--max-branches", type=int, default=MAX_BRANCHES, help="branches of a block at most")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="or cuda:1, ...")
    add("--dtype", choices=("float32", "bfloat16", "float64"), help="none: what suits the device")
    add("--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)")
    add("--json", metavar="FILE", help="also write the answers and their figures here")
    args = p.parse_args()

    one = {"category": None, "prompt": args.prompt}
    prompts = [one] if args.prompts is None else read_prompts(args.prompts)
    lm = load(args.ckpt, args.device, args.dtype, args.compile)
    settings = {name: getattr(args, name) for name in SETTINGS}
    results = []
    try:
        for record in prompts:
            view = View()
            watch = view if sys.stdout.isatty() else None
            try:
                answer = generate(lm, record["prompt"], watch=watch, **settings)
            finally:
                view.write(view.text)  # after Ctrl-C, too, no branch lines are left
            del answer.segments  # token ids, of no use in a file
            results.append(record | vars(answer))
            view.write(answer.text + "\n")
            print(f"\n{answer.tokens} tokens in {answer.steps} steps, "
                  f"branches {[len(block) for block in answer.blocks]}, "
                  f"{answer.tokens / answer.seconds:.0f} tokens/s, first after "
                  f"{1000 * answer.ttft:.0f} ms, finish: {answer.finish}\n", file=sys.stderr)
    finally:  # after an error or Ctrl-C, too: what there is
        if args.json:
            write_whole(args.json, [json.dumps({"results": results}, ensure_ascii=False, indent=1)])


if __name__ == "__main__":
    cli(main)
