# l4pack in a container, with all its parts, for the CPU:
#   docker build --tag l4pack .
#   docker run --rm --user "$(id -u)" --volume "$PWD:/work" l4pack plan llama-4-scout
# For CUDA, on a base that has what the GPU's owner wants there, and with torch's build for it:
#   docker build --tag l4pack:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
# The core alone, without torch, for checks in CI: --build-arg EXTRAS=
ARG BASE=python:3.12-slim

FROM python:3.12-slim AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=all

# A base without Python gets its distribution's, whose versions are the distribution's choice.
# hadolint ignore=DL3008
RUN if ! command -v python3 > /dev/null; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -m venv /opt/l4pack

# torch comes first, from the index of its build; everything else is the version that the tests were last run with.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    if [ -n "$EXTRAS" ]; then \
        /opt/l4pack/bin/pip install --no-cache-dir --constraint /constraints.txt --index-url "$TORCH_INDEX" torch; \
    fi \
    && /opt/l4pack/bin/pip install --no-cache-dir --constraint /constraints.txt \
        "$(echo /wheels/l4pack-*.whl)${EXTRAS:+[$EXTRAS]}"

# Whoever it is run as has a home to keep caches in.
RUN useradd --uid 10001 --create-home l4pack && chmod 1777 /home/l4pack && mkdir -m 1777 /work
USER 10001
ENV HOME=/home/l4pack PATH=/opt/l4pack/bin:$PATH
WORKDIR /work
ENTRYPOINT ["l4pack"]
CMD ["--help"]
