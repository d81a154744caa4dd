"""Sets of experts, one for each topic, that documents of the topic are to get along with.

A topic has half of each layer's experts. Some of them are in every topic's set: those that all
topics use anyway, for what is read before the topic is known. The others are those that the topic
uses more than others do, when the sets are chosen; from then on a loss draws the router into its
document's set, and some documents must do with it. So experts come to know topics, and half of
them is enough for a text: what a runtime with little memory wants."""
import random

import torch

import corpus as corpus_
import model as model_
from batch import Batch

SHARED = 1 / 6  # of the experts, in every set
SIZE = 1 / 2    # of the experts, in a set
DOCUMENTS = 40  # of each topic, to choose by


class Sets:
    """Of each row of a batch, its document's set and whether that is all it may use."""

    def __init__(self, members, topics, documents, rng, limit):
        at, limited = [], []
        for topic, ((first, end), branches) in zip(topics, documents):
            n = (branches[-1][1] if branches else end) - first
            at += [topic] * n
            limited += [rng.random() < limit] * n
        self.members, self.at = members, torch.tensor(at)
        self.free = ~torch.tensor(limited).unsqueeze(1)

    def of(self, layer):
        """Which experts are in each row's set, and which it may use [rows, experts]."""
        inside = self.members[:, layer].index_select(0, self.at)
        return inside, inside | self.free


def price(share):
    """What balancing asks for each expert, from its share of its layer's use on the long run: 1
    for a fair share, and ever less the nearer it is to none."""
    return (share * share.shape[-1]).clamp(min=0.05).log().add(1)


def use(params, c, corpus, tokenizer, seed):
    """How often each topic chooses each expert, as a share of the choices in its layer [topics,
    layers, experts]."""
    out = torch.zeros(len(corpus.topics), c.layers, c.experts)
    with torch.no_grad():
        for t, topic in enumerate(corpus.topics):
            rng = random.Random(f"sets/{seed}/{topic}")
            scenes = [s for s in corpus.scenes if s.topic == topic]
            for _ in range(DOCUMENTS // 8):
                records = [corpus.record(rng, False, rng.choice(scenes)) for _ in range(8)]
                batch = Batch([corpus_.base_document(corpus, rng, record=r) for r in records],
                              tokenizer)
                chosen = []
                model_.forward(params, c, batch.ids, batch.documents, counts=chosen, half=True)
                for i, which in enumerate(chosen):
                    out[t, i] += torch.bincount(which.view(-1), minlength=c.experts)
    return out / out.sum(-1, keepdim=True)


def choose(used):
    """The topics' sets [topics, layers, experts], from what use() says."""
    topics, layers, experts = used.shape
    members = torch.zeros(used.shape, dtype=torch.bool)
    n_shared = round(SHARED * experts)
    n_own = round(SIZE * experts) - n_shared
    most = -(-topics * n_own // (experts - n_shared)) if experts > n_shared else 0
    for i in range(layers):
        shared = set(used[:, i].min(0)[0].topk(n_shared)[1].tolist())
        lift = used[:, i] / used[:, i].mean(0).clamp(min=1e-6)
        pairs = sorted((-lift[t, e].item(), t, e) for t in range(topics) for e in range(experts)
                       if e not in shared)
        own, in_sets = [0] * topics, [0] * experts
        members[:, i, list(shared)] = True
        # An expert is in about as many sets as any other, unless a set would stay too small.
        for limit in (most, topics):
            for _, t, e in pairs:
                if own[t] < n_own and in_sets[e] < limit and not members[t, i, e]:
                    members[t, i, e] = True
                    own[t] += 1
                    in_sets[e] += 1
    return members
