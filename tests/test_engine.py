"""
The invariants of decoding: cached parallel decoding equals one full masked forward pass, adaptive equals branchwise,
every token is fed exactly once. Random weights decode into well-formed rows of every shape, thanks to the grammar.

    python -m pytest tests/test_engine.py -k fuzz --decodes 10000   # more random decodes than the usual 150
"""
import math
import random
import re
import shutil
from argparse import Namespace
from collections import Counter, namedtuple
from functools import cache
from itertools import chain, count, repeat

import numpy as np
import pytest
import torch
from torch._inductor.utils import run_and_get_code

import decode
from aspd import POSITIONS, Special, branch_mask, is_block, layout, plain, stats
from bench import script
from data import MAX_BRANCHES, Tokenizer, corpus, extract, make_rows, make_tokenizer
from decode import AFTER_TITLE, BRANCH, LM, MODES, SERIAL, TEXT_ONLY, TITLE, TITLE_CAP, TITLE_START, generate, sample
from helpers import TOKENIZER, random_ids, random_text
from model import GPT, GPTConfig
from train import make_optimizer, train_step

UNTAGGED = Tokenizer(**TOKENIZER.settings | {"special": None})
TAGS, EOS = TOKENIZER.special, TOKENIZER.eos
MIN_BRANCH = 8  # what the design promises, whatever decode.py says


# -----------------------------------------------------------------------------
# models, and what is watched while they decode

def random_lm(dtype=torch.float64, seed=0, compile=False, tokenizer=TOKENIZER, **config):
    """A tiny untrained model over bytes; its last five ids have no token."""
    torch.manual_seed(seed)
    settings = dict(block_size=1024, vocab_size=TOKENIZER.vocab_size + 5, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                    n_inner=48, head_size=8) | config
    return LM(GPT(GPTConfig(**settings)).to(dtype), tokenizer, compile)


def like_tags(lm, **bonus):
    """Makes the model fond of some tags: adds a bonus to their logits, so that random weights write blocks."""
    ids = torch.tensor([getattr(TAGS, name, -1) for name in bonus])  # -1, the last: an id without a token
    values = torch.tensor(list(bonus.values()))

    def fond_forward(*args, **kwargs):
        y = GPT.forward(lm.model, *args, **kwargs)
        return y.index_add(-1, ids % y.size(-1), values.to(y.dtype).expand(*y.shape[:-1], -1))

    lm.model.forward = fond_forward
    return lm


Pass = namedtuple("Pass", "feed mask logits chosen")


def record(lm):
    """Keeps what every pass was fed, saw and chose, in lm.passes."""
    lm.passes, step = [], lm.step

    def recorder(model, cache, allow, uniform, feed, seen, lanes, sampling):
        chosen, logits = step(model, cache, allow, uniform, feed, seen, lanes, sampling)
        mask = cache.mask(feed[2], feed[3], seen)
        lm.passes.append(Pass(feed.numpy().copy(), mask.numpy().copy(), logits.clone(), chosen.numpy().copy()))
        return chosen, logits

    lm.step = recorder
    return lm


def puppet(lm, choose, thinks=False):
    """Lets choose(states, branches) choose the tokens of a pass, which the grammar must allow. A None leaves the choice
    to the model. thinks: the model runs all the same."""
    def step(*args):
        feed, lanes = args[4], args[6]
        states, branches = feed[5, :lanes].tolist(), feed[3][feed[4, :lanes]].tolist()
        chosen, logits = decode.forward_pass(*args) if thinks else (torch.zeros(lanes, dtype=torch.int64), None)
        tokens = [own if token is None else token for token, own in zip(choose(states, branches), chosen.tolist())]
        assert all(lm.allow[state, token] for state, token in zip(states, tokens)), "the grammar allows it"
        return torch.tensor(tokens), logits

    lm.step = step
    return lm


def by_state(**tokens):
    """A chooser with one token a state of the grammar, given by name: an id, an iterator of ids, or for branches one of
    these a branch."""
    def choose(states, branches):
        wanted = [tokens[NAMES[state]] for state in states]
        wanted = [w[branch - 1] if isinstance(w, tuple) else w for w, branch in zip(wanted, branches)]
        return [next(w) if hasattr(w, "__next__") else w for w in wanted]
    return choose


NAMES = {TEXT_ONLY: "text", SERIAL: "serial", TITLE_START: "start", TITLE: "title", AFTER_TITLE: "after",
         BRANCH: "branch"}
X, Y, Z = b"xyz"
ENDLESS = dict(text=X, serial=TAGS.title, start=Y, title=Y, after=TAGS.title, branch=Z)  # wants all of everything


def told(ids, lm=None):
    """A puppet that writes this tokenised answer; its model thinks only where it is given."""
    passes = iter(script(ids, TAGS))
    return puppet(lm or random_lm(n_layer=1, block_size=4096), lambda states, branches: next(passes), thinks=bool(lm))


# -----------------------------------------------------------------------------
# what must hold for a decoded answer

def fed_tokens(lm):
    """Every token fed, without padding: {slot: (token, position, branch, slots it saw, logits, chosen)}; the last
    two are None where nothing was chosen."""
    out = {}
    for feed, mask, logits, chosen in lm.passes:
        for w in range(feed.shape[1]):
            token, position, slot, branch = feed[:4, w]
            if branch >= 0:
                k = np.flatnonzero(feed[4, :len(logits)] == w)
                assert slot not in out, "a slot is written once"
                picked = (logits[k[-1]], chosen[k[-1]]) if len(k) else (None, None)
                out[slot] = (token, position, branch, np.flatnonzero(mask[w]), *picked)
    return out


def check_against_one_forward(lm, prompt, answer, tolerance, system=None):
    """Invariants 1 and 3 for a decoded answer. Returns its row and, for each row index, the token chosen there."""
    ids, config = lm.tokenizer.prompt(prompt, system), lm.model.config
    row = layout(ids, answer.segments, lm.tokenizer.special or Special(*[EOS] * 7), config.positions, config.stride)
    fed = fed_tokens(lm)
    assert sorted(fed) == list(range(len(row.token))), "each row token is fed exactly once, in the next slot"
    # match slots to row indices: the streams (prompt and serial, or one branch of one block) keep their order
    streams, block, was_serial = {}, 0, True
    for slot in sorted(fed):
        branch = fed[slot][2]
        block += bool(branch) and was_serial
        was_serial = not branch
        streams.setdefault((block if branch else 0, branch), []).append(slot)
    index = np.zeros(len(fed), dtype=int)
    for (b, br), slots in streams.items():
        where = np.flatnonzero((row.block == b) & (row.branch == br))
        assert len(where) == len(slots)
        index[slots] = where
    mask = branch_mask(torch.tensor(row.block), torch.tensor(row.branch))
    full = lm.model(torch.tensor(row.token)[None], torch.tensor(row.position)[None], mask[None, None])[0]
    for slot, (token, position, branch, seen, logits, _) in fed.items():
        i = index[slot]
        assert (token, position, branch) == (row.token[i], row.position[i], row.branch[i])
        assert np.array_equal(np.sort(index[seen]), np.flatnonzero(mask[i].numpy())), "visibility equals the layout's"
        if logits is not None:
            assert (logits - full[i]).abs().max() <= tolerance * full[i].abs().max()
    blocks = [s for s in answer.segments if is_block(s)]
    saved = [sum(len(rest) + 1 for _, rest in s) - max(len(rest) + 1 for _, rest in s) for s in blocks]
    assert answer.steps == stats(answer.segments).steps + (answer.mode == "branchwise") * sum(saved), "as data.py says"
    assert answer.tokens == len(plain(answer.segments))
    assert answer.blocks == [[len(title + rest) for title, rest in s] for s in blocks]
    return row, {index[slot]: chosen for slot, (*_, chosen) in fed.items()}


def check_well_formed(lm, answer, row, limit, max_branches):
    """Of an answer that may have limit row tokens, prompt included."""
    assert len(row.token) <= limit <= lm.model.config.block_size and len(row.token) <= lm.cache.slots
    assert row.position.max() < lm.model.config.block_size
    assert not lm.cache.owner.any(), "nothing is left of the last block"
    pieces = [piece for s in answer.segments for piece in (sum(s, ()) if is_block(s) else [s])]
    assert all(i in lm.tokenizer.bytes for piece in pieces for i in piece), "no tag, end-of-text or unknown id in text"
    for s in filter(is_block, answer.segments):
        assert 2 <= len(s) <= max_branches and all(1 <= len(title) <= TITLE_CAP for title, _ in s)
    assert answer.text == lm.tokenizer.decode(plain(answer.segments)) and answer.seconds >= answer.ttft > 0
    assert not (answer.blocks and answer.mode == "serial"), "serial mode has no blocks"


def spell(chosen, prompt, limit, max_branches, mode, config):
    """The tokenised answer and finish that follow from what the model chose at each row index, by the grammar and the
    budget of the design, token after token in the order of the row."""
    n = position = len(prompt)  # row tokens so far; the next serial position
    segments, cut, stride = [[]], False, config.stride if config.positions == "stride" else None

    def room(titles):
        """Whether every branch gets MIN_BRANCH tokens even if the titles to come, at first two, are of the longest."""
        new = 1 if titles else 2
        sizes = [len(title) for title in titles] + [TITLE_CAP] * new
        row = sum(2 + size for size in sizes[len(titles):]) + 1 + sum(1 + size + MIN_BRANCH + 1 for size in sizes) + 1
        fits = mode != "serial" and len(sizes) <= max_branches and n + row <= limit
        if stride:
            fits &= 1 + TITLE_CAP + MIN_BRANCH + 1 <= stride
            fits &= position + new * (2 + TITLE_CAP) + 1 + len(sizes) * stride + 1 <= config.block_size
        return fits

    while (token := chosen[n - 1]) != EOS:
        if n == limit or position == config.block_size:
            cut = True
            break
        if token != TAGS.title:
            segments[-1].append(token)
            n, position = n + 1, position + 1
            continue
        assert room([]), "a block opens only with room"
        titles = []
        while len(titles) < 2 or chosen[n - 1] == TAGS.title and room(titles):
            title, n, position = [], n + 1, position + 1
            while chosen[n - 1] != TAGS.title_end and len(title) < TITLE_CAP:
                title.append(chosen[n - 1])
                n, position = n + 1, position + 1
            titles, n, position = titles + [title], n + 1, position + 1
        cut |= chosen[n - 1] == TAGS.title and len(titles) < max_branches
        n, position = n + 1, position + 1  # <|para|>
        quota = (limit - n - 1 - sum(1 + len(title) for title in titles)) // len(titles) - 1
        quota = min(quota, stride - 2 - max(map(len, titles))) if stride else quota
        assert quota >= MIN_BRANCH
        block, sizes = [], []
        for title in titles:
            n, rest = n + 1 + len(title), []
            while chosen[n - 1] not in (TAGS.branch_end, EOS) and len(rest) < quota:
                rest.append(chosen[n - 1])
                n += 1
            cut |= chosen[n - 1] not in (TAGS.branch_end, EOS)
            block.append((title, rest))
            sizes.append(1 + len(title + rest) + 1)
            n += 1
        position += len(sizes) * stride if stride else sum(sizes) if config.positions == "aspd" else max(sizes)
        n, position = n + 1, position + 1  # <|/para|>
        segments += [block, []]
    return [s for s in segments if s], "length" if cut else "stop"


# -----------------------------------------------------------------------------
# invariants 1 to 3, on random and on trained weights

CASES = [(scheme, dtype, tol) for scheme in POSITIONS for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-3))]


@pytest.mark.parametrize("scheme,dtype,tolerance", CASES)
def test_cached_parallel_decoding_equals_one_masked_forward(scheme, dtype, tolerance):
    shapes = Counter()
    for seed in range(4):
        lm = random_lm(dtype, seed, positions=scheme, stride=96)
        like_tags(lm, title=2.5, para=2.5, title_end=2.0, branch_end=0.5, eos=-1.0)
        answer = generate(record(lm), "two tips", temperature=1.0, seed=seed, max_new_tokens=500)
        check_against_one_forward(lm, "two tips", answer, tolerance)
        shapes["blocks"] = max(shapes["blocks"], len(answer.blocks))
        shapes["branches"] = max([shapes["branches"]] + [len(b) for b in answer.blocks])
        shapes["uneven"] |= any(max(b) > 3 * min(b) for b in answer.blocks)
    assert shapes["blocks"] >= 2 and shapes["branches"] >= 3 and (shapes["uneven"] or scheme == "stride")


@pytest.mark.parametrize("scheme,branches", [("aspd", 16), ("longest", 8), ("stride", 8)])
def test_blocks_of_many_branches_one_far_longer_equal_one_masked_forward(scheme, branches):
    """A given answer, whatever the weights would write: two blocks, and a third with nothing before it."""
    ids = random_ids(branches, branches=branches)
    ids.append(next(s for s in ids if is_block(s)))
    lm = record(told(ids, random_lm(positions=scheme, stride=700, block_size=24000)))
    answer = generate(lm, "two tips", max_new_tokens=11000)
    assert answer.segments == [s for s in ids if s] and answer.finish == "stop"
    check_against_one_forward(lm, "two tips", answer, 1e-10)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_adaptive_equals_branchwise(temperature):
    blocks = 0
    for seed in range(4):
        lm = like_tags(random_lm(seed=seed), title=2.5, para=2.5, title_end=2.0, branch_end=0.5)
        a, b = (generate(lm, "two tips", mode, temperature=temperature, seed=seed, max_new_tokens=400)
                for mode in ("adaptive", "branchwise"))
        assert a.segments == b.segments and a.finish == b.finish and a.steps <= b.steps
        blocks += len(a.blocks)
    assert blocks >= 4


@pytest.fixture(scope="session")
def trained():
    """(an LM in float64, records): five short answers of the corpus with blocks, one with two, learnt by heart."""
    blocks = lambda r: sum(not isinstance(s, str) for s in extract(r["response"], r["prompt"])[0])
    short = sorted(corpus(400), key=lambda r: len(r["response"]))
    records = [r for r in short if blocks(r) == 1][:4] + [r for r in short if blocks(r) == 2][:1]
    tokenizer = make_tokenizer("bpe", [r["prompt"] + r["response"] for r in records])
    torch.manual_seed(0)
    model = GPT(GPTConfig(1024, tokenizer.vocab_size, 2, 4, n_kv_head=2, n_embd=64, n_inner=128, head_size=16))
    rows, _ = make_rows(records, tokenizer, model.config)
    optimizer = make_optimizer(model, 5e-3)
    settings = Namespace(device="cpu", dtype="float32", micro_tokens=10**6, no_branch_mask=False)
    for step in range(90):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, step / 10, 2 - step / 50)
        train_step(model, rows, optimizer, settings)
    return LM(model.double(), tokenizer), records


def test_trained_weights_open_blocks_by_themselves_and_keep_the_invariants(trained):
    """Greedily the answers come back; adaptive is one masked forward and equals branchwise, sampled too."""
    lm, records = trained
    step = lm.step
    for r in records:
        for temperature in (0.0, 1.5):
            answer = generate(record(lm), r["prompt"], temperature=temperature, max_new_tokens=900)
            check_against_one_forward(lm, r["prompt"], answer, 1e-10)
            lm.step = step
            other = generate(lm, r["prompt"], "branchwise", temperature=temperature, max_new_tokens=900)
            assert answer.segments == other.segments and answer.finish == other.finish
            assert temperature or answer.blocks and answer.text == r["response"] and answer.finish == "stop"
            assert temperature or answer.steps < answer.tokens, "fewer passes than tokens"


# -----------------------------------------------------------------------------
# fuzz

@cache
def fuzz_lm(dtype, tokenizer, seed):
    """Tiny weights that many decodes share, and with them a cache full of what the last one left."""
    return record(random_lm(dtype, seed, tokenizer=tokenizer, n_layer=1, n_embd=16, n_head=2, n_kv_head=1))


def fuzz(seed):
    """A random decode of random weights -> Answer, None where the prompt is too long."""
    rng = random.Random(seed)
    dtype, tagged = rng.choice((torch.float64, torch.float32)), rng.random() < 0.95
    context = rng.choice((40, 64, 96, 256, 400, 500, 500, 800))
    lm = fuzz_lm(dtype, TOKENIZER if tagged else UNTAGGED, rng.randrange(3))
    config = lm.model.config
    config.block_size, config.positions, config.stride = context, rng.choice(POSITIONS), rng.choice((16, 43, 60, 150))
    fondness = rng.choice((0, 2, 3, 4, 5, 6))
    likes = {name: rng.choice((0, 0.6, 1)) * fondness for name in ("title_end", "para", "branch_end")}
    like_tags(lm, title=fondness, **likes, eos=rng.choice((-9, 0, 0, 4)), nothing=9)
    prompt = rng.choice((rng.choice("a7漢\U0001f600é\x00"), random_text(rng, rng.randint(1, 20)),
                         "x" * rng.randint(1, context)))
    prompt, system = prompt if prompt.strip() else "<|para|>", rng.choice((None, "", "Be <|title|>brief<|/title|>."))
    options = dict(max_new_tokens=rng.choice((1, rng.randint(1, 60), rng.randint(150, 400), 10**6, 10**6)),
                   temperature=rng.choice((0.0, 0.5, 1.0, 1.0, 1.0, 50.0)), top_k=rng.choice((0, 0, 1, 5, 10**6)),
                   top_p=rng.choice((1.0, 1.0, 0.9, 1e-9)), max_branches=rng.randint(2, MAX_BRANCHES),
                   seed=rng.randrange(5), system=system)
    mode, ids = rng.choice((None, *MODES) if tagged else (None, "serial")), lm.tokenizer.prompt(prompt, system)
    if len(ids) >= context:
        with pytest.raises(ValueError, match=f"{len(ids)} tokens.*{context}"):
            generate(lm, prompt, mode, **options)
        return None
    lm.passes.clear()
    answer = generate(lm, prompt, mode, **options)
    assert answer.mode == (mode or ("adaptive" if tagged else "serial"))
    limit = min(len(ids) + options["max_new_tokens"], context)
    row, chosen = check_against_one_forward(lm, prompt, answer, 1e-10 if dtype == torch.float64 else 1e-3, system)
    check_well_formed(lm, answer, row, limit, options["max_branches"])
    assert (answer.segments, answer.finish) == spell(chosen, ids, limit, options["max_branches"], answer.mode, config)
    if answer.blocks and dtype == torch.float64:  # greedy and sampled, over a cache with an answer in it
        other = generate(lm, prompt, {"adaptive": "branchwise", "branchwise": "adaptive"}[answer.mode], **options)
        assert (answer.segments, answer.finish) == (other.segments, other.finish)
    if answer.mode == "serial" and limit < context:  # "length" says just this: that more would have come
        more = generate(lm, prompt, mode, **options | {"max_new_tokens": 10**6})
        assert plain(more.segments)[:answer.tokens] == plain(answer.segments)
        assert (more.tokens > answer.tokens) == (answer.finish == "length")
    return answer


def test_fuzz_every_decode_is_well_formed(request):
    """Any weights, prompt, budget, context, mode, scheme and sampling: the row is as designed, cached decoding equals
    one masked forward, what was fed follows from what the model chose, as does finish; adaptive equals branchwise."""
    seen, n = Counter(), request.config.getoption("--decodes")
    for seed in range(n):
        if answer := fuzz(seed):
            seen.update([answer.mode, answer.finish, *(f"{len(b)} branches" for b in answer.blocks)])
            seen["parallel"] += bool(answer.blocks)
        seen["too long"] += not answer
    print(sorted(seen.items()))
    assert n < 150 or seen["parallel"] > n / 10
    assert n < 150 or all(seen[name] for name in (*MODES, "stop", "length", "2 branches", "3 branches", "too long"))


# -----------------------------------------------------------------------------
# grammar

def test_grammar_allows_exactly_what_the_design_says():
    """For a tokenizer with holes and a padded vocabulary; ids without a token are allowed nowhere."""
    spread = Tokenizer(TOKENIZER.settings["pattern"], {bytes([b]): 2 * b for b in range(256)}, eos=777)
    text, tags = set(range(0, 512, 2)), spread.add_tags().special
    assert set(tags[:6]) == {1, 3, 5, 7, 9, 11}
    expected = {TEXT_ONLY: text | {777}, SERIAL: text | {777, tags.title}, TITLE_START: text,
                TITLE: text | {tags.title_end}, AFTER_TITLE: {tags.title, tags.para},
                BRANCH: text | {777, tags.branch_end}}
    allow = decode.grammar(spread.add_tags(), 800)
    assert allow.shape == (6, 800) and {state: set(np.flatnonzero(allow[state])) for state in expected} == expected
    assert set(np.flatnonzero(decode.grammar(spread, 800)[TEXT_ONLY])) == text | {777}


def states_asked(lm, **options):
    """The grammar states that an answer's passes choose in."""
    asked, step = [], lm.step
    lm.step = lambda *args: asked.append(args[4][5, :args[6]].tolist()) or step(*args)
    return generate(lm, "p", **options), asked


def test_engine_asks_in_the_state_of_the_grammar():
    ids = [[X, X], [([Y, Y], [Z]), ([Y], [])], [X]]
    titles = [[TITLE_START], [TITLE], [TITLE], [AFTER_TITLE], [TITLE_START], [TITLE], [AFTER_TITLE]]
    block = [[BRANCH, BRANCH], [BRANCH, BRANCH], [BRANCH]]  # prefixes; z and the second's end; the first's end
    answer, asked = states_asked(told(ids))
    assert answer.segments == ids
    assert asked == [[SERIAL], [SERIAL], [SERIAL], *titles, *block, [SERIAL], [SERIAL]]
    assert states_asked(told([[X]]), mode="serial")[1] == [[TEXT_ONLY]] * 2
    assert states_asked(told([[X]]), max_new_tokens=100)[1] == [[TEXT_ONLY]] * 2, "no room for a block"
    assert states_asked(told([[X]], LM(random_lm().model, UNTAGGED)))[1] == [[TEXT_ONLY]] * 2


def test_forced_tokens():
    """The second title; the title's end at the cap; <|para|> at the branch cap. None of these is a cut."""
    once = dict(ENDLESS, branch=TAGS.branch_end)
    for wish, block in (
        (dict(title=TAGS.title_end, after=TAGS.para), [([Y], [])] * 2),
        (dict(after=TAGS.para), [([Y] * TITLE_CAP, [])] * 2),
        (dict(title=TAGS.title_end), [([Y], [])] * 5),
    ):
        lm = record(puppet(random_lm(), by_state(**once | wish | dict(serial=iter([TAGS.title, X, EOS]))), thinks=True))
        answer = generate(lm, "p", max_new_tokens=900, max_branches=5)
        assert answer.segments == [block, [X]] and answer.finish == "stop"
        check_against_one_forward(lm, "p", answer, 1e-10)


@pytest.mark.parametrize("mode", ["adaptive", "branchwise"])
def test_end_of_text_in_a_branch_ends_that_branch_alone(mode):
    """What is fed there is <|/branch|>, and the answer goes on after the block."""
    write = lambda *tokens: chain(tokens, repeat(TAGS.branch_end))  # the choice after the end counts for nothing
    after = iter([TAGS.title, TAGS.title, TAGS.para])
    wish = dict(serial=iter([TAGS.title, X, EOS]), title=TAGS.title_end, after=after,
                branch=(write(EOS), write(Z, Z, Z), write(Z, EOS)))
    lm = record(puppet(random_lm(), by_state(**ENDLESS | wish), thinks=True))
    answer = generate(lm, "p", mode)
    assert answer.segments == [[([Y], []), ([Y], [Z, Z, Z]), ([Y], [Z])], [X]] and answer.finish == "stop"
    check_against_one_forward(lm, "p", answer, 1e-10)


# -----------------------------------------------------------------------------
# budget and quota

def greedy_for_more(max_new_tokens, max_branches, title=TITLE_CAP, mode="adaptive", **wish):
    """The answer of a puppet that wants as many and as long branches as it can have, with titles of so many tokens."""
    lm, n = random_lm(n_layer=1), count()
    wish = ENDLESS | dict(title=(Y if next(n) % title < title - 1 else TAGS.title_end for _ in count())) | wish
    return generate(puppet(lm, by_state(**wish)), "p", mode, max_new_tokens=max_new_tokens, max_branches=max_branches)


@pytest.mark.parametrize("max_branches", [2, 5, 16])
@pytest.mark.parametrize("title", [1, TITLE_CAP])
def test_quota_is_the_same_for_all_and_the_block_fits(title, max_branches):
    """Whatever the budget: all branches get the same, at least 8 tokens after the title, and <|/para|> still fits."""
    blocks = 0
    for budget in [*range(140, 240), 300, 500, 900]:
        answer = greedy_for_more(budget, max_branches, title)
        row = layout(TOKENIZER.prompt("p"), answer.segments, TAGS)
        assert len(row.token) == len(TOKENIZER.prompt("p")) + budget and answer.finish == "length"
        for s in filter(is_block, answer.segments):
            rests = {len(rest) for _, rest in s}
            assert len(rests) == 1 and min(rests) >= MIN_BRANCH and {len(t) for t, _ in s} == {title}
            blocks += 1
        left_over = [len(s) for s in answer.segments[1:] if not is_block(s)]
        assert not left_over or max(left_over) < 154, "with more left another block would have been opened"
    assert blocks >= 89


def test_block_opens_as_soon_as_every_branch_is_sure_of_its_tokens():
    """With the longest titles: one token less and the block has a branch less, or there is none."""
    least = lambda n: n * (TITLE_CAP + 2) + 2 + n * (1 + TITLE_CAP + MIN_BRANCH + 1)  # titles, para tags, branches
    for n in (2, 3, 7, 11):
        exact, less = greedy_for_more(least(n), n), greedy_for_more(least(n) - 1, n)
        assert exact.segments == [[([Y] * TITLE_CAP, [Z] * MIN_BRANCH)] * n]
        assert [len(s) for s in less.segments if is_block(s)] == [n - 1] * (n > 2)
        assert less.finish == "length", "a title that had no room is a cut"


@pytest.mark.parametrize("mode", ["adaptive", "branchwise"])
def test_quota_does_not_depend_on_siblings(mode):
    """Nor on the order of decoding. What a branch that ends early leaves is for the text after the block."""
    after = lambda answer: sum(len(s) for s in answer.segments if not is_block(s))
    everyone = greedy_for_more(300, 3, 4, mode)
    (size, *sizes), = everyone.blocks
    assert sizes == [size] * 2 and after(everyone) < 3
    for k in range(3):
        branches = tuple(TAGS.branch_end if i == k else Z for i in range(3))
        answer = greedy_for_more(300, 3, 4, mode, branch=branches)
        assert answer.blocks == [[4 if i == k else size for i in range(3)]]
        assert after(answer) == after(everyone) + size - 4
    ended = greedy_for_more(300, 3, 4, mode, branch=(Z, Z, TAGS.branch_end), text=EOS)
    assert ended.blocks == [[size, size, 4]] and after(ended) == 0
    assert ended.finish == "length", "though the answer ended by itself, a branch was cut"


# -----------------------------------------------------------------------------
# sampling

def probabilities(logits, temperature, top_k, top_p):
    """What sample() must draw from: a list of logits -> of probabilities. Slow and plain."""
    best = max(logits)
    weights = [math.exp((x - best) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k or None]
    total, kept, reached = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if reached < top_p * total:  # the fewest that reach it
            kept.append(i)
            reached += weights[i]
    return [weights[i] / reached if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.35, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 4, 99])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_sample_draws_with_the_right_frequencies(temperature, top_k, top_p):
    """Over a fine grid of u each token comes as often as a plain reference says, and one that is filtered out never."""
    n = 4000
    for seed in range(3):
        torch.manual_seed(seed)
        logits = (torch.randn(12, dtype=torch.float64) * 2).masked_fill(torch.arange(12) % 4 == 3, -torch.inf)
        p = torch.tensor(probabilities(logits.tolist(), temperature, top_k, top_p), dtype=torch.float64)
        u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        drawn = sample(logits.expand(n, -1), u, temperature, top_k, top_p).bincount(minlength=12) / n
        assert (drawn - p).abs().max() <= 1.01 / n and not drawn[p == 0].any()
        ends = sample(logits.expand(2, -1), torch.tensor([0, 1 - 2**-24]), temperature, top_k, top_p)
        assert p[ends].min() > 0 and ends[0] == logits.argmax()


def test_each_row_is_sampled_with_its_own_number():
    logits, u = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)), torch.rand(50)
    alone = [sample(logits[i:i + 1], u[i:i + 1], 1.0, 5, 0.9) for i in range(50)]
    assert torch.equal(sample(logits, u, 1.0, 5, 0.9), torch.cat(alone))


def test_greedy_is_the_best_token_and_the_limit_of_a_low_temperature():
    logits, u = torch.randn(200, 30, generator=torch.Generator().manual_seed(0)), torch.rand(200)
    best = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    for settings in ((0.0, 0, 1.0), (0.0, 3, 0.5), (1e-6, 0, 1.0), (1e-20, 0, 1.0), (1.0, 1, 1.0), (1.0, 0, 1e-9)):
        assert torch.equal(sample(logits, u, *settings), best)


def test_same_seed_same_answer_and_other_seeds_differ():
    lm = random_lm()
    texts = [generate(lm, "p", temperature=1.0, max_new_tokens=30, seed=seed).text for seed in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert texts[:4] == texts[4:] and len(set(texts)) == 4
    assert len({generate(lm, "p", max_new_tokens=30, seed=seed).text for seed in range(3)}) == 1, "greedy has no seed"


def test_siblings_draw_apart():
    """Branches with the same title are sampled differently, and differently from one position to the next."""
    wish = dict(ENDLESS, title=TAGS.title_end, branch=None)
    lm = puppet(like_tags(random_lm(), eos=-9.0, branch_end=-9.0), by_state(**wish), thinks=True)
    block = generate(lm, "p", temperature=1.0, max_new_tokens=400, max_branches=4).segments[0]
    assert [title for title, _ in block] == [[Y]] * 4
    assert len({tuple(rest[:8]) for _, rest in block}) == 4 and all(len(set(rest[:8])) > 2 for _, rest in block)


# -----------------------------------------------------------------------------
# the cache, and compiling

def test_cache_is_written_once_and_in_place():
    """Nothing that is in the cache is moved, copied or changed; only live branches own slots, and only their own."""
    lm, last, inside = random_lm(), {"slot": 0}, 0

    def watch(engine):
        nonlocal inside
        kv, old, n = [*lm.cache.k, *lm.cache.v], last.get("kv"), last["slot"]
        assert old is None or all(a.data_ptr() == p and torch.equal(a[..., :n, :], b) for a, (p, b) in zip(kv, old))
        written = kv[0][..., n:engine.slot, :].abs().sum((0, 1, 3))
        assert engine.slot > n and (written > 0).all(), "the next slots"
        assert not kv[0][..., engine.slot:, :].any(), "and no others"
        last.update(slot=engine.slot, kv=[(a.data_ptr(), a[..., :engine.slot, :].clone()) for a in kv])
        live = isinstance(engine.segments[-1], list) and is_block(engine.segments[-1]) and lm.cache.owner.any()
        owners = set(lm.cache.owner.tolist())
        assert owners == ({0, *range(1, 4)} if live else {0})
        inside += bool(live)

    wish = ENDLESS | dict(serial=iter([X, TAGS.title, X, TAGS.title, X, EOS]), title=TAGS.title_end)
    answer = generate(puppet(lm, by_state(**wish), thinks=True), "p", max_new_tokens=200, max_branches=3, watch=watch)
    assert len(answer.blocks) == 1 and inside == max(len(rest) for _, rest in answer.segments[1]) + 2
    at = lm.cache.k[0].data_ptr()
    lm.step = decode.forward_pass
    again, alone = (generate(lm, "other", max_new_tokens=200) for lm in (lm, random_lm()))
    assert lm.cache.k[0].data_ptr() == at, "the next answer takes the same memory"
    assert again.segments == alone.segments, "and sees nothing of the last one"


def test_interrupted_answer_leaves_nothing_behind():
    """Not even in the middle of a block, whose slots are still owned."""
    lm, options = random_lm(), dict(temperature=1.0, max_new_tokens=200)

    def interrupt(engine):
        if lm.cache.owner.any():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wish = dict(ENDLESS, serial=TAGS.title, title=TAGS.title_end)
        generate(puppet(lm, by_state(**wish), thinks=True), "p", watch=interrupt, **options)
    lm.step = decode.forward_pass
    assert generate(lm, "p", **options).segments == generate(random_lm(), "p", **options).segments


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_compiled_equals_eager_and_is_never_compiled_again():
    """Invariant 6, in all modes, greedy and sampled, for prompts and budgets of many lengths. The cache stays."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    eager = random_lm(n_layer=1, n_embd=16, n_inner=24, block_size=600)  # four heads in two key groups
    compiled = LM(like_tags(eager, title=3.0, para=2.0, title_end=2.5, branch_end=1.0).model, TOKENIZER, compile=True)
    cases, blocks = [("p", 5), ("two tips", 500), ("x" * 100, 200), ("y" * 300, 10**6), ("z" * 580, 9)], Counter()
    for sampling in (dict(temperature=0.0), dict(temperature=0.9, top_k=200, top_p=0.95)):
        with torch.no_grad():
            compiled.warm_up(tuple({"temperature": 0.0, "top_k": 0, "top_p": 1.0, **sampling}.values()), 600)
        warm, places = graphs(), set()
        assert warm > 0
        for prompt, budget in cases:
            for mode in MODES:
                options = dict(max_new_tokens=budget, seed=3, **sampling)
                a, b = (generate(lm, prompt, mode, **options) for lm in (eager, compiled))
                assert a.segments == b.segments and (a.steps, a.finish) == (b.steps, b.finish)
                assert not compiled.cache.owner[:-1].any(), "padding owns the reserved slot alone"
                places.add(compiled.cache.k[0].data_ptr())
                blocks[mode] += len(a.blocks)
        assert graphs() == warm and len(places) == 1
    assert min(blocks["adaptive"], blocks["branchwise"]) >= 4
    torch._dynamo.reset()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_compiled_step_writes_the_cache_in_place():
    """No buffer of the compiled step is as long as the cache: a layer's keys and values are never copied."""
    torch._dynamo.reset()
    lm = random_lm()
    engine = decode.Engine(lm, [], "serial", 700, (0.0, 0, 1.0), 0, 16, None)
    slots, feed = lm.cache.slots + 1, torch.tensor([[X], [0], [0], [0], [0], [SERIAL]])
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(decode.forward_pass, fullgraph=True), lm.model, lm.cache, lm.allow,
                                    engine.uniform, feed, 256, 1, (0.0, 0, 1.0))
    buffers = re.findall(r"= empty_strided\w*\((\(.*?\))", "\n".join(codes))
    assert len(buffers) > 5 and not any(f" {slots}," in shape for shape in buffers), buffers
    torch._dynamo.reset()
