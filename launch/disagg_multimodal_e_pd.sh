#!/usr/bin/env bash
# The same as disagg_e_pd.sh with vLLM in the PD workers; encode workers run the vision tower.
set -euo pipefail
ENGINE=vllm exec "$(dirname "${BASH_SOURCE[0]}")/disagg_e_pd.sh" "$@"
