"""Networks: torch only, no AnnData, no Lightning, no input or output."""

from __future__ import annotations
