#!/bin/sh
# The commands on a small random model: what they print, and that neither budget, back end, threads
# nor codec change it. Usage: model.sh SLUICE
. "$(dirname "$0")/common.sh"

"$sluice" synth --gguf model.gguf --arch qwen3moe --layers 3 --embd 64 --ff 96 --experts 16 --used 4 \
    --vocab 320 --ctx 256 >/dev/null || exit 99
"$sluice" pack model.gguf -o model.slu --block-size 16K >pack.txt || fail "pack"
grep -q 'compression saved' pack.txt || fail "pack says nothing of compression: $(cat pack.txt)"
"$sluice" pack model.gguf -o raw.slu --codec raw --block-size 16K >/dev/null || fail "pack --codec raw"
"$sluice" pack model.gguf -o slow.slu --codec auto --flash-mbps 0.1 --cores 2 --block-size 16K \
    >slow.txt || fail "pack --codec auto"
"$sluice" pack model.gguf -o fast.slu --codec auto --flash-mbps 10000000 --block-size 16K \
    >fast.txt || fail "pack --codec auto --flash-mbps 10000000"
grep -q '^codec auto: 100 % of the blocks' slow.txt || fail "slow flash: $(cat slow.txt)"
grep -q '^codec auto: 0 % of the blocks' fast.txt || fail "fast flash: $(cat fast.txt)"
[ -z "$(find . -name '*.tmp*' -o -name '*.rate*')" ] || fail "temporary files are left: $(ls)"

# inspect tells the same of both, but for the codec.
"$sluice" inspect model.gguf --json --tensors >gguf.json || fail "inspect a GGUF"
"$sluice" inspect model.slu --json --tensors >slu.json || fail "inspect a pack"
"$sluice" inspect raw.slu --json >raw.json || fail "inspect a raw pack"
for file in gguf slu raw; do
    json $file.json 'o["architecture"] == "qwen3moe" and o["is_supported"]'
    json $file.json 'o["config"]["n_layers"] == 3 and o["config"]["n_experts"] == 16'
done
json slu.json 'o["kind"] == "pack" and o["n_blocks_compressed"] > 0 and o["codec_ratio"] < 1'
json raw.json 'o["n_blocks_compressed"] == 0 and o["codec_ratio"] == 1'
for file in slow fast; do
    "$sluice" inspect $file.slu --json >$file.json || fail "inspect of $file"
    "$sluice" inspect $file.slu | grep -q '^codec  *auto, ' || fail "inspect says nothing of auto"
done
json slow.json 'o["codec_auto"]["share"] == 1 and o["codec_auto"]["cores"] == 2'
json slow.json 'o["n_blocks_compressed"] == json.load(open("slu.json"))["n_blocks_compressed"]'
json fast.json 'o["codec_auto"]["share"] == 0 and o["n_blocks_compressed"] == 0'
json slu.json '"codec_auto" not in o'
json gguf.json 'any(t["name"] == "blk.0.attn_q.weight" for t in o["tensors"])'
"$sluice" inspect model.slu | grep -q '^experts .*16 in each layer, 4 used' || fail "inspect's text"

# plan: what it calls the least does, and one byte less is refused with that number.
"$sluice" plan model.slu --ram 64M --json >plan.json || fail "plan"
json plan.json 'o["fits"] and sum(l["bytes"] for l in o["lines"]) == o["total_bytes"]'
json plan.json '0 < o["least_ram_bytes"] <= o["total_bytes"] <= o["ram_bytes"]'
least=$(python3 -c 'import json; print(json.load(open("plan.json"))["least_ram_bytes"])')
"$sluice" plan model.slu --ram "$least" >/dev/null || fail "plan --ram $least"
"$sluice" plan model.slu --ram $((least - 1)) --json >less.json 2>err
[ $? -eq 1 ] || fail "plan --ram less than the least succeeds"
json less.json 'not o["fits"]'
grep -q "$least" err || fail "plan doesn't name what would do: $(cat err)"
"$sluice" run model.slu -p a -n 1 --ram $((least - 1)) >out 2>err
[ $? -eq 1 ] && [ ! -s out ] || fail "run --ram less than the least succeeds"
grep -q "$least" err || fail "run doesn't name what would do: $(cat err)"

# run: one answer, however it is computed.
ask() {
    "$sluice" run "$@" -p 'Once upon' --raw -n 24
}
ask model.slu >expected || fail "run"
[ -s expected ] || fail "run prints nothing"
ask model.slu --ram "$least" >got && cmp expected got || fail "--ram $least changes the answer"
ask model.slu --min-cache >got && cmp expected got || fail "--min-cache changes the answer"
ask model.slu --io pread >got && cmp expected got || fail "--io pread changes the answer"
ask model.slu --threads 1 >got && cmp expected got || fail "--threads 1 changes the answer"
ask raw.slu >got && cmp expected got || fail "--codec raw changes the answer"
ask slow.slu >got && cmp expected got || fail "--codec auto for slow flash changes the answer"
ask fast.slu >got && cmp expected got || fail "--codec auto for fast flash changes the answer"
printf 'Once upon' >prompt
"$sluice" run model.slu --file prompt --raw -n 24 >got && cmp expected got || fail "--file"
"$sluice" run model.slu -p - --raw -n24 <prompt >got && cmp expected got || fail "-p -"
ask model.slu --stats >got 2>stats && cmp expected got || fail "--stats changes the answer"
grep -q 'tokens/s' stats || fail "--stats tells nothing: $(cat stats)"
ask model.slu --json --ram "$least" >run.json || fail "run --json"
json run.json 'len(o["tokens"]) == o["n_generated"] == 24 and o["stop"] == "length"'
json run.json 'o["text"] == open("expected", newline="").read()'
json run.json 'o["prefill_tok_s"] > 0 and o["decode_tok_s"] > 0 and o["flash_bytes"] > 0'
json run.json "0 <= o['cache_hit_rate'] <= 1 and 0 < o['peak_ledger_bytes'] <= $least"

# A seed decides; without a temperature it doesn't matter.
ask model.slu --temp 2 --seed 7 >one && ask model.slu --temp 2 --seed 7 >two && cmp one two ||
    fail "one seed gives two answers"
ask model.slu --temp 2 --seed 8 >two && cmp -s one two && fail "two seeds give one answer"
ask model.slu --temp 2 --seed 8 --top-k 1 >two && cmp expected two || fail "--top-k 1 isn't greedy"
ask model.slu --seed 8 >two && cmp expected two || fail "--seed matters when greedy"

# eval: logits of each position, and the same continuation as run's.
ids=$(python3 -c 'import json
o = json.load(open("run.json"))
print(",".join(map(str, o["tokens"])))')
"$sluice" eval model.slu --tokens 5,6,7 --logits all.f32 --greedy 4 >greedy || fail "eval"
[ "$(wc -c <all.f32)" -eq $((3 * 320 * 4)) ] || fail "logits have $(wc -c <all.f32) bytes"
"$sluice" eval model.slu --tokens "5 6 7" --greedy 4 --ram "$least" >got && cmp greedy got ||
    fail "eval --greedy without --logits differs"
first=$(cut -d' ' -f1 greedy) rest=$(cut -d' ' -f2- greedy)
[ "$("$sluice" eval model.slu --tokens "5,6,7,$first" --greedy 3)" = "$rest" ] ||
    fail "a continuation differs when resumed"
python3 -c 'import array, sys
row = array.array("f", open("all.f32", "rb").read())[-320:]
sys.exit(row.index(max(row)) != int(sys.argv[1]))' "$first" || fail "the first id isn't the likeliest"
"$sluice" eval model.slu --tokens 5,6,7 --greedy 4 --json >eval.json || fail "eval --json"
json eval.json 'o["greedy"] == [int(i) for i in open("greedy").read().split()]'
"$sluice" eval model.slu --tokens 5,320 --logits no.f32 2>err
[ $? -eq 1 ] && [ ! -e no.f32 ] || fail "an id outside the vocabulary is computed"
grep -q 320 err || fail "an id outside the vocabulary isn't named"
"$sluice" eval model.slu --tokens "$ids" --greedy 300 --ctx 64 >out 2>err
[ $? -eq 1 ] && [ ! -s out ] || fail "more ids than the context holds"

# Perplexity of a random model is near its vocabulary's size, in one window or several.
head -c 200 "$sluice" | od -c | head -n 8 >text
"$sluice" eval model.slu --text text --json >ppl.json || fail "eval --text"
json ppl.json '32 < o["perplexity"] < 32000 and o["n_scored"] > 50'
"$sluice" eval model.slu --text text --ctx 32 >ppl || fail "eval --text --ctx 32"
grep -q '^perplexity .* windows of 32$' ppl || fail "eval --text prints $(cat ppl)"
: >empty
"$sluice" eval model.slu --text empty 2>err && fail "an empty text has a perplexity"

# tokenize takes a pack as well as a GGUF, and decodes what it encodes.
printf 'Hello, \303\244 world' >text
"$sluice" tokenize model.slu <text >ids && "$sluice" tokenize model.gguf <text >got &&
    cmp ids got || fail "pack and GGUF tokenize differently"
"$sluice" tokenize model.slu --decode <ids >got && cmp text got || fail "--decode"
"$sluice" tokenize model.slu </dev/null >ids && "$sluice" tokenize model.slu --decode <ids >got &&
    [ ! -s got ] || fail "--decode of no ids"

# A file that may not grow further is an error as a full disk is: one line, nothing left.
for size in 1 100; do
    (ulimit -f $size && exec "$sluice" pack model.gguf -o limited.slu) >/dev/null 2>err
    [ $? -eq 1 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q 'limited.slu: .*too large' err ||
        fail "pack past ulimit -f $size: $(cat err)"
done
(ulimit -f 1 && exec "$sluice" eval model.slu --tokens 1,2,3 --logits limited.f32) >/dev/null 2>err
[ $? -eq 1 ] && grep -q 'limited.f32: .*too large' err || fail "eval past ulimit -f: $(cat err)"
[ -z "$(ls | grep limited)" ] || fail "left behind by a limit: $(ls)"

# A pack that is cut short or overwritten while it is in use ends the generation with one line.
for harm in ': >cut.slu' 'dd if=/dev/zero of=cut.slu bs=4096 seek=1 count=40 conv=notrunc 2>/dev/null'; do
    cp raw.slu cut.slu
    mkfifo pipe
    "$sluice" eval cut.slu --text pipe --ram "$least" --ctx 256 >out 2>err &
    exec 3>pipe # the model is open by the time that its text is read
    eval "$harm"
    cat "$sluice" >&3 2>/dev/null
    exec 3>&-
    wait $!
    [ $? -eq 1 ] && [ ! -s out ] && [ "$(wc -l <err)" -eq 1 ] || fail "$harm: $(cat out err)"
    rm pipe
done

# A closed stdout is told.
"$sluice" run model.slu -p a --raw -n 3 >&- 2>err
[ $? -eq 1 ] && grep -q 'cannot write to standard output' err || fail "a closed stdout: $(cat err)"

# A prompt longer than the context is an error of one line.
"$sluice" run model.slu --file "$sluice" --ctx 16 >out 2>err
[ $? -eq 1 ] && [ ! -s out ] && [ "$(wc -l <err)" -eq 1 ] || fail "a long prompt: $(cat err)"

# What is missing of the standard streams isn't the next file that is opened.
"$sluice" run model.slu -p - <&- >out 2>err && fail "a prompt from a closed standard input"
grep -q 'standard input: Bad file descriptor' err || fail "standard input closed: $(cat err)"

# Outputs replace files only, and go on with nothing but their own.
mkfifo pipe
"$sluice" run model.slu -p a -n 1 --save-profile pipe >out 2>err && fail "a profile replaces a pipe"
grep -q 'is there and not a file' err || fail "a profile in a pipe's place: $(cat err)"
cp model.slu t.part
"$sluice" run t.part -p a -n 1 --trace t >out 2>err && fail "a trace goes on with a model"
cmp model.slu t.part || fail "a trace writes over the model: $(cat err)"
rm pipe t.part

# What speaks against a plan, and why an answer ends.
"$sluice" run model.slu -p a --raw -n 1 --ctx 100000 >out 2>err || fail "run --ctx 100000"
grep -q 'was trained for a context of' err || fail "no doubt about --ctx 100000: $(cat err)"
"$sluice" run model.slu -p a --raw --ctx 8 >out 2>err || fail "run --ctx 8"
grep -q 'because the context is full' err || fail "no word of a full context: $(cat err)"

# A small stack grows where it may, without which the kernels of AVX-512 would run past it, and is
# an error of one line where it may not, but to commands that don't compute.
words=$(printf 'word %.0s' 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20)
"$sluice" run model.slu -p "$words" --raw -n 3 --temp 0 >want || fail "a prompt of 20 words"
for threads in 1 2; do
    (ulimit -S -s 768 && "$sluice" run model.slu -p "$words" --raw -n 3 --temp 0 \
        --threads $threads) >out 2>err || fail "a small stack, $threads threads: $(cat err)"
    cmp -s want out || fail "a small stack, $threads threads, says something else"
done
(ulimit -s 768 && "$sluice" run model.slu -p "$words" --raw -n 3) >out 2>err
[ $? -eq 1 ] && grep -q 'ulimit -H -s' err && [ "$(wc -l <err)" -eq 1 ] ||
    fail "a stack too small: $(cat err)"
(ulimit -s 768 && "$sluice" inspect model.slu) >out 2>err || fail "inspect, little stack: $(cat err)"

# Ends early, with the status that a shell gives: Ctrl-C, and a reader that went away.
"$sluice" run model.slu -p a --raw --ctx 256 | head -c 1 >/dev/null # must not hang or complain
if command -v timeout >/dev/null; then
    timeout --preserve-status -s INT 0.3 "$sluice" eval model.slu --text /dev/stdin --json \
        <model.gguf >out 2>err
    status=$?
    [ $status -eq 130 ] || fail "Ctrl-C gives exit status $status: $(cat err)"
fi

[ "$n_failed" -eq 0 ] || { echo "$n_failed checks failed" >&2; exit 1; }
