"""``python -m genejepa``: the command line."""

from __future__ import annotations

from genejepa.cli import main

if __name__ == "__main__":
    main()
