#!/bin/sh
# `sluice synth`: the pack that it writes is that of the GGUF that it writes, in bounded memory, and
# shapes that make no model are refused. Usage: synth.sh SLUICE
. "$(dirname "$0")/common.sh"

# refuse TEXT ARGS...: synth fails with one line that has TEXT in it, and leaves nothing.
refuse() {
    text=$1
    shift
    "$sluice" synth -o none.slu "$@" >out 2>err
    [ $? -eq 1 ] && [ ! -s out ] && [ "$(wc -l <err)" -eq 1 ] && grep -qF -e "$text" err ||
        fail "no '$text': synth $*: $(cat out err)"
    [ -z "$(ls | grep none)" ] || fail "left behind: $(ls)"
}

# Written directly or by way of the GGUF, it is the same pack, for formats with and without a short
# cut, with either codec.
for model in '--arch gpt-oss --expert-type MXFP4' '--arch qwen3moe --expert-type Q4_K' \
    '--arch qwen3moe --expert-type Q5_1 --dense-type F16' '--arch deepseek2-lite --tied'; do
    for codec in raw zstd; do
        # shellcheck disable=SC2086
        "$sluice" synth $model --layers 2 --seed 5 --codec $codec -o a.slu --gguf a.gguf >out ||
            fail "synth $model"
        "$sluice" pack a.gguf --codec $codec -o b.slu >/dev/null || fail "pack of synth $model"
        cmp a.slu b.slu || fail "synth $model --codec $codec differs from its GGUF"
    done
done
# Quantized on the way: out of F16 if no type is told, the rest as it is told.
for options in '--quant q4e' '--quant q3e --quant-error 0.2 --dense-type Q4_0' \
    '--dense-quant q6e --expert-type MXFP4' '--quant q5e --expert-type Q8_0 --dense-quant q6e'; do
    quant=$(echo "$options" | grep -o -e '--[a-z-]*quant[a-z-]* [^ ]*' | tr '\n' ' ')
    # shellcheck disable=SC2086
    "$sluice" synth --arch qwen3moe --layers 1 $options -o a.slu --gguf a.gguf >out ||
        fail "synth $options"
    grep -q '^quantized [1-9][0-9]* weights' out || fail "synth $options: $(cat out)"
    for threads in 1 3; do
        # shellcheck disable=SC2086
        "$sluice" pack a.gguf $quant --threads $threads -o b.slu >b.out || fail "pack $quant"
        cmp a.slu b.slu || fail "synth $options: not what pack makes with $threads threads"
    done
done
# What isn't quantized is as it would be.
cat >mixed.json <<'END'
{"arch": "qwen3moe", "n_layers": 4, "n_embd": 256, "n_ff": 256, "n_experts": 2,
 "expert_type": "Q4_K", "dense_type": "Q4_K", "has_more_bits": true}
END
for options in '' '--quant q4e' '--dense-quant q6e'; do
    # shellcheck disable=SC2086
    "$sluice" synth --shape mixed.json $options -o a.slu >out &&
        "$sluice" inspect a.slu --json --tensors || fail "synth $options"
done >mixed.txt
python3 -c 'import json
plain, experts, dense = (json.loads(line) for line in open("mixed.txt"))
formats = lambda o: {t["name"]: t["format"] for t in o["tensors"]}
assert formats(plain)["blk.3.attn_v.weight"] == "Q6_K", formats(plain)
assert formats(experts) == formats(plain), formats(experts)
assert experts["expert_bytes"] < plain["expert_bytes"] == dense["expert_bytes"]
assert formats(dense)["token_embd.weight"] == "Q4_K", formats(dense)
assert formats(dense)["blk.3.attn_v.weight"].startswith("q6e"), formats(dense)' ||
    fail "other formats came of quantizing"
# A number that is none is found wherever it is, and by whichever thread.
"$sluice" synth --arch olmoe --layers 1 --embd 256 --ff 256 --experts 16 --expert-type F16 \
    --gguf a.gguf >out || fail "synth --expert-type F16"
python3 -c 'import os
f = open("a.gguf", "r+b")
f.seek(os.path.getsize("a.gguf") // 2 // 2 * 2)
f.write(b"\0\x7e")'
for threads in 1 3; do
    "$sluice" pack a.gguf --quant q4e --threads $threads -o none.slu >out 2>err
    [ $? -eq 1 ] && grep -q 'infinite or none' err || fail "$threads threads: $(cat out err)"
    [ -z "$(ls | grep none)" ] || fail "left behind: $(ls)"
done

"$sluice" synth --arch deepseek2-lite --tied --layers 2 --seed 6 -o b.slu >out || fail "seed 6"
cmp -s a.slu b.slu && fail "two seeds give one pack"

# A known shape, cut down: the mix of formats that files called Q4_K_M have.
"$sluice" synth --shape qwen3-30b-a3b --layers 8 --experts 8 --vocab 512 -o q.slu >out ||
    fail "synth --shape"
"$sluice" inspect q.slu --json --tensors >q.json || fail "inspect"
python3 -c 'import json, sys
o = json.load(open("q.json"))
types = {t["name"]: t["format"] for t in o["tensors"]}
c = o["config"]
assert (c["n_embd"], c["n_experts"], c["n_used"]) == (2048, 8, 8), c
assert types["blk.0.attn_v.weight"] == types["output.weight"] == "Q6_K", types
assert types["blk.1.attn_v.weight"] == types["blk.0.attn_q.weight"] == "Q4_K", types' ||
    fail "the shape came out otherwise"

# Its logits are numbers of a sane size, and its experts are used about equally.
"$sluice" eval q.slu --tokens 1,2,3,4,5,6,7,8 --logits logits.f32 || fail "eval"
python3 -c 'import array, math
x = array.array("f", open("logits.f32", "rb").read())
d = math.sqrt(sum(v * v for v in x) / len(x))
assert 1 < d < 4, d' || fail "logits"

# Shapes from files.
cat >shape.json <<'END'
{"arch": "olmoe", "n_layers": 2, "n_embd": 64, "n_experts": 4, "n_used": 2, "expert_type": "Q4_0"}
END
"$sluice" synth --shape shape.json -o s.slu >out || fail "a shape from a file"
"$sluice" inspect s.slu --json | grep -q '"n_experts": *4' || fail "the file's shape is not it"
cat >config.json <<'END'
{"model_type": "qwen3_moe", "architectures": ["X"], "hidden_size": 64, "num_hidden_layers": 1,
 "moe_intermediate_size": 32, "intermediate_size": 999, "num_experts": 4, "num_experts_per_tok": 2,
 "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 400,
 "max_position_embeddings": 128, "sliding_window": null}
END
"$sluice" synth --shape config.json -o s.slu >out || fail "a checkpoint's config.json"
"$sluice" inspect s.slu --json | grep -q '"n_ff_expert": *32' || fail "config.json's shape is not it"
cat >config.json <<'END'
{"model_type": "deepseek_v2", "hidden_size": 256, "num_hidden_layers": 2, "n_routed_experts": 12,
 "num_experts_per_tok": 3, "moe_intermediate_size": 32, "vocab_size": 400}
END
"$sluice" synth --shape config.json -o s.slu >out || fail "DeepSeek's config.json"
"$sluice" inspect s.slu --json | grep -q '"n_experts": *12' || fail "n_routed_experts is passed over"

refuse 'no shape and no file is called gpt-9' --shape gpt-9
bad() {
    printf '%s' "$2" >bad.json
    refuse "$1" --shape bad.json
}
bad "'arch' is missing" '{}'
bad 'not a JSON object' '[1]'
bad 'line 1' '{"arch": "olmoe"'
bad "'n_embed' is no member" '{"arch": "olmoe", "n_embed": 64}'
bad "'n_layers' is not a number" '{"arch": "olmoe", "n_layers": -1}'
bad "'n_layers' is not a number" '{"arch": "olmoe", "n_layers": "2"}'
bad "'n_layers' is not a number" '{"arch": "olmoe", "n_layers": 1e3}'
bad "'is_tied' is neither" '{"arch": "olmoe", "is_tied": 1}'
bad "names no supported architecture" '{"arch": "eliza"}'
bad "names no supported architecture" '{"arch": 3}'
bad 'no weight format' '{"arch": "olmoe", "expert_type": "Q9"}'
bad 'cannot use 5 of 4' '{"arch": "olmoe", "n_experts": 4, "n_used": 5}'
bad 'too large' '{"arch": "olmoe", "n_embd": 16777216}'
bad 'bad.json' "$(head -c 300 "$sluice" | tr '\0' '?')"

# 150 MB of weights, in a process that may map 100 MB.
(ulimit -v 100000 && exec "$sluice" synth --arch qwen3moe --layers 2 --embd 1024 --ff 1024 \
    --experts 48 --vocab 512 --expert-type Q4_0 --codec raw -o big.slu) >out 2>err ||
    [ "${ASAN_OPTIONS+set}" ] || fail "memory: $(cat err)"

[ "$n_failed" -eq 0 ] || { echo "$n_failed checks failed" >&2; exit 1; }
