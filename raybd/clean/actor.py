"""What a Ray actor does with the assignment of a cleaning trial."""

from __future__ import annotations

import atexit
import gc
from dataclasses import dataclass
from functools import cache
from typing import Any

from raybd.assignment import Assignment, Notify
from raybd.ledger import Entry, Kind
from raybd.store import Store
from raybd.study import Study
from raybd.watchdog import Watchdog


@cache
def _keep_imports() -> None:
    """Spare the collector what stays for as long as the process: looking at it took half a second of each trial."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries complain of what is left at the end


@dataclass(frozen=True)
class CleanTrial:
    """Carries a cleaning trial out, in a process that may have run others before.

    Attributes:
        threads: of torch, on the CPU.
        use_gpu: train on the GPU that the process sees.
        memory: share of that GPU's memory that torch may have: what it would have beyond is not there for it, so that
            it takes nothing from others on the GPU. 1 sets no limit.
    """

    threads: int
    use_gpu: bool
    memory: float = 1.0

    def __call__(self, study: Study, store: Store, task: Assignment, notify: Notify) -> Entry:
        """Run the trial under a watchdog and return its ended entry; see `run_trial`."""
        # The driver makes these and trains nothing: torch is for the process that does.
        import torch

        from raybd.clean.trial import run_trial

        _keep_imports()
        torch.set_num_threads(self.threads)
        device = torch.device("cuda" if self.use_gpu else "cpu")
        with Watchdog(store, Kind.TRIAL, task.trial_id, seconds=60 * study.search.hang_minutes) as watchdog:

            def report(epoch: int, record: dict[str, Any]) -> None:
                # The driver may be slow to take it.
                with watchdog.waiting():
                    notify(epoch, record)

            # What the trial before left; a GPU that hangs may hang here.
            gc.collect()
            if device.type == "cuda":
                if self.memory < 1:
                    torch.cuda.set_per_process_memory_fraction(self.memory)
                torch.cuda.empty_cache()
            return run_trial(study, store, task, device=device, notify=report)
