"""The model by itself: attention, positions, the cache. (Published folders: test_convert.)"""
import pytest
import torch
from torch.nn import functional as F

from aspd import cache_mask
from model import GPT, GPTConfig, Linear, attend, fast_dtype, pack, rope, rotate

PROMPT = [3, 17, 5, 29, 11]
SHAPES = [dict(), dict(n_kv_head=4), dict(n_kv_head=1, qkv_bias=True, tied=False)]


def tiny(**config):
    torch.manual_seed(0)
    settings = dict(block_size=64, vocab_size=40, n_layer=2, n_head=4, n_kv_head=2, n_embd=16,
                    n_inner=24, head_size=4)
    return GPT(GPTConfig(**settings | config)).double().requires_grad_(False)


def forward(model, ids):
    """Logits of a whole causal row, (T, V), without a cache."""
    return model(torch.tensor([ids]), torch.arange(len(ids))[None], causal(len(ids)))[0]


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


def some_ids(n):
    return [(7 * i + i * i) % 40 for i in range(n)]


# ---- attention and positions ------------------------------------------------

@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("T,S", [(1, 9), (5, 9), (6, 6), (20, 24)])
def test_attend_is_softmax_of_the_scores_over_the_visible_keys(n_kv_head, T, S):
    """Head after head, written out; every query head reads its group's keys; one mask, or one for
    each row of the batch; for as few tokens as a step has, and for more."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, T, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, n_kv_head, S, 8, dtype=torch.float64)
    sees = torch.rand(2, 1, T, S) < 0.5
    sees[..., 0] = True
    expected = torch.empty_like(q)
    for b in range(2):
        for head in range(4):
            group = head * n_kv_head // 4
            scores = q[b, head] @ k[b, group].t() / 8 ** 0.5
            scores[~sees[b, 0]] = -torch.inf
            expected[b, head] = scores.softmax(-1) @ v[b, group]
    mask = torch.zeros(2, 1, T, S, dtype=torch.float64).masked_fill(~sees, -torch.inf)
    mask = torch.cat([mask] * (4 // n_kv_head), dim=-2)
    assert torch.allclose(attend(q, k, v, mask), expected, rtol=1e-12, atol=1e-12)
    one = attend(q[:1], k[:1], v[:1], mask[0, 0])
    assert torch.allclose(one, expected[:1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_rows_of_a_batch_do_not_mix(config):
    """With a mask for each row of the batch."""
    model = tiny(**config)
    rows = [some_ids(9), some_ids(18)[9:]]
    position = torch.arange(9).expand(2, 9)
    far = causal(9)
    far[5:, 2:4] = False
    masks = torch.stack([causal(9), far])[:, None]
    together = model(torch.tensor(rows), position, masks)
    apart = model(torch.tensor(rows[1:]), position[:1], far[None, None])
    assert torch.allclose(together[0], forward(model, rows[0]), rtol=1e-12, atol=1e-12)
    assert torch.allclose(together[1], apart[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(together[1], forward(model, rows[1]), rtol=1e-3), "the mask counts"


def test_rotated_scores_depend_on_the_distance_alone():
    """Position 0 turns nothing, lengths stay, and siblings, which share positions, turn alike."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def turned(x, at):
        return rotate(x, *rope(torch.tensor([[at]]), 8, 10000.0))

    scores = [(turned(q, at + 3) * turned(k, at)).sum() for at in (0, 1, 40, 900)]
    assert torch.allclose(torch.stack(scores), scores[0], rtol=1e-4)
    others = [(turned(q, 3 + distance) * turned(k, 3)).sum() for distance in (0, 1, 2, 4, 50)]
    assert all(abs(score - scores[0]) > 1e-3 for score in others)
    assert torch.equal(turned(q, 0), q)
    assert torch.allclose(turned(q, 77).norm(), q.norm(), rtol=1e-6)


def test_rope_is_the_formula_of_the_paper():
    """Pair i of a head turns by position * theta ** (-2i / head_size); its two numbers stand half a
    head apart, as in published Llama weights."""
    x = torch.arange(1.0, 9.0, dtype=torch.float64)
    found = rotate(x.view(1, 1, 1, 8), *rope(torch.tensor([[5]]), 8, 100.0))[0, 0, 0]
    for i in range(4):
        pair = torch.complex(x[i], x[i + 4])
        angle = torch.tensor(5 * 100.0 ** (-2 * i / 8), dtype=torch.float64)
        turned = pair * torch.polar(torch.ones_like(angle), angle)
        assert torch.allclose(found[[i, i + 4]], torch.stack([turned.real, turned.imag]), rtol=1e-5)


# ---- the cache --------------------------------------------------------------

@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_cached_forward_equals_uncached(config):
    """A prompt at once, then a few tokens a pass, then one, gives the logits of the whole row in
    float64; over a cache that holds another answer, read in part or whole."""
    model = tiny(**config)
    model.setup_cache(32)
    ids = some_ids(24)
    whole = forward(model, ids)
    for other, seen in ((True, 32), (False, 32), (False, None)):
        for begin, end in [(0, 9), (9, 12)] + [(i, i + 1) for i in range(12, 24)]:
            slot = torch.arange(begin, end)
            mask = cache_mask(slot, torch.zeros_like(slot), model.owner[:seen or end])
            fed = torch.tensor([ids[begin:end]])
            if other:
                fed = 39 - fed
            logits = model(fed, slot[None], mask, slot)[0]
            assert other or (logits - whole[begin:end]).abs().max() <= 1e-10 * whole.abs().max()


def test_cache_only_grows_and_has_the_models_type():
    """What is large enough is kept, in place; a larger one is new and empty; nothing of it is in a
    checkpoint."""
    model = tiny().bfloat16()
    names = list(model.state_dict())
    model.setup_cache(16)
    attention = model.model.layers[1].self_attn
    cache = attention.v_cache
    assert cache.shape == (1, 2, 16, 4)
    assert cache.dtype == torch.bfloat16 and len(model.owner) == 16
    model.owner.fill_(3)  # of an answer that was interrupted in the middle of a block
    model.setup_cache(9)
    assert attention.v_cache is cache and len(model.owner) == 16
    assert not model.owner.any(), "no slot is a branch's"
    cache.fill_(1)
    model.setup_cache(17)
    assert attention.k_cache.shape == attention.v_cache.shape == (1, 2, 17, 4)
    assert not attention.v_cache.any() and len(model.owner) == 17
    assert list(model.state_dict()) == names


# ---- weights ----------------------------------------------------------------

@pytest.mark.parametrize("dtype,error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2),
                                         (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows,bias", [(128, False), (128, True), (130, True), (8192, True)])
def test_a_packed_layer_is_the_same_product(dtype, error, rows, bias):
    """From one token to more than a decoding pass has, in one or two leading dimensions; and it can
    still be trained, with the weights that it then has."""
    torch.manual_seed(0)
    layer = Linear(96, rows, bias=bias).to(dtype).requires_grad_(False)
    pack(layer)
    fast = (torch.float32, getattr(torch, fast_dtype("cpu")))
    assert hasattr(layer.weight, "packed") == (dtype in fast)
    for n in (1, 2, 3, 16, 17):
        x = torch.randn(n, 96, dtype=dtype)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        y = layer(x)
        assert y.dtype == dtype and y.shape == (n, rows)
        assert torch.allclose(y.double(), exact, atol=error, rtol=error)
        assert torch.equal(layer(x[None]), y[None])
    layer.requires_grad_(True)
    with torch.no_grad():
        layer.weight.zero_()
    assert layer(x).requires_grad and not (layer(x) - (layer.bias if bias else 0)).any()


def test_parameters_are_those_of_the_published_shape():
    """A tied head counts once; biases are those of queries, keys and values alone."""
    V, C, I, n_layer = 40, 16, 24, 2

    def size(**changes):
        return sum(p.numel() for p in tiny(**changes).parameters())

    per_layer = 2 * C + C * (4 + 2 * 2) * 4 + C * C + 3 * C * I
    assert size(tied=True) == V * C + n_layer * per_layer + C
    assert size(tied=False) == 2 * V * C + n_layer * per_layer + C
    assert size(qkv_bias=True) - size() == n_layer * (4 + 2 * 2) * 4
    assert size(n_kv_head=4) - size() == n_layer * C * 2 * 2 * 4


def test_pick_gives_the_logits_of_those_tokens_alone():
    """By their flat indices in the batch, in the order of asking."""
    model = tiny()
    idx = torch.tensor([PROMPT, PROMPT[::-1]])
    position = torch.arange(5).expand(2, 5)
    pick = torch.tensor([8, 1, 4])
    picked = model(idx, position, causal(5), pick=pick)
    assert picked.shape == (3, 40)
    assert torch.allclose(picked, model(idx, position, causal(5)).flatten(0, 1)[pick], rtol=1e-12)
