#!/usr/bin/env python3
"""Trains a LoRA adapter on the frozen base model, and saves it as a PEFT folder.

Only the answers' tokens are learnt. One process and one thread, so the result depends on the
arguments alone; a run that was killed is resumed from its last checkpoint.
"""
import argparse
import csv
import json
import os
import random
import struct
import time

os.environ["OMP_NUM_THREADS"] = "1"
import needs
import torch

import bpe
import corpus as corpus_
import model as model_
import sets as sets_
from batch import Batch
from train import cut_log

# GGUF's names of what is adapted, and the modules of Hugging Face's Qwen3-MoE.
MODULES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
           "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
           "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.E.gate_proj",
           "ffn_up_exps": "mlp.experts.E.up_proj", "ffn_down_exps": "mlp.experts.E.down_proj"}


class Low(torch.autograd.Function):
    """B A for matrices or stacks of them."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        if a.dim() == 2:
            return model_.gemm(b, a)
        return torch.stack([model_.gemm(y, x) for x, y in zip(a, b)])

    @staticmethod
    def backward(ctx, d):
        a, b = ctx.saved_tensors
        if a.dim() == 2:
            return model_.gemm(b.t(), d), model_.gemm(d, a.t())
        return (torch.stack([model_.gemm(y.t(), z) for y, z in zip(b, d)]),
                torch.stack([model_.gemm(z, x.t()) for x, z in zip(a, d)]))


class Adapter:
    def __init__(self, base, targets, rank, alpha, seed):
        self.base, self.scale = base, alpha / rank
        g = torch.Generator().manual_seed(seed)
        self.pairs = {}
        for name, w in base.items():
            if name.rpartition(".")[2] in targets:
                stack, (rows, cols) = w.shape[:-2], w.shape[-2:]
                a = torch.empty(*stack, rank, cols).normal_(0, cols ** -0.5, generator=g)
                b = torch.zeros(*stack, rows, rank)
                self.pairs[name] = (a.requires_grad_(True), b.requires_grad_(True))

    def leaves(self):
        return [t for pair in self.pairs.values() for t in pair]

    def weights(self):
        """The base's weights with the pairs added."""
        out = dict(self.base)
        for name, (a, b) in self.pairs.items():
            out[name] = self.base[name] + Low.apply(a, b) * self.scale
        return out


def save_safetensors(path, tensors):
    header, at, data = {}, 0, []
    for name, t in sorted(tensors.items()):
        blob = t.detach().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + len(blob)]}
        at += len(blob)
        data.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(data))


def save_peft(folder, adapter, targets, rank, alpha):
    os.makedirs(folder, exist_ok=True)
    tensors, modules = {}, set()
    for name, (a, b) in adapter.pairs.items():
        _, layer, kind = name.split(".")
        for e in range(a.shape[0]) if a.dim() == 3 else (None,):
            module = MODULES[kind].replace(".E.", f".{e}.")
            modules.add(module.rpartition(".")[2])
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[key + ".lora_A.weight"] = a if e is None else a[e]
            tensors[key + ".lora_B.weight"] = b if e is None else b[e]
    save_safetensors(os.path.join(folder, "adapter_model.safetensors"), tensors)
    config = {"base_model_name_or_path": "sluice-demo", "bias": "none", "fan_in_fan_out": False,
              "inference_mode": True, "init_lora_weights": True, "lora_alpha": alpha,
              "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": rank,
              "target_modules": sorted(modules), "task_type": "CAUSAL_LM"}
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(config, f, indent=2)
        f.write("\n")


def draw(task, corpus, rng, held_out=False):
    """A document of the task, and its topic's number."""
    record = corpus.record(rng, held_out)
    return (corpus_.task_document(task, corpus, rng, record=record),
            corpus.topics.index(record.topic))


def exact(weights, c, corpus, tokenizer, task, n, seed, members=None):
    """The share of held-out answers that greedy decoding would give exactly. With `members`, each
    document uses its topic's experts only."""
    rng, right, total = random.Random(f"eval {seed}"), 0, 0
    with torch.no_grad():
        while total < n:
            documents, topics = zip(*(draw(task, corpus, rng, True) for _ in range(8)))
            batch, sets = Batch(documents, tokenizer), None
            if members is not None:
                sets = sets_.Sets(members, topics, batch.documents, random.Random(0), 1.0)
            hidden = model_.forward(weights, c, batch.ids, batch.documents, sets=sets)
            logits = model_.logits(weights, hidden.index_select(0, batch.at))
            ok = logits.argmax(-1) == batch.next
            for _, _, a, b in batch.branches:
                right += bool(ok[a:b].all())
                total += 1
    return right / total


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("task", choices=("summarize", "tone"))
    add("--base", required=True, help="the base model's checkpoint")
    add("--vocab", required=True, help="the tokenizer, made by bpe.py")
    add("--out", required=True, help="folder for the checkpoint, the log and the PEFT folder")
    add("--targets", default="attn_q,attn_k,attn_v,attn_output",
        help="matrices to adapt, by GGUF's names (attention's)")
    add("--rank", type=int, default=16)
    add("--alpha", type=int, default=32)
    add("--seed", type=int, default=1)
    add("--steps", type=int, default=300)
    add("--lr", type=float, default=2e-3)
    add("--tokens", type=int, default=2048, help="tokens in a step, about")
    add("--set-weight", type=float, default=0.02,
        help="weight of the loss that draws into the topic's experts")
    add("--set-limit", type=float, default=0.5,
        help="share of documents that must do with their topic's experts")
    add("--eval-every", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.makedirs(args.out, exist_ok=True)
    state = torch.load(args.base, map_location="cpu")
    c = model_.Config(**state["config"])
    corpus, tokenizer = corpus_.Corpus(), bpe.Tokenizer(args.vocab)
    targets = args.targets.split(",")
    adapter = Adapter(model_.views(state["params"], c), targets, args.rank, args.alpha, args.seed)
    optimizer = torch.optim.AdamW(adapter.leaves(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0)
    last, first, seconds = os.path.join(args.out, "last.pt"), 0, 0.0
    if os.path.exists(last):
        kept = torch.load(last)
        first, seconds = kept["step"], kept["seconds"]
        for leaf, value in zip(adapter.leaves(), kept["leaves"]):
            leaf.data.copy_(value)
        optimizer.load_state_dict(kept["optimizer"])
    log_path = os.path.join(args.out, "adapt.csv")
    cut_log(log_path, first, ["step", "tokens", "seconds", "lr", "loss"])
    log, began = open(log_path, "a", newline=""), time.time() - seconds
    for step in range(first, args.steps):
        rng = random.Random(f"{args.task}/{args.seed}/{step}")
        documents, topics, n = [], [], 0
        while n < args.tokens:
            (trunk, branches), topic = draw(args.task, corpus, rng)
            documents.append((trunk, branches))
            topics.append(topic)
            n += sum(len(tokenizer.encode(t)) for t, _ in sum(branches, trunk))
        batch = Batch(documents, tokenizer)
        weights, outside = adapter.weights(), []
        sets = sets_.Sets(state["members"], topics, batch.documents, rng, args.set_limit)
        hidden = model_.forward(weights, c, batch.ids, batch.documents, half=True, sets=sets,
                                outside=outside)
        loss = model_.losses(weights, hidden.index_select(0, batch.at), batch.next, half=True).mean()
        optimizer.zero_grad()
        (loss + args.set_weight * sum(outside)).backward()
        lr = args.lr * min(1, (step + 1) / 20, (args.steps - step) / (0.6 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        csv.writer(log).writerow([step + 1, n, f"{time.time() - began:.1f}", f"{lr:.6f}",
                                  f"{loss.item():.5f}"])
        log.flush()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            with torch.no_grad():
                got = [exact(adapter.weights(), c, corpus, tokenizer, args.task, 96, 0, members)
                       for members in (None, state["members"])]
            print(f"step {step + 1}: loss {loss.item():.4f}, held-out exact {got[0]:.3f}, "
                  f"with the topic's experts only {got[1]:.3f}", flush=True)
            part = last + ".part"
            torch.save({"step": step + 1, "seconds": time.time() - began,
                        "leaves": [t.detach() for t in adapter.leaves()],
                        "optimizer": optimizer.state_dict(), "args": vars(args)}, part)
            os.replace(part, last)
            save_peft(os.path.join(args.out, "peft"), adapter, targets, args.rank, args.alpha)


if __name__ == "__main__":
    main()
