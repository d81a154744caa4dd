#!/usr/bin/env python3
"""The shipped model and its adapters load and answer as recorded, streamed under two fifths of the
weights' size and with all of it in memory. Usage: answers.py SLUICE DEMO"""
import json
import os
import subprocess
import sys

sluice, demo = sys.argv[1:3]
model = os.path.join(demo, "sluice-demo.slu")


def run(*args):
    done = subprocess.run([sluice, *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"FAILED: {' '.join(args)}: {done.stderr}")
    return json.loads(done.stdout)


about = run("inspect", model, "--json")
unpacked = sum(f["bytes"] for f in about["formats"])
if os.path.getsize(model) > 20_000_000:
    sys.exit(f"FAILED: {model} has {os.path.getsize(model)} bytes, over 20 MB")
failed = 0
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "answers.json")) as f:
    recorded = json.load(f)
for case in recorded:
    options = ["run", model, "-p", case["prompt"], "--ctx", "256", "--threads", "2", "--json"]
    if case["adapter"]:
        options += ["--adapter", os.path.join(demo, case["adapter"] + ".sla")]
    for ram in (unpacked * 2 // 5, 1 << 30):
        got = run(*options, "--ram", str(ram))
        if got["text"] != case["answer"] or got["peak_ledger_bytes"] > ram:
            failed += 1
            print(f"FAILED: {case['adapter'] or 'base'} with {ram} bytes, of which it used "
                  f"{got['peak_ledger_bytes']}:\n  wanted {case['answer']}\n  got    {got['text']}")
print(f"{2 * len(recorded)} answers, {failed} failed")
sys.exit(failed > 0)
