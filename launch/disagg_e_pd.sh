#!/usr/bin/env bash
# Start a frontend, encode workers and PD workers on this machine, and stop them on Ctrl-C: sets up the package in
# .venv (with ENGINE=vllm or sglang in .venv-vllm or .venv-sglang) if it is not installed, then becomes `trtllm-mm-cache
# serve`, which takes every option and variable.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export RUN_DIR=${RUN_DIR:-$root/.run/$(date +%Y%m%d-%H%M%S)-$$}

venv=$root/.venv extras=(transformers) packages=(dynamo torch)
case ${ENGINE:-} in
    vllm) venv=$root/.venv-vllm extras=(vllm) packages+=(vllm) ;;
    sglang) venv=$root/.venv-sglang extras=(sglang) packages+=(sglang) ;;
    trtllm) extras=(trtllm) ;;
    *) if [[ ${PD_RANKS:-1} != 1 ]]; then extras+=(mpi); fi ;;
esac

# In this folder any Python finds the package; what it needs is there only where it was installed.
installed() {
    "$1" - "${packages[@]}" <<'PYTHON' 2>/dev/null
import sys
from importlib.util import find_spec

import trtllm_mm_cache.cli.main

sys.exit(not all(find_spec(name) for name in sys.argv[1:]))
PYTHON
}

python=python3
if ! installed python3; then
    python=$venv/bin/python
    if ! installed "$python"; then
        (umask 077 && mkdir -p "$RUN_DIR")
        echo "[launch] the package is not installed: setting it up in $venv (log: $RUN_DIR/setup.log)"
        if ! "$root/launch/setup_venv.sh" "$venv" "${extras[@]}" 2>&1 | tee "$RUN_DIR/setup.log"; then
            echo "[launch] error: the set-up failed; the lines above and $RUN_DIR/setup.log say why" >&2
            exit 1
        fi
    fi
    export PATH=$venv/bin:$PATH # mpirun is there
fi
exec "$python" -m trtllm_mm_cache.cli serve "$@"
