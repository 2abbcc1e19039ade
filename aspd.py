"""
ASPD: Adaptive Serial-Parallel Decoding (arXiv 2508.08895). This file is the idea; the other four make it run.

An answer is a list of segments. A segment is either serial text (a str) or a block: a list of branches that do not
need each other. The tagged answer writes every branch's title first, in series, and then all branches side by side:

    Two tips:  <|title|>1. Sleep<|/title|> <|title|>2. Move<|/title|> <|para|>
                   <|branch|>1. Sleep: eight hours.<|/branch|>
                   <|branch|>2. Move: walk daily.<|/branch|>
               <|/para|>  Start today.

Lossless by construction: without the titles and the tags, the segments' texts joined are the answer.
Once tokenised, a serial segment is a list of ids and a branch is a pair (title ids, rest ids): the pieces are
tokenised apart, so training sees exactly the tokens that decoding feeds.

    python aspd.py        # prints a tagged answer, its row table and its branch mask
"""
from typing import NamedTuple

import numpy as np
import torch

TAG_NAMES = ("<|title|>", "<|/title|>", "<|para|>", "<|/para|>", "<|branch|>", "<|/branch|>")
POSITIONS = ("aspd", "longest", "stride")
IGNORE = -100  # "no target here", the value cross_entropy skips


class Branch(NamedTuple):
    """One branch of a block, as text. The title is a verbatim, non-empty prefix of the text."""
    title: str
    text: str


class Special(NamedTuple):
    """Token ids of the six tags, in the order of TAG_NAMES, and of end-of-text."""
    title: int
    title_end: int
    para: int
    para_end: int
    branch: int
    branch_end: int
    eos: int


class Row(NamedTuple):
    """A laid-out answer: five int64 arrays of length T (paper section 3.2). See layout()."""
    token: np.ndarray
    block: np.ndarray     # 0 where serial, else counts from 1
    branch: np.ndarray    # 0 where serial, else counts from 1 within its block
    position: np.ndarray  # rotary position
    target: np.ndarray    # the token that the decoder chooses next, or IGNORE


# -----------------------------------------------------------------------------
# text <-> segments <-> ids

def join(segments):
    """The plain answer: list of segments -> str."""
    return "".join(s if isinstance(s, str) else "".join(b.text for b in s) for s in segments)


def tokenize(segments, encode):
    """Segments of text -> segments of ids; encode: str -> list of ids. Serial text, title and rest are encoded apart."""
    return [encode(s) if isinstance(s, str) else [(encode(b.title), encode(b.text[len(b.title):])) for b in s]
            for s in segments]


def plain(ids):
    """Segments of ids -> the ids of the plain answer: no tags, no repeated titles."""
    out = []
    for s in ids:
        out += [i for title, rest in s for i in title + rest] if is_block(s) else s
    return out


def is_block(s):
    """Whether a tokenised segment is a block: a list of (title, rest) pairs rather than of ids."""
    return len(s) > 0 and isinstance(s[0], tuple)


# -----------------------------------------------------------------------------
# the layout: one flat row, for training and decoding alike

def layout(prompt, ids, special, positions="aspd", stride=0):
    """
    Lays a tokenised answer out behind its prompt (DESIGN: paper section 3.2).
    prompt: list of ids; ids: tokenised segments -> Row. Raises ValueError for an unknown position scheme and,
    under "stride", for a branch longer than the stride.
    """
    pieces = []  # (ids, block, branch, whether the decoder chooses these tokens itself)
    pieces.append((prompt, 0, 0, False))
    n_block = 0
    for s in ids:
        if not is_block(s):
            pieces.append((s, 0, 0, True))
            continue
        n_block += 1
        for i, (title, _) in enumerate(s):
            pieces.append(([special.title], 0, 0, i != 1))  # the second title is forced: a block has two branches
            pieces.append((title + [special.title_end], 0, 0, True))
        pieces.append(([special.para], 0, 0, True))
        for i, (title, rest) in enumerate(s, start=1):
            pieces.append(([special.branch] + title, n_block, i, False))  # fed by the engine
            pieces.append((rest + [special.branch_end], n_block, i, True))
        pieces.append(([special.para_end], 0, 0, False))
    lengths = [len(p[0]) for p in pieces]
    token = np.array([i for p in pieces for i in p[0]], dtype=np.int64)
    block, branch, chosen = (np.repeat([p[k] for p in pieces], lengths) for k in (1, 2, 3))
    position = position_ids(block, branch, positions, stride)
    return Row(token, block, branch, position, targets(token, block, chosen, special.eos))


def position_ids(block, branch, scheme="aspd", stride=0):
    """
    Rotary positions of a row (paper section 3.3). block, branch: (T,) -> (T,).
    All branches of a block start at the same position s (at s + i * stride under "stride"); the serial stream goes on
    after the sum of their lengths ("aspd"), after the longest ("longest") or after n * stride ("stride").
    """
    if scheme not in POSITIONS:
        raise ValueError(f"unknown position scheme {scheme!r}, expected one of {', '.join(POSITIONS)}")
    T = len(block)
    edge = np.flatnonzero((np.diff(block, prepend=-1) != 0) | (np.diff(branch, prepend=-1) != 0))  # where a run starts
    run_block, run_branch, run_length = block[edge], branch[edge], np.diff(edge, append=T)
    within = np.arange(T) - np.repeat(edge, run_length)  # index of a token inside its run
    n_block = block.max(initial=0)
    advance = np.zeros(n_block + 1, dtype=np.int64)  # by how much each block moves the serial stream on
    inside = run_block > 0
    if scheme == "aspd":
        np.add.at(advance, run_block[inside], run_length[inside])
    elif scheme == "longest":
        np.maximum.at(advance, run_block[inside], run_length[inside])
    else:
        if run_length[inside].max(initial=0) > stride:
            raise ValueError(f"a branch of {run_length[inside].max()} tokens is longer than the stride {stride}")
        np.maximum.at(advance, run_block[inside], run_branch[inside] * stride)
    advance = advance.cumsum()
    serial = block == 0
    serial_before = serial.cumsum() - serial
    finished = np.maximum.accumulate(block) - ~serial  # blocks that ended before this token
    offset = within + (branch - 1) * stride if scheme == "stride" else within
    return serial_before + advance[finished] + np.where(serial, 0, offset)


def targets(token, block, chosen, eos):
    """The next token of the same stream where the decoder chooses it, else IGNORE. All (T,) -> (T,)."""
    target = np.full_like(token, IGNORE)
    here = np.flatnonzero((block > 0) & chosen)
    target[here - 1] = token[here]  # a branch starts with forced tokens, so here - 1 is in the same branch
    serial = np.flatnonzero(block == 0)
    target[serial[:-1]] = np.where(chosen[serial[1:]], token[serial[1:]], IGNORE)
    target[serial[-1]] = eos
    return target


def branch_mask(block, branch):
    """
    The branch-invisible mask (paper section 3.2): True where query q sees key k, that is where k is at or before q
    and the two are not in different branches of one block. block, branch: (..., T) tensors -> (..., T, T) bool.
    """
    T = block.size(-1)
    causal = torch.ones(T, T, dtype=torch.bool, device=block.device).tril()
    same_block = (block[..., :, None] == block[..., None, :]) & (block[..., :, None] > 0)
    siblings = same_block & (branch[..., :, None] != branch[..., None, :])
    return causal & ~siblings


# -----------------------------------------------------------------------------
# metrics (DESIGN section 7; paper section 4.1)

class Stats(NamedTuple):
    """Counts of one answer, in tokens; tags never count as tokens, but they do take steps."""
    tokens: int         # of the plain answer
    steps: int          # forward passes after the prompt
    branches: list      # branches of each block
    branch_tokens: int  # titles included
    title_tokens: int

    @property
    def speedup(self):
        """Ideal speedup: a plain answer of n tokens takes n steps."""
        return self.tokens / self.steps if self.steps else 1.0


def stats(ids):
    """Tokenised segments -> Stats. The steps are what the engine needs, exactly."""
    steps = branch_tokens = title_tokens = 0
    for s in ids:
        if not is_block(s):
            steps += len(s)
            continue
        titles = sum(len(title) for title, _ in s)
        steps += titles + 2 * len(s) + 1                   # titles with their tags, and <|/para|>
        steps += 1 + max(len(rest) + 1 for _, rest in s)   # <|para|> with all prefixes, then the longest branch
        title_tokens += titles
        branch_tokens += titles + sum(len(rest) for _, rest in s)
    blocks = [len(s) for s in ids if is_block(s)]
    return Stats(len(plain(ids)), steps, blocks, branch_tokens, title_tokens)


def summary(all_stats):
    """List of Stats -> dict of the paper's figures: PPD, ABN, APD, APE and the ideal speedup (mean, best)."""
    mean = lambda values: float(np.mean(values)) if len(values) else 0.0
    parallel = [s for s in all_stats if s.branches]
    return {
        "answers": len(all_stats),
        "PPD": mean([bool(s.branches) for s in all_stats]),                     # share with at least one block
        "ABN": mean([n for s in parallel for n in s.branches]),                 # branches a block
        "APD": mean([s.branch_tokens / s.tokens for s in parallel]),            # share of the answer in branches
        "APE": mean([(s.branch_tokens - s.title_tokens) / s.branch_tokens for s in parallel]),
        "speedup": mean([s.speedup for s in all_stats]),
        "best": max([s.speedup for s in all_stats], default=0.0),
    }


# -----------------------------------------------------------------------------
# the picture

def picture():
    """Prints a small tagged answer, its row table and its mask: the paper's figure 3, in a terminal."""
    segments = ["Two tips:\n\n", [Branch("1. Sleep", "1. Sleep: eight hours.\n"), Branch("2. Move", "2. Move: daily.\n\n")],
                "Start today."]
    words, special = ["How", "to", "live", "well?"], Special(*range(7))
    vocab = [*TAG_NAMES, "<eos>", *words]

    def encode(text):  # a toy tokenizer: one id a word
        vocab.extend(w for w in text.split() if w not in vocab)
        return [vocab.index(w) for w in text.split()]

    ids = tokenize(segments, encode)
    row = layout(encode("How to live well?"), ids, special)
    print(f"The answer:\n\n{join(segments)}\n\nits row, under a prompt of {len(words)} tokens:\n")
    print(f"{'row':>3} {'token':<12} {'block':>5} {'branch':>6} {'position':>8}  {'target':<12}  sees (# yes, . no)")
    mask = branch_mask(torch.tensor(row.block), torch.tensor(row.branch))
    for t, (token, block, branch, position, target) in enumerate(zip(*row)):
        seen = "".join("#" if s else "." for s in mask[t, :t + 1].tolist())
        target = "-" if target == IGNORE else vocab[target]
        print(f"{t:>3} {vocab[token]:<12} {block:>5} {branch:>6} {position:>8}  {target:<12}  {seen}")
    s = stats(ids)
    print(f"\n{s.tokens} plain tokens in {s.steps} steps. This toy is too short to gain: titles and tags cost more steps")
    print("than two such branches save. Longer branches turn it around: `python data.py` shows by how much.")


if __name__ == "__main__":
    picture()
