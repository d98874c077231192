# Every target works on a fresh machine that has Python 3.11, pip and make.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := build/tools/bin

export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: install demo test test-all chaos simulate explore reference roles docs check lint tools lock sbom clean

install: $(INSTALLED)

# torch goes first and from the constraints alone: it decides between a CPU build and gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,docs,plots,s3,duplicates]"
	touch $@

demo: install
	$(BIN)/vcf-batch generate manifests/demo.parquet out/demo --model tiny --address local
	$(BIN)/vcf-batch report out/demo --out out/demo/index.html --png out/demo/contact_sheet.png

# Two processes, each with whole files in their order, and one thread: OpenMP's spin where they wait for a core.
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --hypothesis-profile same -n 2 --dist loadfile --no-loadscope-reorder

# In one process: some of the long tests are about workers that are silent for too long.
test-all: install
	$(BIN)/pytest

# One run struck by a hundred faults; about ten minutes. SEED=2 for others, S3=1 on an S3 server.
chaos: install
	$(BIN)/python tests/support/chaos.py --seed $(or $(SEED),1) $(if $(S3),--s3)

# Runs in simulated worlds, on all cores. SEEDS=100 for fewer, SEED=7 for one with everything that happens.
simulate: install
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m support.simulation $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),10000))

# Every request of drivers, pushes and readers to the storage, struck once: tens of thousands of runs, on all cores.
explore: install
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m support.simulation --explore

reference: install
	$(BIN)/python docs/make_reference.py

roles: install
	$(BIN)/python docs/make_roles.py

# The documentation as a site, build/site/index.html. A link that leads nowhere, or any other warning, fails it.
docs: install
	$(BIN)/python -m sphinx --quiet --nitpicky --fail-on-warning --fresh-env -c docs -d build/doctrees . build/site

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

tools:
	test -x $(TOOLS)/python || $(PYTHON) -m venv build/tools
	$(TOOLS)/pip install --quiet uv==0.13.9 cyclonedx-bom==7.5.0

# What images install: the versions of constraints.txt with the hashes of PyPI's files, torch with CUDA among them.
lock: tools
	$(TOOLS)/uv pip compile --quiet --no-config --default-index https://pypi.org/simple --generate-hashes --no-annotate \
		--custom-compile-command "make lock" --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
		--constraint constraints.txt --extra plots --extra s3 --output-file requirements.lock pyproject.toml

# The parts list of the image's Python packages, as CycloneDX.
sbom: tools
	mkdir -p out
	$(TOOLS)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --of JSON -o out/sbom.cdx.json \
		requirements.lock

clean:
	rm -rf out build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
