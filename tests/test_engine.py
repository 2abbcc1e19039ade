"""
The invariants of decoding: cached parallel decoding equals one full masked forward pass, adaptive equals branchwise,
every token is fed exactly once. Random weights decode into well-formed rows of every shape, thanks to the grammar.
"""
from collections import Counter

import numpy as np
import pytest
import torch

import decode
from aspd import IGNORE, branch_mask, is_block, layout, plain, stats, tokenize
from data import PATTERN, Tokenizer
from decode import LM, generate
from model import GPT, GPTConfig

TOKENIZER = Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, eos=256).add_tags()


def random_lm(dtype=torch.float64, seed=0, compile=False, **config):
    """A tiny untrained model over bytes."""
    torch.manual_seed(seed)
    settings = dict(block_size=1024, vocab_size=TOKENIZER.vocab_size + 5, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                    n_inner=48, head_size=8) | config
    return LM(GPT(GPTConfig(**settings)).to(dtype), TOKENIZER, compile)


def like_tags(lm, **bonus):
    """Makes the model fond of some tags: adds a bonus to their logits, so that random weights write blocks."""
    ids = torch.tensor([TOKENIZER.eos if name == "eos" else getattr(TOKENIZER.special, name) for name in bonus])
    forward, values = lm.model.forward, torch.tensor(list(bonus.values()))

    def fond_forward(*args, **kwargs):
        y = forward(*args, **kwargs)
        return y.index_add(-1, ids, values.to(y.dtype).expand(*y.shape[:-1], -1))

    lm.model.forward = fond_forward
    return lm


def record(lm):
    """Keeps what every pass was fed and its logits, in lm.passes."""
    lm.passes, step = [], lm.step

    def recorder(model, cache, allow, uniform, feed, seen, lanes, sampling):
        chosen, logits = step(model, cache, allow, uniform, feed, seen, lanes, sampling)
        mask = cache.mask(feed[2], feed[3], seen)
        lm.passes.append((feed.numpy().copy(), mask.numpy().copy(), logits.clone()))
        return chosen, logits

    lm.step = recorder
    return lm


def fed_tokens(lm):
    """Every token fed: {slot: (token, position, branch, {slots it saw}, logits or None)}, padding left out."""
    out = {}
    for feed, mask, logits in lm.passes:
        for w in range(feed.shape[1]):
            token, position, slot, branch = feed[:4, w]
            if branch >= 0:
                picked = [k for k in range(len(logits)) if feed[4, k] == w]
                assert slot not in out, "a slot is written once"
                out[slot] = (token, position, branch, set(np.flatnonzero(mask[w])), logits[picked[-1]] if picked else None)
    return out


def check_against_one_forward(lm, prompt, answer, tolerance):
    """Invariants 1 and 3 for a decoded answer."""
    ids = lm.tokenizer.prompt(prompt)
    config = lm.model.config
    row = layout(ids, answer.segments, lm.tokenizer.special, config.positions, config.stride)
    fed = fed_tokens(lm)
    assert sorted(fed) == list(range(len(row.token))), "each row token is fed exactly once, in the next slot"
    # match slots to row indices: the streams (prompt and serial, or one branch of one block) keep their order
    streams, block_of_slot, block, was_serial = {}, {}, 0, True
    for slot in sorted(fed):
        branch = fed[slot][2]
        block += bool(branch) and was_serial
        was_serial = not branch
        streams.setdefault((block if branch else 0, branch), []).append(slot)
    index = {}
    for (b, br), slots in streams.items():
        where = np.flatnonzero((row.block == b) & (row.branch == br))
        assert len(where) == len(slots)
        index.update(zip(slots, where))
    mask = branch_mask(torch.tensor(row.block), torch.tensor(row.branch))
    full = lm.model(torch.tensor(row.token)[None], torch.tensor(row.position)[None], mask[None, None])[0]
    for slot, (token, position, branch, seen, logits) in fed.items():
        i = index[slot]
        assert (token, position, branch) == (row.token[i], row.position[i], row.branch[i])
        assert {index[s] for s in seen} == set(np.flatnonzero(mask[i].numpy())), "visibility equals the layout's"
        if logits is not None:
            assert (logits - full[i]).abs().max() <= tolerance * full[i].abs().max()
    assert stats(answer.segments).steps == answer.steps, "data.py's step count is the engine's"
    assert answer.tokens == len(plain(answer.segments))
    return row


CASES = [(scheme, dtype, tol) for scheme in ("aspd", "longest", "stride")
         for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-3))]


@pytest.mark.parametrize("scheme,dtype,tolerance", CASES)
def test_cached_parallel_decoding_equals_one_masked_forward(scheme, dtype, tolerance):
    shapes = Counter()
    for seed in range(8):
        lm = record(like_tags(random_lm(dtype, seed, positions=scheme, stride=96), title=1.5, title_end=1.5, branch_end=0.5, eos=-1.0))
        lm.passes = []
        answer = generate(lm, "two tips", temperature=1.0, seed=seed, max_new_tokens=700)
        check_against_one_forward(lm, "two tips", answer, tolerance)
        shapes["blocks"] = max(shapes["blocks"], len(answer.blocks))
        shapes["branches"] = max([shapes["branches"]] + [len(b) for b in answer.blocks])
        shapes["uneven"] |= any(max(b) > 3 * min(b) for b in answer.blocks)

    assert shapes["blocks"] >= 2 and shapes["branches"] >= 3 and (shapes["uneven"] or scheme == "stride")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_adaptive_equals_branchwise(temperature):
    for seed in range(8):
        answers = [generate(like_tags(random_lm(seed=seed), title=1.5, title_end=1.5, branch_end=0.5), "two tips", mode=mode,
                            temperature=temperature, seed=seed, max_new_tokens=500) for mode in ("adaptive", "branchwise")]
        assert answers[0].segments == answers[1].segments
        assert answers[0].finish == answers[1].finish
