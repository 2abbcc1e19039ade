"""Trains a GPT on tagged answers under the branch mask (section 3.2), from scratch or fine-tuning.

    python train.py                                        # the built-in corpus, minutes on a CPU
    python train.py --mode serial --out-dir out-serial     # its serial twin: the same, untagged
    python train.py --data answers.jsonl --init-from DIR   # fine-tune a Llama or Qwen2 model
    torchrun --nproc_per_node=8 train.py ...               # 8 devices share a step's 8 batches

What is special about ASPD is in layout() and collate(); this is an ordinary training loop. Under
torchrun every process keeps a part of the weights and computes a part of a step's batches; one
process with --accumulate 8 takes the same steps as the last command.
"""
import argparse
import itertools
import math
import os
import signal
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from aspd import IGNORE, POSITIONS, check
from data import (Tokenizer, batches, cli, collate, corpus, make_rows, make_tokenizer,
                  read_records, split_held_out)
from model import (GPT, GPTConfig, check_device, fast_dtype, from_checkpoint, from_published,
                   read_checkpoint, save_checkpoint)

# Tag i of TAG_NAMES starts as the mean of the tokens of TAG_WORDS[i]: phrases that answers hardly
# ever have, for a tag starts about as likely as its words.
TAG_WORDS = [tag + end for tag in (" headline", " parallel", " branch") for end in ("", " closed")]
RANK = int(os.environ.get("RANK", 0))         # torchrun starts processes 0, 1, ...
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and says how many
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # not one process's part
MAY_CHANGE = {"out_dir", "device", "compile", "resume", "save_every"}  # with --resume


# ---- settings ---------------------------------------------------------------

def parse_args():
    """-> args, and the state to go on from: a checkpoint's, or that of a new run. ValueError naming
    a setting that is out of range, or not that of the run to resume."""
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--data", metavar="FILE", help="answers; none: the built-in corpus")
    add("--init-from", metavar="DIR", help="a Llama or Qwen2 folder; none: from scratch")
    add("--mode", choices=("aspd", "serial"), default="aspd", help="tagged, or untagged")
    add("--out-dir", default="out", help="where ckpt.pt goes")
    add("--positions", choices=POSITIONS, default="aspd", help="how text goes on after a block")
    add("--no-branch-mask", action="store_true", help="ablation: branches see each other")
    add("--tokenizer", default="bpe", help="from scratch: bpe (learnt here) or of a folder")
    add("--n-layer", type=int, default=3, help="from scratch: layers")
    add("--n-head", type=int, default=4, help="from scratch: attention heads of 64 channels")
    add("--block-size", type=int, default=1024, help="longer answers are left out")
    add("--steps", type=int, help="updates; none: two epochs")
    add("--batch-size", type=int, default=4, help="answers in memory at once")
    add("--accumulate", type=int, default=WORLD, help="batches a step")
    add("--lr", type=float, help="highest learning rate; none: 1e-3 from scratch, else 1e-4")
    add("--seed", type=int, default=1337, help="of weights and order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--dtype", choices=("float32", "bfloat16"), help="none: bfloat16 where it is fast")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in out-dir")
    args = p.parse_args()
    state = read_checkpoint(args.out_dir) if args.resume else {"args": {}, "step": 0}
    p.set_defaults(**state["args"])  # again: what is not given stays, except MAY_CHANGE
    args = p.parse_args()
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "seed":
            check(value > 0, f"--{name.replace('_', '-')} must be over 0, not {value}")
    check(args.accumulate % WORLD == 0, f"--accumulate must be a multiple of the {WORLD} processes")
    check_device(args.device)
    args.dtype = args.dtype or fast_dtype(args.device)
    args.lr = args.lr or (1e-4 if args.init_from else 1e-3)
    args.checksum_of_data = args.data and zlib.crc32(Path(args.data).read_bytes())  # for --resume
    for name, was in state["args"].items():
        value = getattr(args, name)
        check(value == was, f"--resume: {name} is {was!r} in {args.out_dir}, not {value!r}")
    return args, state


# ---- data and model ---------------------------------------------------------

def prepare(args, state):
    """-> model, tokenizer, rows to train on, held-out rows; fills args.steps in. ValueError when no
    answer fits."""
    # 1) answers
    if args.data:
        answers, held_out = split_held_out(read_records(args.data))
    else:
        answers = corpus()
        held_out = corpus(200, split="val")

    # 2) the model, split over the processes
    torch.manual_seed(args.seed % 2**63)  # torch takes no larger ones
    model, tokenizer = make_model(args, state, answers)
    if WORLD > 1:
        mesh = dist.init_device_mesh(torch.device(args.device).type, (WORLD,))
        for part in [*model.model.layers, model]:
            fully_shard(part, mesh=mesh)
    model.to(args.device)  # only now: the whole model need not fit on one device

    # 3) rows; a published model keeps its context, though it is not trained on all of it
    config = replace(model.config, block_size=min(args.block_size, model.config.block_size))
    rows = make_rows(answers, tokenizer, config, args.mode)
    held_out = make_rows(held_out, tokenizer, config, args.mode)
    if args.no_branch_mask:  # all in one branch, so that branches see each other
        rows = [row._replace(branch=row.branch * 0) for row in rows]
    check(rows, f"none of {len(answers)} answers to train on fits {config.block_size} tokens")
    args.steps = args.steps or math.ceil(2 * len(rows) / (args.batch_size * args.accumulate))
    n_tokens = sum(len(row.token) for row in rows)
    print(f"{len(rows)} answers of {n_tokens} tokens, {len(answers) - len(rows)} too long; "
          f"{args.steps} steps")
    return model, tokenizer, rows, held_out


def make_model(args, state, answers):
    """-> model, tokenizer: of a checkpoint, of a published folder, or from scratch."""
    if args.resume:
        return from_checkpoint(state, args.out_dir), Tokenizer(**state["tokenizer"])
    tokenizer = make_tokenizer(args.init_from or args.tokenizer, (r["response"] for r in answers))
    if args.mode == "aspd":
        tokenizer = tokenizer.add_tags()
    if args.init_from:
        model = from_published(args.init_from).float()
        if tokenizer.tags:
            words = map(tokenizer.encode, TAG_WORDS)
            model.grow(tokenizer.vocab_size, dict(zip(tokenizer.tags, words)))
    else:
        model = GPT(GPTConfig(
            block_size=args.block_size, vocab_size=tokenizer.vocab_size, n_layer=args.n_layer,
            n_head=args.n_head, n_kv_head=args.n_head, n_embd=64 * args.n_head,
            n_inner=176 * args.n_head))  # about 8/3 of n_embd, as in Llama
    model.config.positions = args.positions
    return model, tokenizer


# ---- one step ---------------------------------------------------------------

def learning_rate(step, args):
    """A linear warm-up over 5% of the steps, then a cosine to zero."""
    warmup = 0.05 * args.steps
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (args.steps - warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model, lr):
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def count_targets(rows):
    """-> how many of the rows' tokens the decoder chooses."""
    return sum(int((row.target != IGNORE).sum()) for row in rows)


def summed_loss(model, rows, args):
    """The loss of a batch, summed over its targets: under the branch mask, in autocast."""
    idx, position, mask, target = collate(rows, args.device)  # (B, T); mask (B, 1, T, T)
    pick = (target.flatten() != IGNORE).nonzero()[:, 0]       # (N,): logits only where they count
    padding = (0, -len(pick) % 128)  # few shapes, as in collate: index 0 again, without a target
    target = F.pad(target.flatten()[pick], padding, value=IGNORE)
    with torch.autocast(idx.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        logits = model(idx, position, mask, pick=F.pad(pick, padding))  # (N, V)
    return F.cross_entropy(logits.float(), target, reduction="sum")


def train_step(model, step_batches, optimizer, args):
    """One update -> the mean loss over the targets of all batches; process r computes batches r,
    r + WORLD, ... Where the loss or the gradient is not finite, the weights stay as they are."""
    targets = sum(map(count_targets, step_batches))
    total = torch.zeros((), device=args.device)
    for rows in step_batches[RANK::WORLD]:
        loss = summed_loss(model, rows, args) / targets
        (loss * WORLD).backward()  # fully_shard takes the mean over the processes
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if WORLD > 1:
        norm = norm.full_tensor()
        dist.all_reduce(total)
    loss = total.item() if norm.isfinite() else math.nan
    if math.isfinite(loss):
        optimizer.step()
    optimizer.zero_grad()
    return loss


@torch.no_grad()
def held_out_loss(model, rows, tokenizer, args):
    """Mean loss over the plain tokens that a model chooses: no tags, no end-of-text, and a title
    once, for its repetition is forced. Under the branch mask, which decoding always has."""
    not_text = torch.tensor([tokenizer.eos, *(tokenizer.tags or ())])
    text_rows = []
    for row in rows:
        target = row.target.masked_fill(torch.isin(row.target, not_text), IGNORE)
        text_rows.append(row._replace(target=target))
    total = sum(summed_loss(model, [row], args).item() for row in text_rows)
    return total / count_targets(text_rows)


# ---- the loop ---------------------------------------------------------------

def save(model, optimizer, tokenizer, step, loss, args):
    """Writes a checkpoint, whole whatever the number of processes, all of which must call this."""
    weights, moments = dcp.get_state_dict(model, optimizer, options=WHOLE)
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    if RANK == 0:
        save_checkpoint(args.out_dir, step=step, loss=loss, args=settings, model=weights,
                        config=vars(model.config), optimizer=moments, tokenizer=tokenizer.settings)


def train(args, state):
    """The training loop. args, state: of parse_args()."""
    # 1) model, optimizer, and the order of the answers, which a resumed run goes on in
    model, tokenizer, rows, held_out = prepare(args, state)
    optimizer = make_optimizer(model, args.lr)
    if args.resume:
        dcp.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
    net = torch.compile(model, dynamic=True) if args.compile else model
    step = state["step"]
    index_batches = batches([len(row.token) for row in rows], args.batch_size, args.seed)
    index_batches = itertools.islice(index_batches, step * args.accumulate, None)

    # 2) Ctrl-C and SIGTERM let the current step end, which is then saved
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *which: signals.append(which))

    # 3) the loop
    stop = False
    tokens = 0
    began = time.perf_counter()
    while step < args.steps and not stop:
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch_indices = itertools.islice(index_batches, args.accumulate)
        step_batches = [[rows[i] for i in indices] for indices in batch_indices]
        loss = train_step(net, step_batches, optimizer, args)
        check(math.isfinite(loss), f"loss is {loss} at step {step}, learning rate {lr:.1e}")
        step += 1
        tokens += sum(len(row.token) for batch in step_batches for row in batch)
        if step % 10 == 0 or step == args.steps:
            print(f"step {step} of {args.steps}: loss {loss:.4f}, lr {lr:.1e}, "
                  f"{tokens / (time.perf_counter() - began):.0f} tokens/s", flush=True)
        stop = torch.tensor(len(signals), device=args.device)
        if WORLD > 1:
            dist.all_reduce(stop)  # a signal to any process stops all, at the same step
        if stop or step == args.steps or step % args.save_every == 0:
            save(model, optimizer, tokenizer, step, loss, args)
    print(f"{'stopped by a signal' if stop else 'done'} after step {step} of {args.steps}: saved",
          flush=True)

    # 4) evaluation, which a signal may break off
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if held_out and not stop:
        loss = held_out_loss(model, held_out, tokenizer, args)
        print(f"held-out loss {loss:.4f} a plain token, over {len(held_out)} answers")
    print(f"Next: python decode.py --ckpt {args.out_dir} --prompt TEXT")


def main():
    """The command line, in every process."""
    if WORLD > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything is put on "cuda"
    args, state = parse_args()
    if WORLD > 1:
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # only process 0 prints
        dist.init_process_group()
    train(args, state)
    if WORLD > 1:
        dist.barrier()  # nobody leaves while another still waits for its messages
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # at once: gloo's threads live on, and abort when Python ends around them


if __name__ == "__main__":
    cli(main)
