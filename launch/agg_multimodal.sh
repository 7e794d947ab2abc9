#!/usr/bin/env bash
# A frontend and vLLM, whose own vision tower encodes what the cache does not have: no encode workers. See disagg_e_pd.sh.
set -euo pipefail
ENGINE=vllm exec "$(dirname "${BASH_SOURCE[0]}")/disagg_e_pd.sh" --disaggregation-mode agg "$@"
