# quantkit in an image, without a GPU (target cpu, the default) or for NVIDIA's (target cuda):
#   docker build --tag quantkit:cpu .
#   docker build --tag quantkit:cuda --target cuda .
# The base is pinned by Python and Debian release, and can be given by digest; packages are those of constraints.txt.
ARG BASE=python:3.12-slim-trixie

FROM ${BASE} AS wheel
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE CHANGELOG.md ./
COPY calib_data calib_data
COPY quantkit quantkit
# git is not in the context: the version, as 'quantkit --version' shall tell it
ARG VERSION=0.1.0.dev0
RUN SETUPTOOLS_SCM_PRETEND_VERSION="${VERSION}" pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE} AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/constraints.txt
COPY constraints.txt /constraints.txt
RUN python -m venv /opt/quantkit
ENV PATH=/opt/quantkit/bin:${PATH}

FROM builder AS cpu-packages
# a local version such as 2.13.0+cpu comes before PyPI's 2.13.0, which brings CUDA
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=llama-cpp,mistral-common,mlflow,sentencepiece,signing,vision
# hadolint ignore=DL3013 # pinned by PIP_CONSTRAINT
RUN pip install torch --extra-index-url "${TORCH_INDEX}"
COPY --from=wheel /wheels /wheels
RUN pip install "$(echo /wheels/*.whl)[${EXTRAS}]"

FROM builder AS cuda-packages
ARG EXTRAS=llama-cpp,mistral-common,mlflow,sentencepiece,signing,vision
# hadolint ignore=DL3013 # pinned by PIP_CONSTRAINT
RUN pip install torch
COPY --from=wheel /wheels /wheels
RUN pip install "$(echo /wheels/*.whl)[cuda,${EXTRAS}]"

FROM ${BASE} AS runtime
# libgomp is what llama.cpp is linked with and Python's slim images do not have
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home quantkit && install --directory --owner quantkit /work
ENV PATH=/opt/quantkit/bin:${PATH} PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
ENTRYPOINT ["quantkit"]
CMD ["--help"]

FROM runtime AS runtime-cuda
USER root
# triton, which torch brings for CUDA, has what launches its kernels compiled
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 1000

FROM runtime-cuda AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-packages /opt/quantkit /opt/quantkit

FROM runtime AS cpu
COPY --from=cpu-packages /opt/quantkit /opt/quantkit
