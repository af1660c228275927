#!/usr/bin/env bash
# Judges and tokenizers whose packages ask for more, or for other versions, than they need: installed without their dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python}" -m pip --disable-pip-version-check install -q --no-deps -c constraints.txt \
  distillmos xls-r-sqa resemblyzer webrtcvad-wheels s3tokenizer
