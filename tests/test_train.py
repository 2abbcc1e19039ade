"""Training: checkpoints that survive anything, runs that resume bit for bit, processes that train
like one, and losses that count the right tokens."""
import json
import math
import os
import pickle
import re
import signal
import socket
import string
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
from aspd import IGNORE, Block, Branch, layout, check, plain
from data import collate
from helpers import (TOKENIZER, fails, random_ids, save_tiny, tiny_model, write_answers)
from model import from_checkpoint, read_checkpoint, save_checkpoint
from train import summed_loss

ROOT = Path(__file__).parent.parent
SMALL = "--n-layer 1 --n-head 1 --batch-size 3 --dtype float32 --device cpu --lr 1e-3".split()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return write_answers(tmp_path_factory.mktemp("data") / "answers.jsonl", 40)


def run_main(monkeypatch, *argv):
    """The command line, in this process, where nobody has launched several."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    train.main()


def read_but_places(folder):
    """A run's checkpoint, without where it was written and how it was started."""
    state = read_checkpoint(folder)
    for name in ("out_dir", "resume"):
        del state["args"][name]
    return state


def assert_same(a, b, where="checkpoint"):
    """Two checkpoints' values, tensors bit for bit. (torch gives AdamW's betas back as a list.)"""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}[{k!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{k}]")
    else:
        assert type(a) is type(b), where
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, where


# ---- checkpoints ------------------------------------------------------------

def dies_while_writing(state, path):
    Path(path).write_bytes(b"half of a checkpoi")
    raise OSError("no space left on device")


def dies_while_replacing(source, target):
    raise OSError("killed")


@pytest.mark.parametrize("owner,name,death", [(torch, "save", dies_while_writing),
                                              (Path, "replace", dies_while_replacing)])
def test_write_that_dies_leaves_the_old_checkpoint(tmp_path, monkeypatch, owner, name, death):
    save_checkpoint(tmp_path, step=1)
    before = (tmp_path / "ckpt.pt").read_bytes()
    with monkeypatch.context() as m:
        m.setattr(owner, name, death)
        with pytest.raises((ValueError, OSError), match="no space left on device|killed"):
            save_checkpoint(tmp_path, step=2)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert read_checkpoint(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"], "nothing is left of it"
    save_checkpoint(tmp_path, step=3)
    assert read_checkpoint(tmp_path)["step"] == 3


FULL = """
import resource, sys, torch
from aspd import BadInput
from model import save_checkpoint
save_checkpoint(sys.argv[1], step=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # a file may not grow further
try:
    save_checkpoint(sys.argv[1], step=2, model=torch.zeros(100_000))
except BadInput as e:
    print(e)
"""


def test_full_disk_is_told_in_a_line_that_names_the_file(tmp_path):
    """The old checkpoint stays whole, and nothing is left of the new one."""
    said = ended([start(tmp_path, code=["-c", FULL])])
    assert f"cannot write {tmp_path}" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    assert read_checkpoint(tmp_path)["step"] == 1


def test_two_saves_never_write_the_same_file(tmp_path, monkeypatch):
    """Process ids do not tell runs apart: in two containers that share a folder both may be 1."""
    new = []
    monkeypatch.setattr(torch, "save", lambda state, path: (new.append(path), path.touch()))
    for _ in range(2):
        save_checkpoint(tmp_path)
    assert new[0] != new[1] and {path.parent for path in new} == {tmp_path}


SAVING = """
import sys, torch
from model import save_checkpoint
for step in range(40):
    save_checkpoint(sys.argv[1], step=step, model=torch.zeros(200_000))
"""


def test_two_runs_that_save_into_one_folder_leave_it_whole_at_every_moment(tmp_path):
    save_checkpoint(tmp_path, step=0)
    both = [start(tmp_path, code=["-c", SAVING]) for _ in range(2)]
    reads = 0
    while any(process.poll() is None for process in both):
        assert read_checkpoint(tmp_path)["format"] == model.FORMAT
        reads += 1
    ended(both)
    assert reads > 5 and read_checkpoint(tmp_path)["step"] == 39
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


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
    cuts = (0, 1, 4, 100, len(whole) // 2, len(whole) - 1, len(whole) - 30)
    broken = [whole[:n] for n in cuts]
    broken += [b"hello\n" * 100, b"PK\x03\x04" + bytes(500), b"\x80\x02."]
    broken.append(pickle.dumps({"step": 1}))
    for content in broken:
        path.write_bytes(content)
        for read in (read_checkpoint, decode.load):
            with pytest.raises(ValueError, match=str(path)) as e:
                read(tmp_path)
            assert "\n" not in str(e.value)


def test_checkpoint_with_code_is_refused_and_runs_nothing(tmp_path):
    path, trap = tmp_path / "ckpt.pt", tmp_path / "trap"
    bomb = {"format": model.FORMAT, "model": RunsCode(trap)}
    for write in (lambda: torch.save(bomb, path),
                  lambda: torch.save(bomb, path, _use_new_zipfile_serialization=False),
                  lambda: path.write_bytes(pickle.dumps(bomb))):
        write()
        with pytest.raises(ValueError, match=str(path)):
            read_checkpoint(tmp_path)
        assert not trap.exists()


UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def test_foreign_checkpoint_is_refused_by_name(tmp_path):
    """Another format, shape, vocabulary or set of fields."""
    weights = tiny_model().state_dict()
    config = vars(tiny_model().config)
    without_up = {name: w for name, w in weights.items() if name != UP}
    for changes, named in [
        (dict(format="aspd-0"), model.FORMAT),
        (dict(model=without_up), UP),
        (dict(model=weights | {EMBEDDING: torch.ones(5, 16)}), rf"{EMBEDDING}.*5, 16.*263, 16"),
        (dict(model=weights | {"model.norm.weight": "text"}), "model.norm.weight"),
        (dict(config=config | {"vocab_size": 100}), rf"{EMBEDDING}.*263, 16.*100, 16"),
        (dict(config=config | {"n_expert": 4}), "n_expert"),
    ]:
        state = dict(format=model.FORMAT, step=3, args={}, config=config, model=weights,
                     optimizer={}, tokenizer=TOKENIZER.settings)
        torch.save(state | changes, tmp_path / "ckpt.pt")
        with pytest.raises(ValueError, match=named):
            decode.load(tmp_path)
    torch.save([1, 2], tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=model.FORMAT):
        read_checkpoint(tmp_path)


def test_checkpoint_gives_the_model_and_the_tokenizer_back(tmp_path):
    for changes in (dict(), dict(tied=False), dict(qkv_bias=True, positions="longest")):
        before = tiny_model(**changes)
        after = from_checkpoint(read_checkpoint(save_tiny(tmp_path, before)))
        assert after.config == before.config
        assert_same(dict(after.state_dict()), dict(before.state_dict()))
    assert decode.load(save_tiny(tmp_path)).tokenizer.settings == TOKENIZER.settings


# ---- runs -------------------------------------------------------------------

def at_step(monkeypatch, number, happens):
    """Calls happens() when train_step() is called for the number-th time."""
    real = train.train_step
    calls = []

    def train_step(*args):
        calls.append(1)
        if len(calls) == number:
            happens()
        return real(*args)

    monkeypatch.setattr(train, "train_step", train_step)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["aspd", "serial"])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, capsys, answers,
                                                             mode):
    """Interrupted in step 5 of 6, --resume goes on from step 4 to the same weights and optimizer
    state, through the same answers; also where these stand under another path now."""
    options = [*SMALL, "--data", answers, "--mode", mode, "--steps", 6, "--accumulate", 2,
               "--save-every", 2]
    run_main(monkeypatch, *options, "--out-dir", tmp_path / "whole")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        at_step(m, 5, interrupt)
        run_main(m, *options, "--out-dir", tmp_path / "parts")
    whole = read_but_places(tmp_path / "whole")
    half = read_checkpoint(tmp_path / "parts")
    assert half["step"] == 4 and not torch.equal(half["model"][UP], whole["model"][UP])

    run_main(monkeypatch, "--resume", "--out-dir", tmp_path / "parts")  # with its settings
    assert_same(read_but_places(tmp_path / "parts"), whole)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(answers.read_bytes())
    capsys.readouterr()
    run_main(monkeypatch, "--resume", "--out-dir", tmp_path / "parts", "--data", moved)
    assert "step" not in capsys.readouterr().out.split("\n", 1)[1], "nothing is left to do"


def test_resume_refuses_other_settings_and_other_data_by_name(tmp_path, monkeypatch):
    data = write_answers(tmp_path / "answers.jsonl", 12)
    run_main(monkeypatch, *SMALL, "--data", data, "--steps", 1, "--out-dir", tmp_path)
    for option in (["--seed", 7], ["--mode=serial"], ["--batch-size", 3], ["--no-branch-mask"]):
        name = str(option[0]).split("=")[0]
        with pytest.raises(ValueError, match=f"--resume.*{name}"):
            run_main(monkeypatch, "--resume", "--out-dir", tmp_path, *option)
    data.write_text(data.read_text().replace("alpha", "omega"))
    with pytest.raises(ValueError, match="--resume: the answers are not"):
        run_main(monkeypatch, "--resume", "--out-dir", tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, answers, bad):
    """The message says what to change; the last checkpoint stays as it was."""
    at_step(monkeypatch, 4, lambda: monkeypatch.setattr(
        train, "summed_loss", lambda *args: summed_loss(*args) * bad))
    with pytest.raises(ValueError, match=r"loss (nan|inf).*lower --lr"):
        run_main(monkeypatch, *SMALL, "--data", answers, "--steps", 6, "--save-every", 2,
                 "--out-dir", tmp_path)
    state = read_checkpoint(tmp_path)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["model"].values())


@pytest.mark.parametrize("prompts", ["a", "ab", "aaaaa", string.ascii_letters[:30]])
def test_a_handful_of_answers_trains(tmp_path, monkeypatch, capsys, prompts):
    """One is held out where there are two prompts, none where there is one."""
    lines = [{"prompt": p, "response": f"It is {n} of them."} for n, p in enumerate(prompts)]
    data = tmp_path / "few.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    run_main(monkeypatch, *SMALL, "--data", data, "--out-dir", tmp_path)
    held_out = len(set(prompts)) > 1
    said = capsys.readouterr().out
    assert said.startswith(f"{len(prompts) - held_out} answers of ") and ", 0 too long" in said
    assert ("over 1 answers" in said) == held_out
    assert read_checkpoint(tmp_path)["step"] == math.ceil((len(prompts) - held_out) / 3)


def test_an_ordinary_model_learns_to_branch(tmp_path, monkeypatch, answers):
    """The paper's own path: a serial model, fine-tuned on tagged answers, decodes with
    tags; and its run is resumed without the model that it started from."""
    run_main(monkeypatch, *SMALL, "--data", answers, "--mode", "serial", "--steps", 2,
             "--out-dir", tmp_path / "base")
    assert decode.load(tmp_path / "base").model.config.positions is None
    options = ["--data", answers, "--init-from", tmp_path / "base", "--dtype", "float32",
               "--device", "cpu", "--steps", 3, "--save-every", 1, "--out-dir", tmp_path / "tuned"]
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        at_step(m, 2, interrupt)
        run_main(m, *options)
    (tmp_path / "base" / "ckpt.pt").unlink()
    run_main(monkeypatch, "--resume", "--out-dir", tmp_path / "tuned")
    assert read_checkpoint(tmp_path / "tuned")["step"] == 3
    lm = decode.load(tmp_path / "tuned")
    assert decode.generate(lm, "What is in set 1?", max_new_tokens=9).mode == "adaptive"


# ---- processes --------------------------------------------------------------

def start(*argv, code=(), **env):
    """train.py, or code, as a process of its own. It can be interrupted, even if these tests run in
    the background of a shell, where SIGINT is ignored."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, *(code or [ROOT / "train.py"]), *map(str, argv)],
                            env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def start_two(*argv, code=()):
    """Two processes, as torchrun starts them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [start(*argv, code=code, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", TORCHELASTIC_RUN_ID="tests",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for rank in range(2)]


def ended(processes):
    """Waits -> stdout of the first. All must end cleanly."""
    try:
        said = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (_, err) in zip(processes, said):
        assert p.returncode == 0 and "Traceback" not in err, err
    assert not any(out for out, _ in said[1:]), "one speaks"
    return said[0][0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_run_with_code_130_and_a_whole_checkpoint(tmp_path, answers, number):
    process = start(*SMALL, "--data", answers, "--steps", 10**6, "--save-every", 1,
                    "--out-dir", tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ckpt.pt").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err, err
    assert read_checkpoint(tmp_path)["step"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("env", [dict(RANK="1", WORLD_SIZE="4"), dict(WORLD_SIZE=""),
                                 dict(LOCAL_RANK="1", RANK="1", WORLD_SIZE="1")],
                         ids=str)
def test_variables_of_a_launcher_without_torchrun_are_not_taken_for_it(tmp_path, answers, env):
    """As schedulers leave them: the run is of one process, and saves."""
    process = start(*SMALL, "--data", answers, "--steps", 1, "--out-dir", tmp_path, **env)
    assert "step 1 of 1" in ended([process])
    assert read_checkpoint(tmp_path)["step"] == 1


UNCLIPPED = """
import torch, data, train
clip = torch.nn.utils.clip_grad_norm_
torch.nn.utils.clip_grad_norm_ = lambda parameters, _: clip(parameters, 1e9)
data.cli(train.main)"""


def test_a_process_without_a_gpu_of_its_own_says_which(tmp_path, monkeypatch, answers):
    """Process 3 of several on a machine with one GPU; before any work, and with nothing written."""
    def one_gpu(device):
        check(device in ("cuda", "cuda:0"), f"device {device!r}: invalid device ordinal")

    monkeypatch.setattr(train, "check_device", one_gpu)
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ValueError, match="device 'cuda:3': invalid"):
        run_main(monkeypatch, "--data", answers, "--out-dir", tmp_path / "out", "--device", "cuda",
                 "--accumulate", 2)
    assert not (tmp_path / "out").exists()


def test_two_processes_train_like_one(tmp_path, monkeypatch, capsys, answers):
    """Four batches a step, two in each process: the same losses and, but for rounding, weights and
    moments; two go on from what one has written. Gradients are not clipped, which would hide it if
    they were twice as large."""
    options = [*SMALL, "--data", answers, "--steps", 12, "--accumulate", 4, "--save-every", 7]
    unclipped = ["-c", UNCLIPPED]
    both = start_two(*options, "--out-dir", tmp_path / "two", code=unclipped)
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda weights, _: clip(weights, 1e9))
    run_main(monkeypatch, *options, "--out-dir", tmp_path / "one")
    said = [capsys.readouterr().out, ended(both)]
    found = [re.findall(r"loss (\d+\.\d+)", text) for text in said]
    losses = [[float(loss) for loss in text] for text in found]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=2e-4)
    one = read_but_places(tmp_path / "one")
    two = read_but_places(tmp_path / "two")
    assert_same({**one["config"], **one["args"]}, {**two["config"], **two["args"]})
    compare_states(one, two)
    assert decode.generate(decode.load(tmp_path / "two"), "What is in set 1?").tokens

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        at_step(m, 10, interrupt)
        run_main(m, *options, "--out-dir", tmp_path / "parts")
    assert read_checkpoint(tmp_path / "parts")["step"] == 7
    ended(start_two("--resume", "--out-dir", tmp_path / "parts", "--device", "cpu", code=unclipped))
    compare_states(one, read_checkpoint(tmp_path / "parts"))


def compare_states(one, two):
    """Weights, and the optimizer's moments, to rounding."""
    assert one["step"] == two["step"]
    assert one["model"].keys() == two["model"].keys()
    for name, weight in one["model"].items():
        assert (weight - two["model"][name]).abs().mean() < 1e-5, name
        for key, moment in one["optimizer"]["state"][name].items():
            assert torch.allclose(moment, two["optimizer"]["state"][name][key], atol=1e-4), name


# ---- losses -----------------------------------------------------------------

def settings(batch_size=4):
    return Namespace(device="cpu", dtype="float32", batch_size=batch_size)


def some_rows():
    rows = []
    for seed in range(9):
        ids = random_ids(seed, blocks=seed % 3, branches=2 + seed % 4, long=15)
        rows.append(layout([1, 2, 3], ids, TOKENIZER.eos, TOKENIZER.tags))
    return rows


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_accumulated_batches_give_the_gradient_of_all_answers_at_once(batch_size):
    """The mean over all targets of the step, however they are split; the gradient is clipped."""
    rows = some_rows()
    net = tiny_model(block_size=4096)
    idx, position, mask, target = collate(rows)
    logits = net(idx, position, mask)
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE)
    expected.backward()
    assert torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0) > 1
    wanted = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    groups = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    loss = train.train_step(net, groups, optimizer, settings())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for p, old, grad in zip(net.parameters(), before, wanted):
        assert torch.allclose(old - p, grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_autocast_in_bfloat16_is_near_float32(n_kv_head):
    """Loss and gradients, in rows longer than a step of decoding, with keys that heads share."""
    nets = [tiny_model(block_size=4096, n_kv_head=n_kv_head) for _ in range(2)]
    losses = []
    for net, dtype in zip(nets, ("float32", "bfloat16")):
        loss = summed_loss(net, some_rows()[:4], Namespace(device="cpu", dtype=dtype))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for exact, near in zip(*[net.parameters() for net in nets]):
        assert (exact.grad - near.grad).norm() < 0.03 * exact.grad.norm()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_update_that_is_not_finite_is_not_made(monkeypatch, what):
    net = tiny_model()
    before = {name: w.clone() for name, w in net.state_dict().items()}
    if what == "loss":
        monkeypatch.setattr(train, "summed_loss", lambda *args: summed_loss(*args) * math.inf)
    else:
        net.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="inf|nan"):
        train.train_step(net, [some_rows()[:2]], optimizer, settings())
    assert_same(dict(net.state_dict()), before)


def test_learning_rate_warms_up_and_then_falls_to_zero():
    args = Namespace(lr=1.0, steps=100)
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert 0 < rates[0] < 0.2 and rates[5] == 1.0 and rates[-1] < 1e-3
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize("supported,dtype", [(True, "bfloat16"), (False, "float32")])
def test_autocast_is_chosen_where_the_cpu_is_fast_in_it(monkeypatch, supported, dtype):
    """A CPU without bfloat16 products once took hours for the minutes of `python train.py`; one
    with AVX-512 but without its bfloat16 instructions takes twice as long as in float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert model.fast_dtype("cpu") == dtype and model.fast_dtype("cuda:1") == "bfloat16"


def test_held_out_loss_counts_the_plain_tokens_that_the_model_chooses():
    """Each once, a title where it is first written; no tags, no end-of-text. So a model that gives
    every token a fixed probability has the same loss on tagged rows as on their serial twins."""
    ids = [random_ids(seed, blocks=seed % 3, branches=3, long=9) for seed in range(6)]
    logits = torch.randn(TOKENIZER.vocab_size, generator=torch.Generator().manual_seed(0))

    def net(idx, position, mask, pick):
        return logits.expand(len(pick), -1)

    tokens = [t for answer in ids for t in plain(answer)]
    expected = -logits.log_softmax(-1)[tokens].mean().item()
    for answers in (ids, [[plain(answer)] for answer in ids]):
        rows = [layout([1, 2], answer, 256, TOKENIZER.tags) for answer in answers]
        found = train.held_out_loss(net, rows, TOKENIZER, settings())
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [[], ["--no-branch-mask"]])
def test_training_sees_the_branch_mask_unless_told_otherwise(
        tmp_path, monkeypatch, answers, options):
    """With the mask a branch's loss does not depend on its sibling's text; without it, it does.
    Held-out answers always have it."""
    rows = []
    for other in ([5, 6, 7, 8], [9, 9, 9, 9]):
        block = Block([Branch([66], other), Branch([65], [1, 2, 3, 4])])
        row = layout([1], [block], TOKENIZER.eos, TOKENIZER.tags)
        rows.append(row._replace(target=row.target.masked_fill(row.branch != 2, IGNORE)))
    taken = {}  # {function: the rows it gets}

    def take(name):
        def function(model, rows, *_):
            taken[name] = rows
            return 0.0
        monkeypatch.setattr(train, name, function)

    monkeypatch.setattr(train, "make_rows", lambda *_: rows)
    take("train_step")
    take("held_out_loss")
    run_main(monkeypatch, *SMALL, "--data", answers, "--batch-size", 2, "--steps", 1,
             "--out-dir", tmp_path, *options)
    net = tiny_model()
    [taken["train_step"]] = taken["train_step"]  # of the one batch
    for name, [a, b] in taken.items():
        a, b = (summed_loss(net, [row], settings()).item() for row in (a, b))
        assert (abs(a - b) > 1e-5) == (name == "train_step" and bool(options))


# ---- bad input --------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with good and bad files for the table's {names}."""
    folder = tmp_path_factory.mktemp("files")
    write_answers(folder / "good.jsonl", 40)
    (folder / "broken.jsonl").write_text('{"prompt": "p", "response": "r"}\n{"prompt": \n')
    (folder / "empty.jsonl").write_text("")
    (folder / "other-names.jsonl").write_text('{"question": "q", "reply": "r"}\n')
    save_tiny(folder / "cut-off")
    whole = (folder / "cut-off" / "ckpt.pt").read_bytes()
    (folder / "cut-off" / "ckpt.pt").write_bytes(whole[:-200])
    (folder / "foreign").mkdir()
    torch.save({"weights": 1}, folder / "foreign" / "ckpt.pt")
    (folder / "published").mkdir()
    (folder / "published" / "config.json").write_text("{}")
    return folder


BAD = [
    ("--data {files}/missing.jsonl", "missing.jsonl"),
    ("--data {files}", "files"),
    ("--data {files}/empty.jsonl", "empty.jsonl"),
    ("--data {files}/broken.jsonl", "broken.jsonl, record 2"),
    ("--data {files}/other-names.jsonl", "question, reply"),
    ("--data {files}/good.jsonl --block-size 8", "none of 39 answers.* 8 tokens"),
    ("--positions sideways", "sideways"),
    ("--mode parallel", "parallel"),
    ("--device cuda:99", "cuda:99"),
    ("--device abacus", "abacus"),
    ("--dtype float8", "float8"),
    ("--steps 0", "--steps.*0"),
    ("--steps -5", "--steps.*-5"),
    ("--steps many", "many"),
    ("--batch-size 0", "--batch-size.*0"),
    ("--accumulate 0", "--accumulate.*0"),
    ("--block-size 0", "--block-size.*0"),
    ("--save-every 0", "--save-every.*0"),
    ("--n-layer 0", "--n-layer.*0"),
    ("--lr 0", "--lr.*0"),
    ("--lr -1", "--lr.*-1"),
    ("--lr nan", "--lr.*nan"),
    ("--seed x", "seed.*x"),
    ("--init-from {files}/nowhere", "nowhere"),
    ("--init-from {files}/published", "published.ckpt.pt"),
    ("--init-from {files}/cut-off", "cut-off"),
    ("--out-dir {files}/good.jsonl/out --data {files}/good.jsonl", "good.jsonl"),
    ("--out-dir {files}/good.jsonl --data {files}/good.jsonl", "good.jsonl"),
    ("--resume --out-dir {files}/nowhere", "nowhere"),
    ("--resume --out-dir {files}/cut-off", "cut-off"),
    ("--resume --out-dir {files}/foreign", "foreign"),
]


@pytest.mark.parametrize("line,named", BAD, ids=[line.replace("{files}/", "") for line, _ in BAD])
def test_bad_command_line_is_refused_in_one_line(files, tmp_path, monkeypatch, capsys, line, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "corpus", lambda n=0, split="train": [])
    monkeypatch.chdir(tmp_path)
    before = sorted(files.rglob("*"))
    small = ["--device", "cpu"] * ("--device" not in line)
    small += ["--n-head", "1"] * ("--resume" not in line)
    message = fails(train, [*line.format(files=files).split(), *small], monkeypatch, capsys)
    assert re.search(named, message), message
    assert not list(tmp_path.iterdir()) and sorted(files.rglob("*")) == before, "nothing is written"


def test_batches_that_cannot_be_shared_out_are_refused(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    with pytest.raises(ValueError, match="--accumulate .* the 2 processes"):
        run_main(monkeypatch, "--accumulate", 3, "--device", "cpu")


@pytest.mark.parametrize("seed", [0, -1, 2**70])
def test_any_seed_trains(tmp_path, monkeypatch, answers, seed):
    options = [*SMALL, "--data", answers, "--steps", 1, "--seed", seed]
    run_main(monkeypatch, *options, "--out-dir", tmp_path)
    run_main(monkeypatch, "--resume", "--out-dir", tmp_path)
