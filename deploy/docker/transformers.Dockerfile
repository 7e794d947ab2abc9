# Every role with the transformers engine, on any machine. From the repository's root:
#
#   docker build -f deploy/docker/transformers.Dockerfile -t trtllm-mm-cache:0.1.0-transformers .
#
# To pin more than the tag: --build-arg PYTHON=docker.io/library/python@sha256:...
ARG PYTHON=docker.io/library/python:3.11.14-slim-bookworm

FROM ${PYTHON} AS dependencies
# Where torch comes from: builds for the CPU. With https://pypi.org/simple it brings CUDA, several GB of it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# Dependencies alone, so that a change of the code leaves this layer, nearly all of the image, as it is.
COPY pyproject.toml constraints/cpu.txt ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; extras = project['optional-dependencies']; print(*project['dependencies'], *extras['transformers'], *extras['tracing'], *extras['store'], sep='\n')" > requirements.txt \
    && pip install --extra-index-url "$TORCH_INDEX" -c cpu.txt -r requirements.txt

FROM dependencies AS wheel
COPY LICENSE README.md ./
COPY trtllm_mm_cache trtllm_mm_cache
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM ${PYTHON}
LABEL org.opencontainers.image.title="trtllm_mm_cache, transformers engine" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 mm-cache \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin mm-cache
COPY --from=dependencies /opt/venv /opt/venv
# HOME: libraries put caches there; /tmp and /dev/shm are all that needs to be writable.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
COPY configs /opt/trtllm-mm-cache/configs
COPY deploy/docker/healthcheck.py /opt/trtllm-mm-cache/healthcheck.py
USER 10001:10001
EXPOSE 8000 9090
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "/opt/trtllm-mm-cache/healthcheck.py"]
ENTRYPOINT ["trtllm-mm-cache"]
CMD ["--help"]
