# vcf-batch with the versions that its tests run with.
#
#   docker build -t vcf-batch:0.2 .
#   docker run --gpus all --read-only --tmpfs /tmp:exec --tmpfs /home/vcf:uid=1000 --shm-size 8g --cap-drop ALL --security-opt no-new-privileges -v "$PWD:/data" vcf-batch:0.2 generate /data/manifest.parquet /data/out --model /data/model
#
# Every package is installed by the hash of its file. torch is PyPI's build with CUDA. For another one, such as a build
# without CUDA, make a lock with its hashes and index, and name it: --build-arg LOCK=FILE.

# Python 3.11.16 on Debian 12, as Docker's list of official images has it (docker-library/repo-info, 2026-08-25).
FROM python:3.11-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b

# KubeRay asks a node with wget whether it is well.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/vcf-batch
ARG LOCK=requirements.lock
COPY ${LOCK} ./requirements.lock
RUN pip install --no-cache-dir --require-hashes --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY vcf_batch ./vcf_batch
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation .

# Kubernetes tells by a number, not by a name, that a user is not root.
RUN useradd --create-home --uid 1000 vcf
USER 1000
WORKDIR /home/vcf
ENV RAY_USAGE_STATS_ENABLED=0 HF_HUB_DISABLE_TELEMETRY=1
ENTRYPOINT ["vcf-batch"]
