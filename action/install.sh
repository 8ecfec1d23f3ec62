#!/usr/bin/env bash
# Installs the quantkit of this action's own commit. INPUT_TORCH: cpu, pypi or none; INPUT_EXTRAS: extras, with commas.
set -euo pipefail

case "$INPUT_TORCH" in
    cpu) python -m pip install torch --index-url https://download.pytorch.org/whl/cpu ;;
    pypi | none) ;;
    *)
        echo "::error::torch is '$INPUT_TORCH', and must be cpu, pypi or none"
        exit 2
        ;;
esac
python -m pip install "$GITHUB_ACTION_PATH${INPUT_EXTRAS:+[$INPUT_EXTRAS]}"
quantkit --version
