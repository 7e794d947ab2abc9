#!/usr/bin/env bash
# Start a frontend, encode workers and PD workers on this machine, and stop them on Ctrl-C: sets up the package in
# .venv if it is not installed, then becomes `trtllm-mm-cache serve`, which takes every option and variable.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export RUN_DIR=${RUN_DIR:-$root/.run/$(date +%Y%m%d-%H%M%S)-$$}

# In this folder any Python finds the package; what it needs is there only where it was installed.
installed() {
    "$1" - <<'PYTHON' 2>/dev/null
import sys
from importlib.util import find_spec

import trtllm_mm_cache.cli.main

sys.exit(not (find_spec("dynamo") and find_spec("torch")))
PYTHON
}

python=python3
if ! installed python3; then
    python=$root/.venv/bin/python
    if ! installed "$python"; then
        extras=(transformers)
        if [[ ${ENGINE:-} == trtllm ]]; then extras=(trtllm); elif [[ ${PD_RANKS:-1} != 1 ]]; then extras+=(mpi); fi
        (umask 077 && mkdir -p "$RUN_DIR")
        echo "[launch] the package is not installed: setting it up in $root/.venv (log: $RUN_DIR/setup.log)"
        if ! "$root/launch/setup_venv.sh" "$root/.venv" "${extras[@]}" 2>&1 | tee "$RUN_DIR/setup.log"; then
            echo "[launch] error: the set-up failed; the lines above and $RUN_DIR/setup.log say why" >&2
            exit 1
        fi
    fi
    export PATH=$root/.venv/bin:$PATH # mpirun is there
fi
exec "$python" -m trtllm_mm_cache.cli serve "$@"
