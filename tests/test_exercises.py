"""
What marks the exercises of README.md, beside the other files: properties of single functions, each held to slow code or
to a table; then the marking itself: once a function is emptied, its command must fail.
"""
import ast
import math
import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from aspd import branch_mask, branch_positions, layout, stats
from data import GROUP_OVER, MAX_BRANCHES, MIN_SAVED, PATTERN, Tokenizer, group
from decode import (AFTER_TITLE, BRANCH, LM, SERIAL, TEXT_ONLY, TITLE, TITLE_START, forward_pass, generate, grammar,
                    sample)
from helpers import TOKENIZER, tiny_model
from model import KVCache

ROOT = Path(__file__).parent.parent
TAGS = TOKENIZER.special


# -----------------------------------------------------------------------------
# positions, steps, the cache, the grammar, sampling, the cost of a block

def test_branch_positions_of_three_branches():
    """Side by side, and on after their sum or the longest; or a stride apart, which the longest, wherever, must fit."""
    for sizes in ([3, 9, 4], [9, 4, 3]):
        assert branch_positions(10, sizes) == branch_positions(10, sizes, "aspd") == ([10, 10, 10], 26)
        assert branch_positions(10, sizes, "longest") == ([10, 10, 10], 19)
        assert branch_positions(10, sizes, "stride", 9) == ([10, 19, 28], 37)
        with pytest.raises(ValueError, match=r"\b9\b.*\b8\b"):
            branch_positions(10, sizes, "stride", 8)


def test_ideal_speedup_is_plain_tokens_over_steps():
    """Titles and tags cost steps, but are not counted as tokens; that of an answer without tokens is 1."""
    block = [([1, 2], [0] * 40), ([3], [0] * 50), ([4], [])]
    s = stats([[5, 6], block])
    assert (s.tokens, s.steps) == (96, 2 + 4 + 3 * 2 + 1 + 51 + 1)  # text, titles, tags, prefixes, the longest, </para>
    assert s.speedup == 96 / 65 and stats([]).speedup == 1

def test_cache_mask_shows_what_is_shared_and_the_branchs_own():
    """A query at slot t sees slot k iff k <= t and owner[k] is 0 or its own branch, in whatever order."""
    rng, cache = random.Random(0), KVCache(tiny_model().config, 40, torch.float32, "cpu")
    for seen in (1, 17, 40):
        owner = [rng.randrange(4) for _ in range(41)]
        cache.owner[:] = torch.tensor(owner)
        slot, branch = [rng.randrange(41) for _ in range(9)], [rng.randrange(-1, 4) for _ in range(9)]
        mask = cache.mask(torch.tensor(slot), torch.tensor(branch), seen)
        expected = [[k <= t and owner[k] in (0, b) for k in range(seen)] for t, b in zip(slot, branch)]
        assert mask.dtype == torch.bool and mask.tolist() == expected
        assert cache.owner.tolist() == owner, "asking changes nothing"


def test_grammar_allows_exactly_what_each_state_may_write():
    """State by state; ids that are no token (here 263 to 299) are allowed nowhere, nor are those of absent tags."""
    untagged = Tokenizer(PATTERN, {bytes([b]): b + 3 for b in range(256)}, eos=1)  # text is 3 to 258
    tokenizer, text = untagged.add_tags(), set(range(3, 259))
    tags, eos = tokenizer.special, tokenizer.eos
    allow = grammar(tokenizer, 300)
    assert allow.dtype == torch.bool and allow.shape == (6, 300)
    for state, expected in {
        TEXT_ONLY: text | {eos}, SERIAL: text | {eos, tags.title}, TITLE_START: text, TITLE: text | {tags.title_end},
        AFTER_TITLE: {tags.title, tags.para}, BRANCH: text | {eos, tags.branch_end},
    }.items():
        assert set(allow[state].nonzero().flatten().tolist()) == expected, f"state {state}"
    allow = grammar(untagged, 300)
    assert set(allow[TEXT_ONLY].nonzero().flatten().tolist()) == text | {eos}
    assert not allow[:, [0, 2, *range(259, 300)]].any()


def shares(logits, temperature, top_k, top_p):
    """How often each token should come: the top_k best, of these the fewest that together reach top_p."""
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    best = sorted(weights, key=weights.get, reverse=True)[:top_k or len(logits)]
    total, kept, reached = sum(weights[i] for i in best), [], 0.0
    for i in best:
        if reached < top_p:
            kept.append(i)
            reached += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature,top_k,top_p", [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 99, 1.0),
                                                     (1.0, 0, 0.6), (1.0, 0, 0.01), (1.5, 4, 0.8), (1.0, 1, 0.5)])
def test_sampled_tokens_come_as_often_as_their_probabilities_say(temperature, top_k, top_p):
    """u spread evenly over [0, 1): every token has its share of it. Rows do not depend on each other."""
    logits, n = torch.tensor([0.3, -math.inf, 2.0, 1.1, -0.4, 1.6, -math.inf, 0.9]), 4000
    u = (torch.arange(n) + 0.5) / n
    rows = torch.cat([logits.expand(n, -1), logits.flip(0).expand(n, -1)])
    chosen = sample(rows, u.repeat(2), temperature, top_k, top_p)
    expected = torch.tensor(shares(logits.tolist(), temperature, top_k, top_p))
    assert chosen.shape == (2 * n,)
    assert (chosen[:n].bincount(minlength=8) / n - expected).abs().max() < 2 / n
    assert torch.equal(chosen[n:], 7 - chosen[:n]), "tokens in another order, the same draw"


def test_sampled_tokens_are_allowed_ones_at_both_ends():
    """u = 0 and the largest float below 1, a large vocabulary of which the grammar forbids all but a few; greedy."""
    torch.manual_seed(0)
    logits = torch.randn(2, 50_000).masked_fill(torch.arange(50_000) % 7 > 0, -math.inf)
    u = torch.tensor([0.0, 1 - 2**-24])
    for sampling in ((1.0, 0, 1.0), (1.0, 0, 0.9), (1.0, 9000, 1.0)):
        assert (sample(logits, u, *sampling) % 7 == 0).all()
    assert torch.equal(sample(logits, u, 0, 5, 0.5), logits.argmax(-1))


def test_group_chooses_the_size_that_saves_most_steps():
    """
    Counted by aspd.stats, a word for a token. A part a branch in lists of up to GROUP_OVER parts; in longer ones
    neighbours may share, so that there are 4 to MAX_BRANCHES branches of equal size. 0 where under MIN_SAVED are saved.
    """
    rng, found = random.Random(0), []
    for _ in range(600):
        n, longest = rng.randint(2, 40), rng.choice((3, 9, 30))
        words = [[f"w{k}" for k in range(rng.randint(4, 4 + longest))] for _ in range(n)]
        titles = [" ".join(part[:rng.randint(1, 3)]) for part in words]

        def saved(size):
            branches = [sum(words[i:i + size], []) for i in range(0, n, size)]
            names = [title.split() for title in titles[::size]]
            s = stats([[(name, branch[len(name):]) for name, branch in zip(names, branches)]])
            return s.tokens - s.steps

        size = group([" ".join(part) + "\n" for part in words], titles)
        best = max(saved(-(-n // count)) for count in (range(4, MAX_BRANCHES + 1) if n > GROUP_OVER else [n]))
        if best < MIN_SAVED:
            assert size == 0, f"saves {best}"
        else:
            assert size == 1 if n <= GROUP_OVER else 4 <= -(-n // size) <= MAX_BRANCHES
            assert saved(size) >= best
        found.append(size)
    assert {0, 1, 2, 3} <= {*found} and found.count(0) > 20


# -----------------------------------------------------------------------------
# the engine, made to write what we want

def steered(choose, **config):
    """(LM, passes): a tiny model in place of whose choices stand choose(branch, position, state) -> token; passes
    keeps what every pass fed, which slots it saw, and its logits."""
    lm, passes = LM(tiny_model(block_size=1024, **config).double(), TOKENIZER), []

    def step(model, cache, allow, uniform, feed, seen, lanes, sampling):
        _, logits = forward_pass(model, cache, allow, uniform, feed, seen, lanes, sampling)
        _, position, slot, branch, pick, state = feed
        passes.append((feed, cache.mask(slot, branch, seen), logits))
        pick = pick[:lanes]
        return torch.tensor(list(map(choose, branch[pick].tolist(), position[pick].tolist(), state.tolist()))), logits

    lm.step = step
    return lm, passes


TWO_BLOCKS = [[70], [([65], []), ([66, 67], [*range(9)]), ([68], [5])],  # tokenised: text, block, block, text
              [([65, 66], [3] * 4), ([67], [4] * 7)], [71, 72]]


@pytest.mark.parametrize("mode,scheme", [("adaptive", "aspd"), ("adaptive", "longest"), ("adaptive", "stride"),
                                         ("branchwise", "aspd")])
def test_engine_feeds_the_rows_of_the_layout(mode, scheme):
    """
    An engine that chooses the layout's targets feeds every row of the layout once, at its position; what a row sees,
    and its logits, are those of one forward pass under the branch mask. Where there is no target, what is chosen
    (here -100) is ignored.
    """
    row = layout(TOKENIZER.prompt("two tips"), TWO_BLOCKS, TAGS, scheme, 64)
    index = {key: i for i, key in enumerate(zip(row.branch.tolist(), row.position.tolist()))}
    lm, passes = steered(lambda branch, position, state: int(row.target[index[branch, position]]), positions=scheme,
                         stride=64)
    answer = generate(lm, "two tips", mode=mode, max_new_tokens=600)
    assert answer.segments == TWO_BLOCKS and answer.finish == "stop"
    mask = branch_mask(torch.tensor(row.block), torch.tensor(row.branch))
    full = lm.model(torch.tensor(row.token)[None], torch.tensor(row.position)[None], mask)[0]
    order = []  # the row that is in each slot
    for feed, seen, logits in passes:
        rows = [index[key] for key in zip(feed[3].tolist(), feed[1].tolist())]
        order += rows
        assert feed[0].tolist() == row.token[rows].tolist() and feed[2, -1] == len(order) - 1
        assert torch.equal(seen, mask[rows][:, order]) and torch.equal(seen.sum(1), mask[rows].sum(1))
        expected = full[rows][feed[4, :len(logits)]]
        assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert sorted(order) == list(range(len(row.token)))
    assert mode == "branchwise" or answer.steps == stats(TWO_BLOCKS).steps


@pytest.mark.parametrize("mode", ["adaptive", "branchwise"])
@pytest.mark.parametrize("budget,scheme,quota", [(200, "aspd", 60), (202, "longest", 60), (203, "aspd", 61),
                                                 (600, "stride", 61)])
def test_what_is_left_is_divided_equally_among_the_branches(budget, scheme, quota, mode):
    """
    Three branches, of which the second stops by itself, with end-of-text, which leaves nothing to the others. Each may
    write a third of the budget, less 11 tokens (titles, <|para|>, <|/para|>), 6 (prefixes) and 3 (<|/branch|>); and no
    more than the stride holds. The text after the block takes what is left, to the last token.
    """
    prompt, text = TOKENIZER.prompt("two tips"), TAGS.eos if scheme == "stride" else 66

    def choose(branch, position, state):
        at = position - len(prompt)  # three titles of a token each are the serial tokens 0 to 8
        return {TEXT_ONLY: text, SERIAL: TAGS.title if at < 0 else text, TITLE_START: 65 + at, TITLE: TAGS.title_end,
                AFTER_TITLE: TAGS.title if at < 8 else TAGS.para, BRANCH: TAGS.eos if branch == 2 else 66}[state]

    lm, passes = steered(choose, positions=scheme, stride=64)
    answer = generate(lm, "two tips", mode=mode, max_new_tokens=budget, max_branches=3)
    assert [len(rest) for _, rest in answer.segments[0]] == [quota, 0, quota]
    assert answer.finish == "length"
    assert scheme == "stride" or sum(feed.size(1) for feed, _, _ in passes) == len(prompt) + budget


# -----------------------------------------------------------------------------
# the exercises

README = ROOT / "README.md"  # not in the copies below, so these tests do not copy themselves again
EXERCISE = r'(?ms)^(\d+)\. \*\*`([\w.]+)`\*\* in `(\w+\.py)`.*?`python -m pytest -q -k "([\w ]+)"`'
EXERCISES = re.findall(EXERCISE, README.read_text(encoding="utf-8")) if README.exists() else []


def emptied(source, name):
    """The source without the body of a function, or of a Class.method; its signature and docstring stay."""
    tree = node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    nothing = ast.parse("return None").body  # and not an error: a test must look at what the function gives
    node.body = node.body[:ast.get_docstring(node) is not None] + nothing
    return ast.unparse(tree)


def test_readme_has_exercises_and_their_commands_name_tests():
    """Numbered from 1, no function twice; every word of a -k is part of a test's name, but not of this or the next."""
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")]
    names = re.findall(r"(?m)^def (test_\w+)", "\n".join(files))
    assert [int(number) for number, *_ in EXERCISES] == list(range(1, len(EXERCISES) + 1)) and len(EXERCISES) >= 8
    assert len({(name, file) for _, name, file, _ in EXERCISES}) == len(EXERCISES)
    for *_, words in EXERCISES:
        for word in words.split(" or "):
            marks = [name for name in names if word in name]
            assert marks and len(marks) <= 3 and not any("exercise" in name for name in marks), f"-k {word!r}: {marks}"


def mark(folder, name, file, words):
    """An exercise's command, run in a copy of the code and the tests where its function returns None."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(path, target)
    (folder / file).write_text(emptied((ROOT / file).read_text(encoding="utf-8"), name), encoding="utf-8")
    return subprocess.run([sys.executable, *"-m pytest -q -x -p no:cacheprovider -k".split(), words], cwd=folder,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    """{number: what mark() will give}, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {number: pool.submit(mark, tmp_path_factory.mktemp("copy"), *exercise) for number, *exercise in EXERCISES}


@pytest.mark.parametrize("number,words", [(number, words) for number, _, _, words in EXERCISES], ids=[number for number, *_ in EXERCISES])
def test_exercise_is_failed_by_an_empty_function(marks, number, words):
    """The tests run, and one of those that its command names fails."""
    done = marks[number].result()
    failed = re.findall(r"(?m)^FAILED \S+::(\w+)", done.stdout)
    assert done.returncode == 1 and len(failed) == 1, done.stdout[-2000:]
    assert any(word in failed[0] for word in words.split(" or "))
