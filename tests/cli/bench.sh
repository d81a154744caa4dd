#!/bin/sh
# `sluice bench`: its fields and how they relate, recorded routing, and refusals. No figure is
# compared with another machine's. Usage: bench.sh SLUICE
. "$(dirname "$0")/common.sh"

"$sluice" synth --arch qwen3moe --layers 3 --experts 16 --used 4 --vocab 400 --block-size 8K \
    -o model.slu >/dev/null || exit 99
"$sluice" bench model.slu --ram 64M --ctx 128 --pp 5 --tg 7 --threads 2 --json >router.json ||
    fail "bench"
json router.json 'o["n_prompt"] == 5 and o["n_generated"] == 7 and o["routing"] == "router"'
json router.json 'all(o[k] > 0 for k in ["prefill_tok_s", "decode_tok_s", "bound_tok_s",
    "prefill_bound_tok_s", "efficiency", "prefill_efficiency", "flash_gb_s", "ram_gb_s",
    "unpack_gb_s", "flash_bytes_per_token", "prefill_flash_bytes_per_token"])'
json router.json 'abs(o["efficiency"] - o["decode_tok_s"] / o["bound_tok_s"]) < 1e-3 * o["efficiency"]'
# So few dense weights are in the caches: memory isn't measured between tokens.
json router.json 'o["prefill_ram_gb_s"] == o["ram_gb_s"]'
json router.json 'o["bound_by"] in ("flash", "unpack", "ram", "arithmetic")'
json router.json '0 <= o["cache_hit_rate"] <= 1 and 0 < o["peak_ledger_bytes"] <= o["ram_bytes"]'
json router.json 'o["threads"] == 2 and o["ctx"] == 128 and o["io"] in ("io_uring", "pread")'
json router.json 'o["kernels"] and o["architecture"] == "qwen3moe" and o["model"] == "model.slu"'
for phase in prefill decode; do
    json router.json "abs(sum(v for k, v in o['$phase'].items() if k.endswith('_s') and
        k not in ('wall_s', 'achieved_flash_gb_s') and not k.startswith('bound')) -
        o['$phase']['wall_s']) < 1e-6"
    json router.json "len(o['$phase']['threads']) == 2"
done
json router.json 'abs(o["flash_bytes_per_token"] * 7 - o["decode"]["flash_bytes"]) < 1'
json router.json 'o["decode"]["cache_hits"] + o["decode"]["cache_misses"] == 7 * o["token_blocks"]'

# Warm, with everything resident: nothing is read but embedding rows, and only the second pass counts.
"$sluice" bench model.slu --ram 64M --ctx 128 --pp 5 --tg 7 --warm --json >warm.json ||
    fail "bench --warm"
json warm.json 'o["warm"] and o["n_prompt"] == 5 and o["n_generated"] == 7'
json warm.json 'o["cache_hit_rate"] == 1 and o["prefill_cache_hit_rate"] == 1'
json warm.json 'o["flash_bytes_per_token"] <= 8192 and o["decode"]["n_chunks"] == 7'

# Through a mapping: the same tokens, no slots, no blocks counted.
"$sluice" bench model.slu --ram 64M --ctx 128 --pp 5 --tg 7 --io mmap --json >mmap.json ||
    fail "bench --io mmap"
json mmap.json 'o["io"] == "mmap" and o["n_slots"] == 0 and o["decode"]["cache_misses"] == 0'
json mmap.json 'o["decode_tok_s"] > 0 and o["major_faults"] >= 0 and o["n_generated"] == 7'
json mmap.json "$(python3 -c 'import json
o = json.load(open("router.json"))
print("o[\"decode\"][\"expert_macs\"] ==", o["decode"]["expert_macs"])')"

# A trace that always goes to the same experts: after the first token, everything is in the cache.
{
    printf '# route_trace v1\n# model=m arch=a n_layer=3 n_expert=16 n_expert_used=4\n'
    echo phase,step,layer,slot,expert,weight
    for phase in 0 1; do
        for layer in 0 1 2; do
            for slot in 0 1 2 3; do
                echo "$phase,0,$layer,$slot,$((slot + 3)),0.25"
            done
        done
    done
} >same.csv
"$sluice" bench model.slu --ram 64M --pp 3 --tg 4 --route-trace same.csv --json >trace.json ||
    fail "bench --route-trace"
json trace.json 'o["routing"] == "trace same.csv" and o["cache_hit_rate"] == 1'
json trace.json 'o["prefill"]["cache_misses"] == o["token_blocks"]'

json trace.json 'o["route_guess"] == 0'
"$sluice" bench model.slu --ram 64M --pp 3 --tg 4 --route-trace same.csv >text || fail "bench in text"
for word in 'recorded, from same.csv' 'GB/s' '^prefill ' '^decode ' 'bound by'; do
    grep -q "$word" text || fail "no '$word': $(cat text)"
done

# Experts that change from token to token, with room for two layers' of them: look-ahead
# foresees what it is told of, and with next to nothing true in that, next to nothing.
{
    head -3 same.csv
    for step in 0 1 2 3 4 5 6 7; do
        for layer in 0 1 2; do
            for slot in 0 1 2 3; do
                echo "1,$step,$layer,$slot,$(((7 * step + 5 * layer + slot) % 16)),0.25"
            done
        done
    done
} >walk.csv
for share in 1 .001; do
    "$sluice" bench model.slu --ram 3700K --ctx 128 --pp 3 --tg 8 --read-ahead on --route-trace walk.csv \
        --route-guess $share --json >guess$share.json || fail "bench --route-guess $share"
    json guess$share.json "o['route_guess'] == $share"
done
json guess1.json 'o["decode"]["guesses"] > 4'
json guess1.json 'o["decode"]["guesses_foreseen"] > 0.7 * o["decode"]["guesses"]'
json guess.001.json 'o["decode"]["guesses_foreseen"] <= 1'
"$sluice" bench model.slu --ram 64M --pp 3 --tg 4 --route-trace same.csv --route-guess .72 >text ||
    fail "bench --route-guess in text"
grep -q 'look-ahead is told 72 % of it rightly' text || fail "what look-ahead is told: $(cat text)"

# refuse TEXT ARGS...
refuse() {
    text=$1
    shift
    "$sluice" bench "$@" >out 2>err
    [ $? -eq 1 ] && [ ! -s out ] && [ "$(wc -l <err)" -eq 1 ] && grep -qF -e "$text" err ||
        fail "no '$text': bench $*: $(cat out err)"
}
echo nonsense >bad.csv
refuse bad.csv model.slu --ram 64M --route-trace bad.csv
refuse none.csv model.slu --ram 64M --route-trace none.csv
refuse 'give --route-trace' model.slu --ram 64M --route-guess 0
refuse 'needs at least' model.slu --ram 1M
refuse bad.csv bad.csv
refuse "don't fit a context" model.slu --ram 64M --ctx 16 --pp 20

[ "$n_failed" -eq 0 ] || { echo "$n_failed checks failed" >&2; exit 1; }
