#!/usr/bin/env bash
# make env: the environment in .venv, at the versions of constraints.txt. DEVICE=cpu|cuda overrides what is found.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-$(nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)}

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || {
  echo "diffuspeech needs Python 3.11 or 3.12; '$PYTHON' is $("$PYTHON" --version 2>&1). Name another: make env PYTHON=python3.11" >&2; exit 1; }
case $DEVICE in cpu|cuda) ;; *) echo "DEVICE is cpu or cuda, not '$DEVICE'" >&2; exit 1;; esac

"$PYTHON" -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check install -q"
$pip 'pip>=24'
torch=$(sed -n 's/^torch==//p' constraints.txt)
if [ "$DEVICE" = cuda ]; then
  $pip "torch===$torch"                       # three signs: just this build, never one marked +cpu
elif [ -n "${TORCH_INDEX:-}" ]; then
  $pip "torch===$torch+cpu" --index-url "$TORCH_INDEX"
elif [ "$(uname -s)" != Linux ] || ! $pip "torch===$torch+cpu" 2>/dev/null; then
  [ "$(uname -s)" != Linux ] || echo "No '+cpu' build of torch where pip looks: taking the default build, which works but is larger.
  To have the small one: rm -r .venv; make env TORCH_INDEX=<PyTorch's index of CPU wheels: pytorch.org, 'Get Started', 'CPU'>"
  $pip "torch==$torch"
fi
$pip --no-deps -c constraints.txt torchaudio   # its dependencies are torch alone, which is there
$pip -c constraints.txt setuptools wheel
$pip -c constraints.txt --no-build-isolation -e '.[lab,align,judges,corpora,docs,dev]'
PYTHON=.venv/bin/python tools/judges.sh
.venv/bin/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" --level=sys_prefix 2>/dev/null
touch .venv/.ready
