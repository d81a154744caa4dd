"""Importing this ends the program with a sentence where PyTorch or NumPy is missing, rather than
with a traceback. It comes before the imports of the two."""
import importlib.util
import os
import sys

missing = [n for n in ("torch", "numpy") if importlib.util.find_spec(n) is None]
if missing:
    sys.exit(f"{os.path.basename(sys.argv[0])}: {sys.executable} has no {' and no '.join(missing)}; "
             "Debian's python3-torch and python3-numpy have them, for /usr/bin/python3")
