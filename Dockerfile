# syntax=docker/dockerfile:1

# The CUDA release that the pinned torch is built for (its wheels bring the libraries; the base brings the runtime, the
# compatibility layer for older drivers, and the check that the host's driver is new enough).
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${BASE} AS build
# Ubuntu 24.04 has no Python 3.11; uv brings one that stands by itself and moves as a folder.
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PATH=/opt/uv/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv==0.13.9
RUN uv python install 3.11 && uv venv --python 3.11 /opt/venv
# Before the code: this layer, by far the largest, is made anew only when a requirement changes.
COPY requirements.txt constraints.txt /build/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/venv/bin/python --requirements /build/requirements.txt

FROM ${BASE}
# Ubuntu's image has a user of its own with this id.
RUN userdel --remove ubuntu \
    && useradd --uid 1000 --create-home trainer \
    && install -d -o trainer -g trainer /models /work
COPY --from=build /opt/python /opt/python
COPY --from=build /opt/venv /opt/venv
COPY --from=build /etc/ssl/certs /etc/ssl/certs

WORKDIR /app
COPY . .
USER trainer
# The base model is fetched once into /models; the pictures and checkpoints of the job in hand lie in /work.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/models WORK_DIR=/work
VOLUME ["/models"]

# In this form Python itself gets the SIGTERM, without a shell in between. All else comes from the environment.
ENTRYPOINT ["python", "main.py"]
CMD ["worker"]
