# syntax=docker/dockerfile:1

# The CUDA release that the pinned torch is built for (its wheels bring the libraries; the base brings the runtime, the
# compatibility layer for older drivers, and the check that the host's driver is new enough).
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Ubuntu 24.04 has no Python 3.11; uv brings one that stands by itself and moves as a folder.
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PATH=/opt/uv/bin:$PATH
# Nothing of these packages but the certificates reaches the image, and Ubuntu keeps one version of each.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY requirements-build.lock /build/
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --require-hashes --no-deps --only-binary :all: \
        --requirement /build/requirements-build.lock
# uv carries the checksums of the Pythons that it knows; 3.11 is the newest of those.
RUN uv python install 3.11 && uv venv --python 3.11 /opt/venv
# Before the code: this layer, by far the largest, is built again only when a lock changes.
COPY requirements.lock requirements-cuda.lock /build/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/venv/bin/python --require-hashes --no-deps --only-binary :all: \
        --requirements /build/requirements.lock --requirements /build/requirements-cuda.lock

FROM ${BASE} AS runtime
# For COMPILE_FROM_STEPS: torch.compile builds what starts its kernels with gcc. uv's Python brings the headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# Ubuntu's image has a user of its own with this id.
RUN userdel --remove ubuntu \
    && useradd --uid 1000 --create-home trainer \
    && install -d -o trainer -g trainer /models /work
COPY --from=build /opt/python /opt/python
COPY --from=build /opt/venv /opt/venv
COPY --from=build /etc/ssl/certs /etc/ssl/certs
# All that is written goes to these three, so the root file system may be read-only: the base model, fetched once, to
# /models; images and checkpoints of the job in hand to /work; the rest to /tmp.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/models WORK_DIR=/work MPLCONFIGDIR=/tmp/matplotlib XDG_CACHE_HOME=/tmp/cache
WORKDIR /app

# A stand-in for the backend, for compose alone; it takes every webhook that is signed as it should be.
FROM runtime AS stand-in-backend
COPY sandbox/__init__.py sandbox/backend.py sandbox/backend_server.py sandbox/
USER 1000:1000
EXPOSE 8000
ENTRYPOINT ["python", "-m", "sandbox.backend_server"]

FROM runtime AS worker
COPY . .
RUN rm -r sandbox
USER 1000:1000
VOLUME ["/models", "/work"]
EXPOSE 8080
# A worker that loads or trains is silent and healthy; five minutes are for the check before the start.
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s --retries=3 CMD ["python", "deploy/health_check.py"]
# In exec form, and the script ends in an exec: Python itself gets the SIGTERM.
ENTRYPOINT ["/app/deploy/entrypoint"]
CMD ["worker"]

# The same with the base model in it, for machines that start without a volume: --target worker-with-model.
FROM worker AS worker-with-model
ARG MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5
# A commit of that model: with another MODEL name its own.
ARG MODEL_REVISION=451f4fe16113bff5a5d2269ed5ad43b0592e9a14
USER 0:0
RUN --mount=type=secret,id=hf_token,env=HF_TOKEN \
    HF_HOME=/tmp/hub python -m training.style.families.fetch_base_model "${MODEL}" "${MODEL_REVISION}" /opt/base-model \
    && rm -rf /tmp/hub
USER 1000:1000
ENV BASE_MODEL=/opt/base-model

# What `docker build` makes unless told otherwise.
FROM worker
