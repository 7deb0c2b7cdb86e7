#!/usr/bin/env bash
# Gradescope runs this once, as root, when the autograder is built.
set -euo pipefail
if command -v apt-get > /dev/null && ! command -v pip3 > /dev/null; then
    apt-get update && apt-get install -y python3-pip
fi
cd "${AUTOGRADER_ROOT:-/autograder}/source"
pip="python3 -m pip install --quiet --root-user-action=ignore"
python3 -m pip install --help | grep -q break-system-packages && pip="$pip --break-system-packages"
# The CPU build of torch: a tenth of the size of the one with CUDA.
$pip "$(grep '^torch==' requirements.txt)" --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
$pip numpy imageio matplotlib tqdm 'tomli; python_version < "3.11"'
python3 -c "import matplotlib.font_manager"  # finds the fonts once, not for every submission
