"""On a CUDA GPU: decoding there is decoding on the CPU, which other tests hold against training;
compiled equals eager; a training step computes the same. All is skipped where there is no GPU."""
from argparse import Namespace
from copy import deepcopy

import bench
import pytest
import torch

import train
from aspd import Block, Branch, layout
from decode import MODES, generate
from helpers import TOKENIZER, random_ids, tiny_model
from test_engine import caches, fond, graphs, like, random_lm, told

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture(scope="module")
def args():
    return bench.parse_args(["--shape", "tiny", "--device", "cuda"])


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_the_cpu(mode, temperature):
    """Token for token, in float64, with blocks of many shapes."""
    blocks = 0
    for seed in range(4):
        answers = []
        for device in ("cpu", "cuda"):
            lm = fond(seed=seed, device=device)
            answers.append(generate(lm, "two tips", mode, temperature=temperature, seed=seed))
        cpu, cuda = answers
        assert (cuda.segments, cuda.steps, cuda.finish) == (cpu.segments, cpu.steps, cpu.finish)
        blocks += len(cpu.blocks)
    assert blocks or mode == "serial"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.float32, 1e-4),
                                              (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("compile", (False, True))
def test_logits_are_those_of_the_cpu(args, compile, dtype, tolerance):
    """Of every choice of a given answer, through the kernels that each type has."""
    torch._dynamo.reset()
    ids = random_ids(0, branches=6, long=20)
    record = {"ids": ids, "prompt": "two tips", "budget": 4000}
    logits = {"cpu": [], "cuda": []}
    shape = dict(head_size=64, block_size=4096)
    on_cpu = random_lm(dtype=torch.float64, **shape)
    on_cuda = random_lm(dtype=dtype, device="cuda", compile=compile, **shape)  # rounded weights
    bench.replay(on_cpu, record, "adaptive", args, keep=logits["cpu"])
    bench.replay(on_cuda, record, "adaptive", args, keep=logits["cuda"])
    cpu, cuda = map(torch.cat, logits.values())
    assert (cuda - cpu).abs().max() <= tolerance * cpu.abs().max()


def test_compiled_equals_eager_and_is_never_compiled_again():
    """Greedy and sampled, for prompts and budgets of many lengths: one graph a width of 1, 2, 4, 8
    and 16, in a cache that stays where it is; so with the other kind of sampling."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shape = dict(head_size=64, block_size=4096, device="cuda")
    likes = dict(title=3.0, para=2.0, title_end=2.5, branch_end=1.0)
    eager = like(random_lm(**shape), **likes)
    compiled = like(random_lm(compile=True, **shape), **likes)
    lengths = [2] * 8 + [4] * 4 + [6] * 2 + [8] + [10]
    block = Block(Branch(list(b"y"), list(b"z") * n) for n in lengths)
    for n, options in enumerate((dict(), dict(temperature=0.9, top_k=20, top_p=0.95)), start=1):
        steps = compiled.step, compiled.compiled_step
        told([list(b"x"), block, list(b"x")], compiled)
        generate(compiled, "p", max_new_tokens=900, **options)
        compiled.step, compiled.compiled_step = steps
        assert graphs() == 5 * n
        places = [kv.data_ptr() for kv in caches(compiled)]
        blocks = 0
        for prompt, budget in [("p", 5), ("two tips", 500), ("x" * 100, 200), ("y" * 300, 400)]:
            for mode in MODES:
                a, b = (generate(lm, prompt, mode, max_new_tokens=budget, seed=budget, **options)
                        for lm in (eager, compiled))
                assert a.segments == b.segments
                blocks += len(a.blocks)
        assert blocks > 4
        assert graphs() == 5 * n
        assert [kv.data_ptr() for kv in caches(compiled)] == places


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.03)])
def test_training_computes_the_same(dtype, tolerance):
    """Loss and gradient of tagged rows under the branch mask, beside those of a CPU in float32."""
    rows = [layout([1, 2], random_ids(seed, long=20), TOKENIZER.eos, TOKENIZER.tags)
            for seed in range(4)]
    net = tiny_model(n_layer=2, n_head=4, n_embd=32, n_inner=48, head_size=64, block_size=4096)
    losses, gradients = [], []
    for device, kind in (("cpu", "float32"), ("cuda", dtype)):
        here = deepcopy(net).to(device)
        loss = train.summed_loss(here, rows, Namespace(device=device, dtype=kind))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in here.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert difference <= 10 * tolerance
