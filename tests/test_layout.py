"""The layout: one row table for training and decoding, held to the design's example and to slow code that loops."""
import random
from collections import Counter

import pytest
import torch

from aspd import IGNORE, Branch, Special, branch_mask, is_block, join, layout, plain, stats, summary, tally, tokenize
from helpers import TOKENIZER, random_ids, random_segments

SPECIAL = TOKENIZER.special
SHAPES = [dict(blocks=3), dict(blocks=1, branches=2), dict(blocks=2, branches=5, long=300), dict(blocks=0)]
CASES = [(seed, shape) for seed, shape in enumerate(SHAPES)]
PROMPT = [7, 7, 7]


def row_of(seed, shape, scheme="aspd", stride=0):
    return layout(PROMPT, random_ids(seed, **shape), SPECIAL, scheme, stride)


def slow_row(prompt, ids, special, scheme="aspd", stride=0):
    """[token, block, branch, position, target] of every row token, one after the other."""
    rows, at, block = [], 0, 0  # at: position of the next serial token
    serial = None               # the last serial row token: what waits for the next one as its target

    def add(token, block, branch, position, previous, chosen):
        if previous is not None and chosen:
            previous[4] = token
        rows.append([token, block, branch, position, IGNORE])
        return rows[-1]

    def feed(tokens, chosen=True):
        nonlocal serial, at
        for token in tokens:
            serial, at = add(token, 0, 0, at, serial, chosen), at + 1

    feed(prompt, chosen=False)
    for s in ids:
        if not is_block(s):
            feed(s)
            continue
        block += 1
        for i, (title, _) in enumerate(s):
            feed([special.title], chosen=i != 1)
            feed(title + [special.title_end])
        feed([special.para])
        lengths = [1 + len(title + rest) + 1 for title, rest in s]
        for i, (title, rest) in enumerate(s):
            last = None
            for j, token in enumerate([special.branch] + title + rest + [special.branch_end]):
                start = at + i * stride if scheme == "stride" else at
                last = add(token, block, i + 1, start + j, last, chosen=j > len(title))
        at += {"aspd": sum(lengths), "longest": max(lengths), "stride": len(s) * stride}[scheme]
        feed([special.para_end], chosen=False)
    serial[4] = special.eos
    return rows


def test_layout_is_the_table_of_the_design():
    """Section 3's example: token, block, branch, position and target of every column."""
    names = "P S <title> t1 </title> <title> t2 </title> <para> <branch> t1 r1 </branch> <branch> t2 r2 </branch> </para> E"
    words = {w: i for i, w in enumerate("<title> </title> <para> </para> <branch> </branch> eos P S E t1 t2 r1 r2".split())}
    special = Special(*range(7))
    ids = [[words["S"]], [([words["t1"]], [words["r1"]]), ([words["t2"]], [words["r2"]])], [words["E"]]]
    row = layout([words["P"]], ids, special)
    targets = "S <title> t1 </title> - t2 </title> <para> - - r1 </branch> - - r2 </branch> - E eos".split()
    assert row.token.tolist() == [words[w] for w in names.split()]
    assert row.block.tolist() == [0] * 9 + [1] * 8 + [0] * 2
    assert row.branch.tolist() == [0] * 9 + [1] * 4 + [2] * 4 + [0] * 2
    assert row.position.tolist() == [*range(9), 9, 10, 11, 12, 9, 10, 11, 12, 17, 18]
    assert row.target.tolist() == [IGNORE if w == "-" else words[w] for w in targets]


@pytest.mark.parametrize("scheme,stride", [("aspd", 0), ("longest", 0), ("stride", 4000)])
@pytest.mark.parametrize("seed,shape", CASES)
def test_layout_equals_a_loop_over_tokens(seed, shape, scheme, stride):
    """Every column, under every position scheme, with several blocks and eight branches, one far longer than the rest."""
    row = row_of(seed, shape, scheme, stride)
    assert list(map(list, zip(*map(list, row)))) == slow_row(PROMPT, random_ids(seed, **shape), SPECIAL, scheme, stride)


def test_layout_of_adjacent_blocks_and_of_a_bare_block():
    """Blocks with nothing before, between or behind them."""
    block = random_ids(1, blocks=1)[1]
    for ids in ([block], [block, block], [block, [5], block, block]):
        assert list(map(list, zip(*map(list, layout(PROMPT, ids, SPECIAL))))) == slow_row(PROMPT, ids, SPECIAL)


@pytest.mark.parametrize("seed,shape", CASES)
def test_mask_equals_its_definition(seed, shape):
    """q sees k iff k is at or before q, unless both are in one block but in different branches."""
    row = row_of(seed, shape | dict(long=30))
    block, branch = row.block.tolist(), row.branch.tolist()
    T = len(block)
    expected = [[k <= q and not (block[q] == block[k] != 0 and branch[q] != branch[k]) for k in range(T)] for q in range(T)]
    mask = branch_mask(torch.tensor(row.block), torch.tensor(row.branch))
    assert mask.tolist() == expected
    batch = branch_mask(torch.tensor([block, block]), torch.tensor([branch, [0] * T]))
    assert torch.equal(batch[0], mask), "leading dimensions are a batch"


def test_unknown_scheme_is_refused_by_name():
    with pytest.raises(ValueError, match="'sideways'.*aspd, longest, stride"):
        row_of(0, {}, "sideways")


def test_branch_longer_than_the_stride_is_refused_with_both_lengths():
    ids = [[([1, 2], [3]), ([4], [5] * 20)]]
    longest = 1 + 1 + 20 + 1
    layout(PROMPT, ids, SPECIAL, "stride", longest)
    with pytest.raises(ValueError, match=rf"\b{longest}\b.*\b{longest - 1}\b"):
        layout(PROMPT, ids, SPECIAL, "stride", longest - 1)


def test_stats_of_the_worked_example():
    """Section 7: 9 serial + 1 + 2 = 12 steps, for 6 plain tokens."""
    s = stats([[1], [([2], [3]), ([4], [5])], [6]])
    assert (s.tokens, s.steps, s.branches, s.branch_tokens, s.title_tokens) == (6, 12, [2], 4, 2)
    plain_answer = stats([[1, 2, 3]])
    assert (plain_answer.tokens, plain_answer.steps, plain_answer.speedup) == (3, 3, 1.0)


@pytest.mark.parametrize("seed,shape", CASES)
def test_stats_count_what_the_row_shows(seed, shape):
    """Steps and tokens, counted again from the row: serial row tokens but <|para|>, and the longest rest of each block."""
    ids, row = random_ids(seed, **shape), row_of(seed, shape)
    token, block = row.token[len(PROMPT):], row.block[len(PROMPT):]
    steps = sum(t != SPECIAL.para for t in token[block == 0])
    for s in filter(is_block, ids):
        steps += 1 + max(len(rest) + 1 for _, rest in s)
    s = stats(ids)
    assert s.steps == steps and s.tokens == len(plain(ids)) and s.branches == [len(b) for b in ids if is_block(b)]
    assert s.branch_tokens == sum((block > 0) & (token < 256))


def without_tags(tokens):
    """Drops titles and tags from a row's answer, by ids."""
    out, in_title = [], False
    for t in tokens:
        in_title = (in_title or t == SPECIAL.title) and t != SPECIAL.title_end
        out += [t] if not in_title and t not in SPECIAL else []
    return out


@pytest.mark.parametrize("seed,shape", CASES + [(seed, dict(blocks=2, branches=3)) for seed in range(10, 30)])
def test_tagging_loses_nothing(seed, shape):
    """Segments join to the text, and their ids without titles and tags decode to it, even where it talks about tags."""
    segments = random_segments(random.Random(seed), **shape)
    text = "".join(s if isinstance(s, str) else "".join(b.text for b in s) for s in segments)
    ids = tokenize(segments, TOKENIZER.encode)
    assert join(segments) == text
    assert TOKENIZER.decode(plain(ids)) == text
    assert TOKENIZER.decode(without_tags(row_of(seed, shape).token[len(PROMPT):].tolist())) == text


def test_pieces_are_tokenised_apart():
    """Serial text, a title and the rest of its branch each go to the tokenizer alone, so decoding feeds what training saw."""
    seen = []
    segments = ["serial", [Branch("1. A", "1. A: x"), Branch("2. B", "2. B")], "end"]
    tokenize(segments, lambda text: seen.append(text) or [len(seen)])
    assert sorted(seen) == sorted(["serial", "1. A", ": x", "2. B", "", "end"])


def test_tally_holds_sums_alone():
    """What data.py keeps of a file does not grow with it; the best is of all answers, in whatever order."""
    parallel, serial = stats([[5], [([1], [0] * 40), ([2], [0] * 50)]]), stats([[1, 2, 3]])
    few, many = Counter(), Counter()
    for total, n in ((few, 1), (many, 500)):
        for s in [serial, parallel, serial] * n:
            tally(total, s)
    assert len(few) == len(many) and all(isinstance(value, (int, float)) for value in many.values())
    assert summary(many) == pytest.approx({**summary(few), "answers": 1500})
    assert summary(few)["best"] == parallel.speedup and summary(few)["PPD"] == pytest.approx(1 / 3)
