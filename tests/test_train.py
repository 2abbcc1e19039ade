"""Training: checkpoints that survive anything, runs that resume bit for bit, and losses that count the right tokens."""
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import decode
import model
import train
from aspd import layout, plain
from data import Tokenizer, collate
from helpers import TOKENIZER, random_ids, save_tiny, tiny_model, write_answers
from model import from_checkpoint, read_checkpoint, save_checkpoint
from train import summed_loss

ROOT = Path(__file__).parent.parent
SMALL = "--n-layer 1 --n-head 1 --batch-size 3 --dtype float32 --device cpu --micro-tokens 600 --lr 1e-3".split()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return write_answers(tmp_path_factory.mktemp("data") / "answers.jsonl")


def run_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    train.main()


def assert_same(a, b, where="checkpoint"):
    """Two checkpoints' values, tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}[{k!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{k}]")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, where


# -----------------------------------------------------------------------------
# checkpoints

def dies_while_writing(state, path):
    Path(path).write_bytes(b"half of a checkpoi")
    raise OSError("no space left on device")


def dies_while_replacing(source, target):
    raise OSError("killed")


@pytest.mark.parametrize("owner,name,death", [(torch, "save", dies_while_writing), (Path, "replace", dies_while_replacing)])
def test_write_that_dies_leaves_the_old_checkpoint(tmp_path, monkeypatch, owner, name, death):
    save_checkpoint(tmp_path, step=1)
    before = (tmp_path / "ckpt.pt").read_bytes()
    with monkeypatch.context() as m:
        m.setattr(owner, name, death)
        with pytest.raises(OSError):
            save_checkpoint(tmp_path, step=2)
    assert (tmp_path / "ckpt.pt").read_bytes() == before and read_checkpoint(tmp_path)["step"] == 1
    save_checkpoint(tmp_path, step=3)
    assert read_checkpoint(tmp_path)["step"] == 3, "what the dead write left behind is no obstacle"


class RunsCode:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_broken_checkpoint_is_refused_with_its_path(tmp_path):
    """Missing, cut off anywhere, or not a checkpoint at all."""
    path = tmp_path / "ckpt.pt"
    with pytest.raises(ValueError, match=f"{path}.*python train.py"):
        read_checkpoint(tmp_path)
    save_tiny(tmp_path)
    whole = path.read_bytes()
    cuts = [whole[:n] for n in (0, 1, 4, 100, len(whole) // 2, len(whole) - 1, len(whole) - 30)]
    for content in [*cuts, b"hello\n" * 100, b"PK\x03\x04" + bytes(500), pickle.dumps({"step": 1}), b"\x80\x02."]:
        path.write_bytes(content)
        for read in (read_checkpoint, decode.load):
            with pytest.raises(ValueError, match=str(path)) as e:
                read(tmp_path)
            assert "\n" not in str(e.value)


def test_checkpoint_with_code_is_refused_and_runs_nothing(tmp_path):
    path, trap = tmp_path / "ckpt.pt", tmp_path / "trap"
    bomb = {"format": model.FORMAT, "model": RunsCode(trap)}
    for write in (lambda: torch.save(bomb, path), lambda: torch.save(bomb, path, _use_new_zipfile_serialization=False),
                  lambda: path.write_bytes(pickle.dumps(bomb))):
        write()
        with pytest.raises(ValueError, match=str(path)):
            read_checkpoint(tmp_path)
        assert not trap.exists()


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


def test_foreign_checkpoint_is_refused_by_name(tmp_path):
    """Another format, shape, vocabulary or set of fields."""
    weights, config = tiny_model().state_dict(), vars(tiny_model().config)
    larger = Tokenizer(**{**TOKENIZER.settings, "special": (*range(300, 306), 256)})
    for changes, named in [
        (dict(format="aspd-0"), model.FORMAT),
        (dict(model=without(weights, "h.0.mlp.c_fc.weight")), "h.0.mlp.c_fc.weight"),
        (dict(model={**weights, "wte.weight": torch.ones(5, 16)}), r"wte.weight.*263, 16.*5, 16"),
        (dict(model={**weights, "ln_f.weight": "text"}), "ln_f.weight"),
        (dict(config={**config, "vocab_size": 100}), r"wte.weight.*100, 16"),
        (dict(config={**config, "n_expert": 4}), "n_expert"),
        (dict(tokenizer=larger.settings), "306.*263"),
    ]:
        state = dict(step=3, args={}, config=config, model=weights, optimizer={}, tokenizer=TOKENIZER.settings)
        path = tmp_path / "ckpt.pt"
        torch.save({"format": model.FORMAT, **state, **changes}, path)
        with pytest.raises(ValueError, match=named):
            decode.load(tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=model.FORMAT):
        read_checkpoint(tmp_path)


def test_checkpoint_gives_the_model_and_the_tokenizer_back(tmp_path):
    for changes in (dict(), dict(tied=False), dict(qkv_bias=True, positions="stride", stride=64)):
        before = tiny_model(**changes)
        after = from_checkpoint(read_checkpoint(save_tiny(tmp_path, before)))
        assert after.config == before.config
        assert_same(dict(after.state_dict()), dict(before.state_dict()))
    assert decode.load(save_tiny(tmp_path)).tokenizer.settings == TOKENIZER.settings


# -----------------------------------------------------------------------------
# runs

def interrupt_at(monkeypatch, step):
    """Ctrl-C during the given step."""
    real, calls = train.train_step, []

    def train_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", train_step)


@pytest.mark.parametrize("mode", ["aspd", "serial"])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path, monkeypatch, capsys, answers, mode):
    """Ctrl-C during step 3 of 6 saves and says so; --resume goes on to the same weights and optimizer state."""
    options = [*SMALL, "--data", answers, "--mode", mode, "--steps", 6]
    run_main(monkeypatch, *options, "--out-dir", tmp_path / "whole")
    assert "stopped" not in capsys.readouterr().out
    with monkeypatch.context() as m:
        interrupt_at(m, 3)
        run_main(m, *options, "--out-dir", tmp_path / "parts")
    said = capsys.readouterr().out
    assert re.search(r"stopped by Ctrl-C.*step 3 of 6.*saved to", said), said
    whole, half = (read_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert half["step"] == 3 and not torch.equal(half["model"]["wte.weight"], whole["model"]["wte.weight"])
    run_main(monkeypatch, "--resume", "--data", answers, "--out-dir", tmp_path / "parts")
    for name in ("step", "config", "model", "optimizer", "tokenizer"):
        assert_same(read_checkpoint(tmp_path / "parts")[name], whole[name], name)
    capsys.readouterr()
    run_main(monkeypatch, "--resume", "--data", answers, "--out-dir", tmp_path / "parts")  # nothing is left to do
    said = capsys.readouterr().out
    assert f"done after step 6 of 6, loss {whole['loss']:.3f}" in said, said


def test_resume_refuses_other_settings_by_name(tmp_path, monkeypatch, answers):
    """Also where the other setting is the default, which the first run did not have."""
    run_main(monkeypatch, *SMALL, "--data", answers, "--steps", 1, "--mode", "serial", "--out-dir", tmp_path)
    for option, value, named in [("--seed", 7, "seed is 1337.*7"), ("--mode", "aspd", "mode is 'serial'.*'aspd'"),
                                 ("--batch-size", 9, "batch_size is 3.*9"), ("--batch-size", 4, "batch_size is 3.*4")]:
        with pytest.raises(ValueError, match=f"--resume.*{named}"):
            run_main(monkeypatch, "--resume", "--out-dir", tmp_path, option, value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, answers, bad):
    """The message names the step, the learning rate and the folder, whose last checkpoint stays as it was."""
    real, calls = train.train_step, []

    def train_step(*args, **kwargs):
        calls.append(1)
        with monkeypatch.context() as m:
            if len(calls) == 4:
                m.setattr(train, "summed_loss", lambda *a: summed_loss(*a) * bad)
            return real(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises(ValueError, match=rf"loss is (nan|inf).*step 3.*learning rate \d.\d+e-0\d.*{tmp_path}"):
        run_main(monkeypatch, *SMALL, "--data", answers, "--steps", 6, "--save-every", 2, "--out-dir", tmp_path)
    state = read_checkpoint(tmp_path)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["model"].values())


def start(*argv, **env):
    """train.py as a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, argv)], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def test_ctrl_c_saves_and_says_so(tmp_path, answers):
    """A real SIGINT to a real process in a long run."""
    process = start(*SMALL, "--data", answers, "--steps", 10**6, "--save-every", 1, "--out-dir", tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ckpt.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    said = re.search(r"stopped by Ctrl-C.*step (\d+) of 1000000", out)
    assert said and read_checkpoint(tmp_path)["step"] == int(said[1]) and "Traceback" not in err


def test_two_processes_train_like_one(tmp_path, monkeypatch, capsys, answers):
    """Three answers a step, two in one process and one in the other: the same losses and, but for rounding, weights."""
    options = [*SMALL, "--data", answers, "--steps", 3, "--out-dir"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    both = [start(*options, tmp_path / "two", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=str(port)) for rank in range(2)]
    run_main(monkeypatch, *options, tmp_path / "one")
    (out, err), _ = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], err
    losses = [[float(x) for x in re.findall(r"loss (\d+\.\d+)", text)] for text in (capsys.readouterr().out, out)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=2e-3)
    one, two = (read_checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    assert all((one[k] - two[k]).abs().mean() < 1e-5 for k in one)


# -----------------------------------------------------------------------------
# losses

def settings(micro_tokens=600, no_branch_mask=False):
    return Namespace(device="cpu", dtype="float32", micro_tokens=micro_tokens, no_branch_mask=no_branch_mask)


def some_rows():
    ids = [random_ids(seed, blocks=seed % 3, branches=2 + seed % 4, long=15) for seed in range(9)]
    return [layout([1, 2, 3], answer, TOKENIZER.special) for answer in ids]


@pytest.mark.parametrize("micro_tokens", [1, 700, 10**9])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_tokens):
    """The mean over all targets of the batch, however it is split."""
    rows, net = some_rows(), tiny_model(block_size=4096)
    idx, position, mask, pick, target = collate(rows)
    expected = F.cross_entropy(net(idx, position, mask, pick=pick), target)
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    assert norm.isfinite()
    wanted = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    value = train.train_step(net, rows, optimizer, settings(micro_tokens))
    assert value == pytest.approx(expected.item(), rel=1e-5)
    for p, old, grad in zip(net.parameters(), before, wanted):
        assert torch.allclose(old - p, grad, rtol=1e-3, atol=1e-6)


def test_update_that_is_not_finite_is_not_made(monkeypatch):
    net = tiny_model()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    monkeypatch.setattr(train, "summed_loss", lambda *args: summed_loss(*args) * math.inf)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    assert not math.isfinite(train.train_step(net, some_rows()[:2], optimizer, settings()))
    assert_same(dict(net.state_dict()), before)


def test_rows_of_new_tokens_go_further_and_the_others_as_far():
    """One step from the same weights and gradients, with and without new tokens."""
    moved = []
    for new in ([], [5, 7]):
        torch.manual_seed(0)
        net = tiny_model(tied=False)
        optimizer, before = train.make_optimizer(net, 1e-3, new), [p.detach().clone() for p in net.parameters()]
        for _ in range(2):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        moved.append({name: (p - b).detach() for (name, p), b in zip(net.named_parameters(), before)})
    for name, usual in moved[0].items():
        rate = torch.ones(len(usual))
        if name in ("wte.weight", "lm_head.weight"):
            rate[[5, 7]] = 10
        expected = usual * rate.view(-1, *[1] * (usual.dim() - 1))
        assert torch.allclose(moved[1][name], expected, rtol=1e-2), name  # weight decay follows the weights


@pytest.mark.parametrize("capability,dtype", [("AVX512", "bfloat16"), ("AVX2", "float32"), ("DEFAULT", "float32")])
def test_autocast_is_chosen_where_the_cpu_is_fast_in_it(monkeypatch, capability, dtype):
    """A CPU without bfloat16 products once took hours for the minutes of `python train.py`."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert model.fast_dtype("cpu") == dtype and model.fast_dtype("cuda:1") == "bfloat16"


def test_held_out_loss_counts_the_plain_tokens_that_the_model_chooses():
    """
    Each once, a title where it is first written; no tags, no end-of-text. So a model that gives every token a fixed
    probability has the same held-out loss on tagged rows as on their serial twins.
    """
    special, ids = TOKENIZER.special, [random_ids(seed, blocks=seed % 3, branches=3, long=9) for seed in range(6)]
    logits = torch.randn(TOKENIZER.vocab_size, generator=torch.Generator().manual_seed(0))
    net = lambda *_, pick, target: F.cross_entropy(logits.expand(len(pick), -1), target, reduction="sum")
    tokens = [t for answer in ids for t in plain(answer)]
    expected = -logits.log_softmax(-1)[tokens].mean().item()
    for form in (lambda answer: answer, lambda answer: [plain(answer)]):
        rows = [layout([1, 2], form(answer), special) for answer in ids]
        for micro_tokens in (1, 10**9):
            value = train.held_out_loss(net, rows, list(special), settings(micro_tokens))
            assert value == pytest.approx(expected, rel=1e-5)


def test_training_sees_the_branch_mask_unless_told_otherwise():
    """With the mask a branch's loss does not depend on its siblings' text; without it, it does."""
    special, net = TOKENIZER.special, tiny_model()
    blocks = [[([65], [1, 2, 3, 4]), ([66], other)] for other in ([5, 6, 7, 8], [9, 9, 9, 9])]
    rows = [layout([1], [[block[0], block[1]][::-1]], special) for block in blocks]  # the fixed branch stands second
    only = [r._replace(target=r.target * (r.branch == 2) + -100 * (r.branch != 2)) for r in rows]
    for use_mask in (True, False):
        a, b = (summed_loss(net, [r], settings(no_branch_mask=not use_mask)).item() for r in only)
        assert (abs(a - b) < 1e-5) == use_mask
