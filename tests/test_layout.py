"""The layout, one row for training and decoding, and the rule of who sees whom: held to the
design's example and to slow code that loops."""
import random
from itertools import groupby

import pytest
import torch

import aspd
from aspd import (IGNORE, POSITIONS, Block, Branch, Tags, branch_mask, cache_mask, join, layout,
                  plain, steps, tokenize)
from helpers import TOKENIZER, random_ids, random_segments

TAGS = TOKENIZER.tags
EOS = TOKENIZER.eos
PROMPT = [7, 7, 7]
SHAPES = [dict(blocks=3), dict(blocks=1, branches=2), dict(blocks=2, branches=5, long=300),
          dict(blocks=0)]
CASES = list(enumerate(SHAPES))  # (seed, shape)


def row_of(seed, shape, positions="aspd"):
    return layout(PROMPT, random_ids(seed, **shape), EOS, TAGS, positions)


def columns(row):
    """A Row as a list of [token, block, branch, position, target]."""
    return torch.stack(row, dim=1).tolist()


# ---- the row ----------------------------------------------------------------

class SlowRow:
    """The layout written down token after token, each as [token, block, branch, position,
    target]."""

    def __init__(self, prompt, ids, positions="aspd"):
        self.rows = []
        self.at = 0          # position of the next serial token
        self.serial = None   # the last serial row: what waits for the next one as its target
        self.feed(prompt, chosen=False)
        blocks = 0
        for segment in ids:
            if isinstance(segment, Block):
                blocks += 1
                self.feed_block(segment, blocks, positions)
            else:
                self.feed(segment)
        self.serial[4] = EOS

    def add(self, token, block, branch, position, before, chosen):
        """before: the row before this one in its stream, or None."""
        if before is not None and chosen:
            before[4] = token
        self.rows.append([token, block, branch, position, IGNORE])
        return self.rows[-1]

    def feed(self, tokens, chosen=True):
        for token in tokens:
            self.serial = self.add(token, 0, 0, self.at, self.serial, chosen)
            self.at += 1

    def feed_block(self, block, number, positions):
        for i, (title, _) in enumerate(block):
            self.feed([TAGS.title], chosen=i != 1)
            self.feed(title + [TAGS.title_end])
        self.feed([TAGS.para])
        lengths = []
        for i, (title, rest) in enumerate(block):
            tokens = [TAGS.branch] + title + rest + [TAGS.branch_end]
            last = None
            for j, token in enumerate(tokens):
                is_rest = j > len(title)
                last = self.add(token, number, i + 1, self.at + j, last, chosen=is_rest)
            lengths.append(len(tokens))
        self.at += sum(lengths) if positions == "aspd" else max(lengths)
        self.feed([TAGS.para_end], chosen=False)


def test_layout_is_the_table_of_the_design():
    """Section 3's example: token, block, branch, position and target of every row token."""
    names = ("P S <title> t1 </title> <title> t2 </title> <para> <branch> t1 r1 </branch> "
             "<branch> t2 r2 </branch> </para> E").split()
    targets = ("S <title> t1 </title> - t2 </title> <para> - - r1 </branch> - - r2 </branch> - "
               "E eos").split()
    words = "<title> </title> <para> </para> <branch> </branch> eos P S E t1 t2 r1 r2".split()
    number = {word: i for i, word in enumerate(words)} | {"-": IGNORE}
    block = Block([Branch([number["t1"]], [number["r1"]]), Branch([number["t2"]], [number["r2"]])])
    ids = [[number["S"]], block, [number["E"]]]
    row = layout([number["P"]], ids, number["eos"], Tags(*range(6)))
    assert row.token.tolist() == [number[name] for name in names]
    assert row.block.tolist() == [0] * 9 + [1] * 8 + [0] * 2
    assert row.branch.tolist() == [0] * 9 + [1] * 4 + [2] * 4 + [0] * 2
    assert row.position.tolist() == [*range(9), 9, 10, 11, 12, 9, 10, 11, 12, 17, 18]
    assert row.target.tolist() == [number[name] for name in targets]
    assert all(column.dtype == torch.int64 for column in row)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("seed,shape", CASES)
def test_layout_equals_a_loop_over_tokens(seed, shape, positions):
    """Every column, with several blocks and up to eight branches, one far longer than the
    others."""
    expected = SlowRow(PROMPT, random_ids(seed, **shape), positions).rows
    assert columns(row_of(seed, shape, positions)) == expected


def test_layout_of_adjacent_blocks_and_of_a_bare_block():
    """Blocks with nothing before, between or behind them."""
    block = random_ids(1, blocks=1)[1]
    for ids in ([block], [block, block], [block, [5], block, block]):
        assert columns(layout(PROMPT, ids, EOS, TAGS)) == SlowRow(PROMPT, ids).rows


def test_serial_row_needs_no_tags_and_is_the_tokens_one_after_the_other():
    """So the serial twin of a training answer is laid out by the same function."""
    row = layout(PROMPT, [[4, 5], [6]], EOS)
    assert row.token.tolist() == PROMPT + [4, 5, 6]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 5]
    assert row.target.tolist() == [IGNORE, IGNORE, 4, 5, 6, EOS]
    assert not row.block.any() and not row.branch.any()


# ---- who sees whom ----------------------------------------------------------

@pytest.mark.parametrize("seed,shape", CASES)
def test_branch_mask_equals_its_definition(seed, shape):
    """q sees k iff k is at or before q, unless both are in one block but in different branches."""
    row = row_of(seed, shape | dict(long=30))
    block = row.block.tolist()
    branch = row.branch.tolist()

    def sees(q, k):
        siblings = block[q] == block[k] != 0 and branch[q] != branch[k]
        return k <= q and not siblings

    n = len(block)
    mask = branch_mask(row.block, row.branch)
    assert mask.tolist() == [[sees(q, k) for k in range(n)] for q in range(n)]


def test_branch_mask_takes_a_batch():
    """Rows of a batch do not mix: leading dimensions are kept."""
    rows = [row_of(seed, dict(blocks=1, branches=2, long=9)) for seed in (3, 4)]
    n = min(len(row.token) for row in rows)
    block = torch.stack([row.block[:n] for row in rows])
    branch = torch.stack([row.branch[:n] for row in rows])
    alone = torch.stack([branch_mask(row.block[:n], row.branch[:n]) for row in rows])
    assert torch.equal(branch_mask(block, branch), alone)
    assert not torch.equal(alone[0], alone[1])


def test_cache_mask_equals_its_definition():
    """A query sees the slots at or before its own that are shared or belong to its branch, for any
    slots, branches and owners; also for branch -1, which the padding is."""
    rng = random.Random(0)
    for _ in range(50):
        owner = rng.choices(range(-1, 4), k=rng.randint(1, 20))
        slot = [rng.randrange(len(owner)) for _ in range(rng.randint(1, 6))]
        branch = rng.choices(range(-1, 4), k=len(slot))
        expected = [[k <= q and owner[k] in (0, own) for k in range(len(owner))]
                    for q, own in zip(slot, branch)]
        mask = cache_mask(torch.tensor(slot), torch.tensor(branch), torch.tensor(owner))
        assert mask.tolist() == expected


def mixed(stretch, branch, rng):
    """A block's row indices in an order of feeding: its branches mixed at random, each in its
    order."""
    branches = [branch[i] for i in stretch]
    waiting = {b: iter([i for i in stretch if branch[i] == b]) for b in set(branches)}
    rng.shuffle(branches)
    return [next(waiting[b]) for b in branches]


@pytest.mark.parametrize("seed", range(8))
def test_the_two_masks_are_the_same_rule(seed):
    """In whatever order the branches of a block are fed, and however many tokens a pass takes,
    cache_mask lets a token see exactly what branch_mask lets it see in the row."""
    rng = random.Random(seed)
    row = row_of(seed, dict(blocks=rng.randint(1, 3), branches=rng.randint(2, 5), long=12))
    mask = branch_mask(row.block, row.branch)
    block = row.block.tolist()
    branch = row.branch.tolist()
    owner = torch.zeros(len(block), dtype=torch.int64)
    index = []  # of each slot: the row index of the token in it
    for number, stretch in groupby(range(len(block)), key=block.__getitem__):
        waiting = list(stretch)
        if number:
            waiting = mixed(waiting, branch, rng)
        while waiting:
            n = rng.randint(1, 9)
            slot = torch.arange(len(index), len(index) + len(waiting[:n]))
            index += waiting[:n]
            own = torch.tensor([branch[i] for i in waiting[:n]])
            owner[slot] = own
            for i, sees in zip(waiting[:n], cache_mask(slot, own, owner[:len(index)])):
                visible = [index[k] for k in sees.nonzero()[:, 0]]
                assert sorted(visible) == mask[i].nonzero()[:, 0].tolist()
            waiting = waiting[n:]
        owner.zero_()  # a block has ended: its slots become shared
    assert sorted(index) == list(range(len(block)))


# ---- tokens and text --------------------------------------------------------

def without_tags(tokens):
    """Drops titles and tags from a row's answer, by ids."""
    out = []
    in_title = False
    for token in tokens:
        if token == TAGS.title:
            in_title = True
        if not in_title and token not in TAGS:
            out.append(token)
        if token == TAGS.title_end:
            in_title = False
    return out


MORE_CASES = CASES + [(seed, dict(blocks=2, branches=3)) for seed in range(10, 30)]


@pytest.mark.parametrize("seed,shape", MORE_CASES)
def test_tagging_loses_nothing(seed, shape):
    """Segments join to the text, and their ids without titles and tags decode to it, even where it
    talks about tags."""
    segments = random_segments(random.Random(seed), **shape)
    text = ""
    for segment in segments:
        if isinstance(segment, Block):
            text += "".join(title + rest for title, rest in segment)
        else:
            text += segment
    ids = tokenize(segments, TOKENIZER.encode)
    assert join(segments) == text
    assert TOKENIZER.decode(plain(ids)) == text
    assert without_tags(row_of(seed, shape).token[len(PROMPT):].tolist()) == plain(ids)


def test_pieces_are_tokenised_apart():
    """Serial text, a title and the rest of its branch each go to the tokenizer alone, so that
    decoding feeds what training saw; and blocks stay blocks."""
    seen = []

    def encode(text):
        seen.append(text)
        return [len(seen)]

    block = Block([Branch("1. A", ": x"), Branch("\n2. B", "")])
    ids = tokenize(["serial", block, "end"], encode)
    assert seen == ["serial", "1. A", ": x", "\n2. B", "", "end"]
    assert ids == [[1], Block([Branch([2], [3]), Branch([4], [5])]), [6]]
    assert [isinstance(segment, Block) for segment in ids] == [False, True, False]


# ---- figures ----------------------------------------------------------------

def test_steps_of_the_worked_example():
    """Section 7: 9 serial + 1 + 2 = 12 steps, for 6 plain tokens. A serial answer takes one a
    token."""
    ids = [[1], Block([Branch([2], [3]), Branch([4], [5])]), [6]]
    assert (len(plain(ids)), steps(ids)) == (6, 12)
    assert steps([[1, 2, 3]]) == 3 and steps([]) == 0


@pytest.mark.parametrize("seed,shape", CASES)
def test_steps_are_what_the_row_shows(seed, shape):
    """Counted again from the row: serial row tokens but <|para|>, and for each block the longest
    rest with its <|/branch|>, and one."""
    ids = random_ids(seed, **shape)
    row = row_of(seed, shape)
    token = row.token[len(PROMPT):]
    block = row.block[len(PROMPT):]
    branch = row.branch[len(PROMPT):]
    chosen = row.target[len(PROMPT):] != IGNORE
    passes = ((block == 0) & (token != TAGS.para)).sum()
    for b in range(1, block.max() + 1):
        in_block = (block == b) & chosen  # a branch chooses its rest and its <|/branch|>
        passes += 1 + branch[in_block].bincount().max()
    assert steps(ids) == passes


def test_picture_of_aspd_py_shows_the_mask(capsys):
    """`python aspd.py` prints a line a row token, with what it sees: itself, the prompt, no
    sibling."""
    aspd.main()
    table, _ = capsys.readouterr().out.split("\n\n")
    seen = [line.split()[-1] for line in table.splitlines()[1:]]
    assert [len(marks) for marks in seen] == list(range(1, len(seen) + 1))
    assert all(marks[0] == marks[-1] == "#" for marks in seen)
    assert any("." in marks for marks in seen) and "." not in seen[-1]
