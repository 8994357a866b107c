"""The keeper's process. Started by its path with ``python -I -S``, so that nothing but the keeper is in its memory."""

from __future__ import annotations

import os
import sys

if not __package__:
    # After the standard library, which none of the packages beside us may shadow.
    sys.path.append(os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))

from shim_porto_runtime.keeper.daemon import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
