# Every role with TensorRT-LLM, for machines with NVIDIA GPUs. From the repository's root:
#
#   docker build -f deploy/docker/trtllm.Dockerfile -t trtllm-mm-cache:0.1.0-trtllm .
#
# To pin more than the tags: --build-arg TENSORRT_LLM=nvcr.io/nvidia/tensorrt-llm/release@sha256:...
ARG TENSORRT_LLM=nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc29
ARG PYTHON=docker.io/library/python:3.11.14-slim-bookworm

FROM ${PYTHON} AS wheel
WORKDIR /src
COPY LICENSE README.md pyproject.toml ./
COPY trtllm_mm_cache trtllm_mm_cache
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${TENSORRT_LLM}
LABEL org.opencontainers.image.title="trtllm_mm_cache, TensorRT-LLM" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 mm-cache \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin mm-cache
# What TensorRT-LLM was built against stays as it is. Where a dependency of ours needs another, this fails: an
# engine with another torch would fail later, and less clearly.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip list --format=freeze > /tmp/installed \
    && grep -iE '^(torch|triton|tensorrt|flashinfer|nvidia|cuda|numpy|transformers)[a-z0-9_.-]*==' /tmp/installed > /tmp/keep \
    && pip install --no-cache-dir -c /tmp/keep "$(echo /wheels/*.whl)[tracing]" \
    && rm /tmp/installed /tmp/keep
# HOME: the engine's compilers put caches there; /tmp and /dev/shm are all that needs to be writable.
ENV HOME=/tmp PYTHONUNBUFFERED=1
COPY configs /opt/trtllm-mm-cache/configs
COPY deploy/docker/healthcheck.py /opt/trtllm-mm-cache/healthcheck.py
USER 10001:10001
EXPOSE 8000 9090
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "/opt/trtllm-mm-cache/healthcheck.py"]
ENTRYPOINT ["trtllm-mm-cache"]
CMD ["--help"]
