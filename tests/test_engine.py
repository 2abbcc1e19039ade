"""The invariants of decoding: cached parallel decoding equals one full masked forward pass,
adaptive equals branchwise, every token is fed exactly once, compiled equals eager. Random weights
decode into well-formed rows of every shape, thanks to the grammar.

    python -m pytest tests/test_engine.py -k fuzz --decodes 10000   # more than the usual 100
"""
import math
import random
import re
import shutil
from collections import Counter
from functools import cache
from itertools import chain, count, repeat
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import decode
from aspd import (IGNORE, MAX_BRANCHES, POSITIONS, Block, Branch, branch_mask, cache_mask, join,
                  layout, plain, steps, tokenize)
from data import Tokenizer, learn_tokenizer
from decode import (AFTER_TITLE, BRANCH, LM, MODES, SERIAL, TEXT_ONLY, TITLE, TITLE_CAP,
                    TITLE_START, sample)
from helpers import TOKENIZER, random_ids, random_text
from model import GPT, GPTConfig, save_checkpoint
from script import script

TAGS = TOKENIZER.tags
EOS = TOKENIZER.eos
ALSO_ENDS = TOKENIZER.vocab_size  # a second id that ends an answer, of the tokenizer TWO_ENDS
TWO_ENDS = Tokenizer(**TOKENIZER.settings | {"stop": (EOS, ALSO_ENDS)})
MIN_BRANCH = 8  # what the design promises, whatever decode.py says
X, Y, Z = b"xyz"


# ---- models, and what is watched while they decode --------------------------

def generate(lm, prompt, mode=None, *, max_branches=MAX_BRANCHES, **options):
    """decode.generate, where a block may have so many branches."""
    with mock.patch.object(decode, "MAX_BRANCHES", max_branches):
        return decode.generate(lm, prompt, mode, **options)


def random_lm(dtype=torch.float64, seed=0, compile=False, tokenizer=TOKENIZER, device="cpu",
              **config):
    """A tiny untrained model over bytes; its last ids have no token."""
    torch.manual_seed(seed)
    settings = dict(block_size=1024, vocab_size=TOKENIZER.vocab_size + 5, n_layer=2, n_head=4,
                    n_kv_head=2, n_embd=32, n_inner=48, head_size=8)
    return LM(GPT(GPTConfig(**settings | config)).to(device, dtype), tokenizer, compile)


def like(lm, **bonus):
    """Makes the model fond of some ids: adds a bonus to their logits, so that random weights write
    blocks. By the names of the tags, eos, or nothing, which is an id without a token."""
    weight = lm.model.model.embed_tokens.weight
    added = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    ids = TAGS._asdict() | {"eos": EOS, "nothing": -1}
    for name, value in bonus.items():
        added[ids[name]] = value

    def fond_forward(*args):
        return GPT.forward(lm.model, *args) + added

    lm.model.forward = fond_forward
    return lm


def fond(**config):
    """A random LM that writes blocks of many kinds."""
    return like(random_lm(**config), title=2.5, para=2.5, title_end=2.0, branch_end=0.5)


class Pass(NamedTuple):
    """What one forward pass was fed, saw and chose."""
    feed: list          # [token, position, branch, slot] of each token
    mask: torch.Tensor  # (tokens, slots) bool: who saw what
    pick: list          # the tokens after which it chose
    logits: torch.Tensor
    chosen: list


def record(lm):
    """Keeps every Pass in lm.passes."""
    lm.passes = []

    def recording(step):
        def recorder(model, feed, pick, allowed, u, sampling, seen):
            chosen, logits = step(model, feed, pick, allowed, u, sampling, seen)
            mask = cache_mask(feed[3], feed[2], model.owner[:seen])
            lm.passes.append(Pass(feed.t().tolist(), mask, pick.tolist(), logits, chosen.tolist()))
            return chosen, logits
        return recorder

    lm.step = recording(lm.step)
    if lm.compiled_step:
        lm.compiled_step = recording(lm.compiled_step)
    return lm


def state_of(allowed):
    """The state of the grammar that a row of LM.allow belongs to."""
    return allowed.storage_offset() // len(allowed)


def puppet(lm, choose, thinks=False):
    """Lets choose(state, branches) choose the tokens of a pass, which the grammar must allow. A
    None leaves the choice to the model. thinks: the model runs all the same."""
    def pulled(real):
        def step(model, feed, pick, allowed, u, sampling, seen):
            chosen = [0] * len(pick)
            logits = None
            if thinks:
                chosen, logits = real(model, feed, pick, allowed, u, sampling, seen)
                chosen = chosen.tolist()
            branches = [branch for branch in feed[2][pick].tolist() if branch >= 0]
            wanted = choose(state_of(allowed), branches)
            tokens = [own if token is None else token for token, own in zip(wanted, chosen)]
            assert allowed[tokens].all(), "the grammar allows it"
            return torch.tensor(tokens + chosen[len(tokens):]), logits
        return step

    lm.step = pulled(lm.step)
    if lm.compiled_step:
        lm.compiled_step = pulled(lm.compiled_step)
    return lm


def by_state(**tokens):
    """A chooser with one token a state of the grammar, given by name: an id, an iterator of ids, or
    for branches a tuple of one of these a branch."""
    def choose(state, branches):
        found = []
        for branch in branches:
            wanted = tokens[NAMES[state]]
            if isinstance(wanted, tuple):
                wanted = wanted[branch - 1]
            if hasattr(wanted, "__next__"):
                wanted = next(wanted)
            found.append(wanted)
        return found
    return choose


NAMES = {TEXT_ONLY: "text", SERIAL: "serial", TITLE_START: "start", TITLE: "title",
         AFTER_TITLE: "after", BRANCH: "branch"}
# Wants all of everything.
ENDLESS = dict(text=X, serial=TAGS.title, start=Y, title=Y, after=TAGS.title, branch=Z)


def told(ids, lm=None):
    """A puppet that writes this tokenised answer; its model thinks only where it is given."""
    passes = iter(script(ids, TAGS, EOS))

    def choose(state, branches):
        return next(passes)

    return puppet(lm or random_lm(n_layer=1, block_size=4096), choose, thinks=bool(lm))


def blocks_of(answer):
    return [segment for segment in answer.segments if isinstance(segment, Block)]


# ---- what must hold for a decoded answer ------------------------------------

class Fed(NamedTuple):
    """A token that was fed, without padding."""
    token: int
    position: int
    branch: int
    saw: torch.Tensor     # (slots,) bool
    logits: torch.Tensor  # None where nothing was chosen after it, as in the next two
    chosen: int


def fed_tokens(lm):
    """{slot: Fed} of lm.passes."""
    out = {}
    for feed, mask, pick, logits, chosen in lm.passes:
        for i, (token, position, branch, slot) in enumerate(feed):
            if branch >= 0:
                assert slot not in out, "a slot is written once"
                choice = (None, None)
                if i in pick:
                    k = pick.index(i)
                    choice = (logits[k], chosen[k])
                out[slot] = Fed(token, position, branch, mask[i], *choice)
    return out


def row_indices(fed, row):
    """The row index of each slot: the streams (prompt and serial, or one branch of one block) keep
    their order."""
    streams = {}
    block = 0
    was_serial = True
    for slot in sorted(fed):
        branch = fed[slot].branch
        block += bool(branch) and was_serial
        was_serial = not branch
        streams.setdefault((block if branch else 0, branch), []).append(slot)
    index = {}
    for (block, branch), slots in streams.items():
        where = ((row.block == block) & (row.branch == branch)).nonzero()[:, 0].tolist()
        assert len(where) == len(slots)
        index.update(zip(slots, where))
    return index


def check_against_one_forward(lm, prompt, answer, tolerance):
    """Invariants 1 and 3 for a decoded answer. Returns its row and, for each row index after which
    something was chosen, the token."""
    ids = lm.tokenizer.prompt(prompt)
    tags = lm.tokenizer.tags
    row = layout(ids, answer.segments, lm.tokenizer.eos, tags, lm.model.config.positions)
    fed = fed_tokens(lm)
    assert sorted(fed) == list(range(len(row.token))), "each row token is fed once, in its slot"
    index = row_indices(fed, row)
    order = torch.tensor([index[slot] for slot in range(len(fed))])
    mask = branch_mask(row.block, row.branch)
    full = lm.model(row.token[None], row.position[None], mask[None, None])[0]
    choices = {}
    for slot, (token, position, branch, saw, logits, chosen) in fed.items():
        i = index[slot]
        assert (token, position, branch) == (row.token[i], row.position[i], row.branch[i])
        known = saw[:len(order)]
        assert torch.equal(known, mask[i, order[:len(known)]]), "it sees what the layout says"
        assert saw.sum() == mask[i].sum(), "all of it, and nothing else"
        if logits is not None:
            assert (logits - full[i]).abs().max() <= tolerance * full[i].abs().max()
            choices[i] = chosen
    may_be_forced = {lm.tokenizer.eos}  # "length"
    if tags:
        may_be_forced |= {tags.title_end, tags.para, tags.branch_end}
    for i, target in enumerate(row.target.tolist()):
        assert target == IGNORE or choices[i] == target or target in may_be_forced
    check_figures(answer)
    return row, choices


def check_figures(answer):
    """The numbers of an Answer: the steps are exactly what data.py predicts."""
    passes = steps(answer.segments)
    if answer.mode == "branchwise":
        for block in blocks_of(answer):
            lengths = [len(rest) + 1 for _, rest in block]
            passes += sum(lengths) - max(lengths)
    assert answer.steps == passes
    assert answer.tokens == len(plain(answer.segments))
    assert answer.blocks == [[len(title + rest) for title, rest in s] for s in blocks_of(answer)]
    assert answer.seconds >= answer.ttft > 0


def check_well_formed(lm, answer, row, limit, max_branches):
    """Of an answer that may have limit row tokens, prompt included."""
    assert len(row.token) <= limit <= lm.model.config.block_size
    assert len(row.token) < len(lm.model.owner), "the last slot is for padding"
    assert row.position.max() < lm.model.config.block_size
    assert not lm.model.owner.any(), "nothing is left of the last block"
    assert all(token in lm.tokenizer.bytes for token in plain(answer.segments)), "text alone"
    for block in blocks_of(answer):
        assert 2 <= len(block) <= max_branches
        assert all(1 <= len(title) <= TITLE_CAP for title, _ in block)
    assert answer.text == lm.tokenizer.decode(plain(answer.segments))
    assert not (answer.blocks and answer.mode == "serial"), "serial mode has no blocks"


class Spelled:
    """The tokenised answer and its finish that follow from what the model chose at each row index,
    by the grammar and the budget of the design, token after token in the order of the row."""

    def __init__(self, chosen, n_prompt, limit, max_branches, mode):
        self.chosen = chosen
        self.n = n_prompt  # row tokens so far
        self.limit = limit
        self.max_branches = max_branches
        self.mode = mode
        self.cut = False
        segments = [[]]
        while self.choice() != EOS and self.n < limit:
            if self.choice() == TAGS.title:
                segments += [self.block(), []]
            else:
                segments[-1].append(self.choice())
                self.n += 1
        self.cut |= self.choice() != EOS
        self.segments = [segment for segment in segments if segment]
        self.finish = "length" if self.cut else "stop"

    def choice(self):
        return self.chosen[self.n - 1]

    def room(self, titles):
        """Would every branch get MIN_BRANCH tokens, with one more title (at first two) of the
        longest?"""
        new = 1 if titles else 2
        sizes = [len(title) for title in titles] + [TITLE_CAP] * new
        needed = new * (1 + TITLE_CAP + 1) + 1 + 1
        needed += sum(1 + size + MIN_BRANCH + 1 for size in sizes)
        fits = len(sizes) <= self.max_branches and self.n + needed <= self.limit
        return fits and self.mode != "serial"

    def block(self):
        assert self.room([]), "a block opens only with room"
        titles = []
        while len(titles) < 2 or self.choice() == TAGS.title and self.room(titles):
            titles.append(self.title())
        self.cut |= self.choice() == TAGS.title and len(titles) < self.max_branches
        self.n += 1  # <|para|>
        after_titles = self.limit - self.n - 1 - sum(1 + len(title) + 1 for title in titles)
        quota = after_titles // len(titles)
        assert quota >= MIN_BRANCH
        block = Block(Branch(title, self.rest(title, quota)) for title in titles)
        self.n += 1  # <|/para|>
        return block

    def title(self):
        title = []
        self.n += 1
        while self.choice() != TAGS.title_end and len(title) < TITLE_CAP:
            title.append(self.choice())
            self.n += 1
        self.n += 1
        return title

    def rest(self, title, quota):
        rest = []
        self.n += 1 + len(title)
        while self.choice() not in (TAGS.branch_end, EOS) and len(rest) < quota:
            rest.append(self.choice())
            self.n += 1
        self.cut |= self.choice() not in (TAGS.branch_end, EOS)
        self.n += 1
        return rest


# ---- invariants 1 to 3, on random and on trained weights --------------------

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-3}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_cached_parallel_decoding_equals_one_masked_forward(positions, dtype):
    """Logits, tokens, positions, visibility and targets, with several blocks of uneven branches."""
    found = []
    for seed in range(8):
        lm = record(fond(dtype=dtype, seed=seed, positions=positions))
        answer = generate(lm, "two tips", temperature=1.0, seed=seed, max_new_tokens=500)
        check_against_one_forward(lm, "two tips", answer, TOLERANCES[dtype])
        found.append(answer.blocks)
    sizes = [block for blocks in found for block in blocks]
    assert max(map(len, found)) >= 2, "several blocks in one answer"
    assert max(map(len, sizes)) >= 3, "more than two branches"
    assert any(max(block) > 3 * min(block) for block in sizes), "uneven ones"


@pytest.mark.parametrize("positions,branches", [("aspd", 16), ("longest", 8)])
def test_blocks_of_many_branches_one_far_longer_equal_one_masked_forward(positions, branches):
    """A given answer, whatever the weights would write: two blocks, and one with nothing before
    it."""
    ids = random_ids(branches, branches=branches, long=30)
    ids.append(next(segment for segment in ids if isinstance(segment, Block)))
    lm = record(told(ids, random_lm(positions=positions, block_size=24000)))
    answer = generate(lm, "two tips", max_new_tokens=11000)
    assert answer.segments == [segment for segment in ids if segment]
    assert answer.finish == "stop"
    check_against_one_forward(lm, "two tips", answer, 1e-10)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_adaptive_equals_branchwise(temperature):
    """Token for token, greedy and sampled, in as many passes or fewer."""
    blocks = 0
    for seed in range(6):
        lm = fond(seed=seed)
        options = dict(temperature=temperature, seed=seed, max_new_tokens=400)
        together = generate(lm, "two tips", "adaptive", **options)
        apart = generate(lm, "two tips", "branchwise", **options)
        assert together.segments == apart.segments and together.finish == apart.finish
        assert together.steps < apart.steps or not together.blocks
        blocks += len(together.blocks)
    assert blocks >= 4


def numbered(lead, *items, end=""):
    """An answer: text, and a Block of numbered items."""
    block = Block()
    for i, item in enumerate(items, start=1):
        title, rest = item.split(":")
        block.append(Branch("\n" * (i > 1) + f"{i}. {title}", ":" + rest))
    return [lead, block, end] if end else [lead, block]


LEARNT = {
    "Two tips?": numbered("Two tips:\n\n", "Sleep: eight hours a night.",
                          "Move: walk to work daily.", end="\n\nStart today."),
    "Three?": numbered("Here:\n", "Sun: it is hot.", "Moon: it is cold and far away.", "Sea: wet."),
    "Two lists?": numbered("One:\n", "Red: like fire.", "Blue: like the sea.", end="\nTwo:\n")
    + numbered("", "Up: to the sky.", "Down: to the ground below us.", end="\nDone.")[1:],
    "No list?": ["Nothing here needs a list, so there is none."],
}


@pytest.fixture(scope="module")
def trained():
    """An LM in float64 that has learnt the answers above by heart, under the branch mask."""
    texts = [prompt + join(segments) for prompt, segments in LEARNT.items()]
    tokenizer = learn_tokenizer(texts)
    torch.manual_seed(0)
    model = GPT(GPTConfig(1024, tokenizer.vocab_size, 2, 4, 2, 64, 128, head_size=16))
    optimizer = torch.optim.AdamW(model.parameters())
    rows = []
    for prompt, segments in LEARNT.items():
        ids = tokenize(segments, tokenizer.encode)
        rows.append(layout(tokenizer.prompt(prompt), ids, tokenizer.eos, tokenizer.tags))
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, step / 10, 2 - step / 30)
        for row in rows:
            mask = branch_mask(row.block, row.branch)[None, None]
            logits = model(row.token[None], row.position[None], mask)[0]
            F.cross_entropy(logits, row.target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return LM(model.double(), tokenizer)


@pytest.mark.parametrize("prompt", LEARNT)
def test_trained_weights_open_blocks_by_themselves_and_keep_the_invariants(trained, prompt):
    """Greedily the answer that was learnt comes back, with its blocks and none where there was
    none; sampled too, adaptive is one masked forward and equals branchwise."""
    answer = generate(trained, prompt)
    assert answer.segments == tokenize(LEARNT[prompt], trained.tokenizer.encode)
    assert answer.text == join(LEARNT[prompt]) and answer.finish == "stop"
    for temperature in (0.0, 1.5):
        lm = record(LM(trained.model, trained.tokenizer))
        together = generate(lm, prompt, temperature=temperature, max_new_tokens=300)
        check_against_one_forward(lm, prompt, together, 1e-10)
        apart = generate(trained, prompt, "branchwise", temperature=temperature, max_new_tokens=300)
        assert together.segments == apart.segments and together.finish == apart.finish


# ---- fuzz -------------------------------------------------------------------

@cache
def fuzz_lm(dtype, seed):
    """Tiny weights that many decodes share, and with them a cache full of what the last one
    left."""
    shape = dict(n_layer=1, n_embd=16, n_head=2, n_kv_head=1)
    return record(random_lm(dtype, seed, **shape))


def random_options(rng):
    return dict(
        max_new_tokens=rng.choice((1, rng.randint(1, 60), rng.randint(150, 400), 10**6, 10**6)),
        temperature=rng.choice((0.0, 0.5, 1.0, 1.0, 1.0, 50.0)),
        top_k=rng.choice((0, 0, 1, 5, 10**6)), top_p=rng.choice((1.0, 1.0, 0.9, 1e-9)),
        max_branches=rng.randint(2, MAX_BRANCHES), seed=rng.randrange(5))


def random_prompt(rng, context):
    prompt = rng.choice((rng.choice("a7漢\U0001f600é\x00"), random_text(rng, rng.randint(1, 20)),
                         "x" * rng.randint(1, context)))
    return prompt if prompt.strip() else "<|para|>"


def fuzz(seed):
    """A random decode of random weights -> Answer, None where the prompt is too long."""
    rng = random.Random(seed)
    dtype = rng.choice((torch.float64, torch.float32))
    tagged = rng.random() < 0.95
    lm = fuzz_lm(dtype, rng.randrange(3))
    context = rng.choice((40, 64, 96, 256, 400, 500, 500, 800))
    lm.model.config.block_size = context
    lm.model.config.positions = rng.choice(list(POSITIONS)) if tagged else None
    fondness = rng.choice((0, 2, 3, 4, 5, 6))
    ends = ("title_end", "para", "branch_end")
    likes = {name: rng.choice((0, 0.6, 1)) * fondness for name in ends}
    like(lm, title=fondness, **likes, eos=rng.choice((-9, 0, 0, 4)), nothing=9)
    prompt = random_prompt(rng, context)
    options = random_options(rng)
    mode = rng.choice((None, *MODES) if tagged else (None, "serial"))
    ids = lm.tokenizer.prompt(prompt)
    if len(ids) >= context:
        with pytest.raises(ValueError, match=f"{len(ids)} tokens.*{context}"):
            generate(lm, prompt, mode, **options)
        return None

    lm.passes.clear()
    answer = generate(lm, prompt, mode, **options)
    assert answer.mode == (mode or ("adaptive" if tagged else "serial"))
    limit = min(len(ids) + options["max_new_tokens"], context)
    tolerance = TOLERANCES[dtype]
    row, chosen = check_against_one_forward(lm, prompt, answer, tolerance)
    check_well_formed(lm, answer, row, limit, options["max_branches"])
    spelled = Spelled(chosen, len(ids), limit, options["max_branches"], answer.mode)
    assert (answer.segments, answer.finish) == (spelled.segments, spelled.finish)
    if answer.blocks and dtype == torch.float64:  # over a cache with an answer in it
        other_mode = {"adaptive": "branchwise", "branchwise": "adaptive"}[answer.mode]
        other = generate(lm, prompt, other_mode, **options)
        assert (answer.segments, answer.finish) == (other.segments, other.finish)
    if answer.mode == "serial" and limit < context:  # "length" says that more would have come
        more = generate(lm, prompt, mode, **options | {"max_new_tokens": 10**6})
        assert plain(more.segments)[:answer.tokens] == plain(answer.segments)
        assert (more.tokens > answer.tokens) == (answer.finish == "length")
    return answer


def test_fuzz_every_decode_is_well_formed(request):
    """Any weights, prompt, budget, context, mode, scheme and sampling: the row is as designed,
    cached decoding equals one masked forward, what was fed follows from what the model chose, as
    does finish; adaptive equals branchwise."""
    seen = Counter()
    n = request.config.getoption("--decodes")
    for seed in range(n):
        answer = fuzz(seed)
        if answer:
            seen.update([answer.mode, answer.finish])
            seen.update(f"{len(block)} branches" for block in answer.blocks)
            seen["parallel"] += bool(answer.blocks)
        seen["too long"] += not answer
    print(sorted(seen.items()))
    if n >= 100:
        assert seen["parallel"] > n / 10
        wanted = (*MODES, "stop", "length", "2 branches", "3 branches", "too long")
        assert all(seen[name] for name in wanted)


# ---- grammar ----------------------------------------------------------------

def test_grammar_allows_exactly_what_the_design_says():
    """For a tokenizer with holes, two ids that end an answer, and a padded vocabulary; ids without
    a token are allowed nowhere."""
    ranks = {bytes([b]): 2 * b for b in range(256)}
    tokenizer = Tokenizer(TOKENIZER.settings["pattern"], ranks, 777, range(779, 785), stop=(778,))
    tags = tokenizer.tags
    text = set(range(0, 512, 2))
    stop = {777, 778}
    assert set(tags) == set(range(779, 785))
    expected = {
        TEXT_ONLY: text | stop, SERIAL: text | stop | {tags.title}, TITLE_START: text,
        TITLE: text | {tags.title_end}, AFTER_TITLE: {tags.title, tags.para},
        BRANCH: text | stop | {tags.branch_end}}
    allow = decode.grammar(tokenizer, 800)
    assert allow.shape == (6, 800)
    names = ("TEXT_ONLY", "SERIAL", "TITLE_START", "TITLE", "AFTER_TITLE", "BRANCH")
    for name, (state, ids) in zip(names, expected.items(), strict=True):
        found = set(allow[state].nonzero()[:, 0].tolist())
        assert found == ids, f"{name} lacks {sorted(ids - found)}, must not have {sorted(found - ids)}"


def states_asked(lm, **options):
    """An answer, and the grammar states that its passes choose in, one for each choice."""
    asked = []
    step = lm.step

    def asking(model, feed, pick, allowed, *others):
        asked.append([state_of(allowed)] * len(pick))
        return step(model, feed, pick, allowed, *others)

    lm.step = asking
    return generate(lm, "p", **options), asked


def test_engine_asks_in_the_state_of_the_grammar():
    """Of a whole answer, pass after pass; and never for a block where there may be none."""
    ids = [[X, X], Block([Branch([Y, Y], [Z]), Branch([Y], [])]), [X]]
    titles = [[TITLE_START], [TITLE], [TITLE], [AFTER_TITLE], [TITLE_START], [TITLE], [AFTER_TITLE]]
    # Prefixes; z and the second branch's end; the first's end.
    block = [[BRANCH, BRANCH], [BRANCH, BRANCH], [BRANCH]]
    answer, asked = states_asked(told(ids))
    assert answer.segments == ids
    assert asked == [[SERIAL], [SERIAL], [SERIAL], *titles, *block, [SERIAL], [SERIAL]]
    assert states_asked(told([[X]]), mode="serial")[1] == [[TEXT_ONLY]] * 2
    assert states_asked(told([[X]]), max_new_tokens=100)[1] == [[TEXT_ONLY]] * 2, "no room"
    assert states_asked(told([[X]], random_lm(positions=None)))[1] == [[TEXT_ONLY]] * 2


@pytest.mark.parametrize("wish,block", [
    (dict(title=TAGS.title_end, after=TAGS.para), [Branch([Y], [])] * 2), # the second title
    (dict(after=TAGS.para), [Branch([Y] * TITLE_CAP, [])] * 2),           # a title's end at the cap
    (dict(title=TAGS.title_end), [Branch([Y], [])] * 5),                   # <|para|> at the cap
], ids=["second title", "title cap", "branch cap"])
def test_forced_tokens(wish, block):
    """They are no cut, and the answer is one masked forward all the same."""
    wish = ENDLESS | dict(branch=TAGS.branch_end, serial=iter([TAGS.title, X, EOS])) | wish
    lm = record(puppet(random_lm(), by_state(**wish), thinks=True))
    answer = generate(lm, "p", max_new_tokens=900, max_branches=5)
    assert answer.segments == [block, [X]] and answer.finish == "stop"
    check_against_one_forward(lm, "p", answer, 1e-10)


@pytest.mark.parametrize("mode,positions", [("adaptive", "aspd"), ("branchwise", "longest")])
@pytest.mark.parametrize("end", [EOS, ALSO_ENDS])
def test_end_of_text_in_a_branch_ends_that_branch_alone(mode, positions, end):
    """Whichever id ends a text: fed there is <|/branch|>, and the answer goes on after the
    block."""
    def write(*tokens):
        return chain(tokens, repeat(TAGS.branch_end))  # the choice after the end counts for nothing

    wish = ENDLESS | dict(serial=iter([TAGS.title, X, end]), title=TAGS.title_end,
                          after=iter([TAGS.title, TAGS.title, TAGS.para]),
                          branch=(write(end), write(Z, Z, Z), write(Z, end)))
    lm = random_lm(tokenizer=TWO_ENDS, positions=positions)
    lm = record(puppet(lm, by_state(**wish), thinks=True))
    answer = generate(lm, "p", mode)
    branches = [Branch([Y], []), Branch([Y], [Z, Z, Z]), Branch([Y], [Z])]
    assert answer.segments == [branches, [X]] and answer.finish == "stop"
    check_against_one_forward(lm, "p", answer, 1e-10)


# ---- budget and quota -------------------------------------------------------

def greedy_for_more(max_new_tokens, max_branches, title=TITLE_CAP, mode="adaptive", **wish):
    """The answer of a puppet that wants as many and as long branches as it can have, with titles of
    so many tokens."""
    titles = (Y if n % title < title - 1 else TAGS.title_end for n in count())
    lm = puppet(random_lm(n_layer=1), by_state(**ENDLESS | dict(title=titles) | wish))
    return generate(lm, "p", mode, max_new_tokens=max_new_tokens, max_branches=max_branches)


def serial_tokens(answer):
    return sum(len(s) for s in answer.segments if not isinstance(s, Block))


@pytest.mark.parametrize("max_branches", [2, 5, 16])
@pytest.mark.parametrize("title", [1, TITLE_CAP])
def test_quota_is_the_same_for_all_and_the_block_fits(title, max_branches):
    """Whatever the budget: it is used up exactly, all branches get the same, at least 8 tokens
    after the title, and <|/para|> still fits."""
    blocks = 0
    prompt = TOKENIZER.prompt("p")
    for budget in [*range(140, 240), 300, 500, 900]:
        answer = greedy_for_more(budget, max_branches, title)
        row = layout(prompt, answer.segments, EOS, TAGS)
        assert len(row.token) == len(prompt) + budget and answer.finish == "length"
        for block in blocks_of(answer):
            rests = {len(rest) for _, rest in block}
            assert len(rests) == 1 and min(rests) >= MIN_BRANCH
            assert {len(title) for title, _ in block} == {title}
            blocks += 1
        over = [len(s) for s in answer.segments[1:] if not isinstance(s, Block)]
        assert not over or max(over) < 154, "with more left another block would have been opened"
    assert blocks >= 89


@pytest.mark.parametrize("n", [2, 3, 7, 11])
def test_block_opens_as_soon_as_every_branch_is_sure_of_its_tokens(n):
    """With the longest titles: one token less and the block has a branch less, or there is none."""
    least = n * (TITLE_CAP + 2) + 2 + n * (1 + TITLE_CAP + MIN_BRANCH + 1)
    exact = greedy_for_more(least, n)
    less = greedy_for_more(least - 1, n)
    assert exact.segments == [[Branch([Y] * TITLE_CAP, [Z] * MIN_BRANCH)] * n]
    assert [len(block) for block in blocks_of(less)] == [n - 1] * (n > 2)
    assert less.finish == "length", "a title that had no room is a cut"


@pytest.mark.parametrize("mode", ["adaptive", "branchwise"])
def test_quota_does_not_depend_on_siblings(mode):
    """Nor on the order of decoding. What a branch that ends early leaves is for the text behind."""
    everyone = greedy_for_more(300, 3, 4, mode)
    size = everyone.blocks[0][0]
    assert everyone.blocks == [[size] * 3] and serial_tokens(everyone) < 3
    for k in range(3):
        branches = tuple(TAGS.branch_end if i == k else Z for i in range(3))
        answer = greedy_for_more(300, 3, 4, mode, branch=branches)
        assert answer.blocks == [[4 if i == k else size for i in range(3)]]
        assert serial_tokens(answer) == serial_tokens(everyone) + size - 4
    ended = greedy_for_more(300, 3, 4, mode, branch=(Z, Z, TAGS.branch_end), text=EOS)
    assert ended.blocks == [[size, size, 4]] and serial_tokens(ended) == 0
    assert ended.finish == "length", "though the answer ended by itself, a branch was cut"


# ---- sampling ---------------------------------------------------------------

def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """sample() with the settings of generate(), as the Engine gives them to it."""
    lm = mock.Mock(device="cpu")
    lm.model.config.vocab_size = logits.size(-1)
    engine = decode.Engine(lm, "serial", 8, (temperature, top_k, top_p), 0, None)
    return sample(logits, u, *engine.sampling)


def probabilities(logits, temperature, top_k, top_p):
    """What must be drawn from: a list of logits -> of probabilities. Slow and plain."""
    best = max(logits)
    weights = [math.exp((x - best) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k or None]
    total = sum(weights[i] for i in order)
    kept = []
    reached = 0.0
    for i in order:
        if reached < top_p * total:  # the fewest that reach it
            kept.append(i)
            reached += weights[i]
    return [weights[i] / reached if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("vocab_size", [12, 150])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.35, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 4, 64, 65, 999])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_sample_draws_with_the_right_frequencies(temperature, top_k, top_p, vocab_size):
    """Over a fine grid of u each token comes as often as a plain reference says, and one that is
    filtered out or not allowed never; whether few or all tokens are looked at."""
    n = 4000
    torch.manual_seed(0)
    logits = torch.randn(vocab_size, dtype=torch.float64) * 2
    logits[3::4] = -torch.inf
    p = probabilities(logits.tolist(), temperature, top_k, top_p)
    p = torch.tensor(p, dtype=torch.float64)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = draw(logits.expand(n, -1), u, temperature, top_k, top_p).bincount(minlength=vocab_size)
    assert (drawn / n - p).abs().max() <= 1.01 / n
    assert not drawn[p == 0].any()
    ends = draw(logits.expand(2, -1), torch.tensor([2**-24, 1]), temperature, top_k, top_p)
    assert p[ends].min() > 0


def test_without_a_filter_nothing_is_sorted():
    """To sort a whole vocabulary takes as long as a pass. So numbers go along the ids in their
    order: from the first to the last that is allowed."""
    logits = torch.tensor([-torch.inf, 1.0, 2.0, 3.0, -torch.inf]).expand(3, -1)
    assert draw(logits, torch.tensor([2**-24, 0.2, 1.0])).tolist() == [1, 2, 3]
    assert draw(logits, torch.tensor([2**-24, 0.2, 1.0]), top_p=0.999).tolist() == [3, 3, 1]


def test_each_row_is_sampled_with_its_own_number():
    """What a branch draws does not depend on the others in its pass."""
    torch.manual_seed(0)
    logits = torch.randn(50, 9)
    u = torch.rand(50)
    alone = [draw(logits[i:i + 1], u[i:i + 1], 1.0, 5, 0.9) for i in range(50)]
    assert torch.equal(draw(logits, u, 1.0, 5, 0.9), torch.cat(alone))


GREEDY = [(0.0, 0, 1.0), (0, 3, 0.5), (1e-6, 0, 1.0), (1e-6, 5, 1.0), (1e-6, 0, 0.9),
          (1e-300, 0, 1.0), (1.0, 1, 1.0), (1.0, 0, 1e-9), (1.0, 0, 0.0)]


@pytest.mark.parametrize("settings", GREEDY)
def test_greedy_is_the_best_token_and_the_limit_of_a_low_temperature(settings):
    """However near to zero, and with logits as large as float32 has them."""
    torch.manual_seed(0)
    u = torch.rand(200)
    for scale in (1.0, 1e4, 1e30):
        logits = torch.randn(200, 30) * scale
        best = torch.tensor([row.index(max(row)) for row in logits.tolist()])
        is_best = torch.arange(30) == best[:, None]
        logits[~is_best & (torch.arange(30) % 7 == 0)] = -torch.inf  # not allowed
        assert torch.equal(draw(logits, u, *settings), best)


def test_limit_of_a_high_temperature_is_any_allowed_token_alike():
    """Up to the largest temperature that generate() takes."""
    logits = torch.tensor([9.0, -torch.inf, 0.0, -9.0])
    u = (torch.arange(300) + 0.5) / 300
    for temperature in (1e6,):
        drawn = draw(logits.expand(300, -1), u, temperature)
        assert drawn.bincount().tolist() == [100, 0, 100, 100]


def test_same_seed_same_answer_and_other_seeds_differ():
    lm = random_lm()
    options = dict(max_new_tokens=30)
    seeds = (0, 1, 2, 3, 0, 1, 2, 3)
    texts = [generate(lm, "p", temperature=1.0, seed=seed, **options).text for seed in seeds]
    assert texts[:4] == texts[4:] and len(set(texts)) == 4
    greedy = {generate(lm, "p", seed=seed, **options).text for seed in range(3)}
    assert len(greedy) == 1, "greedy has no seed"


@pytest.mark.parametrize("seed", [-1, 2**63 - 1, 2**63 + 5, 2**64 + 7, -10**30, 10**30])
def test_seed_may_be_any_integer(seed):
    """Whatever Python takes for one, and the same twice is the same answer."""
    lm = random_lm(n_layer=1)
    answers = [generate(lm, "p", temperature=1.0, max_new_tokens=20, seed=seed) for _ in range(2)]
    assert answers[0].segments == answers[1].segments
    assert answers[0].segments != generate(lm, "p", temperature=1.0, max_new_tokens=20).segments


def test_siblings_draw_apart():
    """Branches with the same title are sampled differently, and differently at every position."""
    lm = like(random_lm(), eos=-9.0, branch_end=-9.0)
    wish = ENDLESS | dict(title=TAGS.title_end, branch=None)
    lm = puppet(lm, by_state(**wish), thinks=True)
    block = generate(lm, "p", temperature=1.0, max_new_tokens=400, max_branches=4).segments[0]
    assert [title for title, _ in block] == [[Y]] * 4
    assert len({tuple(rest[:8]) for _, rest in block}) == 4
    assert all(len(set(rest[:8])) > 2 for _, rest in block)


@pytest.mark.parametrize("defaults", [torch.bfloat16, torch.float16, torch.float64, "meta"])
def test_torchs_defaults_as_others_set_them_change_nothing(tmp_path, defaults):
    """Every tensor that is made names its type and device."""
    lm = fond(dtype=torch.float32, seed=3)
    state = dict(config=vars(lm.model.config), model=GPT.state_dict(lm.model),
                 tokenizer=TOKENIZER.settings)
    save_checkpoint(tmp_path, **state)
    likes = dict(title=2.5, para=2.5, title_end=2.0, branch_end=0.5)

    def answer():
        loaded = like(decode.load(tmp_path), **likes)
        return generate(loaded, "two tips", temperature=0.8, top_p=0.95, seed=3, max_new_tokens=300)

    expected = answer()
    try:
        if defaults == "meta":
            torch.set_default_device(defaults)
        else:
            torch.set_default_dtype(defaults)
        found = answer()
        layout([1], found.segments, EOS, TAGS)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found.segments == expected.segments and expected.blocks


def test_modes_of_torch_that_others_have_switched_on_change_nothing():
    """Autocast; and what was made in inference mode can be used outside of it."""
    def answer(lm):
        found = generate(lm, "two tips", temperature=0.8, seed=3, max_new_tokens=300)
        return found.segments

    expected = answer(fond(dtype=torch.float32, seed=3))
    lm = fond(dtype=torch.float32, seed=3)
    with torch.inference_mode():
        assert answer(lm) == expected
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert answer(lm) == expected


def test_a_second_thread_is_refused_while_a_model_decodes():
    """Both would write into one cache. When the first is done, or has failed, the second may."""
    lm = random_lm(n_layer=1)

    def again(engine):
        with pytest.raises(ValueError, match="already decoding"):
            generate(lm, "q", max_new_tokens=5)

    generate(lm, "p", max_new_tokens=5, watch=again)
    with pytest.raises(KeyboardInterrupt):
        generate(lm, "p", max_new_tokens=5, watch=mock.Mock(side_effect=KeyboardInterrupt))
    assert generate(lm, "q", max_new_tokens=5).tokens


# ---- what is refused --------------------------------------------------------

REFUSED = {
    "mode": dict(mode="parallel"),
    "max-new-tokens": dict(max_new_tokens=0),
    "temperature.* not -0.1": dict(temperature=-0.1),
    "temperature.* not nan": dict(temperature=math.nan),
    "temperature.* not inf": dict(temperature=math.inf),
    "top-k": dict(top_k=-1),
    "top-p.* not -0.1": dict(top_p=-0.1),
    "top-p.* not 1.5": dict(top_p=1.5),
    "top-p.* not nan": dict(top_p=math.nan),
}


@pytest.mark.parametrize("message", REFUSED)
def test_setting_out_of_range_is_refused_by_name_before_any_pass(message):
    lm = record(random_lm(n_layer=1))
    with pytest.raises(ValueError, match=message):
        generate(lm, **dict(prompt="p") | REFUSED[message])
    assert not lm.passes


@pytest.mark.parametrize("mode", ["adaptive", "branchwise"])
def test_model_that_never_learnt_to_branch_decodes_serially_alone(mode):
    lm = random_lm(positions=None)
    assert generate(lm, "p", max_new_tokens=5).mode == "serial"
    with pytest.raises(ValueError, match=f"{mode}.*never learnt to branch"):
        generate(lm, "p", mode)


def test_prompt_that_is_too_long_is_named_in_one_line():
    """With its tokens and the context; nothing of it could steer a terminal."""
    with pytest.raises(ValueError, match="tokens.*context only 64") as error:
        generate(random_lm(block_size=64), "two\nlines \x1b[31m\r" * 20)
    assert all(character.isprintable() for character in str(error.value))


# ---- logits that are not finite ---------------------------------------------

def kinds_of_passes(passes):
    """{kind: the step of such a pass}. The prefill is step 0."""
    found = {"prefill": 0, "serial": 1}
    for step, p in enumerate(passes):
        if len(p.pick) > 1:
            found["branches" if len(p.pick) == len(p.feed) else "prefixes"] = step
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["prefill", "serial", "prefixes", "branches"])
def test_logits_that_are_not_finite_end_decoding_with_the_step(kind, value):
    """One logit is enough, of the last branch of a pass, be it of a token that nobody would
    choose."""
    lm = record(fond())
    answer = generate(lm, "two tips", temperature=1.0, max_new_tokens=400, seed=3)
    bad_step = kinds_of_passes(lm.passes)[kind]
    steps = count()
    forward = lm.model.forward

    def spoilt(*args):
        logits = forward(*args).clone()
        if next(steps) == bad_step:
            logits[-1, -1] = value
        return logits

    lm.model.forward = spoilt
    with pytest.raises(ValueError, match=rf"step {bad_step}\b.*not finite"):
        generate(lm, "two tips", temperature=1.0, max_new_tokens=400, seed=3)
    assert next(steps) == bad_step + 1, "no pass after it"
    again = generate(lm, "two tips", temperature=1.0, max_new_tokens=400, seed=3)
    assert again.segments == answer.segments, "and nothing is left of it"


# ---- the cache --------------------------------------------------------------

def caches(lm):
    attentions = [layer.self_attn for layer in lm.model.model.layers]
    return [cache for a in attentions for cache in (a.k_cache, a.v_cache)]


class CacheWatch:
    """After every pass: nothing that is in the cache was moved, copied or changed, the next slots
    are written and no others, and only the branches of a live block own slots."""

    def __init__(self, lm):
        self.lm = lm
        self.slot = 0
        self.before = []
        self.passes_in_blocks = 0

    def __call__(self, engine):
        after = caches(self.lm)
        for old, new in zip(self.before, after):
            assert new.data_ptr() == old[0]
            assert torch.equal(new[:, :, :self.slot], old[1])
        assert engine.slot > self.slot
        for kv in after:
            size = kv.abs().sum((0, 1, 3))  # of each slot
            assert (size[self.slot:engine.slot] > 0).all(), "the next slots"
            assert not size[engine.slot:].any(), "and no others"
        self.slot = engine.slot
        self.before = [(kv.data_ptr(), kv[:, :, :self.slot].clone()) for kv in after]
        owners = set(self.lm.model.owner.tolist())
        assert owners in ({0}, {0, 1, 2, 3})
        if len(owners) > 1:
            assert isinstance(engine.segments[-1], Block)
            self.passes_in_blocks += 1


def test_cache_is_written_once_and_in_place():
    """Through text, titles, a block and text again; and the next answer takes the same memory, and
    sees nothing of the last one."""
    lm = random_lm()
    watch = CacheWatch(lm)
    serial = iter([X, TAGS.title, X, TAGS.title, X, EOS])
    wish = ENDLESS | dict(serial=serial, title=TAGS.title_end)
    lm = puppet(lm, by_state(**wish), thinks=True)
    answer = generate(lm, "p", max_new_tokens=200, max_branches=3, watch=watch)
    assert len(answer.blocks) == 1
    longest = max(len(rest) for _, rest in blocks_of(answer)[0])
    assert watch.passes_in_blocks == longest + 2, "prefixes, the rest, <|/branch|>"
    places = [kv.data_ptr() for kv in caches(lm)]
    again = generate(LM(lm.model, TOKENIZER), "other", max_new_tokens=200)
    assert [kv.data_ptr() for kv in caches(lm)] == places
    assert again.segments == generate(random_lm(), "other", max_new_tokens=200).segments


def test_interrupted_answer_leaves_nothing_behind():
    """Not even in the middle of a block, whose slots are still owned."""
    lm = random_lm()
    options = dict(temperature=1.0, max_new_tokens=200)

    def interrupt(engine):
        if lm.model.owner.any():
            raise KeyboardInterrupt

    step = lm.step
    wish = ENDLESS | dict(title=TAGS.title_end)
    with pytest.raises(KeyboardInterrupt):
        generate(puppet(lm, by_state(**wish), thinks=True), "p", watch=interrupt, **options)
    lm.step = step
    for prompt in ("p", "a prompt that reaches into the slots of the block " * 4):
        expected = generate(random_lm(), prompt, **options)
        assert generate(lm, prompt, **options).segments == expected.segments


def test_memory_follows_the_answer_not_the_context():
    """A short prompt in a context of 131,072 takes a cache for itself and its budget, rounded up to
    a power of two; a longer answer then takes more, a shorter one the same."""
    lm = random_lm(n_layer=1, block_size=131072)
    rows_of_numbers = []

    def watch(engine):
        rows_of_numbers.append(len(engine.uniform))

    prompt = len(TOKENIZER.prompt("p"))
    longer = [(5, 256), (255 - prompt, 256), (256 - prompt, 512), (900, 1024), (5, 1024)]
    for budget, slots in longer:
        lm = told([[X]], LM(lm.model, TOKENIZER))
        generate(lm, "p", max_new_tokens=budget, watch=watch)
        assert {kv.size(2) for kv in caches(lm)} == {len(lm.model.owner)} == {slots}
        assert rows_of_numbers.pop() <= prompt + budget


# ---- compiling --------------------------------------------------------------

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))),
                                    reason="no C++ compiler")


def graphs():
    """How many graphs have been compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Pair:
    """An eager and a compiled LM with the same weights. The compiled one has greedily decoded an
    answer in whose block first 16, then 8, 4, 2 and 1 branches are live, with the largest cache of
    all."""

    def __init__(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        shape = dict(n_layer=1, n_embd=16, n_inner=24, head_size=64, block_size=131072)
        likes = dict(title=3.0, para=2.0, title_end=2.5, branch_end=1.0)
        self.eager = like(random_lm(**shape), **likes)
        self.compiled = record(like(random_lm(compile=True, **shape), **likes))
        from torch._inductor.utils import run_and_get_code  # which takes a while
        steps = (self.compiled.step, self.compiled.compiled_step)
        lengths = [2] * 8 + [4] * 4 + [6] * 2 + [8] + [10]
        block = Block(Branch([Y], [Z] * n) for n in lengths)
        told([[X], block, [X]], self.compiled)
        _, self.codes = run_and_get_code(generate, self.compiled, "p", max_new_tokens=900)
        self.compiled.step, self.compiled.compiled_step = steps
        self.after_greedy = graphs()

    def answers(self, prompt, mode=None, **options):
        """Both, which must be the same; the compiled one must equal one masked forward."""
        self.compiled.passes.clear()
        eager = generate(self.eager, prompt, mode, **options)
        compiled = generate(self.compiled, prompt, mode, **options)
        assert compiled.segments == eager.segments
        assert (compiled.steps, compiled.finish) == (eager.steps, eager.finish)
        check_against_one_forward(self.compiled, prompt, compiled, 1e-6)
        return compiled


@pytest.fixture(scope="module")
def pair():
    yield Pair()
    torch._dynamo.reset()


REQUESTS = [("p", 5), ("two tips", 500), ("x" * 100, 200), ("y" * 300, 400),
            ("three tips", 600), ("z" * 580, 9)]


@needs_compiler
def test_compiled_equals_eager_and_is_never_compiled_again(pair):
    """Invariant 6, in all modes, for prompts and budgets of many lengths: one graph a width of 1,
    2, 4, 8 and 16, and a cache that stays where it is, no larger than the answers need."""
    assert pair.after_greedy == 5
    places = [kv.data_ptr() for kv in caches(pair.compiled)]
    blocks = Counter()
    for prompt, budget in REQUESTS:
        for mode in MODES:
            answer = pair.answers(prompt, mode, max_new_tokens=budget)
            blocks[mode] += len(answer.blocks)
    assert graphs() == 5
    assert [kv.data_ptr() for kv in caches(pair.compiled)] == places
    assert len(pair.compiled.model.owner) == 1024
    assert min(blocks["adaptive"], blocks["branchwise"]) >= 4 and not blocks["serial"]


@needs_compiler
def test_compiled_passes_are_padded_to_a_power_of_two_in_a_slot_that_nobody_sees(pair):
    """Padding queries belong to no branch, write to the last slot, and no token sees that."""
    pair.answers("two tips", max_new_tokens=500, max_branches=3)
    last = len(pair.compiled.model.owner) - 1
    padded = 0
    for p in pair.compiled.passes:
        real = [token for token in p.feed if token[2] >= 0]
        if len(p.pick) == len(p.feed):
            assert len(p.feed) == 1 << (len(real) - 1).bit_length()
        for (_, _, branch, slot), saw in zip(p.feed, p.mask):
            assert (slot == last) == (branch < 0)
            assert branch < 0 or not saw[last:].any()
        padded += len(p.feed) > len(real)
    assert padded > 5


@needs_compiler
def test_compiled_step_writes_the_cache_in_place(pair):
    """No buffer of the compiled step is as large as a layer's keys: they are never copied."""
    shapes = re.findall(r"= empty_strided\w*\(\((.*?)\)", "\n".join(pair.codes))
    sizes = [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]
    assert len(pair.codes) >= 5 and len(sizes) > 25
    assert max(sizes) < caches(pair.compiled)[0].numel()


@needs_compiler
def test_compiled_sampling_is_eager_sampling(pair):
    """A graph for each width and each setting, and none the second time."""
    before = graphs()
    options = dict(temperature=0.9, top_k=20, top_p=0.95, max_branches=2, max_new_tokens=300)
    answer = pair.answers("two tips", **options)
    assert answer.blocks
    assert graphs() - before <= 2
    before = graphs()
    pair.answers("two more tips", seed=5, **options)
    assert graphs() == before


@needs_compiler
def test_interrupted_answer_leaves_nothing_behind_in_a_compiled_cache(pair):
    """Though compiled passes read all slots: not the owners of a block that was never ended."""
    lm = pair.compiled

    def interrupt(engine):
        if lm.passes[-1].pick[1:] and lm.model.owner.max() > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(lm, "two tips", max_new_tokens=500, watch=interrupt)
    assert lm.model.owner.max() > 1
    pair.answers("two tips", max_new_tokens=500)


@needs_compiler
def test_keys_that_are_not_finite_leave_nothing_behind_in_a_compiled_cache(pair):
    """Though compiled passes read all slots, those that are masked out too. The next answer is as
    if none had failed before."""
    lm = pair.compiled
    row = lm.model.model.embed_tokens.weight[X]
    kept = row.clone()
    row.fill_(math.nan)  # what follows from an x is not finite
    try:
        with pytest.raises(ValueError, match="step 0 are not finite"):
            generate(lm, "x" * 200, max_new_tokens=500)
    finally:
        row.copy_(kept)
    pair.answers("p", max_new_tokens=500)


@needs_compiler
def test_the_compiler_keeps_plain_products_in_attention():
    """They are there because torch's kernel is slow for few queries on a GPU; of products in its
    own order inductor would make that kernel again."""
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):  # else it may not look
        lm = random_lm(compile=True, n_layer=1, head_size=64, n_head=4, n_kv_head=2)
        decode.Engine(lm, "serial", 200, (0.0, 1, 1.0), 0, None).serial([X])
    found = torch._dynamo.utils.counters["inductor"]
    assert found["pattern_matcher_count"] and not found["fuse_attention"]
