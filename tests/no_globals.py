#!/usr/bin/env python3
"""No mutable globals in the library but the CPU mask, as seen in the built objects.

    no_globals.py OBJDUMP ARCHIVE...

Constant data whose addresses the loader fills in (.data.rel.ro) is not mutable.
"""

import re
import subprocess
import sys

ALLOWED = {"cpu_mask"}
# "0000 l     O .bss	0004 cpu_mask": address, flags, section, size, name.
SYMBOL = re.compile(r"^[0-9a-f]+ .{7} (\S+)\t([0-9a-f]+)\s+(?:\.hidden )?(\S+)$")
MUTABLE = re.compile(r"^\.(data|bss|tdata|tbss)(\.|$)|^\*COM\*$")


def main():
    objdump, archives = sys.argv[1], sys.argv[2:]
    found, n_symbols = [], 0
    for archive in archives:
        table = subprocess.run(
            [objdump, "-t", archive], capture_output=True, text=True, check=True
        ).stdout
        for line in table.splitlines():
            match = SYMBOL.match(line)
            if not match:
                continue
            n_symbols += 1
            section, size, name = match.groups()
            if section.startswith(".data.rel.ro") or name == section or int(size, 16) == 0:
                continue
            if MUTABLE.match(section) and name not in ALLOWED:
                found.append(f"{archive}: {name}, {int(size, 16)} bytes in {section}")
    print("\n".join(found) or f"no mutable global among {n_symbols} symbols")
    return 1 if found or n_symbols == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
