#!/usr/bin/env bash
# Put NVIDIA's tritonserver, its Python backend and a Python for its models into a folder.
#
#     setup.sh TARGET_DIR [PYTHON]
#
# PYTHON (default: python3) is one with the project installed: models import from its packages, with
# an older numpy before them, since the backend was built against numpy 1. Everything comes from
# PyPI. Running it again changes nothing.
set -euo pipefail

target=${1:?usage: setup.sh TARGET_DIR [PYTHON]}
python=${2:-python3}
server_version=0.7.0 # nvidia-pytriton, which carries tritonserver 2.51
numpy_version=1.26.4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

mkdir -p "$target"
target=$(cd "$target" && pwd)
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
pip=("$python" -m pip --disable-pip-version-check --quiet)

# The wheel's own layout: programs find the libraries at $ORIGIN/../../../nvidia_pytriton.libs.
server="$target/pytriton/tritonserver"
if [ ! -e "$target/nvidia_pytriton-$server_version.dist-info/RECORD" ]; then
    "${pip[@]}" install --no-deps --no-compile --target "$target" "nvidia-pytriton==$server_version"
fi
stub="$server/python_backend_stubs/$version/triton_python_backend_stub"
[ -e "$stub" ] || { echo "no stub for Python $version in nvidia-pytriton" >&2; exit 1; }
ln -sf "../../python_backend_stubs/$version/triton_python_backend_stub" "$server/backends/python/"
mkdir -p "$server/backends/onnxruntime"
cp "$here/onnxruntime_backend.py" "$server/backends/onnxruntime/model.py"

# The stub embeds libpython; one of the very Python that the packages are for.
if [ ! -x "$target/venv/bin/python" ]; then
    "$python" -m venv --without-pip "$target/venv"
fi
own=$("$target/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [ ! -e "$own/numpy-$numpy_version.dist-info/RECORD" ]; then
    "${pip[@]}" install --no-deps --no-compile --target "$own" "numpy==$numpy_version"
fi
# `addsitedir` also reads the .pth files there: an editable install is found. The stub ignores
# PYTHONDONTWRITEBYTECODE, and a file that appears in a polled model's folder loads it again.
cat > "$own/behind.pth" <<EOF
import sys; sys.dont_write_bytecode = True
import site; site.addsitedir('$packages')
EOF
# A command of the wheel that starts other things, by this machine's path.
rm -rf "$target/bin"
libraries=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
mkdir -p "$target/lib"
ln -sf "$libraries/libpython$version.so.1.0" "$target/lib/"

"$target/venv/bin/python" -c 'import numpy, onnxruntime; assert numpy.__version__ < "2", numpy'
