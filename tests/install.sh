#!/bin/sh
# What is installed is enough: the example builds with what pkg-config says, runs against the
# shared library, and the library shows the functions of its headers and no others.
# Usage: install.sh MESON BUILD SOURCE COMPILER...
set -eu
meson=$1 build=$2 source=$3
shift 3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$meson" install -C "$build" --no-rebuild --destdir "$work/root" >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    exit 1
}
pc=$(find "$work/root" -name sluice.pc)
[ -f "$pc" ] || { echo "sluice.pc isn't installed" >&2; exit 1; }
# The prefix is where the files will be; here they are below another root.
prefix=$work/root$(sed -n 's/^prefix=//p' "$pc")
export PKG_CONFIG_PATH="${pc%/*}${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
config() {
    pkg-config --define-variable=prefix="$prefix" "$@" sluice
}
libdir=$(config --variable=libdir)

# shellcheck disable=SC2046
"$@" -std=c11 -Wall -Wextra -Werror "$source/examples/hello.c" $(config --cflags --libs) \
    -o "$work/hello"
# shellcheck disable=SC2046
"$@" "$source/examples/hello.c" $(config --cflags) -L"$libdir" -Wl,-Bstatic -lsluice -Wl,-Bdynamic \
    $(config --static --libs-only-l | sed 's/-lsluice//g') -o "$work/hello-static"

# Functions that the headers declare, against those that the library exports.
sed -n 's/^[a-z].*\(slu_[a-z_0-9]*\)(.*/\1/p' "$prefix/include/sluice/slu.h" \
    "$prefix/include/sluice/base/err.h" | grep -v '_fn$' | sort -u >"$work/declared"
nm -D --defined-only "$libdir/libsluice.so" | awk '$2 != "A" { sub(/@.*/, "", $3); print $3 }' |
    sort -u >"$work/exported"
[ "$(wc -l <"$work/declared")" -gt 10 ] || { echo "too few functions are declared" >&2; exit 1; }
diff "$work/declared" "$work/exported" >&2 || { echo "headers and exports differ" >&2; exit 1; }

# The example answers, and the installed program packs and answers alike.
"$prefix/bin/sluice" synth --gguf "$work/model.gguf" --arch qwen3moe --layers 2 --embd 64 --ff 64 \
    --experts 8 --used 2 --vocab 320 --ctx 512 >/dev/null
"$prefix/bin/sluice" pack "$work/model.gguf" -o "$work/model.slu" >/dev/null
"$prefix/bin/sluice" run "$work/model.slu" -p 'Hello?' -n 200 >"$work/expected"
echo >>"$work/expected"
LD_LIBRARY_PATH=$libdir "$work/hello" "$work/model.slu" 'Hello?' >"$work/answer"
cmp "$work/expected" "$work/answer"
"$work/hello-static" "$work/model.slu" 'Hello?' >"$work/answer"
cmp "$work/expected" "$work/answer"
if LD_LIBRARY_PATH=$libdir "$work/hello" "$work/absent.slu" >/dev/null 2>"$work/err"; then
    echo "a model that isn't there gives no error" >&2
    exit 1
fi
grep -q 'absent.slu' "$work/err"
