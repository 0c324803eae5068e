"""``python -m birl_ext`` is ``birl``; alone, it is ``birl doctor``."""

import sys

from birl_ext.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["doctor"]))
