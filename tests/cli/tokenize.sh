#!/bin/sh
# `sluice tokenize` on vocabularies of the data folder: texts give the listed ids, and these decode
# back to them. (The unit tests go through all cases of all vocabularies.) Usage: tokenize.sh SLUICE DATA
set -u
sluice=$1 data=${SLUICE_DATA:-$2}
if [ ! -d "$data/vocab" ]; then
    echo "skipped: no vocabularies under $data" >&2
    exit 77
fi
work=$(mktemp -d) || exit 99
trap 'rm -rf "$work"' EXIT
n_failed=0 n_cases=0

fail() {
    echo "FAILED: $*" >&2
    n_failed=$((n_failed + 1))
}

# The smallest vocabularies and some of their cases, since each opens its file anew.
for vocab in llama-spm gpt-2; do
    gguf=$data/vocab/vocab-$vocab.gguf
    # Texts stand between marker lines, without the newline in front of the marker.
    rm -f "$work"/text.*
    awk -v work="$work" '
        /^__ggml_vocab_test__$/ { close(file); file = sprintf("%s/text.%03d", work, n++); first = 1
                                  printf "" > file; next }
        { printf "%s%s", first ? "" : "\n", $0 > file; first = 0 }
    ' n=1 file="$work/text.000" first=1 "$gguf.inp"
    n=0
    while [ "$n" -lt 20 ] && IFS= read -r ids; do
        text=$work/text.$(printf '%03d' "$n")
        n=$((n + 1)) n_cases=$((n_cases + 1))
        [ -e "$text" ] || { fail "$vocab: no text $n"; break; }
        got=$("$sluice" tokenize "$gguf" <"$text") || fail "$vocab $n: tokenize fails"
        [ "$got" = "$(echo $ids)" ] || fail "$vocab $n: ids '$got', not '$ids'"
        [ -s "$text" ] || continue
        echo "$ids" | "$sluice" tokenize "$gguf" --decode >"$work/back" || fail "$vocab $n: decode"
        cmp -s "$work/back" "$text" || fail "$vocab $n: decodes to something else"
    done <"$gguf.out"
done
[ "$n_cases" -gt 20 ] || fail "only $n_cases cases were found"

# Ids outside the vocabulary, and what isn't an id, are refused.
gguf=$data/vocab/vocab-llama-spm.gguf
echo 32000000 | "$sluice" tokenize "$gguf" --decode 2>"$work/err" && fail "a huge id decodes"
grep -q '32000000' "$work/err" || fail "a huge id isn't named"
echo '1 two' | "$sluice" tokenize "$gguf" --decode 2>"$work/err" && fail "a word decodes"
grep -q "'two'" "$work/err" || fail "a word isn't named"
# Special tokens are text unless --special says otherwise.
plain=$(printf '<s>' | "$sluice" tokenize "$gguf")
special=$(printf '<s>' | "$sluice" tokenize "$gguf" --special)
[ "$special" = 1 ] || fail "--special <s> gives '$special'"
[ "$plain" != 1 ] || fail "<s> is special without --special"

[ "$n_failed" -eq 0 ] || exit 1
