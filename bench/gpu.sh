#!/usr/bin/env bash
# Run bench/gpu_check.py on a machine with a GPU that has PyTorch but not this package, and no network:
#   bash bench/gpu.sh [flags of gpu_check.py]
# CONTRIBUTING says what to prepare: wheels in .whl, and in .gpu the commit and ONNX Runtime.
set -euo pipefail
cd "$(dirname "$0")/.."
began=$SECONDS
work=${TMPDIR:-/tmp}/adavipro-gpu
mkdir -p "$work/package" "$work/site" "$work/onnxruntime"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
if compgen -G '.whl/*.whl' >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" .whl/*.whl
fi
flags=(--work "$work/work")
if [ -f .gpu/ort_sm90.tar.xz ]; then
    python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
        .gpu/ort_sm90.tar.xz "$work/onnxruntime"
    flags+=(--onnxruntime "$work/onnxruntime")
fi
[ -f .gpu/commit ] && export ADAVIPRO_COMMIT=${ADAVIPRO_COMMIT:-$(cat .gpu/commit)}
# The package as an installation would lay it out, in a folder of its own: with the repository itself
# on the path, transformers would take kernels/ for Hugging Face's package of that name.
mkdir -p "$work/package/adavipro_fast"
for part in adavipro_fast/*; do
    [ "${part##*/}" = kernels ] || [ "${part##*/}" = export ] || ln -sfn "$PWD/$part" "$work/package/adavipro_fast/"
done
ln -sfn "$PWD/kernels" "$PWD/export" "$work/package/adavipro_fast/"
export PYTHONPATH=$work/package:$work/site
python3 bench/gpu_check.py --limit-s $((570 - SECONDS + began)) "${flags[@]}" "$@"
