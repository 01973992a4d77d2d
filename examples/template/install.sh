#!/bin/bash
# Installs the consumer's packages into a virtual environment: install.sh FOLDER. NULLWORKER is what pip installs.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
python3 -m venv "$1"
"$1/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check "$NULLWORKER" -r "$here/requirements.txt"
"$1/bin/python" -m pip check
"$1/bin/nullworker" --version
