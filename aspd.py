"""ASPD: Adaptive Serial-Parallel Decoding (arXiv 2508.08895). This file is the idea; the other four
make it run.

An answer is a list of segments: serial text, or a Block of branches that do not need each other.
Joined, they are the answer, character for character. The tagged answer has a block's titles first,
and then all its branches side by side (line breaks only for reading):

    Two tips:
    <|title|>1. Sleep<|/title|><|title|>2. Move<|/title|><|para|>
    <|branch|>1. Sleep: eight hours.<|/branch|>
    <|branch|>2. Move: walk daily.<|/branch|><|/para|>
    Start today.

    here          in the paper                                                           section
    block         a parallel region: branches, each from <|branch|> to <|/branch|>           3.1
    serial        everything else: text, the titles before a block, <|para|>, <|/para|>      3.1
    layout        the training sequence: tokens, positions and targets                       3.2
    branch_mask   the branch-invisible mask                                                  3.2
    POSITIONS     where serial text goes on after a block                                    3.3
    cache_mask    branch_mask again, for the KV cache of the engine (decode.py)              3.4
    steps         how many forward passes an answer takes                                    4.1

`python aspd.py` prints the row of such an answer, and who sees whom.
"""
from collections import namedtuple
from contextlib import contextmanager
from typing import NamedTuple

import torch

# Names for printing. A tokenizer holds six ids for them, which encode() never returns.
TAG_NAMES = ("<|title|>", "<|/title|>", "<|para|>", "<|/para|>", "<|branch|>", "<|/branch|>")
# All branches of a block start at one position. Serial text goes on behind it by the sum of their
# lengths, as if they had been written one after the other (Seq in the paper), or by the longest
# (Max). So what has room for the tokens of a row has room for their positions.
POSITIONS = {"aspd": sum, "longest": max}
MAX_BRANCHES = 16  # of a block; a pass with one token of each branch has so many at most
BRANCH_TAGS = 2    # <|branch|> and <|/branch|>: each takes a token and a position of its branch
IGNORE = -100      # "no target here": the value that cross_entropy skips


# ---- an answer --------------------------------------------------------------

class Branch(NamedTuple):
    """A part of a block; title + rest is its text. Both are str or, tokenised, lists of ids."""
    title: object  # not empty; written in series first, so that the branches know of each other
    rest: object   # may be empty


class Block(list):
    """Two or more Branches that do not need each other. isinstance() tells it from serial ids,
    which are a list, too."""


Tags = namedtuple("Tags", "title title_end para para_end branch branch_end")  # ids of TAG_NAMES


def pieces(segments):
    """Yields the texts (or lists of ids) that make up the plain answer, in their order."""
    for segment in segments:
        if isinstance(segment, Block):
            for branch in segment:
                yield from branch  # its title, then its rest
        else:
            yield segment


def join(segments):
    """Segments of text -> the plain answer, a str."""
    return "".join(pieces(segments))


def plain(segments):
    """Segments of ids -> the ids of the plain answer, a list: no tags, every title once."""
    return [token for piece in pieces(segments) for token in piece]


def tokenize(segments, encode):
    """Segments of text -> of ids. encode: str -> list. Every piece is encoded apart. Otherwise a
    token could straddle a title and its rest, and the branch, which repeats its title, would have
    other tokens than decoding feeds."""
    ids = []
    for segment in segments:
        if isinstance(segment, Block):
            ids.append(Block(Branch(*map(encode, branch)) for branch in segment))
        else:
            ids.append(encode(segment))
    return ids


# ---- the layout: a row for training; the engine builds the same, token by token ----

def branch_lengths(block):
    """Of each branch, how many tokens it takes in the row; it takes as many positions."""
    return [len(title + rest) + BRANCH_TAGS for title, rest in block]


class Row(NamedTuple):
    """A prompt and its answer, laid out: five int64 tensors of shape (T,). The T row tokens are all
    that is ever fed, tags and repeated titles included."""
    token: torch.Tensor
    block: torch.Tensor     # 0 where serial, else 1, 2, ... in the order of the blocks
    branch: torch.Tensor    # 0 where serial, else 1, 2, ... within the block
    position: torch.Tensor  # for rotary embeddings; all branches of a block start at the same one
    target: torch.Tensor    # the token that the decoder chooses after this one, or IGNORE


def layout(prompt, segments, eos, tags=None, positions="aspd"):
    """Lays an answer out behind its prompt (sections 3.2 and 3.3) -> Row.

    A token is either chosen by the model or forced, that is fed by the engine without asking it.
    Always forced are the prompt, the second <|title|>, <|branch|>, repeated titles and <|/para|>.
    Only the others are targets.
    prompt: a list of ids. segments: of ids. eos: the last target, not itself in the row. tags: a
    Tags, needed for blocks. positions: one of POSITIONS.
    """
    row = []  # of each token: itself, block, branch, position, and itself again where it is chosen

    def add(tokens, start, is_chosen, block=0, branch=0):
        """Adds a piece at positions start, start + 1, ...; returns the position after it."""
        for position, token in enumerate(tokens, start):
            row.append((token, block, branch, position, token if is_chosen else IGNORE))
        return start + len(tokens)

    n_blocks = 0
    at = add(prompt, 0, False)  # at: the next position of the serial stream
    for segment in segments:
        if not isinstance(segment, Block):
            at = add(segment, at, True)
            continue
        for number, (title, _) in enumerate(segment, start=1):
            at = add([tags.title], at, number != 2)  # the 2nd is forced: a block has at least two
            at = add(title + [tags.title_end], at, True)
        at = add([tags.para], at, True)
        n_blocks += 1
        for number, (title, rest) in enumerate(segment, start=1):
            # every branch starts at `at`, the position behind <|para|>
            rest_at = add([tags.branch] + title, at, False, n_blocks, number)
            add(rest + [tags.branch_end], rest_at, True, n_blocks, number)
        at += POSITIONS[positions](branch_lengths(segment))
        at = add([tags.para_end], at, False)

    # A chosen token is the target of the one before it in the row. No target crosses from a branch
    # into the next one, or into what follows the block: these begin with a forced token, <|branch|>
    # or <|/para|>.
    *columns, chosen = zip(*row)
    columns.append([*chosen[1:], eos])  # the last token of a row is serial
    # Tensors name their device, here and elsewhere: a notebook may have set another default.
    return Row(*[torch.tensor(column, device="cpu") for column in columns])


# ---- one rule, stated twice: who sees whom ----------------------------------

def branch_mask(block, branch):
    """The branch-invisible mask of a row (section 3.2): a query sees the keys at or before it,
    unless they are in different branches of one block.
    block, branch: (..., T) -> (..., T, T) bool, [query, key], True = sees."""
    # Serial tokens count as one block, 0, with one branch, 0: they see each other.
    same_block = block[..., :, None] == block[..., None, :]
    same_branch = branch[..., :, None] == branch[..., None, :]
    return (same_branch | ~same_block).tril()  # hidden: same block, another branch


def cache_mask(slot, branch, owner):
    """The same rule in the KV cache (section 3.4), where the tokens of the branches that are being
    written alternate: a query sees the slots at or before its own that are shared or its branch's.
    slot, branch: (T,), of the queries. owner: (S,), of each slot the branch that is being written
    there, 0 = shared; slots that nothing was written to may hold anything. -> (T, S) bool."""
    at_or_before = torch.arange(len(owner), device=owner.device) <= slot[:, None]
    shared_or_own = (owner == 0) | (owner == branch[:, None])
    return at_or_before & shared_or_own


# ---- what it is worth -------------------------------------------------------

def steps(segments):
    """Segments of ids -> how many forward passes they take after the prompt (section 4.1). The
    engine takes exactly these; a serial decoder takes one for each plain token."""
    n = 0
    for segment in segments:
        if not isinstance(segment, Block):
            n += len(segment)
            continue
        n += sum(len(title) + 2 for title, _ in segment)  # serial: every title, between its tags
        n += 1  # <|para|> and all prefixes (<|branch|> + title); it chooses the first tokens
        n += max(len(rest) for _, rest in segment)  # one for each token of the longest rest
        n += 1  # the <|/branch|> of the longest
        n += 1  # <|/para|>
    return n


def main():
    """Prints a small answer's row: the paper's figure 3, in a terminal."""
    vocab = {name: i for i, name in enumerate([*TAG_NAMES, "<eos>"])}

    def encode(text):  # a toy: one id a word
        return [vocab.setdefault(word, len(vocab)) for word in text.split()]

    block = Block([Branch("1. Sleep", ": eight hours."), Branch("2. Move", ": walk daily.")])
    ids = tokenize(["Two tips:", block, "Start today."], encode)
    row = layout(encode("How to live well?"), ids, vocab["<eos>"], Tags(*range(6)))
    mask = branch_mask(row.block, row.branch).tolist()
    names = {i: name for name, i in vocab.items()} | {IGNORE: "-"}
    print("row token        block branch position  target        sees (# yes, . no)")
    columns = zip(*(column.tolist() for column in row))
    for t, (token, block, branch, position, target) in enumerate(columns):
        seen = "".join(".#"[sees] for sees in mask[t][:t + 1])
        print(f"{t:>3} {names[token]:<12} {block:>5} {branch:>6} {position:>8}  "
              f"{names[target]:<12}  {seen}")
    print(f"\n{len(plain(ids))} plain tokens in {steps(ids)} steps: branches too short to pay.")


# ---- errors -----------------------------------------------------------------

class BadInput(ValueError):
    """What was given is wrong. A command line says so in one line; a bug has a traceback."""


def check(ok, message):
    """Raises BadInput with the message unless ok."""
    if not ok:
        raise BadInput(message)


@contextmanager
def naming(where):
    """Whatever goes wrong inside becomes a BadInput: one line that starts with the place."""
    try:
        yield
    except Exception as e:
        # A KeyError's text is only the key; some errors have none.
        reason = f"no {e}" if isinstance(e, KeyError) else str(e) or type(e).__name__
        raise BadInput(" ".join(f"{where}: {reason:.300}".split())) from None


if __name__ == "__main__":
    from data import cli  # which itself imports this file, so not above
    cli(main)
