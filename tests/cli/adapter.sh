#!/bin/sh
# `sluice adapter`: imports of both kinds, what inspecting says, mistakes and refusals.
# Usage: adapter.sh SLUICE SYNTH_ADAPTER
synth_adapter=$(realpath "$2")
. "$(dirname "$0")/common.sh"

# refuse STATUS TEXT ARGS...: one line on stderr, with TEXT in it, and nothing on stdout.
refuse() {
    status=$1 text=$2
    shift 2
    "$sluice" adapter "$@" >out 2>err
    got=$?
    [ $got -eq "$status" ] || fail "exit status $got, not $status: adapter $*"
    grep -qF -e "$text" err || fail "no '$text' but $(cat err): adapter $*"
    [ "$(wc -l <err)" -eq 1 ] && [ ! -s out ] || fail "not one line on stderr: adapter $*"
}

"$sluice" synth --gguf model.gguf --arch llama --layers 2 --embd 64 --experts 4 --used 2 --vocab 320 >/dev/null ||
    exit 99
"$sluice" pack model.gguf -o model.slu >/dev/null || exit 99
"$synth_adapter" a.gguf --base model.gguf --targets all --rank 6 --seed 5 || fail "a GGUF LoRA"
"$synth_adapter" a --base model.gguf --targets all --rank 6 --seed 5 --format peft || fail "PEFT"

# The three forms make the same adapter, but for the order of rows, which each tells.
"$sluice" adapter import a.gguf -o gguf.sla --name formal --description 'In a suit.' >out ||
    fail "import a GGUF"
grep -q '^name  *formal$' out || fail "import tells $(cat out)"
"$sluice" adapter import a -o dir.sla --base model.slu >/dev/null || fail "import a folder"
"$sluice" adapter import a/adapter_model.safetensors -o file.sla >/dev/null || fail "import a file"
for name in gguf dir file; do
    "$sluice" adapter inspect $name.sla --json >$name.json || fail "inspect $name.sla"
    json $name.json 'o["rank_min"] == o["rank_max"] == 6 and o["n_layers"] == 2'
    json $name.json '{"attn_q", "attn_output", "ffn_gate_inp", "ffn_down_exps", "output"} < set(o["targets"])'
    json $name.json 'o["n_matrices"] == 2 * 8 + 2 and o["memory_bytes"] > 4096'
done
json gguf.json 'o["name"] == "formal" and o["description"] == "In a suit."'
json gguf.json 'o["architecture"] == "llama" and not o["is_hf_order"] and not o["base_fingerprint"]'
json dir.json 'o["name"] == "a" and o["architecture"] == "llama" and o["is_hf_order"]'
json file.json 'o["name"] == "adapter_model" and o["architecture"] == ""'
"$sluice" inspect model.slu --json >model.json
fingerprint=$(python3 -c 'import json; print(json.load(open("model.json"))["fingerprint"])')
json dir.json "o['base_fingerprint'] == '$fingerprint'"
"$sluice" adapter inspect dir.sla | grep -q "^base .*$fingerprint" || fail "inspect's text"
[ -z "$(find . -name '*.tmp*')" ] || fail "temporary files are left: $(ls)"

# Help, mistakes and refusals.
"$sluice" adapter --help | grep -q '^Usage: sluice adapter import' || fail "adapter --help"
"$sluice" help adapter | grep -q 'inspect NAME.sla' || fail "help adapter"
"$sluice" adapter import --help | grep -q -e '--base MODEL.slu' || fail "adapter import --help"
"$sluice" adapter inspect --help | grep -q -e --json || fail "adapter inspect --help"
refuse 2 'import or inspect is missing'
refuse 2 "unknown command 'frob'" frob
refuse 2 "unknown option '--frob'" --frob
refuse 2 '-o NAME.sla is missing' import a
refuse 2 'is missing' import -o b.sla
refuse 2 'is missing' inspect
refuse 1 'cannot be opened' import none -o b.sla
refuse 1 'cannot be opened' inspect none.sla
refuse 1 'is no adapter of sluice' inspect model.slu
refuse 1 'general.type' import model.gguf -o b.sla
refuse 1 'is no pack' import a -o b.sla --base model.gguf
sed 's/"use_dora": false/"use_dora": true/' a/adapter_config.json >config &&
    mv config a/adapter_config.json
refuse 1 'DoRA' import a -o b.sla
head -c 5000 gguf.sla >short.sla
refuse 1 'truncated' inspect short.sla
[ ! -e b.sla ] || fail "a refused import left a file"

refuse 2 'gguf.sla would overwrite itself' import gguf.sla -o ./gguf.sla
refuse 2 'would overwrite model.slu' import a.gguf -o model.slu --base model.slu
"$sluice" adapter inspect gguf.sla >/dev/null || fail "a refused import touched gguf.sla"

# run_with STATUS TEXT ARGS...: `sluice run` with these options.
run_with() {
    status=$1 text=$2
    shift 2
    "$sluice" run model.slu --raw -p x -n 2 "$@" >out 2>err
    got=$?
    [ $got -eq "$status" ] || fail "exit status $got, not $status: run $*"
    [ "$status" -eq 0 ] && return
    grep -qF -e "$text" err || fail "no '$text' but $(cat err): run $*"
    [ "$(wc -l <err)" -eq 1 ] && [ ! -s out ] || fail "not one line on stderr: run $*"
}

# What experts take, and what is left of the file without them.
json gguf.json 'o["expert_blocks"] == 8 and o["expert_bytes"] == 8 * o["expert_block_bytes"] > 8192'
"$sluice" adapter inspect gguf.sla | grep -q '^experts .* in 8 blocks' || fail "inspect's experts"

# Experts that the adapters' share has no room for are streamed, and the answer is the same.
"$synth_adapter" big.gguf --base model.gguf --targets experts --rank 512 --gain 3 &&
    "$sluice" adapter import big.gguf -o big.sla >/dev/null || fail "a large adapter"
"$sluice" run model.slu --raw -p x -n 8 --adapter big.sla --stats >whole 2>whole.err ||
    fail "run with a large adapter: $(cat whole.err)"
"$sluice" run model.slu --raw -p x -n 8 --adapter big.sla --adapter-ram 7M --stats >part 2>part.err ||
    fail "run with a part of an adapter: $(cat part.err)"
"$sluice" run model.slu --raw -p x -n 8 >none 2>/dev/null
cmp -s whole part || fail "a streamed adapter makes another answer"
cmp -s whole none && fail "the adapter changes nothing"
grep -q '^adapters  *1, 0 with experts streamed' whole.err || fail "stats tell $(cat whole.err)"
grep -q '^adapters  *1, 1 with experts streamed' part.err || fail "stats tell $(cat part.err)"
run_with 1 'even with its experts streamed' --adapter big.sla --adapter-ram 1M

# Names and scales.
mkdir many && cp gguf.sla many/formal.sla && cp gguf.sla many/a:b.sla && cp gguf.sla many/x:2.sla
mkdir many/folder.sla && mkfifo many/pipe.sla
run_with 0 '' --adapter gguf.sla
run_with 0 '' --adapter gguf.sla:-0.5 --adapter ./many/x:2.sla --adapter gguf.sla:2
run_with 0 '' --adapters-dir many --adapter formal --adapter a:b --adapter x:2:1
run_with 1 'many/x.sla: cannot be opened' --adapters-dir many --adapter x:2
run_with 1 'many/folder.sla: is a directory' --adapters-dir many --adapter folder
run_with 1 'many/pipe.sla: is a device or pipe' --adapters-dir many --adapter pipe
run_with 1 'name is empty' --adapters-dir many --adapter :2
run_with 1 'is no path' --adapter formal
for scale in '' x 1,5 1x; do
    run_with 1 "the scale '$scale' of adapter gguf.sla is not a number" --adapter gguf.sla:$scale
done
for scale in nan inf -inf 1e999; do
    run_with 1 'the scale of adapter gguf.sla is not a finite number' --adapter gguf.sla:$scale
done
run_with 2 'can be given 8 times' $(printf -- '--adapter gguf.sla %.0s' 1 2 3 4 5 6 7 8 9)

# Numbers that grow beyond all bounds are an error, not a perplexity.
printf 'a text' >text
"$sluice" eval model.slu --text text --adapter gguf.sla:1e15 >out 2>err
[ $? -eq 1 ] && grep -q 'its logits are not numbers' err || fail "a perplexity of $(cat out err)"

# An adapter that is named twice is in memory once.
"$sluice" plan model.slu --json --adapter gguf.sla >once.json || fail "plan"
"$sluice" plan model.slu --json --adapter gguf.sla --adapter gguf.sla:2 >twice.json || fail "plan"
cmp once.json twice.json || fail "an adapter named twice is planned for twice"

[ "$n_failed" -eq 0 ] || { echo "$n_failed checks failed" >&2; exit 1; }
