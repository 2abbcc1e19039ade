"""Trains a GPT on tagged answers under the branch mask (paper section 3.2), from scratch or from a published model.

    python train.py                                        # the built-in corpus, from scratch, minutes on a CPU
    python train.py --mode serial --out-dir out-serial     # its serial twin: the same answers, untagged
    python train.py --data answers.jsonl --init-from DIR   # fine-tune a Llama or Qwen2 model on your own answers
    torchrun --nproc_per_node=8 train.py ...               # data parallel: the same batches, split among processes"""
import argparse
import itertools
import math
import os
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from aspd import IGNORE, POSITIONS, check, summary
from data import (Tokenizer, batches, cli, collate, corpus, make_rows, make_tokenizer, micro_batches,
                  published_tokenizer, read_records, split_held_out)
from model import (GPT, GPTConfig, check_device, fast_dtype, from_checkpoint, from_published, read_checkpoint,
                   save_checkpoint)

def parse_args():
    """(args, the dict of the checkpoint to go on from or None). ValueError naming a setting that cannot be."""
    p = argparse.ArgumentParser(description="Trains on tagged answers. Next: python decode.py --prompt TEXT",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--data", metavar="FILE", help="answers, as data.py reads them; none: the built-in corpus")
    add("--init-from", metavar="DIR", help="a published Llama or Qwen2 folder to start from; none: from scratch")
    add("--mode", choices=("aspd", "serial"), default="aspd", help="tagged, or the same answers untagged")
    add("--out-dir", default="out", help="where ckpt.pt goes")
    add("--positions", choices=POSITIONS, default="aspd", help="position scheme of the branches")
    add("--stride", type=int, default=256, help='tokens of a branch at most under "stride"')
    add("--no-branch-mask", action="store_true", help="ablation: let branches see each other in training")
    add("--tokenizer", default="bpe", help="from scratch: bpe (learnt from the answers), or a tiktoken name")
    add("--n-layer", type=int, default=3, help="from scratch: layers")
    add("--n-head", type=int, default=4, help="from scratch: attention heads, of 64 channels each")
    add("--block-size", type=int, default=1024, help="context in tokens; longer answers are left out")
    add("--steps", type=int, help="updates; none: 2500 for the built-in corpus, else --epochs")
    add("--epochs", type=float, default=2.0, help="passes over a file's answers")
    add("--batch-size", type=int, default=4, help="answers a step")
    add("--micro-tokens", type=int, default=4096, help="tokens in memory at once; a batch is summed up in such parts")
    add("--lr", type=float, help="highest learning rate; none: 1e-3 from scratch, 1e-4 otherwise")
    add("--seed", type=int, default=1337, help="of the weights and of the order of the answers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("float32", "bfloat16"), help="autocast; none: bfloat16 where the machine is fast in it")
    add("--compile", action="store_true", help="torch.compile the model (GPU only)")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from out-dir's checkpoint, as Ctrl-C leaves one")
    args = p.parse_args()
    check_device(args.device)
    args.dtype = args.dtype or fast_dtype(args.device)
    check(not args.compile or args.device != "cpu", "--compile: torch fails to compile this training on cpu")
    for name, value in vars(args).items():
        fits = type(value) not in (int, float) or value > 0 or (name == "seed" and value == 0)
        check(fits, f"--{name.replace('_', '-')} must be over 0, not {value}")
    if not args.resume:
        return args, None
    state, may_change = read_checkpoint(args.out_dir), ("out_dir", "device", "compile", "resume", "save_every")
    p.set_defaults(**state["args"] | {name: getattr(args, name) for name in may_change})
    for name, value in vars(args := p.parse_args()).items():
        was = p.get_default(name)
        check(value == was, f"--resume: {name} is {was!r} in {args.out_dir}, not {value!r}")
    return args, state

def prepare(args, state):
    """(model, tokenizer, rows, held-out rows): from a checkpoint's dict, a published folder or scratch."""
    train, val = split_held_out(list(read_records(args.data))) if args.data else (corpus(), corpus(200, split="val"))
    torch.manual_seed(args.seed)
    if state:
        model, tokenizer = from_checkpoint(state), Tokenizer(**state["tokenizer"])
    elif args.init_from:
        model, tokenizer = from_published(args.init_from).float(), published_tokenizer(args.init_from)
        if args.mode == "aspd":  # embedding rows for the tags
            tokenizer = tokenizer.add_tags()
            model.grow(tokenizer.vocab_size, list(tokenizer.special[:6]))
    else:
        tokenizer = make_tokenizer(args.tokenizer, (r["response"] for r in train))
        model = GPT(GPTConfig(args.block_size, tokenizer.vocab_size, args.n_layer, args.n_head, n_kv_head=args.n_head,
                              n_embd=64 * args.n_head, n_inner=176 * args.n_head))
    model.config.positions, model.config.stride = args.positions, args.stride
    (rows, total), (val_rows, _) = (make_rows(records, tokenizer, model.config, args.mode, args.block_size)
                                    for records in (train, val))
    for kept, of, what in (rows, train, "train on"), (val_rows, val, "hold out (2% of the prompts)"):
        check(kept, f"{args.data or 'corpus'}: none of the {len(of)} answers to {what} fits {args.block_size} tokens")
    args.steps = args.steps or (math.ceil(args.epochs * len(rows) / args.batch_size) if args.data else 2500)
    args.lr = args.lr or (1e-4 if args.init_from else 1e-3)
    s, size = summary(total), sum(p.numel() for p in model.parameters())
    print(f"{len(rows)} answers ({len(train) - len(rows)} too long), {sum(len(r.token) for r in rows)} tokens; "
          f"{s['PPD']:.0%} have parallel parts, ideal speedup {s['speedup']:.2f}x\n"
          f"{size / 1e6:.2f}M parameters, {args.steps} steps of {args.batch_size} answers", flush=True)
    return model, tokenizer, rows, val_rows

def make_optimizer(model, lr, new=(), fast=10):
    """AdamW; only matrices decay. new: ids that a trained model has not met, the tags. Their rows in embedding and
    head go `fast` times as far: they start at the mean of all tokens, a long way from where they are of use."""
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrix],
               "weight_decay": 0.1 * matrix} for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
    tables, before = [m.weight.data for m in (model.wte, model.lm_head) if m], []
    def leap(*_):
        for table in tables:
            table[new] += (fast - 1) * (table[new] - before.pop(0))
    if new:
        optimizer.register_step_pre_hook(lambda *_: before.extend(table[new] for table in tables))
        optimizer.register_step_post_hook(leap)
    return optimizer

def summed_loss(model, rows, args):
    """The loss of a micro-batch, summed over its targets: under the branch mask, in autocast."""
    idx, position, mask, pick, target = collate(rows, args.device)
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return model(idx, position, None if args.no_branch_mask else mask, pick=pick, target=target)

def train_step(model, rows, optimizer, args, rank=0, world=1):
    """One update -> the batch's mean loss, over all processes. Leaves the weights alone where that is not finite."""
    groups, total = micro_batches(rows[rank::world] or rows[:1], args.micro_tokens), 0.0  # DDP: none may idle
    weight = world * (rank < len(rows)) / sum((r.target != IGNORE).sum() for r in rows)  # and it takes the mean
    for group in groups:
        model.require_backward_grad_sync = group is groups[-1]  # DDP exchanges gradients once a step
        loss = summed_loss(model, group, args) * weight
        loss.backward()
        total += loss.detach() / world
    if world > 1:
        dist.all_reduce(total)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    value = (total + 0 * norm).item()  # NaN when either is not finite
    if math.isfinite(value):
        optimizer.step()
    optimizer.zero_grad()
    return value

@torch.no_grad()
def held_out_loss(model, rows, not_text, args):
    """Mean loss over the plain tokens that the model chooses: none of the ids not_text, no repeated title."""
    rows = [r._replace(target=np.where(np.isin(r.target, not_text), IGNORE, r.target)) for r in rows]
    total = sum(summed_loss(model, group, args).item() for group in micro_batches(rows, args.micro_tokens))
    return total / sum((r.target != IGNORE).sum() for r in rows)

def main():
    """The command line: the training loop."""
    args, state = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")  # one speaks
        if args.device == "cuda":  # without a number: each process its own GPU
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    model, tokenizer, rows, val_rows = prepare(args, state)
    new = list(tokenizer.special[:6]) if args.init_from and tokenizer.special else []
    optimizer = make_optimizer(model.to(args.device), args.lr, new)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    net = torch.compile(model, dynamic=True) if args.compile else model
    net = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net
    interrupts, lengths = [], np.array([len(r.token) for r in rows])
    before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))  # Ctrl-C lets the current step end
    step, value = (state["step"], state.get("loss", math.nan)) if state else (0, math.nan)
    tokens, stop, began = 0, 0, time.perf_counter()
    order = itertools.islice(batches(lengths, args.batch_size, args.seed), step, args.steps)
    for batch in (bar := tqdm(order, "training", args.steps, initial=step, disable=rank > 0 or None)):
        # a linear warm-up over 5% of the steps, under a cosine to zero
        lr = args.lr * min((step + 1) / (0.05 * args.steps), 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        value = train_step(net, [rows[i] for i in batch], optimizer, args, rank, world)
        check(math.isfinite(value), f"loss is {value} at step {step}, learning rate {lr:.2e}; saved: {args.out_dir}")
        step, tokens = step + 1, tokens + lengths[batch].sum()
        bar.set_postfix_str(f"loss {value:.3f}, lr {lr:.1e}, {tokens / (time.perf_counter() - began):.0f} tokens/s")
        stop = torch.tensor(len(interrupts), device=args.device)
        if world > 1:  # a Ctrl-C anywhere stops all processes, at the same step
            dist.all_reduce(stop)
        if rank == 0 and (stop or step == args.steps or step % args.save_every == 0):
            save_checkpoint(args.out_dir, step=step, loss=value, args=vars(args), config=vars(model.config),
                            model=model.state_dict(), optimizer=optimizer.state_dict(), tokenizer=tokenizer.settings)
        if stop:
            break
    signal.signal(signal.SIGINT, before)
    print(f"{'stopped by Ctrl-C' if stop else 'done'} after step {step} of {args.steps}, loss {value:.3f}; {tokens} "
          f"tokens in {time.perf_counter() - began:.0f} s; saved to {args.out_dir}\n"
          f"Next: python decode.py --ckpt {args.out_dir} --prompt TEXT", flush=True)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0 and not stop:
        args.no_branch_mask = False  # decoding always has the mask
        value = held_out_loss(model, val_rows, [tokenizer.eos, *(tokenizer.special or ())], args)
        print(f"held-out loss {value:.4f} a plain token, over {len(val_rows)} answers")

if __name__ == "__main__":
    cli(main)
