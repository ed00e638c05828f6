#!/bin/sh
# Generates the committed stubs; with --check only compares them with what is committed.
set -eu
cd "$(dirname "$0")/.."
bin=$PWD/.venv-protos/bin
out=protos
if [ "${1:-}" = --check ]; then
	out=$(mktemp -d)
	trap 'rm -rf "$out"' EXIT
	mkdir -p "$out/loraplex_protos/v1"
fi
"$bin/python" -m grpc_tools.protoc -I protos \
	--plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
	--python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
	protos/loraplex_protos/v1/generation.proto \
	protos/loraplex_protos/v1/adapters.proto \
	protos/loraplex_protos/v1/status.proto
[ "$out" = protos ] && exit 0
for file in "$out"/loraplex_protos/v1/*; do
	cmp "$file" "protos/loraplex_protos/v1/$(basename "$file")" || {
		echo "stubs are stale: run 'make protos' and commit what it changes" >&2
		exit 1
	}
done
