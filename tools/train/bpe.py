#!/usr/bin/env python3
"""A byte-level BPE tokenizer, trained on the corpus: GPT-2's way of splitting text into words, and
merges of byte pairs within a word. Written as JSON with its tokens in order of their ids, bytes
spelt as GPT-2's table spells them. Needs nothing but Python's own library."""
import argparse
import json
import os
import random
import re
from collections import Counter, defaultdict

import corpus as corpus_

# GPT-2's expression, for ASCII: the corpus has nothing else. Other letters count as marks.
WORDS = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
)
MARKS = (corpus_.END, corpus_.IM_START, corpus_.IM_END)


def byte_table():
    """GPT-2's printable character for each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table, n = {b: chr(b) for b in plain}, 0
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + n)
            n += 1
    return table


TABLE = byte_table()


def spell(text):
    return "".join(TABLE[b] for b in text.encode())


def train(counts, vocab_size):
    """The tokens and merges of a vocabulary. Ties go to the pair that sorts first."""
    tokens = [TABLE[b] for b in range(256)]
    merges = []
    words = [(list(spell(w)), c) for w, c in sorted(counts.items())]
    pairs, where = Counter(), defaultdict(set)
    for i, (w, c) in enumerate(words):
        for p in zip(w, w[1:]):
            pairs[p] += c
            where[p].add(i)
    while len(tokens) + len(MARKS) < vocab_size and pairs:
        best = min(pairs, key=lambda p: (-pairs[p], p))
        if pairs[best] < 2:
            break
        merges.append(best)
        tokens.append(best[0] + best[1])
        for i in sorted(where[best]):
            w, c = words[i]
            for p in zip(w, w[1:]):
                pairs[p] -= c
                if pairs[p] <= 0:
                    del pairs[p]
                where[p].discard(i)
            merge(w, best)
            for p in zip(w, w[1:]):
                pairs[p] += c
                where[p].add(i)
    return tokens + list(MARKS), merges


def merge(w, pair):
    """Joins each occurrence of the pair in a list of tokens, from the left."""
    i = 0
    while i + 1 < len(w):
        if (w[i], w[i + 1]) == pair:
            w[i : i + 2] = [w[i] + w[i + 1]]
        i += 1


class Tokenizer:
    def __init__(self, path):
        data = json.load(open(path, encoding="utf-8"))
        self.tokens, self.merges = data["tokens"], [tuple(m.split(" ")) for m in data["merges"]]
        self.ids = {t: i for i, t in enumerate(self.tokens)}
        self.ranks = {m: i for i, m in enumerate(self.merges)}
        self.marks = re.compile("(" + "|".join(map(re.escape, MARKS)) + ")")
        self.cache = {}
        self.bytes = {c: b for b, c in TABLE.items()}

    def __len__(self):
        return len(self.tokens)

    def _word(self, word):
        w = list(spell(word))
        while len(w) > 1:
            rank, pair = min((self.ranks.get(p, len(self.ranks)), p) for p in zip(w, w[1:]))
            if rank == len(self.ranks):
                break
            merge(w, pair)
        return [self.ids[t] for t in w]

    def encode(self, text):
        """The ids of a text; marks in it are recognised."""
        ids, cache = [], self.cache
        for part in self.marks.split(text):
            if part in MARKS:
                ids.append(self.ids[part])
                continue
            for word in WORDS.findall(part):
                got = cache.get(word)
                if got is None:
                    got = cache[word] = self._word(word)
                ids += got
        return ids

    def decode(self, ids):
        out = b""
        for i in ids:
            t = self.tokens[i]
            out += t.encode() if t in MARKS else bytes(self.bytes[c] for c in t)
        return out.decode("utf-8", "replace")


def save(path, tokens, merges):
    # Under another name at first: `all` takes a file of this name for a whole one.
    with open(path + ".part", "w", encoding="utf-8") as f:
        json.dump({"tokens": tokens, "merges": [" ".join(m) for m in merges]}, f,
                  ensure_ascii=False, indent=0)
        f.write("\n")
    os.replace(path + ".part", path)


def count_words(n, seed):
    corpus, rng, counts = corpus_.Corpus(), random.Random(seed), Counter()
    for _ in range(n):
        trunk, branches = corpus_.base_document(corpus, rng)
        for text, _ in sum(branches, trunk):
            for mark in MARKS:
                text = text.replace(mark, "\n")
            counts.update(WORDS.findall(text))
    for i in range(10):
        counts[str(i)] += 2  # so that a digit alone is never strange
    return counts


def main():
    parser = argparse.ArgumentParser(description="train the BPE vocabulary on the corpus")
    parser.add_argument("-o", "--output", required=True, help="the JSON file to write")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens (4096)")
    parser.add_argument("--documents", type=int, default=40000, help="documents to count (40000)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    counts = count_words(args.documents, args.seed)
    tokens, merges = train(counts, args.vocab)
    save(args.output, tokens, merges)
    tokenizer = Tokenizer(args.output)
    n = sum(c * len(tokenizer.encode(w)) for w, c in counts.items())
    whole = sum(c for w, c in counts.items() if len(tokenizer.encode(w)) == 1)
    print(f"{len(tokens)} tokens; {len(counts)} different words, "
          f"{whole / sum(counts.values()):.4f} of all are one token, "
          f"{n / args.documents:.1f} tokens a document")


if __name__ == "__main__":
    main()
