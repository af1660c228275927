# diffuspeech: `make lab` opens the notebooks, `make test` runs the tests; both make the environment first
PY := .venv/bin/python
export PLOTLY_RENDERER := plotly_mimetype
.PHONY: help home lab test types env docs bench voice notebooks format

FILES := $(or $(DIFFUSPEECH_HOME),$(HOME)/.cache/diffuspeech)# pretrained files, corpora
ifeq ($(shell test -w "$(HOME)" || echo no),no)# Jupyter, pip and matplotlib keep theirs there, too
export HOME := $(FILES)
endif

help:       ## print this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

lab: .venv/.ready  ## make the environment and open JupyterLab on the first explore notebook
	.venv/bin/jupyter lab --config=tools/jupyter_config.py nbs/explore/trajectory.ipynb $(LAB)

test: .venv/.ready  ## make the environment and run every test (QUICK=1: only what names a package that may be absent)
	@$(PY) tools/test.py $(if $(QUICK),--quick)

types: .venv/.ready  ## only the type checker
	@.venv/bin/pyrefly check --output-format min-text

env: .venv/.ready  ## make the environment, in .venv (DEVICE=cpu|cuda instead of what is found)

home:
	@mkdir -p "$(FILES)" 2>/dev/null && test -w "$(FILES)" || \
	  { echo "$(FILES) cannot be written: set DIFFUSPEECH_HOME to a folder that can be"; exit 1; }

.venv/.ready: constraints.txt settings.ini setup.py tools/env.sh tools/judges.sh | home
	@tools/env.sh

docs: .venv/.ready  ## build the site, in _docs/
	@$(PY) tools/docs.py

bench: .venv/.ready  ## measure time and memory of sampling, decoding and training
	@.venv/bin/diffuspeech bench sampler
	@.venv/bin/diffuspeech bench vocabulary
	@.venv/bin/diffuspeech bench decoder
	@.venv/bin/diffuspeech bench training
	@.venv/bin/diffuspeech bench law

CORPUS := $(FILES)/corpora/small
voice: .venv/.ready  ## train speech tokens and vocoder from scratch, into runs/codec (hours; started again, it resumes)
	@.venv/bin/diffuspeech corpus build small
	@for split in train dev; do .venv/bin/diffuspeech corpus prepare $(CORPUS)/$$split.jsonl || exit; done
	@.venv/bin/diffuspeech train speech-tokens -o runs/codec/speech-tokens
	@.venv/bin/diffuspeech train flow -o runs/codec/flow --set options.tokenizer=runs/codec/speech-tokens/model
	@echo "diffuspeech encode clip.wav -o ids.jsonl --codec runs/codec"

notebooks: .venv/.ready  ## run every notebook from top to bottom and store its outputs (NB=path: only these)
	@$(PY) tools/notebooks.py $(NB)

format: .venv/.ready  ## export, clean and format the notebooks, fix lint, write README.md
	@PATH="$(CURDIR)/.venv/bin:$$PATH"; ruff check --fix -q . && ruff format -q nbs tests tools && nbdev_export && nbdev_clean && $(PY) tools/readme.py
