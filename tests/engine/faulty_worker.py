"""A worker whose router can be broken between two steps, with the plugin or without it; for faulty.py."""

from __future__ import annotations

from typing import Any

from faulty import BROKEN_LAYER, FAULTS

from moe_serving.worker import WorkerExtension


class FaultyWorker(WorkerExtension):
    """vLLM's worker with the plugin's calls (inert where `MOESTACK_PLUGIN=0`) and one that breaks a router."""

    def break_router(self: Any, fault: str) -> int:
        """From the next step on one layer's router answers wrongly; returns how many routers were found."""
        found = [
            module
            for name, module in self.get_model().named_modules()
            if name.endswith(f"layers.{BROKEN_LAYER}.mlp.gate")
        ]
        for module in found:
            module._forward_hooks.clear()
            module.register_forward_hook(lambda _, __, output: (FAULTS[fault](output[0]), *output[1:]))
        return len(found)
