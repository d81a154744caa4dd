#!/usr/bin/env python3
"""The demo's corpus: the same seed writes the same text, no held-out record is trained on, and the
language is as rich as its model card says. Usage: corpus.py TOOLS_TRAIN"""
import collections
import hashlib
import os
import random
import re
import sys
import tempfile

sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True

import bpe
import corpus as c

corpus = c.Corpus()


def documents(seed, n, held_out=False):
    rng = random.Random(seed)
    return [c.base_document(corpus, rng, held_out) for _ in range(n)]


def check(ok, what):
    if not ok:
        sys.exit(f"FAILED: {what}")


# The same seed, twice, in fresh objects; another seed.
digest = hashlib.sha256(repr(documents(7, 200)).encode()).hexdigest()
corpus = c.Corpus()
check(digest == hashlib.sha256(repr(documents(7, 200)).encode()).hexdigest(), "not deterministic")
check(digest != hashlib.sha256(repr(documents(8, 200)).encode()).hexdigest(), "seeds don't matter")

# The split is by record: what the two sides draw never meets, even where both see many records.
rng = random.Random(1)
trained = {corpus.record(rng) for _ in range(3000)}
held = {corpus.record(rng, True) for _ in range(300)}
check(not trained & held, "a record is on both sides of the split")
check(all(map(c.is_held_out, held)) and not any(map(c.is_held_out, trained)), "split by the hash")

# Richness; and notes hold what their summaries tell.
words, notes = collections.Counter(), set()
for r in list(trained):
    note = c.note(r, rng)
    notes.add(note)
    check(len(note.split()) >= 30, f"a note of under 30 words: {note}")
    for fact in (r.sender, r.reader, r.verb, r.noun, r.ask, c.bare(r.reason)):
        if fact == r.verb and r.past in note.split():
            continue
        check(fact in note or r.past in note, f"'{fact}' is missing in: {note}")
    summary = c.summary(r)
    check(summary.count(".") == 1 and summary.endswith("."), f"not one sentence: {summary}")
    for sentence in re.split(r"(?<=[.!?]) ", note):
        told = [f for f in (r.sender, r.noun, r.ask) if f in sentence]
        check(len(told) < 3, f"one sentence tells all: {sentence}")
    for text in [note, summary, *(c.tone(r, t) for t in c.TONES)]:
        check(text.isascii() and "  " not in text and "{" not in text, f"malformed: {text}")
        words.update(re.findall(r"[a-z]+(?:['-][a-z]+)*", text.lower()))
check(len(notes) == len(trained), "notes repeat")
check(len(corpus.topics) >= 12 and len(words) >= 2000, f"{len(words)} words")
check(corpus.size() > 1e8, "too few records")

# A tokenizer that was trained twice is the same, and gives back what it was given.
counts = bpe.count_words(300, 1)
tokens, merges = bpe.train(counts, 900)
check((tokens, merges) == bpe.train(counts, 900), "the tokenizer isn't deterministic")
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "vocab.json")
    bpe.save(path, tokens, merges)
    tokenizer = bpe.Tokenizer(path)
odd = "I'm 42, can't   stop\n\n\n  it's 12.45!? \t na\u00efve x"
for text in [odd] + [t for d in documents(3, 50) for t in c.linear(d)]:
    check(tokenizer.decode(tokenizer.encode(text)) == text, f"round trip: {text}")
print(f"{len(words)} words, {len(notes)} notes, digest {digest[:16]}")
