"""The command line."""

from __future__ import annotations

from genejepa.cli.commands import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    app()
