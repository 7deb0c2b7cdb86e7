#!/usr/bin/env bash
# Gradescope runs this once, as root, when the autograder is built.
set -euo pipefail
if command -v apt-get > /dev/null && ! command -v pip3 > /dev/null; then
    apt-get update && apt-get install -y python3-pip
fi
cd "${AUTOGRADER_ROOT:-/autograder}/source"
pip="python3 -m pip install --quiet"
for option in --root-user-action=ignore --break-system-packages; do  # pip 22.0 of Ubuntu 22.04 knows neither
    if python3 -m pip install --help | grep -e "${option%%=*}" > /dev/null; then pip="$pip $option"; fi
done
# The CPU build of torch: a tenth of the size of the one with CUDA.
$pip "$(grep '^torch==' requirements.txt)" --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
$pip numpy imageio matplotlib tqdm 'tomli; python_version < "3.11"'
python3 -c "import matplotlib.font_manager"  # finds the fonts once, not for every submission
# The scripts here are the solution: it has to get all points before a student's work is graded.
python3 homework.py grade ASSIGNMENT --submission . --json self_test.json
python3 -c "import json; r = json.load(open('self_test.json')); exit(r['score'] < r['max_score'])"
