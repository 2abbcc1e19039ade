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
from collections import namedtuple

import numpy as np
import torch

TAG_NAMES = ("<|title|>", "<|/title|>", "<|para|>", "<|/para|>", "<|branch|>", "<|/branch|>")
POSITIONS = ("aspd", "longest", "stride")
IGNORE = -100  # "no target here", the value that cross_entropy skips

# a branch as text; the title is a verbatim, non-empty prefix of the text
Branch = namedtuple("Branch", "title text")
# the ids of the six tags, in the order of TAG_NAMES, and of end-of-text
Special = namedtuple("Special", "title title_end para para_end branch branch_end eos")
# A laid-out answer, five int64 arrays of length T. block, branch: both 0 where serial, else counted from 1 (branch within
# its block); position: rotary; target: the token that the decoder chooses next, or IGNORE.
Row = namedtuple("Row", "token block branch position target")
# Counts of an answer: tokens of the plain answer; steps: forward passes after the prompt; branches of each block (a list);
# branch_tokens, titles included; title_tokens; ideal speedup = tokens / steps. Tags are no tokens, but they take steps.
Stats = namedtuple("Stats", "tokens steps branches branch_tokens title_tokens speedup")


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
    Lays a tokenised answer out behind its prompt (paper section 3.2). prompt: list of ids; ids: tokenised segments
    -> Row. Raises ValueError for an unknown position scheme and, under "stride", for a branch longer than the stride.
    """
    pieces = []  # (ids, block, branch, first position, whether the decoder chooses these tokens itself)
    at = n_block = 0  # the serial stream's position, the blocks so far

    def serial(tokens, chosen):
        nonlocal at
        pieces.append((tokens, 0, 0, at, chosen))
        at += len(tokens)

    serial(prompt, False)
    for s in ids:
        if not is_block(s):
            serial(s, True)
            continue
        for i, (title, _) in enumerate(s):
            serial([special.title], i != 1)  # the second title is forced: a block has at least two branches
            serial(title + [special.title_end], True)
        serial([special.para], True)
        n_block += 1
        starts, at = branch_positions(at, [len(title) + len(rest) + 2 for title, rest in s], positions, stride)
        for i, (title, rest) in enumerate(s):
            pieces.append(([special.branch] + title, n_block, i + 1, starts[i], False))  # the engine feeds the prefix
            pieces.append((rest + [special.branch_end], n_block, i + 1, starts[i] + 1 + len(title), True))
        serial([special.para_end], False)
    lengths = [len(p[0]) for p in pieces]
    token = np.array([i for p in pieces for i in p[0]], dtype=np.int64)
    position = np.concatenate([np.arange(p[3], p[3] + len(p[0])) for p in pieces])
    block, branch, chosen = (np.repeat([p[k] for p in pieces], lengths) for k in (1, 2, 4))
    return Row(token, block, branch, position, targets(token, block, chosen, special.eos))


def branch_positions(start, sizes, scheme="aspd", stride=0):
    """
    Where each branch of a block starts, and where the serial stream goes on (paper section 3.3). start: the position
    after <|para|>; sizes: each branch's tokens, tags included -> (list of positions, position).
    """
    if scheme == "aspd":  # side by side, and afterwards as if they had been written one after the other
        return [start] * len(sizes), start + sum(sizes)
    if scheme == "longest":  # as APAR has it
        return [start] * len(sizes), start + max(sizes)
    if scheme == "stride":  # as PASTA has it, without its prediction of lengths
        if max(sizes) > stride:
            raise ValueError(f"a branch of {max(sizes)} tokens is longer than the stride, {stride}")
        return [start + i * stride for i in range(len(sizes))], start + len(sizes) * stride
    raise ValueError(f"unknown position scheme {scheme!r}, expected one of {', '.join(POSITIONS)}")


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
    causal = torch.ones(block.size(-1), block.size(-1), dtype=torch.bool, device=block.device).tril()
    same_block = block[..., :, None] == block[..., None, :]  # serial text counts as one block, all of branch 0
    siblings = same_block & (branch[..., :, None] != branch[..., None, :])
    return causal & ~siblings


# -----------------------------------------------------------------------------
# metrics (DESIGN section 7; paper section 4.1)

def stats(ids):
    """Tokenised segments -> Stats. The steps are exactly what the engine needs."""
    blocks, tokens = [s for s in ids if is_block(s)], len(plain(ids))
    steps = sum(len(s) for s in ids if not is_block(s))
    for s in blocks:
        steps += sum(len(title) + 2 for title, _ in s) + 1  # titles with their tags; <|/para|>
        steps += 1 + max(len(rest) + 1 for _, rest in s)    # <|para|> with all prefixes; the longest branch
    titles = sum(len(title) for s in blocks for title, _ in s)
    rests = sum(len(rest) for s in blocks for _, rest in s)
    return Stats(tokens, steps, [len(s) for s in blocks], titles + rests, titles, tokens / steps if steps else 1.0)


def tally(total, s):
    """Adds an answer's Stats to a Counter of sums, so that memory does not grow with the file."""
    total.update(answers=1, speedup=s.speedup)
    total["best"] = max(total["best"], s.speedup)
    if s.branches:
        total.update(PPD=1, blocks=len(s.branches), ABN=sum(s.branches), APD=s.branch_tokens / s.tokens,
                     APE=(s.branch_tokens - s.title_tokens) / s.branch_tokens)


def summary(total):
    """
    A tallied Counter -> dict of the paper's figures: PPD, the share of answers with a block; ABN, branches a block; APD,
    the share of a parallel answer that lies in branches; APE, the share of branch tokens that are not titles; and the
    ideal speedup, on average and at best.
    """
    over = {"PPD": "answers", "ABN": "blocks", "APD": "PPD", "APE": "PPD", "speedup": "answers"}
    return {"answers": total["answers"], "best": total["best"], **{k: total[k] / max(total[n], 1) for k, n in over.items()}}


# -----------------------------------------------------------------------------
# the picture

def picture():
    """Prints a small tagged answer, its row table and its mask: the paper's figure 3, in a terminal."""
    block = [Branch("1. Sleep", "1. Sleep: eight hours.\n"), Branch("2. Move", "2. Move: walk daily.\n\n")]
    segments = ["Two tips:\n\n", block, "Start today."]
    vocab = [*TAG_NAMES, "<eos>"]

    def encode(text):  # a toy tokenizer: one id a word
        vocab.extend(w for w in text.split() if w not in vocab)
        return [vocab.index(w) for w in text.split()]

    ids = tokenize(segments, encode)
    row = layout(encode("How to live well?"), ids, Special(*range(7)))
    mask = branch_mask(torch.tensor(row.block), torch.tensor(row.branch))
    print(f"{join(segments)}\n\nThe row of this answer, behind its prompt:\n")
    print(f"{'row':>3} {'token':<12} {'block':>5} {'branch':>6} {'position':>8}  {'target':<12}  sees (# yes, . no)")
    for t, (token, block, branch, position, target) in enumerate(zip(*row)):
        seen = "".join(".#"[s] for s in mask[t, :t + 1].int())
        target = "-" if target == IGNORE else vocab[target]
        print(f"{t:>3} {vocab[token]:<12} {block:>5} {branch:>6} {position:>8}  {target:<12}  {seen}")
    s = stats(ids)
    print(f"\n{s.tokens} plain tokens in {s.steps} steps: this toy is too short to gain, for titles and tags take steps too. "
          f"\nLonger branches turn it around; `python data.py` shows by how much.")


if __name__ == "__main__":
    picture()
