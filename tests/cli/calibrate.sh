#!/bin/sh
# Calibration on a small random model: the predictor gets into the pack and changes nothing else,
# a run that was interrupted is gone on with, and what is damaged or another model's is told of.
# Usage: calibrate.sh SLUICE
. "$(dirname "$0")/common.sh"

make_model() {
    "$sluice" synth --gguf "$1.gguf" --arch qwen3moe --layers 2 --embd 64 --ff 64 --experts 8 \
        --used 2 --vocab 320 --ctx 256 --seed "$2" >/dev/null || exit 99
    "$sluice" pack "$1.gguf" -o "$1.slu" >/dev/null || exit 99
}
make_model model 1
make_model other 2
cp model.slu plain.slu
answer() {
    "$sluice" run "$@" -p 'Once upon a time' --raw -n 16
}
answer model.slu >expected || exit 99

i=0
while [ $i -lt 24 ]; do
    echo "\"a prompt that has the number $i\""
    i=$((i + 1))
done >prompts.jsonl
echo '{"prompt": "what?", "answer": "that."}' >>prompts.jsonl

# Calibrated: a predictor, no working files, and the same answers.
"$sluice" calibrate model.slu --prompts prompts.jsonl --n-answer 8 --json >report.json ||
    fail "calibrate"
python3 -c 'import json
o = json.load(open("report.json"))
assert o["prompts"] == 25 and o["resumed"] == 0 and o["section_bytes"] > 1000, o
assert o["hindsight"]["covered"] >= o["predictor"]["covered"] > 0, o' || fail "its report"
[ -z "$(ls ./*.part ./*.trace 2>/dev/null)" ] || fail "working files are left: $(ls)"
answer model.slu >got 2>err || fail "run with a predictor"
cmp -s got expected || fail "the predictor changes the answer"
[ ! -s err ] || fail "run says $(cat err)"
"$sluice" inspect model.slu >/dev/null || fail "inspect a pack with a section"

# Again: from the first prompt, and into the same place.
size=$(wc -c <model.slu)
"$sluice" calibrate model.slu --text prompts.jsonl --trace text.slt >/dev/null || fail "--text"
[ -s text.slt ] || fail "no trace is kept"
"$sluice" calibrate model.slu --prompts prompts.jsonl --n-answer 8 >/dev/null || fail "again"
[ "$(wc -c <model.slu)" -le $((2 * size)) ] || fail "the pack grows"

# Killed while it records: what is whole is not computed again.
cp plain.slu killed.slu
"$sluice" calibrate killed.slu --prompts prompts.jsonl --n-answer 8 --trace whole.slt \
    --no-predictor >/dev/null || fail "--no-predictor"
cmp -s killed.slu plain.slu || fail "--no-predictor changes the pack"
head -c $(($(wc -c <whole.slt) / 2)) whole.slt >resumed.slt.part
"$sluice" calibrate killed.slu --prompts prompts.jsonl --n-answer 8 --trace resumed.slt --json \
    >report.json || fail "resume"
python3 -c 'import json
o = json.load(open("report.json"))
assert o["prompts"] == 25 and 5 < o["resumed"] < 25, o' || fail "nothing is resumed"
cmp -s whole.slt resumed.slt || fail "a resumed trace differs"

# What was recorded of a file as text isn't gone on with as prompts.
"$sluice" calibrate killed.slu --text prompts.jsonl --trace as.slt --no-predictor >/dev/null ||
    fail "as text"
mv as.slt as.slt.part
"$sluice" calibrate killed.slu --prompts prompts.jsonl --n-answer 8 --trace as.slt --no-predictor \
    --json >report.json || fail "as prompts"
json report.json 'o["resumed"] == 0'
rm as.slt

# What matters, the same whether a run was killed or not, wherever that was.
i=0
while [ $i -lt 100 ]; do
    echo "\"many prompts, of which this has the number $i\""
    i=$((i + 1))
done >many.jsonl
calibrate_many() {
    exec "$sluice" calibrate plain.slu --prompts many.jsonl --n-answer 2 --no-predictor "$@"
}
(calibrate_many --trace a.slt --importance a.imp) >/dev/null || fail "--importance"
[ -s a.imp ] || fail "there is no importance"
for delay in 0.1 0.3; do
    (calibrate_many --trace b.slt --importance b.imp) >/dev/null 2>&1 &
    sleep $delay
    kill -9 $! 2>/dev/null
    wait $! 2>/dev/null
done
rm -f b.imp b.slt
(calibrate_many --trace b.slt --importance b.imp) >/dev/null || fail "going on after kills"
cmp -s a.slt b.slt || fail "a trace after kills differs"
cmp -s a.imp b.imp || fail "importance after kills differs"
[ -z "$(ls ./*.part 2>/dev/null)" ] || fail "working files are left: $(ls)"

# What pack says of it, of a file for another model, and of codes too few for an error.
"$sluice" synth --gguf floats.gguf --arch qwen3moe --layers 2 --embd 64 --ff 64 --experts 8 \
    --used 2 --vocab 320 --ctx 256 --expert-type F32 >/dev/null || exit 99
"$sluice" synth --gguf wide.gguf --arch qwen3moe --layers 1 --embd 32 --ff 32 --experts 4 \
    --used 2 --vocab 320 --ctx 256 --expert-type F32 >/dev/null || exit 99
quantize() {
    "$sluice" pack "$@" -o quant.slu --quant q4e --importance a.imp >said || fail "pack $*"
}
quantize floats.gguf
grep -q '48 of 48 matrices had importance' said || fail "importance: $(cat said)"
grep -q 'more bits' said && fail "an error that was met: $(cat said)"
quantize wide.gguf
grep -q 'a.imp of another model' said || fail "another model's importance: $(cat said)"
quantize floats.gguf --quant-error 0.01
grep -q '100 % of them .* codes of more bits' said || fail "an error too small: $(cat said)"

# A damaged section, and one of another pack, are told of; the answer is the same.
python3 - <<'PYTHON' || exit 99
data = bytearray(open("model.slu", "rb").read())
data[-5000] ^= 1
open("damaged.slu", "wb").write(data)
PYTHON
answer damaged.slu >got 2>err || fail "run with a damaged section"
cmp -s got expected || fail "a damaged section changes the answer"
grep -q 'section.*going on without' err || fail "a damaged section isn't told of: $(cat err)"

# Profiles and traces of a run.
answer model.slu --save-profile p.prof --trace run.slt >got 2>err || fail "save: $(cat err)"
cmp -s got expected || fail "saving changes the answer"
answer model.slu --profile p.prof >got 2>err || fail "--profile"
cmp -s got expected && [ ! -s err ] || fail "a profile changes exact answers: $(cat err)"
answer other.slu --profile p.prof >/dev/null 2>err || fail "another model's profile ends the run"
grep -q 'p.prof.*another model.*going on without' err || fail "of another model: $(cat err)"
printf 'x' | dd of=p.prof bs=1 seek=60 conv=notrunc 2>/dev/null
answer model.slu --profile p.prof >got 2>err || fail "a damaged profile ends the run"
cmp -s got expected || fail "a damaged profile changes the answer"
grep -q 'damaged.*going on without' err || fail "of damage: $(cat err)"
answer model.slu --profile absent.prof >/dev/null 2>err || fail "an absent profile ends the run"
grep -q 'absent.prof.*going on without' err || fail "of absence: $(cat err)"

# Mistakes.
"$sluice" calibrate model.slu >/dev/null 2>&1
[ $? -eq 2 ] || fail "no text is no mistake"
"$sluice" calibrate model.slu --prompts prompts.jsonl --trace model.slu >/dev/null 2>&1
[ $? -eq 2 ] || fail "the trace may overwrite the model"
echo '{"question": 1}' >bad.jsonl
"$sluice" calibrate plain.slu --prompts bad.jsonl >/dev/null 2>err
[ $? -eq 1 ] && grep -q 'bad.jsonl: line 1' err || fail "a bad line: $(cat err)"
for text in /dev/zero . absent.txt; do
    timeout 20 "$sluice" calibrate plain.slu --text $text >/dev/null 2>err
    [ $? -eq 1 ] && grep -q "^sluice: $text: " err || fail "$text as text: $(cat err)"
done
: >empty.txt
"$sluice" calibrate plain.slu --text empty.txt >/dev/null 2>err
[ $? -eq 1 ] && grep -q 'no text' err || fail "an empty text: $(cat err)"
[ ! -e plain.slu.trace.part ] || fail "an empty text leaves a trace"
if [ "$(id -u)" -ne 0 ]; then # to root all is writable
    chmod a-w plain.slu
    "$sluice" calibrate plain.slu --text prompts.jsonl >/dev/null 2>err
    [ $? -eq 1 ] && grep -q 'plain.slu: cannot be written' err || fail "no leave: $(cat err)"
    chmod u+w plain.slu
fi

# What can't be written is told before anything is computed, and nothing is left of it.
mkdir folder
told() {
    path=$1
    shift
    "$sluice" "$@" >out 2>err
    [ $? -eq 1 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q "$path: .*cannot be written" err ||
        fail "$*: $(cat err)"
    [ ! -s out ] || fail "$* printed $(cat out)"
}
for path in none/out folder; do
    for option in --trace --save-profile; do
        told $path run plain.slu -p x -n 4 $option $path
        told $path calibrate plain.slu --text prompts.jsonl --no-predictor $option $path
    done
    told $path calibrate plain.slu --text prompts.jsonl --no-predictor --importance $path
done

# No output takes the place of a text or of another output, by whatever name.
cp prompts.jsonl text.txt
clash() {
    "$sluice" "$@" >/dev/null 2>err
    [ $? -eq 2 ] && [ "$(wc -l <err)" -eq 1 ] && grep -q 'would overwrite' err ||
        fail "$*: $(cat err)"
}
clash run plain.slu -p x -n 4 --trace t.slt --save-profile ./t.slt
clash run plain.slu -f text.txt -n 4 --trace ./text.txt
clash run plain.slu -p x -n 4 --profile p.prof --trace p.prof
clash calibrate plain.slu --text text.txt --trace t.slt --save-profile ./t.slt
clash calibrate plain.slu --text text.txt --trace t.slt --importance "$PWD/t.slt"
clash calibrate plain.slu --prompts text.txt --trace text.txt
clash calibrate plain.slu --text text.txt --importance text.txt
cmp -s prompts.jsonl text.txt || fail "a text is overwritten"
rm text.txt
"$sluice" run plain.slu -p x -n 4 --ram 1 --trace t.slt --save-profile t.prof >/dev/null 2>&1 &&
    fail "run in a byte"
[ -z "$(ls -- *.part t.* 2>/dev/null)" ] || fail "a run that failed leaves $(ls)"
for option in --trace --save-profile; do
    "$sluice" run plain.slu -p x $option ./plain.slu >/dev/null 2>err
    [ $? -eq 2 ] && grep -q 'would overwrite the model' err || fail "$option plain.slu: $(cat err)"
done

# What a run records is within its budget.
least=$("$sluice" plan plain.slu --json | python3 -c 'import json, sys
print(json.load(sys.stdin)["least_ram_bytes"])')
"$sluice" run plain.slu -p x -n 4 --ram $((least + 65536)) --trace t.slt --json >out 2>err ||
    fail "a trace in little memory: $(cat err)"
json out "o['peak_ledger_bytes'] <= $least + 65536"
"$sluice" run plain.slu -p x -n 4 --ram "$least" --trace t.slt >/dev/null 2>err &&
    fail "a trace takes no memory"
grep -q 'at least' err || fail "of a budget without room for a trace: $(cat err)"

# Only options that do something are told of.
"$sluice" calibrate --help | grep -q -e --adapter && fail "calibrate --help has adapters"
"$sluice" calibrate plain.slu --text prompts.jsonl --adapter a.sla >/dev/null 2>err
[ $? -eq 2 ] && grep -q 'unknown option --adapter' err || fail "calibrate --adapter: $(cat err)"
cmp -s killed.slu model.slu || fail "a resumed calibration gives another pack"
exit $((n_failed > 0))
