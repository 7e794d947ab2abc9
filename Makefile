# `make test` needs nothing but Python 3.11 or 3.12: it makes its own virtual environment in $(VENV).
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=

export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: test test-parts lint check docs demo format clean environment environment-vllm environment-sglang
.PHONY: bench-cache bench-transfer gpu-check bench-serving bench-burst soak soak-serving fuzz faults chaos redteam
.PHONY: test-vllm test-vllm-part bench-vllm test-sglang test-sglang-part bench-sglang

test: lint check

$(STAMP): pyproject.toml constraints/cpu.txt launch/setup_venv.sh
	launch/setup_venv.sh $(VENV) transformers mpi store --dev
	touch $@
environment: $(STAMP)

lint: $(STAMP)
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	shellcheck launch/*.sh .ci/run

# File by file, as fixtures are shared, and in their order: xdist's own begins with the files of many tests, and ends
# with one of a single long test, for which the other core waits.
PYTEST := pytest -n 2 --dist loadfile --no-loadscope-reorder
check: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS)

# What another Python version can change: one run of the whole stack (first, for it is the longest), cache, workers,
# transfer, media.
PARTS := tests/e2e/test_pictures.py tests/faults/test_misses.py tests/faults/test_cancellation.py \
    tests/cache tests/transfer tests/media tests/runtime tests/tiers tests/encode tests/pd
test-parts: $(STAMP)
	$(PYTEST) $(PYTEST_ARGS) $(PARTS)

# vLLM has an environment of its own, for it wants another transformers: tests/vllm on the real engine, on the CPU too.
# The part is what CI has time for: without the tests that are marked `long`.
VENV_VLLM ?= .venv-vllm
STAMP_VLLM := $(VENV_VLLM)/.installed
$(STAMP_VLLM): pyproject.toml constraints/cpu.txt launch/setup_venv.sh tools/repair_torchvision.py
	launch/setup_venv.sh $(VENV_VLLM) vllm --dev
	touch $@
environment-vllm: $(STAMP_VLLM)
test-vllm: $(STAMP_VLLM)
	PATH="$(abspath $(VENV_VLLM)/bin):$$PATH" pytest -m "long or not long" $(PYTEST_ARGS) tests/vllm
test-vllm-part: $(STAMP_VLLM)
	PATH="$(abspath $(VENV_VLLM)/bin):$$PATH" pytest $(PYTEST_ARGS) tests/vllm

# The same for SGLang: on the CPU it runs with a stand-in for its GPU kernels. With SGLANG_TEST_ENCODE_PYTHON, the Python
# of an environment with the extra transformers, the whole suite runs encode workers there too.
VENV_SGLANG ?= .venv-sglang
STAMP_SGLANG := $(VENV_SGLANG)/.installed
$(STAMP_SGLANG): pyproject.toml constraints/cpu.txt constraints/sglang-cpu.txt launch/setup_venv.sh tools/repair_torchvision.py \
    $(wildcard tools/sglang_stand_in/*.py)
	launch/setup_venv.sh $(VENV_SGLANG) sglang --dev
	touch $@
environment-sglang: $(STAMP_SGLANG)
test-sglang: $(STAMP_SGLANG)
	PATH="$(abspath $(VENV_SGLANG)/bin):$$PATH" pytest -m "long or not long" $(PYTEST_ARGS) tests/sglang
test-sglang-part: $(STAMP_SGLANG)
	PATH="$(abspath $(VENV_SGLANG)/bin):$$PATH" pytest $(PYTEST_ARGS) tests/sglang

# Renews docs/configuration.md from the settings classes, and builds the site: build/docs/index.html.
docs: $(STAMP)
	python tools/configuration_reference.py
	sphinx-build --quiet --fail-on-warning --keep-going -c docs . build/docs

# Serves the demo model, asks it about drawn pictures, and stops: true answers, hits and misses.
demo: $(STAMP)
	python tools/demo.py

# What benchmarks/RESULTS.md reports under "Cache core": five minutes; each prints one JSON object.
bench-cache: $(STAMP)
	for name in handoff key copy operations utilization what_if; do python -m benchmarks.cache_$$name || exit 1; done

# Beside Dynamo's own senders and receivers, from the ai-dynamo wheel; as root add BENCH_ARGS=--two-hosts.
BENCH_ARGS ?=
.venv-dynamo: $(STAMP)
	pip install --quiet --no-deps --target $@ ai-dynamo==1.6.1 msgspec==0.21.1
bench-transfer: .venv-dynamo
	python -m benchmarks.transfer --peer .venv-dynamo $(BENCH_ARGS)

# What only a GPU shows, within 8 minutes and with nothing from outside; GPU_CHECK_ARGS names parts and the model's size.
GPU_CHECK_ARGS ?=
gpu-check:
	python -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

# The whole stack under AIPerf, which has a virtual environment of its own (1.2 GB).
.venv-aiperf:
	python3 -m venv $@
	$@/bin/pip install --quiet aiperf==0.13.0
bench-serving: $(STAMP) .venv-aiperf
	python -m benchmarks.serving --aiperf .venv-aiperf/bin/aiperf $(BENCH_ARGS)

bench-burst: $(STAMP)
	python -m benchmarks.burst $(BENCH_ARGS)

# vLLM alone, with its own connector, with Dynamo's, and ours in both modes; text of equal length beside them.
bench-vllm: $(STAMP_VLLM) .venv-dynamo
	PATH="$(abspath $(VENV_VLLM)/bin):$$PATH" python -m benchmarks.vllm --peer .venv-dynamo $(BENCH_ARGS)

# SGLang alone and ours over it, and an embedding's way to its scheduler: eight minutes.
bench-sglang: $(STAMP_SGLANG)
	PATH="$(abspath $(VENV_SGLANG)/bin):$$PATH" python -m benchmarks.sglang $(BENCH_ARGS)

# Threads that do everything to one cache, SOAK_SECONDS for each eviction policy; reports memory.
SOAK_SECONDS ?= 600
soak: $(STAMP)
	python -m tests.cache.stress --seconds $(SOAK_SECONDS)

# The whole stack under mixed, broken, cancelled and large requests; fails when the memory of a process grows.
SOAK_ARGS ?=
soak-serving: $(STAMP)
	python -m tests.soak.run --seconds $(SOAK_SECONDS) $(SOAK_ARGS)

# Damaged and made-up input for every parser, FUZZ_EXAMPLES for each: 20 minutes.
FUZZ_EXAMPLES ?= 20000
fuzz: $(STAMP)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) pytest --timeout 3600 tests/fuzz

# Every fault of docs/failure-modes.md on real processes, those too that are too long for `make test`.
faults: $(STAMP)
	pytest -m "long or not long" tests/faults tests/pd tests/encode tests/transfer tests/tiers

# Kills, freezes and restarts workers under load for CHAOS_SECONDS; fails if anything is wrong or lost.
CHAOS_SECONDS ?= 300
CHAOS_ARGS ?=
chaos: $(STAMP)
	python -m tests.chaos.run --seconds $(CHAOS_SECONDS) $(CHAOS_ARGS)

# Bad people on one machine: another user, false workers, idle connections, clock steps. As root, with `faketime`.
redteam: $(STAMP)
	pytest -m "long or not long" $(PYTEST_ARGS) tests/redteam

format: $(STAMP)
	ruff check --fix .
	ruff format .

clean:
	rm -rf .venv .venv-vllm .venv-sglang .run build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
