"""
Trains a GPT on tagged answers under the branch mask (paper section 3.3), from scratch or from a published model.

    python train.py                                        # the built-in corpus, from scratch, a few minutes on a CPU
    python train.py --mode serial --out-dir out-serial     # its serial twin: the same answers, untagged
    python train.py --data answers.jsonl --init-from DIR   # fine-tune a Llama or Qwen2 model on your own answers
    torchrun --nproc_per_node=8 train.py ...               # data parallel: the same batches, split among processes

Ctrl-C saves and stops; --resume goes on from the last checkpoint, bit for bit on a CPU.
"""
import argparse
import contextlib
import itertools
import math
import os
import signal
import statistics
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from aspd import IGNORE, POSITIONS, summary
from data import (Tokenizer, batches, cli, collate, corpus, make_rows, make_tokenizer, published_tokenizer, read_records,
                  split_held_out)
from model import GPT, GPTConfig, from_checkpoint, from_published, read_checkpoint, save_checkpoint


def parser():
    p = argparse.ArgumentParser(description="Trains an ASPD model. Next: python decode.py --prompt TEXT",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", metavar="FILE", help="JSON or JSON Lines of answers, as data.py reads; none: the built-in corpus")
    p.add_argument("--init-from", metavar="DIR", help="start from a published Llama or Qwen2 folder; none: from scratch")
    p.add_argument("--mode", choices=("aspd", "serial"), default="aspd", help="tagged, or the same answers untagged")
    p.add_argument("--out-dir", default="out", help="where ckpt.pt goes")
    p.add_argument("--positions", choices=POSITIONS, default="aspd", help="position scheme of the branches")
    p.add_argument("--stride", type=int, default=256, help='tokens; under "stride" the longest branch')
    p.add_argument("--block-size", type=int, default=1024, help="context in tokens; longer answers are left out")
    p.add_argument("--no-branch-mask", action="store_true", help="ablation: let the branches see each other in training")
    p.add_argument("--n-layer", type=int, default=4, help="from scratch: layers")
    p.add_argument("--n-head", type=int, default=4, help="from scratch: attention heads of 64")
    p.add_argument("--tokenizer", default="bpe", help="from scratch: bpe (learnt from the answers) or a tiktoken name")
    # optimisation
    p.add_argument("--steps", type=int, help="default: 400 from scratch, else --epochs")
    p.add_argument("--epochs", type=float, default=2.0, help="passes over the answers, where --steps is not given")
    p.add_argument("--batch-size", type=int, default=32, help="answers a step")
    p.add_argument("--micro-tokens", type=int, default=8192, help="tokens in memory at once, padding included; the rest of "
                                                                 "a batch is accumulated")
    p.add_argument("--lr", type=float, help="default: 2e-3 from scratch, else 1e-4")
    p.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    p.add_argument("--weight-decay", type=float, default=0.1, help="of matrices")
    p.add_argument("--grad-clip", type=float, default=1.0, help="norm of the gradient at most")
    p.add_argument("--seed", type=int, default=1337, help="of the weights and of the order of the answers")
    # machine
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="autocast; weights stay float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler)")
    p.add_argument("--resume", action="store_true", help="go on from out-dir's checkpoint")
    p.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    return p


# -----------------------------------------------------------------------------
# what to train on, and what to train

def load_answers(args):
    """(training records, held-out records): the built-in corpus, or a file split by prompt."""
    if args.data:
        return split_held_out(list(read_records(args.data)))
    return corpus(), corpus(200, split="val")


def new_model(args, records):
    """(model, tokenizer): from a published folder, grown by the tags, or from scratch."""
    torch.manual_seed(args.seed)
    if args.init_from:
        model = from_published(args.init_from)
        tokenizer, used = published_tokenizer(args.init_from)
        if args.mode == "aspd":
            model.grow(tokenizer.add_tags(used).vocab_size, list(tokenizer.special[:6]))
        model.config.positions, model.config.stride = args.positions, args.stride
        return model.float(), tokenizer
    tokenizer = make_tokenizer(args.tokenizer, (r["response"] for r in records))
    config = GPTConfig(block_size=args.block_size, vocab_size=tokenizer.vocab_size, n_layer=args.n_layer,
                       n_head=args.n_head, n_kv_head=args.n_head, n_embd=64 * args.n_head, n_inner=176 * args.n_head,
                       positions=args.positions, stride=args.stride)
    return GPT(config), tokenizer


def resume(args, defaults):
    """The checkpoint's dict, and args with its settings. ValueError for a setting that was given and differs."""
    state = read_checkpoint(args.out_dir)
    machine = ("out_dir", "device", "compile", "resume", "save_every")
    for name, value in state["args"].items():
        given = getattr(args, name)
        if name not in machine and given not in (value, defaults(name)):
            raise ValueError(f"--resume: {name} is {value!r} in {args.out_dir}, not {given!r}")
        if name not in machine:
            setattr(args, name, value)
    return state


# -----------------------------------------------------------------------------
# loss

def micro_batches(rows, micro_tokens):
    """Rows -> lists of rows of like length, each at most micro_tokens once padded (or a single row)."""
    groups = [[]]
    for row in sorted(rows, key=lambda r: len(r.token)):
        if groups[-1] and (len(groups[-1]) + 1) * len(row.token) > micro_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


class Loss:
    """Sums the loss of rows: what training minimises and, over the plain tokens alone, the held-out loss."""

    def __init__(self, model, device, dtype, branch_mask=True):
        self.model, self.device, self.branch_mask = model, device, branch_mask
        self.autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=dtype == "bfloat16")

    def __call__(self, rows):
        """Summed loss of rows as one padded batch, and its number of targets."""
        idx, position, mask, pick, target = collate(rows, self.device)
        with self.autocast:
            logits = self.model(idx, position, mask if self.branch_mask else None, pick=pick)
        return F.cross_entropy(logits.float(), target, reduction="sum"), len(target)

    @torch.no_grad()
    def held_out(self, rows, special, micro_tokens):
        """Mean loss over the plain-answer tokens that the model chooses: no tags, no end-of-text, no repeated title."""
        rows = [r._replace(target=np.where(np.isin(r.target, special), IGNORE, r.target)) for r in rows]
        parts = [self(group) for group in micro_batches(rows, micro_tokens)]
        return sum(loss.item() for loss, _ in parts) / sum(n for _, n in parts)


def learning_rate(step, args):
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = max(1, int(args.warmup * args.steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))


def train_step(loss, rows, optimizer, args, rank, world):
    """One update on a batch, split among processes and in micro-batches. Returns its mean loss on this process's share."""
    total = sum(int((r.target != IGNORE).sum()) for r in rows)  # of all processes: every target weighs the same
    groups = micro_batches(rows[rank::world] or rows[:1], args.micro_tokens)
    weight = world / total if rows[rank::world] else 0.0  # DistributedDataParallel averages over processes
    summed = 0.0
    for k, group in enumerate(groups):
        last = k == len(groups) - 1
        with contextlib.nullcontext() if world == 1 or last else loss.model.no_sync():
            part = loss(group)[0] * weight
            part.backward()
        summed += part.detach()
    if world > 1:
        dist.all_reduce(summed)
        summed /= world
    norm = torch.nn.utils.clip_grad_norm_(loss.model.parameters(), args.grad_clip)
    value = summed.item()
    if math.isfinite(value) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value if math.isfinite(norm) else math.nan


def make_optimizer(model, args):
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


# -----------------------------------------------------------------------------
# the run

class Run:
    """A training run: answers, model and optimizer, from the start or from state, the dict of a checkpoint."""

    def __init__(self, args, state, rank, world):
        self.args, self.rank, self.world = args, rank, world
        self.records, held_out = load_answers(args)
        if state:
            self.model, self.tokenizer = from_checkpoint(state), Tokenizer.load(state["tokenizer"])
        else:
            self.model, self.tokenizer = new_model(args, self.records)
        lay = lambda records: make_rows(records, self.tokenizer, self.model.config, args.mode, args.block_size)
        (self.rows, self.lengths, figures), (self.held_out, _, _) = lay(self.records), lay(held_out)
        if not self.rows or not self.held_out:
            raise ValueError(f"{args.data}: {len(self.rows)} answers to train on and {len(self.held_out)} held out fit "
                             f"the context of {args.block_size} tokens; both are needed")
        args.steps = args.steps or (400 if not args.data else math.ceil(args.epochs * len(self.rows) / args.batch_size))
        args.lr = args.lr or (1e-4 if args.init_from else 2e-3)
        s = summary(figures)
        self.say(f"{len(self.rows)} answers of {sum(self.lengths)} tokens, {len(self.records) - len(self.rows)} too long; "
                 f"{s['PPD']:.0%} have parallel parts, ideal speedup {s['speedup']:.2f}x")
        self.say(f"{self.model.num_params() / 1e6:.2f}M parameters, {args.steps} steps of {args.batch_size} answers")

        self.model.to(args.device).train()
        self.optimizer = make_optimizer(self.model, args)
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
        wrapped = torch.compile(self.model, dynamic=True) if args.compile else self.model
        wrapped = DistributedDataParallel(wrapped) if world > 1 else wrapped
        self.loss = Loss(wrapped, args.device, args.dtype, not args.no_branch_mask)
        self.step = state["step"] if state else 0

    def say(self, text):
        """Prints once, whatever the number of processes."""
        if self.rank == 0:
            print(text, flush=True)

    def save(self):
        """Writes the checkpoint, whole or not at all."""
        if self.rank == 0:
            save_checkpoint(self.args.out_dir, step=self.step, args=vars(self.args), config=asdict(self.model.config),
                            model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                            tokenizer=self.tokenizer.state())

    def fit(self):
        """Runs the remaining steps. Ctrl-C ends the run after the current step, with a checkpoint."""
        args, stopped, tokens, began = self.args, [], 0, time.perf_counter()
        before = signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
        order = itertools.islice(batches(self.lengths, args.batch_size, args.seed), self.step, args.steps)
        with tqdm(order, desc="training", total=args.steps, initial=self.step, disable=None if self.rank == 0 else True,
                  mininterval=1) as bar:
            for batch in bar:
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.step, args)
                value = train_step(self.loss, [self.rows[i] for i in batch], self.optimizer, args, self.rank, self.world)
                if not math.isfinite(value):
                    raise ValueError(f"the loss is {value} at step {self.step}, learning rate {group['lr']:.2e}; "
                                     f"the last checkpoint in {args.out_dir} is as it was")
                self.step += 1
                tokens += sum(len(self.rows[i].token) for i in batch)
                speed = tokens / (time.perf_counter() - began)
                bar.set_postfix_str(f"loss {value:.3f}, lr {group['lr']:.1e}, {speed:.0f} tokens/s")
                if stopped or self.step % args.save_every == 0 or self.step == args.steps:
                    self.save()
                if stopped:
                    break
        signal.signal(signal.SIGINT, before)
        self.say(f"{'stopped by Ctrl-C' if stopped else 'done'}: step {self.step} of {args.steps}, loss {value:.3f}, "
                 f"{speed:.0f} tokens/s; saved to {args.out_dir}")
        return not stopped

    def report(self):
        """Held-out loss, and what training on tagged rows costs against the same answers untagged."""
        self.model.eval()
        loss = Loss(self.model, self.args.device, self.args.dtype).held_out(
            self.held_out, [self.tokenizer.eos, *(self.tokenizer.special or ())], self.args.micro_tokens)
        self.say(f"held-out loss {loss:.4f} a plain token, over {len(self.held_out)} answers")
        if self.args.mode == "aspd" and self.rank == 0:
            print("against serial training on the same answers: {:+.1%} tokens, {:+.1%} time a step".format(*self.overhead()))

    def overhead(self, answers=32, repeats=3):
        """(extra tokens, extra time) of training on some answers tagged, against untagged; forward and backward."""
        records, config = self.records[:answers], self.model.config
        sides = [make_rows(records, self.tokenizer, config, mode, self.args.block_size)[0] for mode in ("aspd", "serial")]
        loss, seconds = Loss(self.model, self.args.device, self.args.dtype), ([], [])
        for _ in range(repeats + 1):
            for rows, times in zip(sides, seconds):
                began = time.perf_counter()
                for group in micro_batches(rows, self.args.micro_tokens):
                    loss(group)[0].backward()
                self.model.zero_grad()
                if self.args.device.startswith("cuda"):
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
        tokens, times = [sum(len(r.token) for r in rows) for rows in sides], [statistics.median(t[1:]) for t in seconds]
        return tokens[0] / tokens[1] - 1, times[0] / times[1] - 1


def main():
    p = parser()
    args, rank, world = p.parse_args(), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: CUDA is not available")
    if world > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    began = time.perf_counter()
    state = resume(args, p.get_default) if args.resume else None
    run = Run(args, state, rank, world)
    if run.fit():
        run.report()
        run.say(f"{time.perf_counter() - began:.0f} s in all. Next: python decode.py --ckpt {args.out_dir} --prompt \"...\"")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
