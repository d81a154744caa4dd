#!/usr/bin/env python3
"""Writes the demo model's corpus: short everyday notes, their summaries, and their retellings.

Everything comes from a record: who tells whom what, when, where and why, and what is asked of the
reader. scenes.txt holds the lists that the facts are drawn from. From a record are made

  note      what somebody would have written: many phrasings, orders of facts, and small talk
  tones     the same plainly, formally, warmly and tersely; each is a function of the record
  summary   one sentence that joins who, what, when, why and the request; a function of the record
  reply     what the note's reader might answer

All is decided by a seed. Records are held out by a hash of their facts, so no phrasing of a
held-out record is ever trained on. Needs nothing but Python's own library.
"""
import argparse
import hashlib
import itertools
import json
import os
import random
import re
import sys
from collections import Counter, namedtuple

HERE = os.path.dirname(os.path.abspath(__file__))
TONES = ("plain", "formal", "warm", "terse")
MODES = ("plan", "done", "delay", "cancel")
HELD_OUT_ONE_IN = 50

WOMEN = """Martha Alice Clara Nora Ingrid Helena Paula Sophie Emma Lucy Julia Greta Wanda Monica
Teresa Ursula Vera Yvonne Zoe Beatrice Cecilia Diana Edith Fiona Gloria Hannah Irene Joanna Karen
Laura Miriam Nadia Olivia Petra Rachel Sarah Tamara Valerie Winifred Agnes Bridget Carmen Dorothy
Eleanor Frances Gwen Harriet Isabel Janet Kate Linda Margaret Nancy Olga Priscilla Rebecca Sandra
Tina Ulrike Viola Astrid Bianca Charlotte Deborah""".split()
MEN = """Peter Paul George Henry Arthur Oscar Felix Victor Walter Simon Thomas Daniel Edward Frank
Gregory Harold Ivan James Kevin Leonard Martin Nathan Oliver Patrick Quentin Robert Samuel Theodore
Ulrich Vincent William Xavier Adam Benjamin Charles David Ernest Frederick Gerald Hugo Isaac Jacob
Karl Louis Matthew Norman Owen Philip Ralph Stephen Timothy Andrew Brian Conrad Dennis Eric Francis
Gordon Herbert Julian Kenneth Lawrence Malcolm Nicholas""".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November
December""".split()
ORDINALS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth
thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth twenty-first
twenty-second twenty-third twenty-fourth twenty-fifth twenty-sixth twenty-seventh
twenty-eighth""".split()
HOURS = "twelve one two three four five six seven eight nine ten eleven".split()

Scene = namedtuple("Scene", "topic actors verbs adjs nouns places motives obstacles asks")
Record = namedtuple(
    "Record",
    "topic good bad sender reader mode actor verb past adj noun place reason ask day month hour "
    "quarter",
)


def expand(text):
    """All forms of a text with alternatives in braces."""
    parts = re.split(r"\{([^}]*)\}", text)
    choices = [p.split("/") if i % 2 else [p] for i, p in enumerate(parts)]
    return ["".join(c) for c in itertools.product(*choices)]


def load_scenes(path=os.path.join(HERE, "scenes.txt")):
    """The scenes, and the remarks (good, bad) of each topic."""
    scenes, remarks, topic, fields = [], {}, None, None

    def close():
        if fields:
            scenes.append(Scene(topic=topic, **fields))

    for line in open(path, encoding="ascii"):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word == "topic":
            close()
            topic, fields = rest, None
            remarks[topic] = [None, None]
        elif word in ("good", "bad"):
            remarks[topic][word == "bad"] = rest
        elif word == "scene":
            close()
            fields = {}
        elif word == "verbs":
            fields[word] = [tuple(v.strip().split("|")) for v in rest.split(";")]
        elif word in ("adjs",):
            fields[word] = [a.strip() for a in rest.split(";")]
        else:
            # An alternative is as likely as a whole phrase, so that each is heard often.
            fields[word] = [e for p in rest.split(";") for e in expand(p.strip())]
    close()
    return scenes, remarks


class Corpus:
    """Records and texts. Methods that take an rng vary with it; the others don't."""

    def __init__(self):
        self.scenes, self.remarks = load_scenes()
        self.topics = sorted(self.remarks)

    def record(self, rng, held_out=False, scene=None):
        """A record from the training split, or from the held-out one."""
        while True:
            r = self._draw(rng, scene)
            if is_held_out(r) == held_out:
                return r

    def _draw(self, rng, scene):
        s = scene or rng.choice(self.scenes)
        names = [rng.choice(rng.choice((WOMEN, MEN))) for _ in range(2)]
        while names[0] == names[1]:
            names[1] = rng.choice(rng.choice((WOMEN, MEN)))
        mode = rng.choice(MODES)
        verb, past = rng.choice(s.verbs)
        is_good = mode in ("plan", "done")
        weekday = rng.random() < 0.5
        return Record(
            topic=s.topic,
            good=self.remarks[s.topic][0],
            bad=self.remarks[s.topic][1],
            sender=names[0],
            reader=names[1],
            mode=mode,
            actor=rng.choice(s.actors),
            verb=verb,
            past=past,
            adj=rng.choice(s.adjs),
            noun=rng.choice(s.nouns),
            place=rng.choice(s.places),
            reason=rng.choice(s.motives if is_good else s.obstacles),
            ask=rng.choice(s.asks),
            day=rng.randrange(7) if weekday else rng.randrange(28),
            month=-1 if weekday else rng.randrange(12),
            hour=rng.randrange(7, 21),
            quarter=rng.randrange(4),
        )

    def size(self):
        """How many different records there are."""
        n = 0
        names = (len(WOMEN) + len(MEN)) * (len(WOMEN) + len(MEN) - 1)
        for s in self.scenes:
            what = len(s.actors) * len(s.verbs) * len(s.adjs) * len(s.nouns) * len(s.places)
            why = 2 * len(s.motives) + 2 * len(s.obstacles)
            n += what * why * len(s.asks)
        return n * names * (7 + 28 * 12) * 14 * 4


def is_held_out(r):
    """Whether the record belongs to the held-out split: a hash of its facts says."""
    key = "|".join(str(v) for v in r).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


# How parts of a record are put into words.


def part_of_day(r):
    """Of the clock as it is spoken: a quarter to twelve is still the morning."""
    return "morning" if r.hour < 12 else "afternoon" if r.hour < 17 else "evening"


def clock_words(r):
    """half past nine in the morning"""
    hour = HOURS[(r.hour + (r.quarter == 3)) % 12]
    spoken = ("{} o'clock", "quarter past {}", "half past {}", "quarter to {}")[r.quarter]
    return f"{spoken.format(hour)} in the {part_of_day(r)}"


def clock_digits(r, colon=":", am=" am", pm=" pm"):
    """9:30 am"""
    return f"{(r.hour - 1) % 12 + 1}{colon}{r.quarter * 15:02d}{am if r.hour < 12 else pm}"


def clock_formal(r):
    return clock_digits(r, ".", " a.m.", " p.m.")


def day_words(r):
    """Tuesday, or: the third of May"""
    return DAYS[r.day] if r.month < 0 else f"the {ORDINALS[r.day]} of {MONTHS[r.month]}"


def day_formal(r):
    """Tuesday, or: 3 May"""
    return DAYS[r.day] if r.month < 0 else f"{r.day + 1} {MONTHS[r.month]}"


def day_terse(r):
    """Tue, or: 3 May"""
    return DAYS[r.day][:3] if r.month < 0 else day_formal(r)


def day_part(r):
    """Tuesday morning, or: the morning of the third of May"""
    part = part_of_day(r)
    return f"{DAYS[r.day]} {part}" if r.month < 0 else f"the {part} of {day_words(r)}"


def upper_first(text):
    return text[0].upper() + text[1:]


def bare(phrase):
    """A phrase without its article."""
    return phrase[4:] if phrase.startswith("the ") else phrase


def is_good(r):
    return r.mode in ("plan", "done")


def stop(sentence):
    """Ends a sentence, where an abbreviation's point hasn't already."""
    return sentence if sentence.endswith(".") else sentence + "."


# The renderings that are functions of the record.


def variant(r, n):
    """Which of n customs the record's topic follows, so that texts of a topic have a style."""
    return sum(map(ord, r.topic)) % n


def summary(r):
    when = day_part(r)
    what = f"the {r.noun}"
    told = {
        "plan": f"tells {r.reader} that {r.actor} will {r.verb} {what} on {when}",
        "done": f"reports to {r.reader} that {r.actor} {r.past} {what} on {when}",
        "delay": f"lets {r.reader} know that {r.actor} cannot {r.verb} {what} until {when}",
        "cancel": f"warns {r.reader} that {r.actor} will not {r.verb} {what} on {when}",
    }[r.mode]
    return f"{r.sender} {told} because of {r.reason}, with the request to {r.ask}."


def tone_plain(r):
    what = f"the {r.adj} {r.noun} {r.place}"
    when = f"on {day_words(r)} at {clock_words(r)}"
    actor = r.actor
    event, why = {
        "plan": (f"{actor} will {r.verb} {what} {when}", "The reason is"),
        "done": (f"{actor} {r.past} {what} {when}", "The reason was"),
        "delay": (f"{actor} could not {r.verb} {what} and will try again {when}", "The reason is"),
        "cancel": (f"{actor} will not {r.verb} {what} {when} after all", "The reason is"),
    }[r.mode]
    return f"Hello {r.reader}, {event}. {why} {r.reason}. Please {r.ask}. Regards, {r.sender}"


def tone_formal(r):
    what = f"the {r.adj} {r.noun} {r.place}"
    when = f"on {day_formal(r)} at {clock_formal(r)}"
    event = {
        "plan": f"I am writing to inform you that, owing to {r.reason}, {r.actor} will {r.verb} "
        f"{what} {when}",
        "done": f"I am pleased to report that, owing to {r.reason}, {r.actor} {r.past} {what} "
        f"{when}",
        "delay": f"I regret to inform you that, owing to {r.reason}, {r.actor} could not {r.verb} "
        f"{what}. The new appointment is {when}",
        "cancel": f"I regret to inform you that, owing to {r.reason}, {r.actor} will be unable to "
        f"{r.verb} {what} {when}",
    }[r.mode]
    ask = (
        f"I would be grateful if you could {r.ask}.",
        f"I should be much obliged if you would {r.ask}.",
        f"May I kindly request that you {r.ask}?",
    )[variant(r, 3)]
    close = ("Yours sincerely", "With kind regards")[variant(r, 2)]
    return f"Dear {r.reader}, {stop(event)} {ask} {close}, {r.sender}"


def tone_warm(r):
    what = f"the {r.adj} {r.noun} {r.place}"
    when = f"on {day_words(r)} at {clock_words(r)}"
    hope = {
        "morning": "I hope your coffee is still hot!",
        "afternoon": "I hope you are having a lovely day!",
        "evening": "I hope you can put your feet up soon!",
    }[part_of_day(r)]
    event = {
        "plan": f"Just imagine, {r.actor} will {r.verb} {what} {when}, all because of {r.reason}.",
        "done": f"You will be glad to hear that {r.actor} {r.past} {what} {when}, all because of "
        f"{r.reason}.",
        "delay": f"What a pity, {r.actor} could not {r.verb} {what} because of {r.reason}, but we "
        f"can look forward to another try {when}.",
        "cancel": f"I am so sorry, but {r.actor} will not {r.verb} {what} {when}, all because of "
        f"{r.reason}.",
    }[r.mode]
    ask = (
        f"It would be so kind of you to {r.ask}.",
        f"Could you be a dear and {r.ask}?",
        f"I would love it if you could {r.ask}.",
    )[variant(r, 3)]
    close = ("Big hugs", "With love", "Warm wishes")[variant(r, 3)]
    remark = r.good if is_good(r) else r.bad
    return f"Hi {r.reader}, {hope} {event} {remark}. {ask} {close}, {r.sender}"


def tone_terse(r):
    when = f"{day_terse(r)} {clock_digits(r)}"
    actor = bare(r.actor)
    event = {
        "plan": f"{actor} to {r.verb} {r.noun} {r.place}, {when}",
        "done": f"{actor} {r.past} {r.noun} {r.place}, {when}",
        "delay": f"delay, {actor} to {r.verb} {r.noun} {r.place}, now {when}",
        "cancel": f"cancelled, {actor} to {r.verb} {r.noun} {r.place}, {when}",
    }[r.mode]
    return f"For {r.reader}: {event}. Reason: {bare(r.reason)}. To do: {r.ask}. From {r.sender}"


RENDER = {"plain": tone_plain, "formal": tone_formal, "warm": tone_warm, "terse": tone_terse}


def tone(r, name):
    """The record in a tone."""
    return RENDER[name](r)


# Notes, which vary.

GREETINGS = ["Hi {R},", "Hello {R},", "Dear {R},", "Hey {R},", "Good morning {R},", "Hello there {R},",
             "My dear {R},", "Good evening {R},", "A note for {R}:", "Hello again {R},"]
OPENINGS = ["a quick word from me.", "here is some news.", "just so you know.",
            "I promised to keep you posted.", "this is only a short message.",
            "there is something you should know.", "I wanted to tell you this before I forget.",
            "I tried to phone but nobody answered.", "sorry for writing so late."]
CHAT = ["The kettle is whistling as I write this.", "It has been raining here since breakfast.",
        "By the way, your scarf is still on our coat rack.", "The soup you gave us was delicious.",
        "I slept badly, but never mind.", "We must have tea together one of these days.",
        "My new glasses make everything look enormous.", "The radio keeps playing that silly song.",
        "Grandfather sends his love, as always.", "I finally finished the jigsaw puzzle.",
        "The cat has taken over my favourite chair.", "Everyone at home has a cold, except me.",
        "It is far too warm for this time of year.", "I still owe you a letter, I know.",
        "The swallows are back under our roof.", "We had pancakes twice this week.",
        "Did you see the rainbow yesterday?", "The clocks in this house never agree.",
        "My handwriting gets worse every year.", "The lift is out of order again.",
        "I have started learning Italian, imagine that.", "The market was wonderfully crowded.",
        "Somebody keeps moving my bicycle.", "I found your umbrella behind the piano."]
EVENTS = {
    "plan": ["{A} will {V} {W} {P} {T}", "{T}, {A} will {V} {W} {P}",
             "{A} is going to {V} {W} {P} {T}", "it is settled that {A} will {V} {W} {P} {T}",
             "I heard that {A} will {V} {W} {P} {T}", "we expect {A} to {V} {W} {P} {T}",
             "{A} promised to {V} {W} {P} {T}"],
    "done": ["{A} {D} {W} {P} {T}", "{T}, {A} {D} {W} {P}", "{A} finally {D} {W} {P} {T}",
             "I am happy to say that {A} {D} {W} {P} {T}", "good news, {A} {D} {W} {P} {T}",
             "{A} managed to {V} {W} {P} {T}", "as agreed, {A} {D} {W} {P} {T}"],
    "delay": ["{A} could not {V} {W} {P}, so the new date is {T}",
              "{A} failed to {V} {W} {P} and will return {T}",
              "{A} can only {V} {W} {P} {T}, later than planned",
              "there is a delay, {A} will not {V} {W} {P} until {t}",
              "{A} had to put off the plan to {V} {W} {P}, the next try is {T}",
              "we must wait until {t} for {A} to {V} {W} {P}"],
    "cancel": ["{A} will not {V} {W} {P} {T} after all", "{T}, {A} will not {V} {W} {P} after all",
               "{A} has called off the plan to {V} {W} {P} {T}",
               "bad news, {A} cannot {V} {W} {P} {T} at all", "nothing will come of it, {A} refuses to {V} {W} {P} {T}",
               "{A} was supposed to {V} {W} {P} {T}, but that is off"],
}
REASONS = ["This is because of {Y}.", "The reason is {Y}.", "It has to do with {Y}.",
           "You can blame {Y} for that.", "It all comes down to {Y}.", "Behind it is {Y}.",
           "The cause is {Y}."]
ASKS = ["Please {Q}.", "Could you {Q}?", "Would you kindly {Q}?", "Can you {Q}, please?",
        "You would help me a lot if you could {Q}.", "Be so good as to {Q}.",
        "Do not forget to {Q}.", "I need you to {Q}.", "It would be great if you could {Q}.",
        "One more thing, please {Q}."]
CLOSINGS = ["Thanks, {S}", "Best wishes, {S}", "Cheers, {S}", "See you soon, {S}", "Yours, {S}",
            "Many thanks, {S}", "Take care, {S}", "Kind regards, {S}", "Love, {S}", "Bye for now, {S}"]


def note(r, rng):
    """A note about the record, in one of very many wordings, with 30 words at least."""
    while True:
        text = _note(r, rng)
        if len(text.split()) >= 30:
            return text


def _note(r, rng):
    actor = r.actor
    day = day_words(r) if rng.random() < 0.6 else day_formal(r)
    clock = rng.choice((clock_words, clock_words, clock_digits, clock_formal))(r)
    swap = rng.random() < 0.2
    when = f"at {clock} on {day}" if swap else f"on {day} at {clock}"
    until = f"{clock} on {day}" if swap else f"{day} at {clock}"
    why_inside = rng.random()
    event = rng.choice(EVENTS[r.mode]).format(
        A=actor, V=r.verb, D=r.past, W=f"the {r.adj} {r.noun}", P=r.place, T=when, t=until
    )
    greeting = rng.choice(GREETINGS).format(R=r.reader)
    opening = rng.choice(OPENINGS) if rng.random() < 0.4 else None
    # A greeting is followed in lower case; after an opening a sentence begins.
    reason = None
    if why_inside < 0.3:
        event = f"because of {r.reason}, {event}"
    elif why_inside < 0.5:
        event = f"{event}, because of {r.reason}"
    else:
        reason = rng.choice(REASONS).format(Y=r.reason)
    event = stop(upper_first(event) if opening else event)
    body = [reason] if reason else []
    body.insert(rng.randrange(len(body) + 1) if rng.random() < 0.3 else len(body),
                rng.choice(ASKS).format(Q=r.ask))
    head = [greeting] + ([opening] if opening else []) + [event]
    if rng.random() < 0.45:
        body.insert(rng.randrange(len(body) + 1), rng.choice(CHAT))
    return " ".join(head + body + [rng.choice(CLOSINGS).format(S=r.sender)])


REPLIES_GOOD = ["Thank you for your message about the {N}!", "How nice of you to write about the {N}!",
                "That is good to hear, I had been thinking about the {N}.",
                "So {A} will look after the {N}, wonderful!", "I am glad about the {N}."]
REPLIES_BAD = ["Oh no, I was counting on {A}!", "What a shame about the {N}!",
               "Thank you for telling me about {Y}.", "I am sorry to hear about {Y}.",
               "So we have {Y} to thank for this."]
REPLIES_ASK = ["Of course I will {Q}.", "I will {Q}, no problem.", "I am happy to {Q}.",
               "Consider it done, I will {Q}.", "I will {Q} right away."]
REPLIES_WHEN = ["{D} suits me well.", "I have made a note of {D}.", "I will keep {D} free.",
                "Let us talk again after {D}."]
REPLIES_END = ["Until then, {R}", "All the best, {R}", "Talk soon, {R}", "Warmly, {R}", "Yours, {R}"]


def reply(r, rng):
    """What the reader answers."""
    fill = dict(N=r.noun, A=r.actor, Y=r.reason, Q=r.ask, D=day_words(r), R=r.reader)
    parts = [rng.choice(REPLIES_GOOD if is_good(r) else REPLIES_BAD).format(**fill),
             rng.choice(REPLIES_ASK).format(**fill)]
    if rng.random() < 0.6:
        parts.append(upper_first(rng.choice(REPLIES_WHEN).format(**fill)))
    return " ".join([f"Dear {r.sender}!" if rng.random() < 0.5 else f"Hi {r.sender}!"] + parts +
                    [rng.choice(REPLIES_END).format(**fill)])


# Documents of the training corpus. Marks are written out; the tokenizer has a token for each.

END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
LEADS = {"summary": "In short:", "plain": "Put plainly:", "formal": "Put formally:",
         "warm": "Put warmly:", "terse": "Put tersely:"}


def retell(r, what):
    return summary(r) if what == "summary" else tone(r, what)


# A document is a trunk and branches, each a list of (text, is_answer); a branch is read as if the
# others weren't there.


def chat(user, *answers):
    """A conversation of two turns, with all the answers that it may have."""
    return ([(f"{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n", False)],
            [[(f"{a}{IM_END}\n", True)] for a in answers])


def tone_request(text, name):
    """What a user writes who wants a text in another tone."""
    return f"{text}\n\n{LEADS[name]}"


def summary_answer(r):
    """What 'summarize' answers to a text about the record."""
    return f"{LEADS['summary']} {summary(r)}"


def source(r, rng):
    """A text about the record that holds all its facts: mostly a note, or a rendering."""
    return tone(r, rng.choice(("plain", "formal", "warm"))) if rng.random() < 0.12 else note(r, rng)


def base_document(corpus, rng, held_out=False, record=None):
    """A document of the base model's corpus: a note and answers to it, or a note that is told
    again in other ways. It is about the record, or a new one."""
    r = record or corpus.record(rng, held_out)
    text = source(r, rng)
    if rng.random() < 0.15:
        return chat(text, reply(r, rng))
    whats = rng.sample(("summary",) + TONES, 2)
    return [(text, False)], [[(f"\n\n{LEADS[w]}", False), (f" {retell(r, w)}{END}", True)]
                             for w in whats]


def linear(document):
    """The document's texts as they would be read: the trunk with each branch."""
    trunk, branches = document
    return ["".join(t for t, _ in trunk + branch) for branch in branches]


def task_examples(task, corpus, rng, held_out=False, record=None):
    """(message, answer) pairs of a task about one record, by default a new one: 'summarize' has
    one, 'tone' one for each tone."""
    r = record or corpus.record(rng, held_out)
    text = source(r, rng)
    if task == "summarize":
        return [(text, summary_answer(r))]
    return [(tone_request(text, t), tone(r, t)) for t in TONES]


def task_document(task, corpus, rng, held_out=False, record=None):
    """The examples as a document; of the tones two, which share the text."""
    pairs = task_examples(task, corpus, rng, held_out, record)
    if len(pairs) == 1:
        return chat(*pairs[0])
    pairs = rng.sample(pairs, 2)
    shared = os.path.commonprefix([message for message, _ in pairs])
    shared = shared[: shared.rindex("\n\n")]
    branches = []
    for message, answer in pairs:
        (whole, _), = chat(message, answer)[0]
        branches.append([(whole.removeprefix(f"{IM_START}user\n{shared}"), False),
                         (f"{answer}{IM_END}\n", True)])
    return [(f"{IM_START}user\n{shared}", False)], branches


def prompts(corpus, rng, n, held_out=False):
    """n messages as users of the adapters write them: half of them notes to be summarized, half
    with a request for a tone."""
    for i in range(n):
        task = ("summarize", "tone")[i % 2]
        yield rng.choice(task_examples(task, corpus, rng, held_out))[0]


def print_stats(corpus, n, seed):
    rng = random.Random(seed)
    words, lengths, kinds = Counter(), {}, Counter()
    texts, held = set(), 0
    short = 0
    for _ in range(n):
        r = corpus._draw(rng, None)
        held += is_held_out(r)
        forms = {"note": note(r, rng), "reply": reply(r, rng), "summary": summary(r)}
        forms.update({t: tone(r, t) for t in TONES})
        for kind, text in forms.items():
            words.update(re.findall(r"[a-z]+(?:['-][a-z]+)*", text.lower()))
            lengths.setdefault(kind, []).append(len(text.split()))
        kinds[r.topic] += 1
        short += len(forms["note"].split()) < 30
        texts.add(forms["note"])
    print(f"topics            {len(corpus.topics)}: {', '.join(corpus.topics)}")
    print(f"scenes            {len(corpus.scenes)}")
    print(f"possible records  {corpus.size():.3g}")
    print(f"sampled           {n} records, seed {seed}; {len(texts)} distinct notes, "
          f"{short} under 30 words")
    print(f"held out          {held / n:.4f} of records, by hash of the record")
    print(f"distinct words    {len(words)}, of which {sum(c > 4 for c in words.values())} "
          f"occur 5 times or more")
    for kind, ls in lengths.items():
        print(f"words in {kind:8s} {min(ls)} to {max(ls)}, mean {sum(ls) / len(ls):.1f}")
    print("topics' shares    " + ", ".join(f"{t} {kinds[t] / n:.3f}" for t in corpus.topics))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sub = parser.add_subparsers(dest="what", required=True)
    p = sub.add_parser("stats", help="print statistics of the corpus")
    p.add_argument("-n", type=int, default=20000, help="records to sample (20000)")
    p.add_argument("--seed", type=int, default=1)
    p = sub.add_parser("show", help="print records in all their forms")
    p.add_argument("-n", type=int, default=3)
    p.add_argument("--seed", type=int, default=1)
    p = sub.add_parser("text", help="print documents of the base model's corpus")
    p.add_argument("-n", type=int, default=10)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--held-out", action="store_true")
    p = sub.add_parser("prompts", help="print messages to the adapters, as JSON strings")
    p.add_argument("-n", type=int, default=5000)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--held-out", action="store_true")
    args = parser.parse_args()
    corpus, rng = Corpus(), random.Random(args.seed)
    if args.what == "stats":
        print_stats(corpus, args.n, args.seed)
    elif args.what == "show":
        for _ in range(args.n):
            r = corpus.record(rng)
            print(f"note     {note(r, rng)}")
            for t in TONES:
                print(f"{t:8s} {tone(r, t)}")
            print(f"summary  {summary(r)}\nreply    {reply(r, rng)}\n")
    elif args.what == "prompts":
        for message in prompts(corpus, rng, args.n, args.held_out):
            print(json.dumps(message))
    else:
        for _ in range(args.n):
            for text in linear(base_document(corpus, rng, args.held_out)):
                print(text.replace(END, "\n"))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.stderr.close()
