"""Training: objectives applied to the architecture, schedules, and the Lightning loop."""

from __future__ import annotations
