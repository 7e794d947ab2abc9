"""Put the stand-in for SGLang's kernels into the environment of this Python, unless it has the real ones.

For environments of tests on a CPU, as `launch/setup_venv.sh` makes them. Says what it does.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Copy two modules and the line that imports the second at the start of every process."""
    for name in ("sglang-kernel", "sgl-kernel"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        print(f"{name} is installed: nothing to stand in for")
        return
    packages = Path(sysconfig.get_path("purelib"))
    for name in ("sgl_kernel.py", "sgl_kernel_first.py"):
        shutil.copyfile(HERE / name, packages / name)
    (packages / "sgl_kernel_first.pth").write_text("import sgl_kernel_first\n", encoding="utf-8")
    print(f"put a stand-in for SGLang's GPU kernels into {packages}: it raises where one is called")


if __name__ == "__main__":
    main()
