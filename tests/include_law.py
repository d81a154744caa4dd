#!/usr/bin/env python3
"""The law of the modules, checked against every file.

  - each #include "..." of a module's files points where the table below lets it;
  - each library is known to one module only;
  - the library never prints and never ends the process;
  - each header compiles alone, and twice.

    include_law.py ROOT [COMPILER...]    checks the tree at ROOT
    include_law.py --self-test           checks that offenders are found
"""

import os
import re
import subprocess
import sys
import tempfile

# Which modules a module may look at, besides itself. The same table is in docs/design.md.
LAW = {
    "base": [],
    "kern": ["base"],
    "io": ["base"],
    "experts": ["base", "io"],
    "adapters": ["base", "io", "kern", "experts"],
    "text": ["base", "io"],
    "model": ["base", "kern", "io", "experts", "adapters", "text"],
    "engine": ["base", "kern", "io", "experts", "adapters", "text", "model"],
    "tools": ["base", "kern", "io", "experts", "adapters", "text", "model", "engine"],
    "server": ["slu.h", "base"],
    "cli": ["slu.h", "base", "tools"],
}

# A module's folder; the longest that fits decides. "engine" is what lies in src itself.
FOLDERS = {
    "src/base": "base",
    "src/kern": "kern",
    "io": "io",
    "experts": "experts",
    "adapters": "adapters",
    "src/text": "text",
    "src/model": "model",
    "src": "engine",
    "src/server": "server",
    "src/cli": "cli",
    "tools": "tools",
}

# Who may know which library.
LIBRARIES = {
    "jemalloc/": ["base"],
    "cpuid.h": ["base"],
    "immintrin.h": ["kern"],
    "arm_neon.h": ["kern"],
    "liburing.h": ["io"],
    "zstd.h": ["io"],
    "xxhash.h": ["io", "text"],
    "pcre2.h": ["text", "tools"],
    "jansson.h": ["base", "cli", "server", "tools"],
    "criterion/": [],
}

MAY_PRINT = ["cli", "server"]
PRINTING = re.compile(
    r"\b(printf|vprintf|puts|putchar|perror|syslog|exit|_exit|_Exit|quick_exit|abort)\s*\("
    r"|\b(stdout|stderr)\b"
)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)[">]', re.M)
COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)


def without_comments(text, strings):
    """Comments become blanks of as many lines; so does the inside of strings, if asked for."""

    def blank(match):
        found = match.group(0)
        if found.startswith("/"):
            return " " + "\n" * found.count("\n")
        return '""' if strings else found

    return COMMENT.sub(blank, text)


def module_of(path):
    folder = os.path.dirname(path)
    while folder:
        if folder in FOLDERS:
            return FOLDERS[folder]
        folder = os.path.dirname(folder)
    return None


def files_of(root):
    tops = sorted({folder.split("/")[0] for folder in FOLDERS})
    for top in tops:
        for folder, _, names in os.walk(os.path.join(root, top)):
            for name in sorted(names):
                if name.endswith((".c", ".h", ".inc")):
                    yield os.path.relpath(os.path.join(folder, name), root)


def resolve(root, path, target):
    for base in (os.path.dirname(path), "src", ""):
        found = os.path.normpath(os.path.join(base, target))
        if os.path.isfile(os.path.join(root, found)):
            return found
    return None


def check_quoted(root, path, module, target):
    found = resolve(root, path, target)
    if found is None:
        return f'includes "{target}", which is no file of the tree'
    other = module_of(found)
    allowed = LAW[module]
    if other == module or other in allowed:
        return None
    if found == "src/slu.h" and "slu.h" in allowed:
        return None
    return f'includes "{target}": {module} may look at {", ".join(allowed) or "nothing"}'


def check_angled(module, target):
    for library, modules in LIBRARIES.items():
        if target.startswith(library) and module not in modules:
            return f"includes <{target}>, which is for {', '.join(modules) or 'tests'} alone"
    return None


def check_file(root, path):
    module = module_of(path)
    with open(os.path.join(root, path), encoding="utf-8") as file:
        text = file.read()
    code = without_comments(text, strings=False)
    found = []
    for match in INCLUDE.finditer(code):
        line = code.count("\n", 0, match.start()) + 1
        kind, target = match.groups()
        wrong = (
            check_quoted(root, path, module, target) if kind == '"' else check_angled(module, target)
        )
        if wrong:
            found.append(f"{path}:{line}: {wrong}")
    bare = without_comments(text, strings=True)
    is_program = re.search(r"^int main\(", bare, re.M)
    if module not in MAY_PRINT and not is_program:
        for match in PRINTING.finditer(bare):
            line = bare.count("\n", 0, match.start()) + 1
            found.append(f"{path}:{line}: the library neither prints nor exits: {match.group(0)}")
    return found


# Folders whose headers are for one machine: the start of its name, and its compilers' options.
MACHINES = {
    "src/kern/x86/": ("x86_64", ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw",
                                 "-mavx512dq", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni"]),
    "src/kern/arm/": ("aarch64", ["-march=armv8.2-a+dotprod+i8mm"]),
}


def options_for(path, compiler):
    """Of a header; None if it isn't for this compiler's machine."""
    for folder, (machine, options) in MACHINES.items():
        if path.startswith(folder):
            run = subprocess.run(
                compiler + ["-dumpmachine"], capture_output=True, text=True, check=False
            )
            return options if run.stdout.startswith(machine) else None
    return []


def check_alone(root, path, compiler, options):
    source = f'#include "{path}"\n#include "{path}"\n'
    command = compiler + ["-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-Isrc", "-I."]
    command += options
    run = subprocess.run(
        command + ["-fsyntax-only", "-x", "c", "-"],
        cwd=root, input=source, capture_output=True, text=True, check=False,
    )
    return [] if run.returncode == 0 else [f"{path}: doesn't compile alone:\n{run.stderr}"]


def check(root, compiler):
    offences, n_files, n_headers = [], 0, 0
    for path in files_of(root):
        n_files += 1
        offences += check_file(root, path)
        options = options_for(path, compiler) if path.endswith(".h") and compiler else None
        if options is not None:
            n_headers += 1
            offences += check_alone(root, path, compiler, options)
    return offences, n_files, n_headers


SELF_TEST = {
    # path: (text, what must be said of it, or None)
    "src/base/a.h": ("struct a;\n", None),
    "src/slu.h": ('#include "base/a.h"\n', None),
    "src/base/up.c": ('#include "kern/k.h"\n', "base may look at nothing"),
    "src/kern/k.h": ('#include "base/a.h"\n', None),
    "src/kern/x86/deep.c": ('#include "io/i.h"\n', "kern may look at base"),
    "io/i.h": ('/* #include "kern/k.h" */\n#include "../src/base/a.h"\n', None),
    "io/side.c": ('\n#include "../src/kern/k.h"\n', "io/side.c:2"),
    "io/gone.c": ('#include "gone.h"\n', "no file of the tree"),
    "experts/e.c": ('#include <zstd.h>\n', "<zstd.h>, which is for io alone"),
    "src/cli/main.c": ('#include "slu.h"\nvoid f(void) { printf("x"); }\n', None),
    "src/cli/deep.c": ('#include "io/i.h"\n', "cli may look at"),
    "src/server/s.c": ('#include "tools/t.h"\n', "server may look at"),
    "tools/t.h": ('#include "slu.h"\n', None),
    "tools/up.c": ('#include "cli/c.h"\n', "tools may look at"),
    "src/cli/c.h": ("", None),
    "tools/program.c": ("int main(void)\n{\n    puts(\"\");\n}\n", None),
    "src/text/loud.c": ("void f(void)\n{\n    fputs(s, stderr);\n}\n", "src/text/loud.c:3"),
    "src/model/end.c": ("void f(void) { exit(1); }\n", "neither prints nor exits"),
    "src/model/quiet.c": ('/* stderr */ char *s = "exit(1)"; int slu_exit(int);\n', None),
}


def self_test():
    wrong = []
    with tempfile.TemporaryDirectory() as root:
        for path, (text, _) in SELF_TEST.items():
            os.makedirs(os.path.join(root, os.path.dirname(path)), exist_ok=True)
            with open(os.path.join(root, path), "w", encoding="utf-8") as file:
                file.write(text)
        offences = check(root, None)[0]
        for path, (_, expected) in SELF_TEST.items():
            said = [line for line in offences if line.startswith(path + ":")]
            if expected is None and said:
                wrong.append(f"{path} is lawful, but: {said}")
            if expected is not None and not any(expected in line for line in said):
                wrong.append(f"{path}: expected '{expected}', got {said}")
    return wrong


def main():
    if sys.argv[1:] == ["--self-test"]:
        wrong = self_test()
        print("\n".join(wrong) or f"{len(SELF_TEST)} cases judged rightly")
        return 1 if wrong else 0
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    offences, n_files, n_headers = check(sys.argv[1], sys.argv[2:])
    print("\n".join(offences) or f"{n_files} files lawful, {n_headers} headers compile alone")
    return 1 if offences else 0


if __name__ == "__main__":
    sys.exit(main())
