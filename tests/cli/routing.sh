#!/bin/sh
# `--route` and what belongs to it, in all commands that have an engine: what is printed and
# refused, and what stays the same. Usage: routing.sh SLUICE
. "$(dirname "$0")/common.sh"

"$sluice" synth --arch gpt-oss --layers 3 --experts 16 --used 4 --vocab 400 --block-size 8K \
    -o model.slu >/dev/null || exit 99
run() {
    "$sluice" run model.slu --ram 64M --ctx 128 --raw -p 'Once upon a time' -n 24 --json "$@"
}

# A set of everything, and no bias, are exact; less isn't, and says what it missed.
run >exact.json || fail "run"
json exact.json 'o["route"] == "exact" and o["covered_router_weight"] == 1 and o["set_experts"] == 0'
json exact.json 'o["first_token_s"] == o["prefill_s"] > 0 and o["experts_read_per_token"] >= 0'
for options in "--route locked" "--route prefer --route-bias 0 --set-share 0.25" \
    "--route exact --set-share 0.25"; do
    # shellcheck disable=SC2086
    run $options >same.json || fail "run $options"
    python3 -c 'import json, sys
a, b = (json.load(open(f)) for f in ("exact.json", "same.json"))
sys.exit(0 if a["tokens"] == b["tokens"] and b["covered_router_weight"] == 1 else 1)' ||
        fail "$options changes the answer"
done
run --route locked --set-share 0.25 >locked.json || fail "run --route locked"
json locked.json 'o["route"] == "locked" and o["set_experts"] == 12'
json locked.json '0 < o["covered_router_weight"] < 1'
run --route locked --set-share 0.25 --threads 1 --io pread >again.json || fail "run again"
json again.json 'o["tokens"] == json.load(open("locked.json"))["tokens"]'
json again.json 'o["covered_router_weight"] == json.load(open("locked.json"))["covered_router_weight"]'
run --route locked --set-share 0.25 --min-coverage 0.95 >covered.json || fail "run --min-coverage"
json covered.json 'o["covered_router_weight"] > json.load(open("locked.json"))["covered_router_weight"]'
"$sluice" run model.slu --ram 64M --ctx 128 --raw -p Hello -n 8 --route locked --set-share 0.25 \
    --stats >/dev/null 2>stats || fail "run --stats"
grep -q "of the router's weight covered" stats || fail "--stats doesn't tell the coverage"

# Perplexity, plan and bench take it too.
printf 'It was the best of times, it was the worst of times.' >text
"$sluice" eval model.slu --text text --route prefer --set-share 0.25 --json >eval.json || fail "eval"
json eval.json 'o["route"] == "prefer" and 0 < o["covered_router_weight"] <= 1'
"$sluice" plan model.slu --ctx 128 --route locked --set-share 0.5 --json >plan.json || fail "plan"
json plan.json 'o["route"] == "locked" and o["set_experts"] == 24'
least=$(python3 -c 'import json; print(json.load(open("plan.json"))["least_ram_bytes"])')
run --route locked --ram "$least" >least.json || fail "locked in $least bytes"
json least.json "3 <= o['set_experts'] < 48 and o['peak_ledger_bytes'] <= $least"
run --route locked --ram $((least - 1)) >/dev/null 2>err && fail "locked in less than the least"
grep -q "at least $least bytes" err || fail "the least isn't told: $(cat err)"

# The trace's choice is what the router wishes for.
{
    echo '# route_trace v1'
    echo '# model=t arch=t n_layer=3 n_expert=16 n_expert_used=4'
    echo 'phase,step,layer,expert,weight'
    python3 -c 'for t in range(12):
    for l in range(3):
        for k in range(4):
            print(f"{int(t >= 6)},{t},{l},{(k + l) % 16},{[.4, .3, .2, .1][k]}")'
} >same.csv
"$sluice" bench model.slu --ram 64M --ctx 128 --pp 6 --tg 6 --route locked --set-share 0.25 \
    --route-trace same.csv --json >bench.json || fail "bench --route locked"
json bench.json 'o["route"] == "locked" and o["set_experts"] == 12 and o["first_token_s"] > 0'
json bench.json 'o["covered_router_weight"] == 1 and o["prefill_covered_router_weight"] == 1'
json bench.json 'o["prefill_tok_s"] > 0 and o["decode_tok_s"] > 0'
json bench.json 'o["experts_read_per_token"] < 1'
for ahead in auto on off wrong; do
    "$sluice" bench model.slu --ram 64M --ctx 128 --pp 6 --tg 6 --read-ahead $ahead --json \
        >ahead.json || fail "bench --read-ahead $ahead"
    json ahead.json 'o["covered_router_weight"] == 1'
done

# A profile is where bench's set begins, too.
"$sluice" run model.slu --ram 64M --ctx 128 --raw -p Hello -n 8 --save-profile p.prof >/dev/null ||
    fail "--save-profile"
for options in "--profile p.prof" --no-predictor; do
    # shellcheck disable=SC2086
    "$sluice" bench model.slu --ram 64M --ctx 128 --pp 6 --tg 6 --route locked --set-share 0.25 \
        --warm $options --json >bench.json 2>err || fail "bench $options"
    json bench.json '0 < o["covered_router_weight"] <= 1 and o["first_token_s"] > 0'
    [ ! -s err ] || fail "bench $options says $(cat err)"
done
"$sluice" bench model.slu --ram 64M --ctx 128 --pp 6 --tg 6 --profile model.slu --json >bench.json \
    2>err || fail "bench with what is no profile"
grep -q 'no.* a profile.*going on without' err || fail "bench says of that: $(cat err)"

# Mistakes.
refused() {
    status=$1
    shift
    "$sluice" "$@" >out 2>err
    [ $? -eq "$status" ] && [ "$(wc -l <err)" -eq 1 ] || fail "sluice $*: $(cat err)"
}
refused 2 run model.slu -p x --route fast
refused 2 run model.slu -p x --route locked --set-share 2
refused 2 run model.slu -p x --min-coverage -1
refused 2 run model.slu -p x --read-ahead on
refused 1 bench model.slu --io mmap --route locked

[ "$n_failed" -eq 0 ]
