# What the tests of commands begin with, sourced by them: the program is $1, and from here on they
# stand in a folder of their own, which goes away with them.
set -u
sluice=$(realpath "$1")
work=$(mktemp -d) || exit 99
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 99
n_failed=0

fail() {
    echo "FAILED: $*" >&2
    n_failed=$((n_failed + 1))
}

# json FILE EXPRESSION: a Python expression over the object, named o, must hold.
json() {
    python3 -c 'import json, sys
o = json.load(open(sys.argv[1]))
sys.exit(0 if eval(sys.argv[2]) else 1)' "$1" "$2" || fail "$2, in $(cat "$1")"
}
