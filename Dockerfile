# vcf-batch with the versions that its tests run with.
#
#   docker build -t vcf-batch:0.2 .
#   docker run --gpus all -v "$PWD:/data" vcf-batch:0.2 generate /data/manifest.parquet /data/out --model /data/model
#
# torch comes from the index that pip uses, whose Linux build has CUDA. For another build, such as one without CUDA, name
# the index that has it: --build-arg TORCH_INDEX_URL=...
FROM python:3.11-slim

# KubeRay asks a node with wget whether it is well.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/vcf-batch
COPY constraints.txt ./
ARG TORCH_INDEX_URL=
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY pyproject.toml README.md LICENSE ./
COPY vcf_batch ./vcf_batch
RUN pip install --no-cache-dir --constraint constraints.txt ".[plots,s3]"

RUN useradd --create-home --uid 1000 vcf
USER vcf
WORKDIR /home/vcf
ENV RAY_USAGE_STATS_ENABLED=0 HF_HUB_DISABLE_TELEMETRY=1
ENTRYPOINT ["vcf-batch"]
