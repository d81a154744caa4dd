#!/usr/bin/env python3
"""Tables of the model card: perplexity of each type of weights, and how experts are used."""
import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile

import needs
import torch
import torch.nn.functional as F

import bpe
import corpus as corpus_
import gguf_types
import model as model_


# What the packer makes itself, and from what.
PACKED = {f"q{bits}e": "f32" for bits in (6, 5, 4, 3)}


def held_out_texts(n, seed):
    """n held-out documents without marks: a note, told again in one way."""
    corpus, rng, texts = corpus_.Corpus(), random.Random(f"perplexity {seed}"), []
    while len(texts) < n:
        r = corpus.record(rng, True)
        what = rng.choice(("summary",) + corpus_.TONES)
        texts.append(f"{corpus_.note(r, rng)}\n\n{corpus_.LEADS[what]} {corpus_.retell(r, what)}")
    return texts


def load(path):
    state = torch.load(path, map_location="cpu")
    c = model_.Config(**state["config"])
    return model_.views(state["params"], c), c


def torch_perplexity(params, c, tokenizer, texts):
    nll, n = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor(tokenizer.encode(text))
            hidden = model_.forward(params, c, ids, [((0, len(ids)), [])])
            nll += F.cross_entropy(model_.logits(params, hidden[:-1]), ids[1:],
                                   reduction="sum").item()
            n += len(ids) - 1
    return math.exp(nll / n)


def sluice_perplexity(sluice, pack, texts):
    nll, n = 0.0, 0
    for text in texts:
        done = subprocess.run([sluice, "eval", pack, "--text", "-", "--ctx", "512", "--json"],
                              input=text, capture_output=True, text=True, check=True)
        got = json.loads(done.stdout)
        nll += math.log(got["perplexity"]) * got["n_scored"]
        n += got["n_scored"]
    return math.exp(nll / n)


def perplexity(args):
    texts, tokenizer = held_out_texts(args.n, 1), bpe.Tokenizer(args.vocab)
    params, c = load(args.checkpoint)
    wanted = torch_perplexity(params, c, tokenizer, texts)
    print("| weights | pack, bytes | perplexity | against F32 in PyTorch |\n| --- | ---: | ---: | ---: |")
    print(f"| F32, PyTorch | | {wanted:.4f} | |", flush=True)
    here = os.path.dirname(os.path.abspath(__file__))
    kinds = [(k, k) for k in gguf_types.NAMES] + [(k, k) for k in PACKED] + [("bf16", "q8_0")]
    for kind, dense in kinds:
        with tempfile.TemporaryDirectory() as folder:
            gguf, pack = os.path.join(folder, "m.gguf"), os.path.join(folder, "m.slu")
            subprocess.run([sys.executable, os.path.join(here, "export.py"), args.checkpoint, "-o",
                            gguf, "--vocab", args.vocab, "--type", PACKED.get(kind, kind),
                            "--dense", PACKED.get(dense, dense)], check=True)
            quantized = ["--quant", kind, "--dense-quant", dense] if kind in PACKED else []
            subprocess.run([args.sluice, "pack", gguf, "-o", pack, *quantized], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            got = sluice_perplexity(args.sluice, pack, texts)
            name = (kind if kind in PACKED else kind.upper()) if kind == dense else f"{kind.upper()}, dense {dense.upper()}"
            print(f"| {name} | {os.path.getsize(pack):,} | {got:.4f} | {got / wanted - 1:+.2%} |",
                  flush=True)


def choices(args, params, c, by_topic):
    """What share of its choices in a layer each topic gives to each expert, and what share of a
    document's choices goes to the half of the experts that it uses most [layers]. Where not by
    topic, its documents are of any topic instead: what then differs is chance."""
    tokenizer, corpus = bpe.Tokenizer(args.vocab), corpus_.Corpus()
    shares, halves = {}, []
    for topic in corpus.topics:
        rng, counts = random.Random(f"routing {topic}"), torch.zeros(c.layers, c.experts)
        with torch.no_grad():
            for _ in range(args.n):
                scene = rng.choice([s for s in corpus.scenes
                                    if s.topic == topic or not by_topic])
                r = corpus.record(rng, True, scene)
                text = corpus_.note(r, rng)
                documents = [f"{text}\n\n{corpus_.LEADS[w]} {corpus_.retell(r, w)}"
                             for w in rng.sample(("summary",) + corpus_.TONES, 2)]
                for document in documents:
                    ids, chosen = torch.tensor(tokenizer.encode(document)), []
                    model_.forward(params, c, ids, [((0, len(ids)), [])], counts=chosen)
                    here = torch.stack([torch.bincount(which.view(-1), minlength=c.experts)
                                        for which in chosen]).float()
                    counts += here
                    best = here.topk(c.experts // 2, 1)[0].sum(1)
                    halves.append(best / here.sum(1))
        shares[topic] = counts / counts.sum(1, keepdim=True)
    return shares, sum(halves) / len(halves)


def difference(shares, overall, layer):
    """Half the sum of differences: what share of choices a topic makes otherwise than average."""
    return sum((s[layer] - overall[layer]).abs().sum() / 2 for s in shares.values()) / len(shares)


def mean(shares):
    return sum(shares.values()) / len(shares)


def routing(args):
    params, c = load(args.checkpoint)
    (shares, half), (mixed, _) = (choices(args, params, c, by) for by in (True, False))
    overall = mean(shares)
    print("| layer | least used expert | most used | topics differ by | by chance | "
          "the best half has |\n| ---: | ---: | ---: | ---: | ---: | ---: |")
    for i in range(c.layers):
        fair = overall[i] * c.experts
        far, chance = difference(shares, overall, i), difference(mixed, mean(mixed), i)
        print(f"| {i} | {fair.min():.2f} | {fair.max():.2f} | {far:.1%} | {chance:.1%} | "
              f"{half[i]:.1%} |")
    print("\n| topic | its favourite experts (layer.expert, times the share they have elsewhere) |\n"
          "| --- | --- |")
    for topic, s in shares.items():
        rest = sum(v for k, v in shares.items() if k != topic) / (len(shares) - 1)
        lift = (s / rest).view(-1)
        top = lift.topk(4)[1].tolist()
        print(f"| {topic} | " + ", ".join(f"{j // c.experts}.{j % c.experts} ×{lift[j]:.1f}"
                                          for j in top) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    sub = parser.add_subparsers(dest="what", required=True)
    for name, does, n in (("perplexity", perplexity, 60), ("routing", routing, 40)):
        p = sub.add_parser(name)
        p.set_defaults(does=does)
        p.add_argument("checkpoint")
        p.add_argument("--vocab", required=True, help="the tokenizer, made by bpe.py")
        p.add_argument("--n", type=int, default=n, help=f"texts ({n}; of each topic for routing)")
        if name == "perplexity":
            p.add_argument("--sluice", required=True, help="the program")
    args = parser.parse_args()
    args.does(args)


if __name__ == "__main__":
    main()
