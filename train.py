"""
Trains a GPT on tagged answers under the branch mask (paper section 3.3), from scratch or from a published model.

    python train.py                                        # the built-in corpus, from scratch, minutes on a CPU
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
from data import (Tokenizer, batches, cli, collate, corpus, make_rows, make_tokenizer, micro_batches, published_tokenizer,
                  read_records, split_held_out)
from model import GPT, GPTConfig, check_device, from_checkpoint, from_published, read_checkpoint, save_checkpoint

# -----------------------------------------------------------------------------
# what seldom changes
warmup = 0.05          # share of the steps
final_lr = 0.1         # share of the learning rate at the end of the cosine
weight_decay = 0.1     # of matrices
betas = (0.9, 0.95)
grad_clip = 1.0        # norm of the gradient at most
# -----------------------------------------------------------------------------


def parser():
    p = argparse.ArgumentParser(description="Trains an ASPD model. Next: python decode.py --prompt TEXT",
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
    add("--n-layer", type=int, default=4, help="from scratch: layers")
    add("--n-head", type=int, default=4, help="from scratch: attention heads, of 64 channels each")
    add("--block-size", type=int, default=1024, help="context in tokens; longer answers are left out")
    add("--steps", type=int, help="updates; none: 400 for the built-in corpus, else --epochs")
    add("--epochs", type=float, default=2.0, help="passes over a file's answers")
    add("--batch-size", type=int, default=32, help="answers a step")
    add("--micro-tokens", type=int, default=8192, help="tokens in memory at once; a batch is accumulated from such parts")
    add("--lr", type=float, help="highest learning rate; none: 2e-3 from scratch, 1e-4 otherwise")
    add("--seed", type=int, default=1337, help="of the weights and of the order of the answers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="autocast; the weights stay float32")
    add("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler)")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from out-dir's checkpoint, with its settings")
    return p


def new_model(args, records):
    """(model, tokenizer): from a published folder, with embedding rows for the tags, or from scratch."""
    torch.manual_seed(args.seed)
    if args.init_from:
        model, (tokenizer, used) = from_published(args.init_from).float(), published_tokenizer(args.init_from)
        model.config.positions, model.config.stride = args.positions, args.stride
        if args.mode == "aspd":
            model.grow(tokenizer.add_tags(used).vocab_size, list(tokenizer.special[:6]))
        return model, tokenizer
    tokenizer = make_tokenizer(args.tokenizer, (r["response"] for r in records))
    return GPT(GPTConfig(block_size=args.block_size, vocab_size=tokenizer.vocab_size, n_layer=args.n_layer,
                         n_head=args.n_head, n_kv_head=args.n_head, n_embd=64 * args.n_head, n_inner=176 * args.n_head,
                         positions=args.positions, stride=args.stride)), tokenizer


def resume(args, default):
    """The checkpoint's dict; args takes its settings over. ValueError for one that was given and differs."""
    state = read_checkpoint(args.out_dir)
    for name in state["args"].keys() - {"out_dir", "device", "compile", "resume", "save_every"}:
        saved, given = state["args"][name], getattr(args, name)
        if given not in (saved, default(name)):
            raise ValueError(f"--resume: {name} is {saved!r} in {args.out_dir}, not {given!r}")
        setattr(args, name, saved)
    return state


# -----------------------------------------------------------------------------
# loss and update

class Loss:
    """The summed loss of a micro-batch, under the branch mask and in autocast."""

    def __init__(self, model, device, dtype, use_mask=True):
        self.model, self.device, self.use_mask = model, device, use_mask
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")

    def __call__(self, rows):
        idx, position, mask, pick, target = collate(rows, self.device)
        with self.autocast:
            logits = self.model(idx, position, mask if self.use_mask else None, pick=pick)
        return F.cross_entropy(logits.float(), target, reduction="sum")

    @torch.no_grad()
    def held_out(self, rows, not_text, micro_tokens):
        """Mean loss over the plain tokens that the model chooses: no tags, no end-of-text, no repeated title."""
        rows = [r._replace(target=np.where(np.isin(r.target, not_text), IGNORE, r.target)) for r in rows]
        return sum(self(group).item() for group in micro_batches(rows, micro_tokens)) / count_targets(rows)


def count_targets(rows):
    return sum(int((r.target != IGNORE).sum()) for r in rows)


def learning_rate(step, args):
    """Linear warm-up, then a cosine."""
    start = max(1, int(warmup * args.steps))
    if step < start:
        return args.lr * (step + 1) / start
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - start) / max(1, args.steps - start))
    return args.lr * (final_lr + (1 - final_lr) * cosine)


def train_step(loss, rows, optimizer, micro_tokens, rank=0, world=1):
    """One update on a batch. Returns its mean loss over all processes; leaves the weights alone where that is not finite."""
    mine = rows[rank::world]
    groups = micro_batches(mine or rows[:1], micro_tokens)
    weight = (world if mine else 0) / count_targets(rows)  # DistributedDataParallel averages; every target weighs the same
    total = 0.0
    for group in groups:
        with contextlib.nullcontext() if world == 1 or group is groups[-1] else loss.model.no_sync():
            part = loss(group) * weight
            part.backward()
        total += part.detach() / world
    if world > 1:
        dist.all_reduce(total)
    norm = torch.nn.utils.clip_grad_norm_(loss.model.parameters(), grad_clip)
    value = (total + 0 * norm).item()  # NaN when either is not finite
    if math.isfinite(value):
        optimizer.step()
    optimizer.zero_grad()
    return value


def make_optimizer(model, lr):
    """AdamW; only matrices decay."""
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrix],
               "weight_decay": weight_decay * matrix} for matrix in (True, False)]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


# -----------------------------------------------------------------------------
# the run

class Run:
    """A training run: answers, model and optimizer, from the start or from state, the dict of a checkpoint."""

    def __init__(self, args, state=None, rank=0, world=1):
        self.args, self.rank, self.world, self.step = args, rank, world, state["step"] if state else 0
        # answers and model
        if args.data:
            self.records, held_out = split_held_out(list(read_records(args.data)))
        else:
            self.records, held_out = corpus(), corpus(200, split="val")
        if state:
            self.model, self.tokenizer = from_checkpoint(state), Tokenizer(**state["tokenizer"])
        else:
            self.model, self.tokenizer = new_model(args, self.records)
        self.rows, total = self.lay(self.records)
        self.held_out, _ = self.lay(held_out)
        if not self.rows or not self.held_out:
            raise ValueError(f"{args.data}: of {len(self.records)} answers to train on and {len(held_out)} held out, "
                             f"{len(self.rows)} and {len(self.held_out)} fit {args.block_size} tokens; both are needed")
        # settings that depend on them
        args.steps = args.steps or (math.ceil(args.epochs * len(self.rows) / args.batch_size) if args.data else 400)
        args.lr = args.lr or (1e-4 if args.init_from else 2e-3)
        s = summary(total)
        self.say(f"{len(self.rows)} answers ({len(self.records) - len(self.rows)} too long), {sum(len(r.token) for r in self.rows)} "
                 f"tokens; {s['PPD']:.0%} have parallel parts, ideal speedup {s['speedup']:.2f}x\n"
                 f"{self.model.num_params() / 1e6:.2f}M parameters, {args.steps} steps of {args.batch_size} answers")
        # the machine
        self.model.to(args.device).train()
        self.optimizer = make_optimizer(self.model, args.lr)
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
        wrapped = torch.compile(self.model, dynamic=True) if args.compile else self.model
        wrapped = DistributedDataParallel(wrapped) if world > 1 else wrapped
        self.loss = Loss(wrapped, args.device, args.dtype, not args.no_branch_mask)

    def lay(self, records, mode=None):
        return make_rows(records, self.tokenizer, self.model.config, mode or self.args.mode, self.args.block_size)

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
        """Runs the remaining steps. Ctrl-C ends the run after the current step, with a checkpoint. True when done."""
        args, stopped, tokens, value, began = self.args, [], 0, math.nan, time.perf_counter()
        before = signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
        order = itertools.islice(batches(len(self.rows), args.batch_size, args.seed), self.step, args.steps)
        bar = tqdm(order, "training", args.steps, initial=self.step, disable=None if self.rank == 0 else True, mininterval=1)
        for batch in bar:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, args)
            rows = [self.rows[i] for i in batch]
            value = train_step(self.loss, rows, self.optimizer, args.micro_tokens, self.rank, self.world)
            if not math.isfinite(value):
                raise ValueError(f"the loss is {value} at step {self.step}, learning rate {group['lr']:.2e}; the last "
                                 f"checkpoint in {args.out_dir} is as it was")
            self.step += 1
            tokens += sum(len(r.token) for r in rows)
            speed = tokens / (time.perf_counter() - began)
            bar.set_postfix_str(f"loss {value:.3f}, lr {group['lr']:.1e}, {speed:.0f} tokens/s")
            if stopped or self.step % args.save_every == 0 or self.step == args.steps:
                self.save()
            if stopped:
                break
        bar.close()
        signal.signal(signal.SIGINT, before)
        self.say(f"{'stopped by Ctrl-C' if stopped else 'done'} after step {self.step} of {args.steps}, loss {value:.3f}; "
                 f"{tokens} tokens in {time.perf_counter() - began:.0f} s; saved to {args.out_dir}")
        return not stopped

    def report(self):
        """Held-out loss, and what training on tagged rows costs against the same answers untagged."""
        self.model.eval()
        loss = Loss(self.model, self.args.device, self.args.dtype)
        not_text = [self.tokenizer.eos, *(self.tokenizer.special or ())]
        self.say(f"held-out loss {loss.held_out(self.held_out, not_text, self.args.micro_tokens):.4f} a plain token, over "
                 f"{len(self.held_out)} answers")
        if self.args.mode == "serial" or self.rank > 0:
            return
        sides = {mode: self.lay(self.records[:self.args.batch_size], mode)[0] for mode in ("aspd", "serial")}
        seconds = {mode: [] for mode in sides}
        for mode in ["aspd", "serial"] * 4:
            began = time.perf_counter()
            for group in micro_batches(sides[mode], self.args.micro_tokens):
                loss(group).backward()
            torch.nn.utils.get_total_norm(p.grad for p in self.model.parameters()).item()  # waits for the device
            seconds[mode].append(time.perf_counter() - began)
        tokens = {mode: sum(len(r.token) for r in rows) for mode, rows in sides.items()}
        times = {mode: statistics.median(s[1:]) for mode, s in seconds.items()}
        print(f"against serial training on the same answers: {tokens['aspd'] / tokens['serial'] - 1:+.1%} tokens, "
              f"{times['aspd'] / times['serial'] - 1:+.1%} time a step")


def main():
    p = parser()
    args, rank, world = p.parse_args(), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_device(args.device)
    for name in ("steps", "epochs", "batch_size", "micro_tokens", "block_size", "n_layer", "n_head", "lr", "save_every"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be over 0, not {getattr(args, name)}")
    if world > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    began = time.perf_counter()
    run = Run(args, resume(args, p.get_default) if args.resume else None, rank, world)
    if run.fit():
        run.report()
        run.say(f"{time.perf_counter() - began:.0f} s in all. Next: python decode.py --ckpt {args.out_dir} --prompt TEXT")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
