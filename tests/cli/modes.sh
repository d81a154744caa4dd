#!/bin/sh
# `bench/predict`: both of its tables, their JSON and plots, on a small random model with an adapter.
# That it runs and says what it should; never how fast. Usage: modes.sh SLUICE PREDICT SYNTH_ADAPTER
predict=$(realpath "$2")
synth_adapter=$(realpath "$3")
. "$(dirname "$0")/common.sh"

"$sluice" synth --gguf model.gguf --arch qwen3moe --layers 2 --embd 64 --ff 64 --experts 8 --used 2 \
    --vocab 320 --ctx 512 >/dev/null && "$sluice" pack model.gguf -o model.slu >/dev/null || exit 99
"$synth_adapter" a.gguf --base model.gguf --targets all --rank 4 --seed 3 &&
    "$sluice" adapter import a.gguf -o short.sla >/dev/null || exit 99
for i in 1 2 3 4 5 6 7 8 9 10 11 12; do
    echo "\"a prompt that has the number $i\""
done >train.jsonl
"$sluice" calibrate model.slu --prompts train.jsonl --n-answer 4 --trace train.slt >/dev/null || exit 99
right=$("$sluice" run model.slu -p 'What now?' -n 6 --ctx 512 --adapter short.sla --json |
    python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["text"]))') || exit 99
cat >modes.jsonl <<EOF
{"prompt": "What now?", "adapter": "short", "expected": $right}
{"prompt": "And then?", "adapter": "short", "expected": "nothing of the kind"}
"no adapter, and no reference"
EOF

# Every mode and predictor once a size; exact is right where it should be, and covers everything.
modes() {
    "$predict" model.slu --modes modes.jsonl --adapters-dir . --train train.slt --n-answer 6 \
        --shares 1,.5 --biases 1 --coverages .9 "$@"
}
modes --json --svg modes.svg >modes.json 2>err || fail "--modes: $(cat err)"
json modes.json 'o["messages"] == 3 and o["exact_right"] == {"short": [1, 2], "base": [0, 0]}'
json modes.json 'len(o["modes"]) == 2 * (1 + 1 + 6 + 1)'
json modes.json '{"-", "hottest", "linear", "network", "profile", "hindsight"} == {
    r["predictor"] for r in o["modes"] if r["mode"] == "locked"}'
# With a set of everything, and in exact, nothing is lost.
json modes.json 'all(r["same"] == 1 and r["right"] == {"short": .5} and r["covered"] == 1 and
    r["kl"] < 1e-5 and not r["breaks"]
    for r in o["modes"] if r["mode"] == "exact" or r["set_share"] == 1 and r["mode"] == "locked")'
json modes.json 'all(0 < r["covered"] <= 1 and r["first_token_ms"] > 0 and r["perplexity"] >= 1
    for r in o["modes"])'
json modes.json 'len({r["ram_bytes"] for r in o["modes"]}) == 2'
python3 -c 'import sys, xml.dom.minidom
svg = xml.dom.minidom.parse("modes.svg")
sys.exit(len(svg.getElementsByTagName("polyline")) != 4 * 9)' || fail "the plot of modes"
modes >modes.txt || fail "--modes as a table"
grep -q '^locked *network *least 0.9 *50.0%' modes.txt || fail "its table: $(cat modes.txt)"
grep -q 'breaks with a set of\|holds with all' modes.txt || fail "it doesn't say what breaks"

# Rankings: coverage and recall.
"$predict" model.slu train.slt train.slt --json --svg rankings.svg >rankings.json || fail "rankings"
json rankings.json 'len(o["rows"]) == 24 and all(0 < r["recall"] <= 1 for r in o["rows"])'
python3 -c 'import sys, xml.dom.minidom
svg = xml.dom.minidom.parse("rankings.svg")
sys.exit(len(svg.getElementsByTagName("polyline")) != 2 * 4)' || fail "the plot of rankings"

# Mistakes.
for options in "" "model.slu" "model.slu --modes" "model.slu --modes x --shares 2" \
    "model.slu --modes x --shares ." "model.slu --modes x --n 0" "model.slu --modes x --frob 1"; do
    # shellcheck disable=SC2086
    "$predict" $options >out 2>err
    [ $? -eq 2 ] && grep -q '^usage' err || fail "predict $options: $(cat err)"
done
echo '{"prompt": 1}' >bad.jsonl
"$predict" model.slu --modes bad.jsonl >out 2>err
[ $? -eq 1 ] && grep -q 'bad.jsonl: line 1' err || fail "a bad line: $(cat err)"
"$predict" model.slu --modes none.jsonl >out 2>err
[ $? -eq 1 ] && grep -q 'none.jsonl: cannot be read' err || fail "no messages: $(cat err)"
echo '{"prompt": "x", "adapter": "none"}' >bad.jsonl
"$predict" model.slu --modes bad.jsonl --adapters-dir . >out 2>err
[ $? -eq 1 ] && grep -q 'none' err || fail "no adapter: $(cat err)"
[ "$n_failed" -eq 0 ]
