"""Make PyPI's torchvision importable beside a torch without CUDA: `python tools/repair_torchvision.py`.

That wheel's compiled half is built for CUDA's torch and does not load. torchvision allows for that, and then
registers shape functions for two operators, `nms` and `qnms`, that only the compiled half would have defined:
`import torchvision` fails, and with it models of vLLM's whose processors are of transformers. What is
appended defines the two, without code behind them. It has to be in the file: vLLM starts its own processes.

Changes the environment of the Python that runs it, once; says what it does. Without CUDA's torchvision, or
where it works, nothing is changed. Exits with status 1 where it does not help.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

_MARK = "# appended by tools/repair_torchvision.py of trtllm_mm_cache"
_APPENDED = f"""

{_MARK}:
# operators of the compiled half, which is built for CUDA's torch and does not load here
if not _has_ops():
    _defined_without_ops = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _defined_without_ops.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> int:
    """Repair the environment of this Python; return the exit status."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        print("torchvision is not installed: nothing to repair")
        return 0
    problem = _import_problem()
    if problem is None:
        print("torchvision can be imported as it is: nothing changed")
        return 0
    extension = Path(spec.origin).with_name("extension.py")
    if _MARK not in extension.read_text(encoding="utf-8"):
        with extension.open("a", encoding="utf-8") as file:
            file.write(_APPENDED)
        print(f"appended the definitions of two operators to {extension}: its compiled half is for CUDA")
        problem = _import_problem()
    if problem is not None:
        print(f"error: torchvision cannot be imported all the same: {problem}", file=sys.stderr)
    return int(problem is not None)


def _import_problem() -> str | None:
    """Return the last line of what `import torchvision` says in a fresh process, or None."""
    ended = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False
    )
    return None if ended.returncode == 0 else ended.stderr.strip().rpartition("\n")[2]


if __name__ == "__main__":
    sys.exit(main())
