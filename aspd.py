"""ASPD: Adaptive Serial-Parallel Decoding (arXiv 2508.08895). This file is the idea; the other four make it run.

An answer is a list of segments: serial text (a str), or a block, a list of branches that do not need each other. Their
texts joined are the answer. The tagged answer writes a block's titles first, and then all its branches side by side:

    Two tips:  <|title|>1. Sleep<|/title|> <|title|>2. Move<|/title|> <|para|>
                   <|branch|>1. Sleep: eight hours.<|/branch|>
                   <|branch|>2. Move: walk daily.<|/branch|>
               <|/para|>  Start today.

`python aspd.py` prints such an answer's row table and its branch mask."""
from collections import namedtuple

import numpy as np
import torch

TAG_NAMES = ("<|title|>", "<|/title|>", "<|para|>", "<|/para|>", "<|branch|>", "<|/branch|>")
POSITIONS = ("aspd", "longest", "stride")
IGNORE = -100  # "no target here", the value that cross_entropy skips

Branch = namedtuple("Branch", "title text")  # the title is a verbatim, non-empty prefix of the text
Special = namedtuple("Special", "title title_end para para_end branch branch_end eos")  # ids, in TAG_NAMES' order
# A laid-out answer, five int64 arrays of length T. block, branch: both 0 where serial, else counted from 1 (branch
# within its block); position: rotary; target: the token that the decoder chooses next, or IGNORE.
Row = namedtuple("Row", "token block branch position target")
# tokens: of the plain answer; steps: passes after the prompt; branches: of each block; speedup: ideal, tokens / steps.
Stats = namedtuple("Stats", "tokens steps branches branch_tokens title_tokens speedup")

def check(ok, message):
    """ValueError with the message unless ok."""
    if not ok:
        raise ValueError(message)

def join(segments):
    """The plain answer: list of segments -> str."""
    return "".join(s if isinstance(s, str) else "".join(b.text for b in s) for s in segments)

def tokenize(segments, encode):
    """Segments of text -> of ids. encode: str -> list; a branch becomes (title ids, rest ids), as it is decoded."""
    return [encode(s) if isinstance(s, str) else [(encode(b.title), encode(b.text[len(b.title):])) for b in s]
            for s in segments]

is_block = lambda s: len(s) > 0 and isinstance(s[0], tuple)  # is a tokenised segment (title, rest) pairs, not ids?

def plain(ids):
    """Segments of ids -> the ids of the plain answer: no tags, no repeated titles."""
    out = []
    for s in ids:
        out += [i for title, rest in s for i in title + rest] if is_block(s) else s
    return out

def layout(prompt, ids, special, positions="aspd", stride=0):
    """Lays tokenised segments out behind a prompt's ids -> Row (paper section 3.2). ValueError as branch_positions."""
    pieces = []  # (ids, block, branch, positions, whether the decoder chooses these tokens itself)
    def add(tokens, start, chosen, block=0, branch=0):
        pieces.append((tokens, block, branch, np.arange(start, start + len(tokens)), chosen))
        return start + len(tokens)
    at, n_block = add(prompt, 0, False), 0  # at: the serial stream's position
    for s in ids:
        if not is_block(s):
            at = add(s, at, True)
            continue
        for i, (title, _) in enumerate(s):
            at = add([special.title], at, i != 1)  # the second title is forced: a block has at least two branches
            at = add(title + [special.title_end], at, True)
        at, n_block = add([special.para], at, True), n_block + 1
        starts, at = branch_positions(at, [len(title) + len(rest) + 2 for title, rest in s], positions, stride)
        for i, (title, rest) in enumerate(s):
            start = add([special.branch] + title, starts[i], False, n_block, i + 1)  # the engine feeds the prefix
            add(rest + [special.branch_end], start, True, n_block, i + 1)
        at = add([special.para_end], at, False)
    tokens, block, branch, position, chosen = zip(*pieces)
    token, position = np.array([i for piece in tokens for i in piece], dtype=np.int64), np.concatenate(position)
    block, branch, chosen = np.repeat([block, branch, chosen], [len(piece) for piece in tokens], axis=1)
    target = np.append(np.where(chosen, token, IGNORE)[1:], IGNORE)  # the next one: each stream starts forced
    target[np.flatnonzero(block == 0)[-1]] = special.eos
    return Row(token, block, branch, position, target)

def branch_positions(start, sizes, scheme="aspd", stride=0):
    """Where branches start and the serial stream goes on (paper section 3.3). start: the position after <|para|>;
    sizes: each branch's tokens, with tags -> (list of positions, position). ValueError: unknown scheme, long branch."""
    check(scheme in POSITIONS, f"unknown position scheme {scheme!r}, expected one of {', '.join(POSITIONS)}")
    if scheme == "stride":  # as PASTA, without its predictions
        check(max(sizes) <= stride, f"a branch of {max(sizes)} tokens is longer than the stride, {stride}")
        return [start + i * stride for i in range(len(sizes))], start + len(sizes) * stride
    # side by side, and on as if they had been written one after the other or, as APAR has it, behind the longest
    return [start] * len(sizes), start + (sum(sizes) if scheme == "aspd" else max(sizes))

def branch_mask(block, branch):
    """The branch-invisible mask (paper section 3.2): query q sees key k at or before it, unless they are in different
    branches of one block. block, branch: (..., T) tensors -> (..., T, T) bool, True = sees."""
    same_block = block[..., :, None] == block[..., None, :]  # serial text counts as one block, all of branch 0
    same_branch = branch[..., :, None] == branch[..., None, :]
    return (same_branch | ~same_block).tril()

def stats(ids):
    """Tokenised segments -> Stats (paper section 4.1). The steps are exactly what the engine needs."""
    blocks, tokens = [s for s in ids if is_block(s)], len(plain(ids))
    titles, rests = (sum(len(branch[part]) for s in blocks for branch in s) for part in (0, 1))
    # serial text and titles, a token each; their tags; <|para|> and prefixes; the longest branch and its end; <|/para|>
    steps = tokens - rests + sum(2 * len(s) + 1 + max(len(rest) for _, rest in s) + 1 + 1 for s in blocks)
    return Stats(tokens, steps, [len(s) for s in blocks], titles + rests, titles, tokens / steps if steps else 1.0)

def tally(total, s):
    """Adds an answer's Stats to a Counter of sums, so that memory does not grow with the file."""
    total.update(answers=1, speedup=s.speedup, best=max(0, s.speedup - total["best"]))
    if s.branches:
        total.update(PPD=1, blocks=len(s.branches), ABN=sum(s.branches), APD=s.branch_tokens / s.tokens,
                     APE=(s.branch_tokens - s.title_tokens) / s.branch_tokens)

def summary(total):
    """A tallied Counter -> dict of the paper's figures. PPD: share of answers with a block; ABN: branches a block; APD:
    share of a parallel answer in branches; APE: share of branch tokens not in titles; speedup: ideal, mean; best."""
    over = {"PPD": "answers", "ABN": "blocks", "APD": "PPD", "APE": "PPD", "speedup": "answers"}
    means = {name: total[name] / max(total[count], 1) for name, count in over.items()}
    return {"answers": total["answers"], "best": total["best"], **means}

if __name__ == "__main__":  # the paper's figure 3, in a terminal
    vocab = {name: i for i, name in enumerate([*TAG_NAMES, "<eos>"])}
    encode = lambda text: [vocab.setdefault(word, len(vocab)) for word in text.split()]  # a toy: one id a word
    block = [Branch("1. Sleep", "1. Sleep: eight hours."), Branch("2. Move", "2. Move: walk daily.")]
    ids = tokenize(["Two tips:", block, "Start today."], encode)
    row, s = layout(encode("How to live well?"), ids, Special(*range(7))), stats(ids)
    mask = branch_mask(torch.tensor(row.block), torch.tensor(row.branch))
    names = {IGNORE: "-"} | {i: name for name, i in vocab.items()}
    print(f"{'row':>3} {'token':<12} {'block':>5} {'branch':>6} {'position':>8}  {'target':<12}  sees (# yes, . no)")
    for t, (token, block, branch, position, target) in enumerate(zip(*row)):
        seen = "".join(".#"[k] for k in mask[t, :t + 1].int())
        print(f"{t:>3} {names[token]:<12} {block:>5} {branch:>6} {position:>8}  {names[target]:<12}  {seen}")
    print(f"\n{s.tokens} plain tokens in {s.steps} steps. Longer branches gain: see python data.py.")
