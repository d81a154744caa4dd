#!/usr/bin/env python3
"""Writes answers.json anew, for a model that was trained anew: what it answers now is what
answers.py expects from then on. Usage: record.py SLUICE DEMO"""
import json
import os
import subprocess
import sys

sluice, demo = sys.argv[1:3]
NOTES = [
    "Hello Martha, the plumber could not repair the old boiler in the basement because of the "
    "missing gasket, so the new date is on Friday at half past nine in the morning. The kettle is "
    "whistling as I write this. Could you leave the spare key under the mat? Thanks, Peter",
    "Hey Walter, good news, the choir rehearsed the solemn requiem in the cathedral on 12 May at "
    "6:45 pm. It all comes down to the radio broadcast. Can you turn the pages, please? See you "
    "soon, Clara",
    "Hi Olga, because of the broken drill, bad news, the optician cannot fit the custom hearing aid "
    "in the annexe on Sunday at eleven o'clock in the morning at all. You would help me a lot if you "
    "could take the painkillers beforehand. Best wishes, Greta",
]
cases = []
for note in NOTES:
    tones = ("plainly", "formally", "warmly", "tersely")
    prompts = [(None, note), ("summarize", note)]
    prompts += [("tone", f"{note}\n\nPut {tone}:") for tone in tones]
    for adapter, prompt in prompts:
        command = [sluice, "run", os.path.join(demo, "sluice-demo.slu"), "-p", prompt, "--ctx",
                   "256", "--json"]
        if adapter:
            command += ["--adapter", os.path.join(demo, adapter + ".sla")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        cases.append({"adapter": adapter, "prompt": prompt,
                      "answer": json.loads(done.stdout)["text"]})
path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "answers.json")
with open(path, "w") as f:
    json.dump(cases, f, indent=1)
    f.write("\n")
