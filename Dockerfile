# syntax=docker/dockerfile:1

# The CUDA release that the pinned torch is built for (its wheels bring the libraries; the base brings the runtime, the
# compatibility layer for older drivers, and the check that the host's driver is new enough).
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

# The base of images without training.
ARG FRONT_BASE=ubuntu:24.04

FROM ${BASE} AS python
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Ubuntu 24.04 has no Python 3.11; uv installs a relocatable one.
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PATH=/opt/uv/bin:$PATH
# Only the certificates of these packages reach the image, and Ubuntu keeps one version of each.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY requirements-build.lock /build/
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: \
        --requirement /build/requirements-build.lock
# uv contains the checksums of the Pythons that it installs.
RUN uv python install 3.11 && uv venv --python 3.11 /opt/venv

# Before the code, so that these layers, by far the largest, are rebuilt only when a lock changes.
FROM python AS build
COPY requirements.lock requirements-cuda.lock /build/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/venv/bin/python --require-hashes --no-deps --only-binary :all: \
        --requirements /build/requirements.lock --requirements /build/requirements-cuda.lock

FROM python AS build-front
COPY requirements-front.lock /build/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/venv/bin/python --require-hashes --no-deps --only-binary :all: \
        --requirements /build/requirements-front.lock

FROM python AS build-api
COPY requirements-api.lock /build/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/venv/bin/python --require-hashes --no-deps --only-binary :all: \
        --requirements /build/requirements-api.lock

FROM ${BASE} AS runtime
# Ubuntu's image has a user with this id.
RUN userdel --remove ubuntu \
    && useradd --uid 1000 --create-home trainer \
    && install -d -o trainer -g trainer /models /work
COPY --from=build /opt/python /opt/python
COPY --from=build /opt/venv /opt/venv
COPY --from=build /etc/ssl/certs /etc/ssl/certs
# The worker writes to three folders only, so the root file system may be read-only: /models (the base model, downloaded
# once), /work (images and checkpoints of the current job) and /tmp (the rest).
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/models WORK_DIR=/work MPLCONFIGDIR=/tmp/matplotlib XDG_CACHE_HOME=/tmp/cache
WORKDIR /app

# The rooms without training: no torch, no CUDA.
FROM ${FRONT_BASE} AS front
COPY --from=build-front /opt/python /opt/python
COPY --from=build-front /opt/venv /opt/venv
COPY --from=build-front /etc/ssl/certs /etc/ssl/certs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app

# A stand-in for the backend, for compose only; it accepts correctly signed webhooks.
FROM front AS stand-in-backend
COPY sandbox/__init__.py sandbox/backend.py sandbox/backend_server.py sandbox/
USER 1000:1000
EXPOSE 8000
ENTRYPOINT ["python", "-m", "sandbox.backend_server"]

# The operators' commands (publish, jobs, cancel, redrive), for machines without a GPU: --target commands.
FROM front AS commands
COPY . .
RUN rm -r sandbox training api
USER 1000:1000
ENTRYPOINT ["python", "main.py"]
CMD ["--help"]

# The API server: no torch, no CUDA: --target api. A starting server brings the tables of its database to its version.
FROM ${FRONT_BASE} AS api
COPY --from=build-api /opt/python /opt/python
COPY --from=build-api /opt/venv /opt/venv
COPY --from=build-api /etc/ssl/certs /etc/ssl/certs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 API_HOST=0.0.0.0
WORKDIR /app
COPY . .
# /app/data is the place of SQLite, which is used without API_DATABASE_URL.
RUN rm -r sandbox training consumer && install -d -o 1000 -g 1000 data
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["/bin/sh", "-c", "exec python deploy/health_check.py http://127.0.0.1:${API_PORT:-8000}"]
# The same for an operator: `docker run … IMAGE api keys list`.
ENTRYPOINT ["python", "main.py"]
CMD ["api"]

FROM runtime AS worker
COPY . .
RUN rm -r sandbox api
USER 1000:1000
VOLUME ["/models", "/work"]
EXPOSE 8080
# A worker that loads or trains is healthy. The start period covers the doctor's check, which takes minutes at most.
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s --retries=3 CMD ["python", "deploy/health_check.py"]
# In exec form, and the script ends in an exec, so that Python itself receives SIGTERM.
ENTRYPOINT ["/app/deploy/entrypoint"]
CMD ["worker"]

# The worker with the base model included, for machines without a volume: --target worker-with-model.
FROM worker AS worker-with-model
ARG MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5
# A commit of that model. Another MODEL needs its own commit.
ARG MODEL_REVISION=451f4fe16113bff5a5d2269ed5ad43b0592e9a14
USER 0:0
RUN --mount=type=secret,id=hf_token,env=HF_TOKEN \
    HF_HOME=/tmp/hub python -m training.style.families.fetch_base_model "${MODEL}" "${MODEL_REVISION}" /opt/base-model \
    && rm -rf /tmp/hub
USER 1000:1000
ENV BASE_MODEL=/opt/base-model

# The worker with quantization for language models: --target worker-llm.
FROM build AS build-llm
COPY requirements-llm.lock /build/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/venv/bin/python --require-hashes --no-deps --only-binary :all: \
        --requirements /build/requirements-llm.lock

FROM worker AS worker-llm
COPY --from=build-llm /opt/venv /opt/venv
ENV KINDS=style,llm

# The default target of `docker build`.
FROM worker
