#!/usr/bin/env bash
# Make a virtual environment that holds this package: launch/setup_venv.sh FOLDER [EXTRA]... [--dev]
# Extras are those of pyproject.toml (transformers, trtllm, mpi); --dev adds the test tools.
# On a machine without an NVIDIA driver, constraints/cpu.txt keeps several GB of CUDA out.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:?usage: launch/setup_venv.sh FOLDER [EXTRA]... [--dev]}
shift
extras=() dev=()
for argument in "$@"; do
    if [[ $argument == --dev ]]; then dev=(--group "$root/pyproject.toml:dev"); else extras+=("$argument"); fi
done

python=${BOOTSTRAP_PYTHON:-}
if [[ -z $python ]]; then
    for candidate in python3.11 python3.12 python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; then
            python=$candidate
            break
        fi
    done
fi
if [[ -z $python ]]; then
    echo "error: Python 3.11 or 3.12 is needed and not on PATH; install it or set BOOTSTRAP_PYTHON" >&2
    exit 1
fi

constraints=()
if ! command -v nvidia-smi >/dev/null; then constraints=(-c "$root/constraints/cpu.txt"); fi
joined=$(IFS=,; echo "${extras[*]}")
target=$root${joined:+"[$joined]"}

echo "making a virtual environment in $venv (about 2.5 GB, a few minutes the first time) ..."
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
# One line for each package as it comes, so that minutes of downloading do not look like a hang.
"$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "${constraints[@]}" \
    --editable "$target" "${dev[@]}" |
    awk '/^Collecting /{print "  " $2; fflush()} /^Installing collected/{print "  installing ..."; fflush()}'
echo "the virtual environment is ready"
