#!/usr/bin/env bash
# Start a frontend, encode workers and PD workers on this machine, wait until they serve, and stop them on Ctrl-C.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/disagg_e_pd.sh [PD WORKER OPTION]...

Every argument goes to the PD workers, for example
  launch/disagg_e_pd.sh --multimodal-embedding-cache-capacity-gb 10
(`trtllm-mm-cache pd --help` lists them). What must be equal on all processes counts for all: model, engine,
endpoint of the encode workers, discovery, limits on images, transfer timeout, logs. The rest is set by
environment variables:

  MODEL_PATH                    model directory or hub name   [the demo model, models/shapes-qwen2-vl; on
                                a machine with TensorRT-LLM: llava-hf/llava-v1.6-mistral-7b-hf]
  ENGINE                        trtllm or transformers        [trtllm if it and a GPU are there]
  ENCODE_ENGINE_ARGS            YAML for the encode engine    [configs/<model>/encode.yaml]
  PD_ENGINE_ARGS                YAML for the PD engine        [configs/<model>/pd.yaml]
  ENCODE_WORKERS, PD_WORKERS    how many of each              [1 and 1]
  PD_RANKS                      ranks of each PD worker, by mpirun  [1]
  ENCODE_CUDA_VISIBLE_DEVICES   GPUs of the encode workers    [all]
  PD_CUDA_VISIBLE_DEVICES       GPUs of the PD workers        [all]
  ENCODE_EXTRA_ARGS             more options for the encode workers, split at spaces
  DYN_HTTP_PORT                 port of the OpenAI API        [8000]
  RUN_DIR                       folder for logs and discovery [.run/<time>-<pid>]

On SIGTERM each kind of process may take DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS (60) to finish what runs;
the exit status is 0 if all did.
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run_dir=${RUN_DIR:-$root/.run/$(date +%Y%m%d-%H%M%S)-$$}
mkdir -p "$run_dir"

say() { echo "[launch] $*"; }
die() {
    echo "[launch] error: $*" >&2
    exit 1
}

# The download of a large model, and loading it from a slow disk, take minutes; what hangs is seen in its log.
ready_timeout_s=900

# --- 0 arguments that are not for the PD workers alone ------------------------------------------------

log_flags=() worker_flags=() name=
arguments=("$@")
for i in "${!arguments[@]}"; do
    flag=${arguments[i]%%=*} value=${arguments[i]#*=}
    if [[ $value == "$flag" ]]; then value=${arguments[i + 1]:-}; fi
    case $flag in
        --model-path) MODEL_PATH=$value ;;
        --engine) ENGINE=$value ;;
        --extra-engine-args) PD_ENGINE_ARGS=$value ;;
        --served-model-name) name=$value ;;
        --encode-endpoint) ENCODE_ENDPOINT=$value ;;
        --discovery-backend) DYN_DISCOVERY_BACKEND=$value ;;
        --log-level | --log-format) log_flags+=("$flag" "$value") ;;
        --max-file-size-mb | --max-image-megapixels | --max-waiting-image-mb | --transfer-timeout-s)
            worker_flags+=("$flag" "$value") ;;
    esac
done

# --- 1 the package -----------------------------------------------------------------------------------

python=python3
if ! python3 -c 'import trtllm_mm_cache' 2>/dev/null; then
    python=$root/.venv/bin/python
    if ! "$python" -c 'import trtllm_mm_cache' 2>/dev/null; then
        extras=(transformers)
        if [[ ${ENGINE:-} == trtllm ]]; then extras=(trtllm); elif ((${PD_RANKS:-1} > 1)); then extras+=(mpi); fi
        say "the package is not installed: setting it up in $root/.venv (log: $run_dir/setup.log)"
        if ! "$root/launch/setup_venv.sh" "$root/.venv" "${extras[@]}" 2>&1 | tee "$run_dir/setup.log"; then
            die "the set-up failed; the lines above and $run_dir/setup.log say why"
        fi
    fi
    export PATH=$root/.venv/bin:$PATH  # mpirun is there
fi
worker=("$python" -m trtllm_mm_cache.cli)

# --- 2 engine, model, configuration ------------------------------------------------------------------

has_module() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

engine=${ENGINE:-}
if [[ -z $engine ]]; then
    engine=transformers
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && has_module tensorrt_llm; then engine=trtllm; fi
fi
case $engine in
    trtllm) module=tensorrt_llm ;;
    transformers) module=transformers ;;
    *) die "ENGINE=$engine is unknown; set trtllm or transformers" ;;
esac
has_module "$module" || die "ENGINE=$engine needs the Python package $module: pip install -e '${root}[$engine]'"

model=${MODEL_PATH:-}
if [[ -z $model && $engine == trtllm ]]; then model=llava-hf/llava-v1.6-mistral-7b-hf; fi
demo_model=$root/models/shapes-qwen2-vl
model=${model:-$demo_model}
name=${name:-$(basename "$model")}

config=$root/configs/$(basename "$model" | tr '[:upper:]' '[:lower:]')
if [[ $engine == transformers ]]; then config=$root/configs/cpu-demo; fi
encode_args=${ENCODE_ENGINE_ARGS:-$config/encode.yaml}
pd_args=${PD_ENGINE_ARGS:-$config/pd.yaml}
for file in "$encode_args" "$pd_args"; do
    [[ -f $file ]] || die "no engine configuration $file; set ENCODE_ENGINE_ARGS and PD_ENGINE_ARGS (see configs/)"
done

# --- 3 processes --------------------------------------------------------------------------------------

export DYN_DISCOVERY_BACKEND=${DYN_DISCOVERY_BACKEND:-file}
export DYN_FILE_KV=${DYN_FILE_KV:-$run_dir/discovery}
export DYN_REQUEST_PLANE=${DYN_REQUEST_PLANE:-tcp} DYN_EVENT_PLANE=${DYN_EVENT_PLANE:-zmq}
export DYN_HTTP_PORT=${DYN_HTTP_PORT:-8000}
export DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS=${DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS:-60}
# Dynamo's own log lines: warnings only, so that the workers' one line a request is readable.
export DYN_LOG=${DYN_LOG:-warn} DYN_SDK_DISABLE_ANSI_LOGGING=${DYN_SDK_DISABLE_ANSI_LOGGING:-1}
export PYTHONUNBUFFERED=1
if [[ -n ${ENCODE_ENDPOINT:-} ]]; then export ENCODE_ENDPOINT; fi

names=() pids=() logs=() ports=() signals=()
stop_signal=TERM

# Dynamo reads DYN_SYSTEM_PORT as a signed 16-bit number, so the port must be below 32768.
free_port() {
    "$python" - <<'PYTHON'
import random, socket
for port in random.sample(range(20000, 32768), 200):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
    print(port)
    break
PYTHON
}

port_is_free() {
    "$python" -c "import socket; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(('127.0.0.1', $1))" 2>/dev/null
}

# start NAME COMMAND...: in the background, its output in a log, its system port and pid on record
start() {
    local label=$1 port log
    shift
    port=$(free_port)
    log=$run_dir/${label// /-}.log
    DYN_SYSTEM_PORT=$port "$@" >"$log" 2>&1 &
    names+=("$label") pids+=($!) logs+=("$log") ports+=("$port") signals+=("$stop_signal")
    printf '%s\t%s\t%s\t%s\n' "$label" "$!" "$port" "$log" >>"$run_dir/processes.tsv"
    say "started $label (pid $!, metrics on 127.0.0.1:$port/metrics, log: $log)"
}

# drain KIND: tell the processes of that kind to finish what runs, and wait until they have ended
drain() {
    local i status deadline=$((SECONDS + DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS))
    for i in "${!pids[@]}"; do
        if [[ ${names[i]} == "$1"* ]]; then kill "-${signals[i]}" "${pids[i]}" 2>/dev/null || true; fi
    done
    for i in "${!pids[@]}"; do
        [[ ${names[i]} == "$1"* ]] || continue
        while kill -0 "${pids[i]}" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.1; done
        # Killed, mpirun would leave its ranks behind; terminated, it kills them.
        if kill -TERM "${pids[i]}" 2>/dev/null; then sleep 1; fi
        if kill -KILL "${pids[i]}" 2>/dev/null; then
            say "${names[i]} did not end in time and was killed"
            undrained=1
        fi
        wait "${pids[i]}" 2>/dev/null && status=0 || status=$?
        # What ended before it was told has been reported already.
        if ((status)) && [[ -z ${ended[i]:-} ]]; then undrained=1; fi
    done
}

# In the order of a request, so that each kind still has what it needs: no request is cut off.
stop_all() {
    trap '' INT TERM
    drain frontend
    drain PD
    drain encode
}
undrained=0
declare -A ended=()
trap stop_all EXIT
trap 'say "stopping"; exit 130' INT
trap 'say "draining: what runs is finished"; trap - EXIT; stop_all; exit "$undrained"' TERM

failed() {
    echo "[launch] ---- last lines of $2 ----" >&2
    tail -n 25 "$2" >&2 || true
    die "$1"
}

port_is_free "$DYN_HTTP_PORT" || die "port $DYN_HTTP_PORT is taken; set DYN_HTTP_PORT to a free one"
: >"$run_dir/processes.tsv"
start frontend "${worker[@]}" frontend "${log_flags[@]}"

common=(--model-path "$model" --engine "$engine")
read -ra encode_extra <<<"${ENCODE_EXTRA_ARGS:-}"
encode=("${worker[@]}" encode "${common[@]}" --extra-engine-args "$encode_args" "${log_flags[@]}" "${worker_flags[@]}" "${encode_extra[@]}")
if [[ -n ${ENCODE_ENDPOINT:-} ]]; then encode+=(--endpoint "$ENCODE_ENDPOINT"); fi
for ((i = 1; i <= ${ENCODE_WORKERS:-1}; i++)); do
    start "encode worker $i" env ${ENCODE_CUDA_VISIBLE_DEVICES:+"CUDA_VISIBLE_DEVICES=$ENCODE_CUDA_VISIBLE_DEVICES"} "${encode[@]}"
done

ranks=()
if ((${PD_RANKS:-1} > 1)); then
    if [[ $engine == trtllm ]]; then
        # trtllm-llmapi-launch expands its command unquoted: a shell splits and globs it a second time.
        for argument in "$python" "$model" "$name" "$pd_args" "$@"; do
            [[ $argument != *[[:space:]\'\"\\*?[]* ]] ||
                die "'$argument' would not survive trtllm-llmapi-launch: with PD_RANKS use no spaces, quotes, backslashes or * ? ["
        done
    fi
    command -v mpirun >/dev/null || die "PD_RANKS=$PD_RANKS needs mpirun: pip install -e '${root}[mpi]'"
    # Without --bind-to none mpirun holds all threads of a rank to one core.
    ranks=(mpirun -n "$PD_RANKS" --bind-to none)
    if ((EUID == 0)); then ranks+=(--allow-run-as-root); fi
    if (($(nproc) < PD_RANKS)); then ranks+=(--oversubscribe); fi
    # mpirun kills its ranks half a second after SIGTERM; SIGUSR1 it passes on, and ours drain on that.
    if [[ $engine == trtllm ]]; then ranks+=(trtllm-llmapi-launch); else stop_signal=USR1; fi
fi
pd=("${ranks[@]}" "${worker[@]}" pd "${common[@]}" --extra-engine-args "$pd_args" --served-model-name "$name")
for ((i = 1; i <= ${PD_WORKERS:-1}; i++)); do
    start "PD worker $i" env ${PD_CUDA_VISIBLE_DEVICES:+"CUDA_VISIBLE_DEVICES=$PD_CUDA_VISIBLE_DEVICES"} "${pd[@]}" "$@"
done

# --- 4 ready ------------------------------------------------------------------------------------------

# ready PORT: does the worker with that system port say that it serves? Its log need not, with --log-level WARNING.
ready() {
    "$python" - "http://127.0.0.1:$1/health" <<'PYTHON' 2>/dev/null
import json, sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=2) as answer:
    sys.exit(json.load(answer)["status"] != "ready")
PYTHON
}

lists_model() {
    "$python" - "http://127.0.0.1:$DYN_HTTP_PORT/v1/models" "$name" <<'PYTHON' 2>/dev/null
import json, sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=2) as answer:
    sys.exit(sys.argv[2] not in [model["id"] for model in json.load(answer)["data"]])
PYTHON
}

check_alive() {
    local i
    for i in "${!pids[@]}"; do
        kill -0 "${pids[i]}" 2>/dev/null || failed "${names[i]} ended before it was ready" "${logs[i]}"
    done
}

began=$SECONDS next_word=$((SECONDS + 5))
for i in "${!pids[@]}"; do
    if [[ ${names[i]} == frontend ]]; then continue; fi
    until ready "${ports[i]}"; do
        check_alive
        ((SECONDS - began < ready_timeout_s)) || failed "${names[i]} was not ready after $ready_timeout_s s" "${logs[i]}"
        if ((SECONDS >= next_word)); then
            say "waiting for ${names[i]} ($((SECONDS - began)) s)"
            next_word=$((SECONDS + 10))
        fi
        sleep 0.5
    done
    say "${names[i]} is ready"
done
until lists_model; do
    check_alive
    ((SECONDS - began < ready_timeout_s)) || failed "the frontend does not list the model" "${logs[0]}"
    sleep 0.2
done

image=photo.jpg question="What is this?"
# The demo model knows drawn cards alone, and the wordings it was trained on.
if [[ $model == "$demo_model" ]]; then image=$root/models/card.png question="Where is the yellow cross?"; fi
# What another terminal needs to find these processes; the rest are the commands' own defaults.
discovery="export$(for variable in DYN_DISCOVERY_BACKEND DYN_FILE_KV DYN_REQUEST_PLANE DYN_EVENT_PLANE ETCD_ENDPOINTS NATS_SERVER ENCODE_ENDPOINT; do
    if [[ -n ${!variable:-} ]]; then printf ' %s=%q' "$variable" "${!variable}"; fi
done)"
cat <<TEXT
[launch] serving $name with $engine on http://127.0.0.1:$DYN_HTTP_PORT after $((SECONDS - began)) s. Try:

  $python -m trtllm_mm_cache.cli ask --url http://127.0.0.1:$DYN_HTTP_PORT/v1 $image "$question"

  curl -s http://127.0.0.1:$DYN_HTTP_PORT/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "$name", "max_tokens": 32, "messages": [{"role": "user", "content": [{"type": "text", "text": "$question"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,$(base64 <"$root/models/card.png" | tr -d '\n')"}}]}]}'

[launch] To drop what the workers hold, copy this into another terminal:

  $discovery

  $python -m trtllm_mm_cache.cli drop --all

[launch] Ctrl-C stops everything.
TEXT

# --- 5 watch ------------------------------------------------------------------------------------------

# Losing an encode worker costs only misses, and one PD worker of several only its own requests: say so and
# go on. Without the frontend or the last PD worker nothing is served: end. This script restarts nothing; in
# production each process runs under a supervisor that does.
pd_workers_left() {
    local i
    for i in "${!pids[@]}"; do
        if [[ ${names[i]} == PD* && -z ${ended[$i]:-} ]]; then return 0; fi
    done
    return 1
}

while true; do
    for i in "${!pids[@]}"; do
        if [[ -n ${ended[$i]:-} ]] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
        ended[$i]=1
        if [[ ${names[i]} == encode* ]]; then
            say "warning: ${names[i]} has ended; text and cached images are still served (log: ${logs[i]})"
        elif [[ ${names[i]} == PD* ]] && pd_workers_left; then
            say "warning: ${names[i]} has ended; the other PD workers go on (log: ${logs[i]})"
        else
            failed "${names[i]} has ended" "${logs[i]}"
        fi
    done
    sleep 0.5 &
    wait $! || true
done
