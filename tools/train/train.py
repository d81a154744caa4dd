#!/usr/bin/env python3
"""Trains the demo's base model on documents that the corpus writes as they are needed.

Several processes share the parameters; each takes its share of a step's documents on one thread.
Their gradients are added in a fixed order, and each process updates its share of the parameters:
Muon for matrices in the layers, AdamW for the rest. What a step reads depends on the seed and the
step's number alone, so two runs with the same arguments give the same weights, and so does a run
that was killed and resumed from its last checkpoint.

The learning rate rises, stays, and falls over the last --decay steps. A run that hasn't begun to
fall can be resumed with more --steps.
"""
import argparse
import csv
import ctypes
import dataclasses
import json
import math
import multiprocessing as mp
import os
import random
import signal
import sys
import time
from multiprocessing.connection import wait

os.environ["OMP_NUM_THREADS"] = "1"
import needs
import torch
import torch.nn.functional as F

import bpe
import corpus as corpus_
import model as model_
import sets as sets_
from batch import Batch

NS = (3.4445, -4.7750, 2.0315)  # the quintic's coefficients of Muon's published form
FIELDS = "step tokens seconds lr loss note_loss balance inside".split()


def is_matrix(name):
    return name.endswith(("_q", "_k", "_v", "_output", "_exps"))


def orthogonalize(m):
    """The nearest half-orthogonal matrices of a stack [n, rows, cols], roughly."""
    flip = m.shape[1] > m.shape[2]
    x = m.transpose(1, 2).contiguous() if flip else m
    x = (x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-7)).bfloat16()
    for _ in range(4):
        a = torch.bmm(x, x.transpose(1, 2))
        b = torch.bmm(a, a).mul_(NS[2]).add_(a, alpha=NS[1])
        x = torch.bmm(b, x).add_(x, alpha=NS[0])
    return (x.transpose(1, 2) if flip else x).float().contiguous()


def take(corpus, tokenizer, rng, n_tokens):
    """Documents with about n_tokens tokens, and their topics' numbers."""
    documents, topics, n = [], [], 0
    while n < n_tokens:
        record = corpus.record(rng)
        trunk, branches = corpus_.base_document(corpus, rng, record=record)
        documents.append((trunk, branches))
        topics.append(corpus.topics.index(record.topic))
        n += sum(len(tokenizer.encode(t)) for t, _ in sum(branches, trunk))
    return documents, topics


def evaluate(params, config, corpus, tokenizer, seed, members=None, n=48):
    """Of held-out documents: the share of retellings of each kind of which every token is the most
    likely one, so that greedy decoding would give them, and the mean loss of all tokens. With
    `members`, each document uses its topic's experts only."""
    rng, right, total, nll, count = random.Random(f"eval {seed}"), {}, {}, 0.0, 0
    kinds = {f"\n\n{v}": k for k, v in corpus_.LEADS.items()}
    with torch.no_grad():
        for _ in range(n // 8):
            records, documents = [], []
            for _ in range(8):
                records.append(corpus.record(rng, True))
                documents.append(corpus_.base_document(corpus, rng, True, records[-1]))
            batch = Batch(documents, tokenizer, rng, 1.0)
            topics = [corpus.topics.index(r.topic) for r in records]
            sets = members is not None and sets_.Sets(members, topics, batch.documents, rng, 1.0)
            hidden = model_.forward(params, config, batch.ids, batch.documents, sets=sets or None)
            logits = model_.logits(params, hidden.index_select(0, batch.at))
            nll += F.cross_entropy(logits, batch.next, reduction="sum").item()
            count += len(batch.at)
            ok = (logits.argmax(-1) == batch.next) | ~batch.is_answer
            for d, i, a, b in batch.branches:
                kind = kinds.get(documents[d][1][i][0][0])
                if kind:
                    total[kind] = total.get(kind, 0) + 1
                    right[kind] = right.get(kind, 0) + bool(ok[a:b].all())
    return {k: right[k] / total[k] for k in sorted(total)}, nll / count


def rate(step, args):
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    left = args.steps - step
    return args.lr * min(1.0, left / max(1, args.decay))


class Shared:
    """What the processes share: parameters, gradients of each, and the optimizer's averages."""

    def __init__(self, config, processes, topics):
        n = model_.count(config)
        self.params, self.m, self.v = (torch.zeros(n).share_memory_() for _ in range(3))
        self.grads = [torch.zeros(n).share_memory_() for _ in range(processes)]
        self.stats = torch.zeros(processes, 7, dtype=torch.float64).share_memory_()
        # How often experts were chosen in the last step, by each process, and on the average of
        # many; and the topics' sets, all empty until they are chosen.
        self.used = torch.zeros(processes, config.layers, config.experts).share_memory_()
        self.share = torch.zeros(config.layers, config.experts).share_memory_()
        self.members = torch.zeros(topics, config.layers, config.experts,
                                   dtype=torch.bool).share_memory_()


def shares(config, processes):
    """Which process updates which parameter: the costliest first, to the least busy."""
    busy, owner = [0.0] * processes, {}
    def cost(item):
        name, shape = item
        n = float(torch.tensor(shape).prod())
        return n * min(shape[-2:]) if is_matrix(name) else n
    for name, shape in sorted(model_.shapes(config).items(), key=lambda i: (-cost(i), i[0])):
        w = busy.index(min(busy))
        busy[w] += cost((name, shape))
        owner[name] = w
    return owner


def update(name, p, g, m, v, lr, step, args):
    if is_matrix(name):
        m.mul_(args.momentum).add_(g)
        d = g.add(m, alpha=args.momentum)
        stack = d.view(-1, *d.shape[-2:])
        # Scaled to the size of Adam's steps, so that one learning rate serves both.
        d = orthogonalize(stack).view(d.shape).mul_(0.2 * max(d.shape[-2:]) ** 0.5)
    else:
        m.lerp_(g, 1 - 0.9)
        v.lerp_(g.square(), 1 - 0.98)
        d = (m / (1 - 0.9 ** (step + 1))) / (v / (1 - 0.98 ** (step + 1))).sqrt().add_(1e-8)
    if p.dim() > 1:
        p.mul_(1 - lr * args.weight_decay)
    p.sub_(d, alpha=lr)


def save(path, shared, config, args, step, seconds, tokens):
    state = {"params": shared.params, "m": shared.m, "v": shared.v, "step": step,
             "config": dataclasses.asdict(config), "args": vars(args), "seconds": seconds,
             "tokens": tokens, "share": shared.share, "members": shared.members}
    torch.save(state, path + ".part")
    os.replace(path + ".part", path)


def end_with(parent):
    """Has this process killed when its parent ends, however that ends: a run that was killed must
    not go on writing where it is resumed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def join(workers):
    """Waits for all, or until one fails: the others would wait for it for ever."""
    left = list(workers)
    while left and not any(w.exitcode for w in workers):
        wait([w.sentinel for w in left])
        left = [w for w in left if w.is_alive()]
    for w in left:
        w.kill()
        w.join()
    return any(w.exitcode for w in workers)


def begin_sets(rank, shared, barrier, params, config, corpus, tokenizer, args):
    """Chooses the topics' sets, where that wasn't done yet."""
    if shared.members.any():
        return
    barrier.wait()  # before the first process has chosen, the others must have seen that none has
    if rank == 0:
        used = sets_.use(params, config, corpus, tokenizer, args.seed)
        shared.share.copy_(used.mean(0))
        shared.members.copy_(sets_.choose(used))
    barrier.wait()


def work(rank, shared, barrier, config, args, first, seconds, tokens, parent):
    end_with(parent)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    corpus, tokenizer = corpus_.Corpus(), bpe.Tokenizer(args.vocab)
    params = model_.views(shared.params, config)
    mine = model_.views(shared.grads[rank], config)
    grads = [model_.views(g, config) for g in shared.grads]
    m, v = model_.views(shared.m, config), model_.views(shared.v, config)
    leaves = {k: p.detach().requires_grad_(True) for k, p in params.items()}
    for k, p in leaves.items():
        p.grad = mine[k]
    owner = shares(config, args.processes)
    began = time.time() - seconds
    log = None
    if rank == 0:
        log = open(os.path.join(args.out, "train.csv"), "a", newline="")
    for step in range(first, args.steps):
        rng = random.Random(f"{args.seed}/{step}/{rank}")
        documents, topics = take(corpus, tokenizer, rng, args.tokens // args.processes)
        batch = Batch(documents, tokenizer, rng, args.note_share)
        shared.grads[rank].zero_()
        balance, chosen, outside, sets, price = [], [], [], None, None
        if step >= args.set_from:
            begin_sets(rank, shared, barrier, params, config, corpus, tokenizer, args)
            sets = sets_.Sets(shared.members, topics, batch.documents, rng, args.set_limit)
            price = sets_.price(shared.share)
        hidden = model_.forward(leaves, config, batch.ids, batch.documents, balance, chosen,
                                half=True, sets=sets, outside=outside, price=price)
        losses = model_.losses(leaves, hidden.index_select(0, batch.at), batch.next, half=True)
        if sets:
            loss = (losses.mean() + args.set_balance * sum(balance) +
                    args.set_weight * sum(outside))
        else:
            loss = losses.mean() + args.balance * sum(balance)
        loss.backward()
        with torch.no_grad():
            answer = batch.is_answer
            shared.stats[rank] = torch.tensor(
                [losses[answer].sum(), answer.sum(), losses[~answer].sum(), (~answer).sum(),
                 sum(balance) / config.layers, len(batch.ids),
                 sum(outside) / config.layers], dtype=torch.float64)
            for i, which in enumerate(chosen):
                shared.used[rank, i] = torch.bincount(which.view(-1), minlength=config.experts)
            barrier.wait()
            lr = rate(step, args)
            for name, w in owner.items():
                if w == rank:
                    g = grads[0][name].clone()
                    for other in grads[1:]:
                        g += other[name]
                    update(name, params[name], g.div_(args.processes), m[name], v[name], lr, step,
                           args)
            if sets and rank == 0:
                used = shared.used.sum(0)
                shared.share.lerp_(used / used.sum(1, keepdim=True), 1 - args.balance_decay)
            stats = shared.stats.clone()
            barrier.wait()
        tokens += int(stats[:, 5].sum())
        if rank != 0:
            continue
        s = stats.sum(0)
        row = [step + 1, tokens, f"{time.time() - began:.1f}", f"{lr:.6f}", f"{s[0] / s[1]:.4f}",
               f"{s[2] / max(1, s[3]):.4f}", f"{s[4] / args.processes:.4f}",
               f"{math.exp(-s[6] / args.processes):.4f}" if sets else ""]
        csv.writer(log).writerow(row)
        log.flush()
        if (step + 1) % args.eval_every == 0:
            for members, name in ((None, step + 1), (shared.members, f"{step + 1} in sets")):
                if members is not None and not members.any():
                    continue
                exact, nll = evaluate(params, config, corpus, tokenizer, 0, members)
                with open(os.path.join(args.out, "eval.csv"), "a", newline="") as f:
                    csv.writer(f).writerow([name, f"{nll:.4f}"] +
                                           [f"{k}={e:.3f}" for k, e in exact.items()])
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(os.path.join(args.out, "last.pt"), shared, config, args, step + 1,
                 time.time() - began, tokens)
        if (step + 1) % args.keep_every == 0:
            save(os.path.join(args.out, f"step{step + 1}.pt"), shared, config, args, step + 1,
                 time.time() - began, tokens)


def cut_log(path, step, fields=FIELDS):
    """Drops what was logged after the checkpoint, and begins a log that isn't there."""
    rows = list(csv.reader(open(path))) if os.path.exists(path) else [fields]
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(r for r in rows if not r[0].isdigit() or int(r[0]) <= step)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", required=True, help="folder for checkpoints and logs; a run there is resumed")
    add("--vocab", required=True, help="the tokenizer, made by bpe.py")
    add("--seed", type=int, default=1)
    add("--steps", type=int, default=3300)
    add("--decay", type=int, default=900, help="last steps, over which the rate falls to 0")
    add("--warmup", type=int, default=50)
    add("--lr", type=float, default=4e-3)
    add("--momentum", type=float, default=0.95)
    add("--weight-decay", type=float, default=0.02)
    add("--balance", type=float, default=0.03, help="weight of the load-balancing loss")
    add("--set-from", type=int, default=2000, help="the step from which topics have sets of experts")
    add("--set-balance", type=float, default=0.1,
        help="weight of the load-balancing loss from then on")
    add("--balance-decay", type=float, default=0.98,
        help="how much of the experts' average use each step keeps, which is then balanced by")
    add("--set-weight", type=float, default=0.05, help="weight of the loss that draws into the set")
    add("--set-limit", type=float, default=0.5, help="share of documents that must do with the set")
    add("--note-share", type=float, default=0.15,
        help="share of documents of which all tokens are learnt, not only the answers")
    add("--tokens", type=int, default=3072, help="tokens in a step, about")
    add("--processes", type=int, default=2)
    add("--eval-every", type=int, default=100)
    add("--save-every", type=int, default=50)
    add("--keep-every", type=int, default=1000)
    add("--from", dest="start", help="a checkpoint to go on from, where --out has none")
    add("--config", default="{}", help="changes to the model's configuration, as JSON")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    config = model_.Config(**json.loads(args.config))
    config.vocab = len(bpe.Tokenizer(args.vocab))
    shared = Shared(config, args.processes, len(corpus_.Corpus().topics))
    last, first, seconds, tokens = os.path.join(args.out, "last.pt"), 0, 0.0, 0
    if not os.path.exists(last):
        last = args.start
    if last:
        state = torch.load(last)
        if state["config"] != dataclasses.asdict(config):
            sys.exit(f"{last} holds another configuration: {state['config']}")
        for name in ("params", "m", "v"):
            getattr(shared, name).copy_(state[name])
        for name in ("share", "members"):  # absent before there were sets
            if name in state:
                getattr(shared, name).copy_(state[name])
        first, seconds, tokens = state["step"], state["seconds"], state["tokens"]
        print(f"going on from step {first} of {last}", flush=True)
    else:
        model_.initialize(model_.views(shared.params, config), config, args.seed)
    cut_log(os.path.join(args.out, "train.csv"), first)
    print(f"{model_.count(config)} parameters", flush=True)
    barrier = mp.Barrier(args.processes)
    workers = [mp.Process(target=work, args=(r, shared, barrier, config, args, first, seconds,
                                             tokens, os.getpid())) for r in range(args.processes)]
    for w in workers:
        w.start()
    sys.exit(join(workers))


if __name__ == "__main__":
    mp.set_start_method("fork")
    main()
