# diffuspeech: two commands are all you need, `make lab` and `make test`
PY := .venv/bin/python
export PLOTLY_RENDERER := plotly_mimetype
.PHONY: help lab test env docs bench voice notebooks format

help:       ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

lab: .venv/.ready  ## make the environment and open JupyterLab on the first explore notebook
	.venv/bin/jupyter lab --config=tools/jupyter_config.py nbs/explore/trajectory.ipynb $(LAB)

test: .venv/.ready  ## make the environment and pass every test
	@tools/debian.sh
	@.venv/bin/diffuspeech fetch whisper-tiny.en || [ $$? = 3 ]
	@$(PY) tools/check.py
	@$(PY) -m pytest tests/test_layout.py
	@OMP_NUM_THREADS=1 PATH="$(CURDIR)/.venv/bin:$$PATH" nbdev_test --n_workers 2 || \
	  { echo "A notebook fails: its name and the cell's error are above. Run it alone with: make notebooks NB=nbs/<part>/<name>.ipynb"; exit 1; }
	@$(PY) -m pytest tests

env: .venv/.ready  ## only the environment, in .venv (DEVICE=cpu|cuda overrides what is found)

.venv/.ready: constraints.txt settings.ini setup.py tools/env.sh tools/judges.sh
	@tools/env.sh

docs: .venv/.ready  ## the site, in _docs/
	@$(PY) tools/docs.py

bench: .venv/.ready  ## what things cost
	@.venv/bin/diffuspeech bench sampler
	@.venv/bin/diffuspeech bench decoder
	@.venv/bin/diffuspeech bench training
	@.venv/bin/diffuspeech bench law

CORPUS := $(or $(DIFFUSPEECH_HOME),$(HOME)/.cache/diffuspeech)/corpora/small
voice: .venv/.ready  ## train speech tokens and voice again from nothing, into runs/codec (hours; stopped, it goes on)
	@.venv/bin/diffuspeech corpus build small
	@for split in train dev; do .venv/bin/diffuspeech corpus prepare $(CORPUS)/$$split.jsonl || exit; done
	@.venv/bin/diffuspeech train speech-tokens -o runs/codec/speech-tokens
	@.venv/bin/diffuspeech train flow -o runs/codec/flow --set options.tokenizer=runs/codec/speech-tokens/model
	@echo "diffuspeech encode clip.wav -o ids.jsonl --model runs/codec"

notebooks: .venv/.ready  ## run every notebook top to bottom at its CI scale and store its outputs (NB=path for some)
	@$(PY) tools/notebooks.py $(NB)

format: .venv/.ready  ## export, clean, lint with fixes
	@PATH="$(CURDIR)/.venv/bin:$$PATH"; nbdev_export && nbdev_clean && ruff check --fix -q . && $(PY) tools/readme.py
