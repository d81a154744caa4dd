#!/bin/sh
# The command line of `sluice`: help, mistakes, exit statuses, and files that aren't models.
# Usage: usage.sh SLUICE
set -u
sluice=$1
work=$(mktemp -d) || exit 99
trap 'rm -rf "$work"' EXIT
n_failed=0

fail() {
    echo "FAILED: $*" >&2
    sed 's/^/    /' "$work/out" "$work/err" >&2
    n_failed=$((n_failed + 1))
}

# expect STATUS TEXT ARGS...: runs sluice with ARGS; TEXT must occur in what it prints.
expect() {
    status=$1 text=$2
    shift 2
    "$sluice" "$@" >"$work/out" 2>"$work/err" </dev/null
    got=$?
    [ "$got" -eq "$status" ] || fail "exit status $got, not $status: sluice $*"
    grep -qF -e "$text" "$work/out" "$work/err" || fail "no '$text': sluice $*"
    # Failures are told in one line, and usage mistakes leave stdout alone.
    if [ "$status" -ne 0 ]; then
        [ "$(wc -l <"$work/err")" -eq 1 ] || fail "not one line on stderr: sluice $*"
        grep -q '^sluice: ' "$work/err" || fail "stderr doesn't begin with 'sluice: ': sluice $*"
        [ ! -s "$work/out" ] || fail "output on stdout: sluice $*"
    fi
}

# Help and version go to stdout, with status 0.
expect 0 'Usage: sluice COMMAND' --help
expect 0 'sluice 0.' --version
for command in pack run eval tokenize inspect plan bench calibrate; do
    expect 0 "Usage: sluice $command" "$command" --help
    expect 0 "Usage: sluice $command" help "$command"
    expect 2 'is missing' "$command"
    expect 2 'unknown option --frob' "$command" x --frob
    expect 2 'unknown option -Z' "$command" x -Z
    for word in --help "$command"; do
        "$sluice" --help | grep -qF -e "$command" || fail "--help lacks $command"
    done
done
for option in -p -n --ram --ctx --threads --io --temp --seed --raw --stats --json --top-k --top-p \
    --min-p --repeat-penalty --file --min-cache; do
    "$sluice" run --help | grep -qF -e "$option" || fail "run --help lacks $option"
done

expect 0 'Usage: sluice synth' synth --help
expect 0 'Usage: sluice synth' help synth

# Mistakes are named, with status 2.
expect 2 '--shape SHAPE or --arch NAME is missing' synth -o x.slu
expect 2 '-o MODEL.slu or --gguf MODEL.gguf is missing' synth --shape gpt-oss-20b
expect 2 "'x' is no option" synth --shape gpt-oss-20b -o y.slu x
expect 2 "unknown architecture 'gpt-9'" synth --arch gpt-9 -o y.slu
expect 2 'one of raw, zstd' synth --arch llama -o y.slu --codec lz4
expect 2 'a command is missing'
expect 2 "unknown command 'frob'" frob
# What a terminal would obey is shown as question marks: a C1 control, and a turn of direction.
expect 2 "'x??31m???y'" "$(printf 'x\302\23331m\342\200\256y')"
expect 2 "unknown option '--frob'" --frob
expect 2 '-p TEXT is missing' run x
expect 2 '-p needs a value' run x -p
expect 2 'two prompts' run x -p a --file b
expect 2 "'4X'" run x -p a --ram 4X
expect 2 "'-1'" run x -p a --ram -1
expect 2 "'99999999999G'" run x -p a --ram 99999999999G
expect 2 "'18446744073709551616'" run x -p a --ram 18446744073709551616
expect 2 "'0x10'" run x -p a --temp 0x10
expect 2 "'nan'" run x -p a --temp nan
expect 2 'from 0 to 1' run x -p a --top-p 1.5
expect 2 "'0'" run x -p a -n 0
expect 2 "'4294967296'" run x -p a -n 4294967296
expect 2 "'5x'" run x -p a -n5x
expect 2 'one of auto, uring, pread' run x -p a --io=mmap
expect 2 'takes no value' run x -p a --json=yes
expect 2 'a second' run x y -p a
expect 2 '-o MODEL.slu is missing' pack x
expect 2 '-o MODEL.slu is missing' pack x -o ''
expect 2 '--quant is missing' pack x -o y --quant-error 0.1
expect 2 '--dense-quant is missing' pack x -o y --quant q4e --dense-error 0.1
expect 2 'MODEL.slu is missing' synth --arch olmoe --gguf y --quant q4e
expect 2 '--threads quantize, but' pack x -o y --threads 2
expect 2 '--quant is missing' synth --arch olmoe -o y --quant-error 0.1
expect 2 '--quant is one of keep, q3e' synth --arch olmoe -o y --quant q9e
expect 2 '--dense-quant are missing' pack x -o y --importance z
for error in 0 -1 1e9 nan inf; do
    expect 2 '--quant-error wants a number from 0.001 to 1' pack x -o y --quant q4e \
        --quant-error=$error
done
for number in 0 -1 nan 1e39; do
    expect 2 '--set-share wants a number' run x --set-share=$number
    expect 2 '--set-reads wants a number' run x --set-reads=$number
done
for share in -1 2 nan 1e39; do
    expect 2 '--min-coverage wants a number' run x --min-coverage=$share
done
for bias in -1 inf nan 101; do
    expect 2 '--route-bias wants a number' run x --route-bias=$bias
done
expect 2 'one of raw, zstd, auto' pack x -o y --codec lz4
expect 2 '--flash-mbps is for --codec auto' pack x -o y --flash-mbps 400
expect 2 '--cores is for --codec auto' pack x -o y --codec raw --cores 4
expect 2 "'0'" pack x -o y --codec auto --cores 0
expect 2 "'0'" pack x -o y --codec auto --flash-mbps 0
expect 2 '--tokens IDS or --text FILE' eval x
expect 2 'exclude each other' eval x --tokens 1 --text f
expect 2 "'b' is not a token id" eval x --tokens '1, b' --greedy 1
expect 2 "'99999999999' is not" eval x --tokens 99999999999 --greedy 1
expect 2 "'-1' is not a token id" eval x --tokens=-1 --greedy 1
expect 2 'is empty' eval x --tokens , --greedy 1
expect 2 'needs --logits' eval x --tokens 1
expect 2 'go with --tokens' eval x --text f --greedy 3

# Files that aren't there, or are something else, give one sentence that names them, status 1.
printf 'GGUF\003\000\000\000\001' >"$work/short.gguf"
printf 'SLUICE\r\n\001\000\000\000' >"$work/short.slu"
printf 'nothing of the kind, but long enough' >"$work/text"
: >"$work/empty"
for name in absent short.gguf short.slu text empty .; do
    file=$work/$name
    expect 1 "$file" inspect "$file"
    expect 1 "$file" tokenize "$file"
    expect 1 "$file" plan "$file" --ram 4G
    expect 1 "$file" run "$file" -p a
    expect 1 "$file" eval "$file" --tokens 1 --logits "$work/logits"
    expect 1 "$file" eval "$file" --text "$work/text"
    expect 1 "$file" pack "$file" -o "$work/out.slu"
    [ ! -e "$work/out.slu" ] || fail "a failed pack left a file"
    [ ! -e "$work/logits" ] || fail "a failed eval left a file"
done
expect 2 'would overwrite itself' pack "$work/text" -o "$work/./text"
expect 2 'would overwrite the model' eval "$work/text" --tokens 1 --logits "$work/./text"
expect 2 'would overwrite an adapter' eval "$work/text" --tokens 1 --adapter "$work/a.sla:.5" \
    --logits "$work/./a.sla"
expect 2 'would overwrite an adapter' run "$work/text" -p x --adapters-dir "$work" --adapter a \
    --trace "$work/./a.sla"
expect 2 'would overwrite an adapter' run "$work/text" -p x --adapter "$work/a.sla" \
    --save-profile "$work/a.sla"
expect 2 'would overwrite the importance' pack "$work/text" -o "$work/imp" --quant q4e \
    --importance "$work/./imp"
expect 2 'would overwrite the shape, the template or the other output' synth --arch olmoe \
    -o "$work/x" --gguf "$work/./x"
mkdir "$work/peft"
: >"$work/peft/adapter_config.json"
expect 2 'would overwrite what it is made of' adapter import "$work/peft" \
    -o "$work/peft/adapter_config.json"
[ "$(cat "$work/text")" = 'nothing of the kind, but long enough' ] || fail "pack or eval overwrote its input"

# Control characters of a name don't reach the terminal.
expect 1 'a?[31mb' inspect "$work/$(printf 'a\033[31mb')"

# A stdout that takes nothing is told.
if [ -w /dev/full ]; then
    "$sluice" --help >/dev/full 2>"$work/err"
    [ $? -eq 1 ] || fail "--help to a full device succeeds"
    grep -q 'cannot write to standard output' "$work/err" || fail "a full device isn't told"
fi

[ "$n_failed" -eq 0 ] || { echo "$n_failed checks failed" >&2; exit 1; }
