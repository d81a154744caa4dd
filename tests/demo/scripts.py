#!/usr/bin/env python3
"""tools/train as a user meets it: what is wrong is said in a sentence, evaluate's JSON has its
figures, a training that is killed leaves no process behind, and one that is resumed ends as one
that never stopped. Usage: scripts.py SLUICE TOOLS"""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

sluice, tools = map(os.path.abspath, sys.argv[1:3])
environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def run(script, *args):
    return subprocess.run([sys.executable, os.path.join(tools, script), *args],
                          capture_output=True, text=True, env=environment, cwd="/")


def check(ok, what):
    if not ok:
        sys.exit(f"FAILED: {what}")


def is_sentence(done):
    return done.returncode not in (0, -6, -11) and done.stderr and "Traceback" not in done.stderr


# evaluate, from another folder than its own.
done = run("evaluate", "--sluice", sluice, "--n", "1", "--json")
check(done.returncode == 0, f"evaluate: {done.stderr}")
result = json.loads(done.stdout)
for name in ("summarize_exact", "tone_exact", "base_summarize_exact", "base_tone_exact"):
    check(isinstance(result[name], float) and 0 <= result[name] <= 1, f"{name}: {result}")
for wrong in (("--sluice", "/nonexistent/sluice"), ("--sluice", sluice, "--n", "0"),
              ("--sluice", sluice, "--ram", "1M"), ("--sluice", sluice, "--model", "/nonexistent")):
    done = run("evaluate", *wrong)
    check(is_sentence(done), f"evaluate {' '.join(wrong)}: {done.stderr}")

# Without PyTorch.
if any(importlib.util.find_spec(name) is None for name in ("torch", "numpy")):
    for script in ("train.py", "adapt.py", "export.py", "tables.py"):
        done = run(script, "--help")
        check(is_sentence(done) and "python3-torch" in done.stderr, f"{script}: {done.stderr}")
    print("scripts without PyTorch say so")
    sys.exit(0)


def workers(folder):
    """The processes that train into the folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                if folder.encode() in f.read():
                    found.append(int(pid))
        except OSError:  # it has ended
            pass
    return found


def until(condition):
    for _ in range(300):
        if condition():
            return True
        time.sleep(0.1)
    return False


# A training of next to nothing. Killed as a whole, or in one worker, all of it ends.
with tempfile.TemporaryDirectory() as folder:
    vocab, tiny = os.path.join(folder, "vocab.json"), {
        "layers": 1, "dim": 32, "heads": 1, "kv_heads": 1, "experts": 4, "width": 8}
    done = run("bpe.py", "-o", vocab, "--vocab", "300", "--documents", "20")
    check(done.returncode == 0, f"bpe.py: {done.stderr}")
    for victim in ("parent", "worker"):
        out = os.path.join(folder, victim)
        training = subprocess.Popen(
            [sys.executable, os.path.join(tools, "train.py"), "--out", out, "--vocab", vocab,
             "--steps", "1000000", "--save-every", "5", "--tokens", "400", "--config",
             json.dumps(tiny)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment)
        try:
            check(until(lambda: os.path.exists(os.path.join(out, "last.pt"))), "no checkpoint")
            children = [p for p in workers(out) if p != training.pid]
            check(len(children) == 2, f"{len(children)} workers")
            os.kill(training.pid if victim == "parent" else children[0], signal.SIGKILL)
            check(until(lambda: training.poll() is not None), "the training goes on")
            check(training.returncode != 0, "the training says that all went well")
            check(until(lambda: not workers(out)), "workers go on alone")
        finally:
            training.kill()
            training.wait()
            for p in workers(out):
                os.kill(p, signal.SIGKILL)

    # A training that topics get sets of experts in, cut in two there and after, ends bit for bit
    # as one that wasn't.
    def train(out, steps, *options):
        done = run("train.py", "--out", out, "--vocab", vocab, "--steps", str(steps), "--decay", "0",
                   "--set-from", "2", "--tokens", "400", "--config", json.dumps(tiny), *options)
        check(done.returncode == 0, f"train.py: {done.stderr}")
        return os.path.join(out, "last.pt")

    import torch
    whole = torch.load(train(os.path.join(folder, "whole"), 6))
    for steps in (2, 4, 6):
        last = train(os.path.join(folder, "parts"), steps)
    parts = torch.load(last)
    for name in ("params", "m", "v", "share", "members"):
        check(torch.equal(whole[name], parts[name]), f"{name} of a resumed training differ")
    sizes = whole["members"].sum(2)
    check(bool((sizes == tiny["experts"] // 2).all()), f"sets of {sizes} experts")
print("scripts, a killed training and a resumed one")
