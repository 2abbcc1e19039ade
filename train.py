"""Trains a GPT on tagged answers under the branch mask (section 3.2), from scratch or fine-tuning.

    python train.py                                        # the built-in corpus, minutes on a CPU
    python train.py --mode serial --out-dir base           # its serial twin: the same, untagged
    python train.py --init-from base --out-dir tuned       # an ordinary model learns to branch
    torchrun --nproc_per_node=8 train.py ...               # 8 devices share a step's 8 batches

What is special about ASPD is in layout() and collate(); this is an ordinary training loop. Under
torchrun every process keeps a part of the weights and computes a part of a step's batches; one
process with --accumulate 8 takes the same steps as the last command.
"""
import argparse
import itertools
import math
import os
import shlex
import sys
import tempfile
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
from data import (Tokenizer, batches, cli, collate, corpus, learn_tokenizer, make_rows,
                  read_records, split_held_out)
from model import (GPT, GPTConfig, check_device, fast_dtype, from_checkpoint, read_checkpoint,
                   save_checkpoint)

LAUNCHED = dist.is_torchelastic_launched()  # by torchrun, which numbers and counts the processes
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # not one process's part
BESIDE_RESUME = {"--resume", "--out-dir", "--device", "--data"}  # all other options are the run's


# ---- settings ---------------------------------------------------------------

def parse_args():
    """-> args, and the checkpoint to start from: of --resume, of --init-from, or None. BadInput for
    a setting that is out of range, or given beside --resume."""
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                allow_abbrev=False)
    add = p.add_argument
    add("--data", metavar="FILE", help="answers; none: the built-in corpus")
    add("--init-from", metavar="DIR", help="a folder with a ckpt.pt; none: from scratch")
    add("--mode", choices=("aspd", "serial"), default="aspd", help="tagged, or untagged")
    add("--out-dir", default="out", metavar="DIR", help="where ckpt.pt goes")
    add("--positions", choices=POSITIONS, default="aspd", help="how text goes on after a block")
    add("--no-branch-mask", action="store_true", help="ablation: branches see each other")
    add("--n-layer", type=int, default=2, help="from scratch: layers")
    add("--n-head", type=int, default=4, help="from scratch: attention heads of 64 channels")
    add("--block-size", type=int, default=1024, help="longer answers are left out")
    add("--steps", type=int, help="updates; none: one epoch")
    add("--batch-size", type=int, default=4, help="answers in memory at once")
    add("--accumulate", type=int, default=WORLD, help="batches a step")
    add("--lr", type=float, help="highest learning rate; none: 7e-4 from scratch, else 1e-4")
    add("--seed", type=int, default=1337, help="of weights and order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--dtype", choices=("float32", "bfloat16"), help="none: bfloat16 where it is fast")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on with the run in out-dir and its settings")
    args = p.parse_args()
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "seed":
            check(value > 0, f"--{name.replace('_', '-')} must be over 0, not {value}")

    start = None
    if args.resume:
        given = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")}
        check(given <= BESIDE_RESUME, f"not to be given with --resume: {given - BESIDE_RESUME}")
        start = read_checkpoint(args.out_dir)
        check(start.get("args"), f"--resume: {args.out_dir} holds no run of train.py")
        p.set_defaults(**start["args"] | {"out_dir": args.out_dir})
        args = p.parse_args()
    elif args.init_from is not None:
        start = read_checkpoint(args.init_from)
    if WORLD > 1 and args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"  # a GPU for each process
    check_device(args.device)
    args.dtype = args.dtype or fast_dtype(args.device)
    args.lr = args.lr or (1e-4 if args.init_from else 7e-4)
    check(args.accumulate % WORLD == 0, f"--accumulate must be a multiple of the {WORLD} processes")
    return args, start


# ---- data and model ---------------------------------------------------------

def prepare(args, start):
    """-> model, tokenizer, rows to train on, held-out rows; fills args.steps and args.checksum in.
    BadInput when no answer fits."""
    # 1) answers
    if args.data is not None:
        answers, others = split_held_out(read_records(args.data))
    else:
        answers = corpus()
        others = corpus(200, split="val")
    checksum = zlib.crc32(repr(answers).encode())
    check(not args.resume or args.checksum == checksum, "--resume: the answers are not the run's")
    args.checksum = checksum  # so it will stand in the checkpoint

    # 2) the model, split over the processes
    torch.manual_seed(args.seed % 2**63)  # torch takes no larger ones
    model, tokenizer = make_model(args, start, answers)
    if WORLD > 1:
        mesh = dist.init_device_mesh(torch.device(args.device).type, (WORLD,))
        for part in [*model.model.layers, model]:  # what is inside first
            fully_shard(part, mesh=mesh)
    model.to(args.device)  # only now: each process then holds its part of the float32 weights

    # 3) rows; --block-size only leaves out answers: a model to fine-tune keeps its own context
    config = replace(model.config, block_size=min(args.block_size, model.config.block_size))
    rows = make_rows(answers, tokenizer, config)
    held_out = make_rows(others, tokenizer, config)
    if args.no_branch_mask:  # all in branch 0 of their block, so that they see each other
        rows = [row._replace(branch=row.branch * 0) for row in rows]
    check(rows, f"none of {len(answers)} answers to train on fits {config.block_size} tokens")
    args.steps = args.steps or math.ceil(len(rows) / (args.batch_size * args.accumulate))
    n_tokens = sum(len(row.token) for row in rows)
    print(f"{len(rows)} answers of {n_tokens} tokens, {len(answers) - len(rows)} too long; "
          f"{args.steps} steps")
    return model, tokenizer, rows, held_out


def make_model(args, start, answers):
    """-> model, tokenizer: of the checkpoint `start` or from scratch."""
    if start:
        model = from_checkpoint(start).float()
        tokenizer = Tokenizer(**start["tokenizer"])
    else:
        tokenizer = learn_tokenizer(r[name] for r in answers for name in ("prompt", "response"))
        model = GPT(GPTConfig(
            block_size=args.block_size, vocab_size=math.ceil(tokenizer.vocab_size / 64) * 64,
            n_layer=args.n_layer, n_head=args.n_head, n_kv_head=args.n_head,
            n_embd=64 * args.n_head, n_inner=176 * args.n_head))  # about 8/3 of n_embd, as in Llama
    model.config.positions = args.positions if args.mode == "aspd" else None
    return model, tokenizer


# ---- one step ---------------------------------------------------------------

def learning_rate(step, args):
    """A linear warm-up over 5% of the steps, then a cosine to zero."""
    warmup = 0.05 * args.steps
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (args.steps - warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def summed_loss(model, rows, args):
    """The loss of a batch, summed over its targets: under the rows' mask, in autocast."""
    idx, position, mask, target = collate(rows, args.device)  # (B, T); mask (B, 1, T, T)
    target = target.flatten()
    pick = (target != IGNORE).nonzero()[:, 0]                 # (N,): logits only where they count
    with torch.autocast(idx.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        logits = model(idx, position, mask, pick=pick)        # (N, V)
    return F.cross_entropy(logits.float(), target[pick], reduction="sum")


def train_step(model, step_batches, optimizer, args):
    """One update -> the mean loss over the targets of all batches; process r computes batches r,
    r + WORLD, ... BadInput where it is not finite: the weights then stay as they are."""
    targets = sum(int((row.target != IGNORE).sum()) for rows in step_batches for row in rows)
    total = torch.zeros((), dtype=torch.float32, device=args.device)
    for rows in step_batches[RANK::WORLD]:
        loss = summed_loss(model, rows, args) / targets
        (loss * WORLD).backward()  # fully_shard takes the mean over the processes
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if WORLD > 1:
        norm = norm.full_tensor()  # of all processes' parts
        dist.all_reduce(total)
    check((total + norm).isfinite(), f"loss {total:.4f}, its gradient {norm:.4f}: lower --lr")
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


@torch.no_grad()
def held_out_loss(model, rows, tokenizer, args):
    """Mean loss over the plain tokens that a model chooses: no tags, no end-of-text, and a title
    once, for its repetition is forced. Under the branch mask, which decoding always has."""
    not_text = torch.tensor([tokenizer.eos, *tokenizer.tags], device="cpu")
    total = 0.0
    n = 0
    for row in rows:
        target = row.target.masked_fill(torch.isin(row.target, not_text), IGNORE)
        total += summed_loss(model, [row._replace(target=target)], args).item()
        n += int((target != IGNORE).sum())
    return total / n


# ---- the loop ---------------------------------------------------------------

def save(model, optimizer, tokenizer, step, args):
    """Writes a checkpoint of the whole model. Every process must call this."""
    weights, moments = dcp.get_state_dict(model, optimizer, options=WHOLE)
    if RANK == 0:
        save_checkpoint(args.out_dir, step=step, args=vars(args), config=vars(model.config),
                        tokenizer=tokenizer.settings, model=weights, optimizer=moments)


def train(args, start):
    """The training loop. args, start: of parse_args()."""
    # 1) model and optimizer
    model, tokenizer, rows, held_out = prepare(args, start)
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out_dir).close()  # fails now, not after minutes of training
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99),
                                  weight_decay=0.1, fused=True)
    first = start["step"] if args.resume else 0
    if args.resume:
        dcp.set_optimizer_state_dict(model, optimizer, start["optimizer"], options=WHOLE)

    # 2) the order of the answers; what a resumed run has had is skipped
    upcoming = batches(rows, args.batch_size, args.seed)
    upcoming = itertools.islice(upcoming, first * args.accumulate, None)

    # 3) the loop
    tokens = 0
    began = time.perf_counter()
    for step in range(first, args.steps):
        lr = learning_rate(step, args)
        optimizer.param_groups[0]["lr"] = lr
        step_batches = list(itertools.islice(upcoming, args.accumulate))
        loss = train_step(model, step_batches, optimizer, args)
        tokens += sum(len(row.token) for batch in step_batches for row in batch)
        done = step + 1
        if done % 10 == 0 or done == args.steps:
            print(f"step {done} of {args.steps}: loss {loss:.4f}, lr {lr:.1e}, "
                  f"{tokens / (time.perf_counter() - began):.0f} tokens/s", flush=True)
        if done % args.save_every == 0 or done == args.steps:
            save(model, optimizer, tokenizer, done, args)

    # 4) evaluation
    if held_out:
        loss = held_out_loss(model, held_out, tokenizer, args)
        print(f"held-out loss {loss:.4f} a plain token, over {len(held_out)} answers")
    print(f"Next: python decode.py --ckpt {shlex.quote(args.out_dir)} --prompt TEXT")


def main():
    """The command line, in every process."""
    args, start = parse_args()
    if WORLD > 1:
        if args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # only process 0 prints
        dist.init_process_group()
    train(args, start)
    if WORLD > 1:
        dist.barrier()  # nobody leaves while another still waits for its messages
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # at once: gloo's threads live on, and abort when Python ends around them


if __name__ == "__main__":
    cli(main)
