"""vLLM's processes end with the PD worker, however that ends.

vLLM ends them when its client shuts down; when that is killed, EngineCore stays behind, with the model in
memory. The kernel's signal for a parent's death goes by threads, and which one starts EngineCore is vLLM's to
choose.
"""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this process as soon as the one that started it by `multiprocessing` has ended.

    Does nothing in a process that was started otherwise. Waits in a thread, without polling.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
