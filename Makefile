# Each target is one command on a fresh machine with Python >= 3.11 and a package index.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: setup demo test test-upstream lint bench verify-gpu clean

setup: $(INSTALLED)

# The stamp is made last: an interrupted set-up starts over, a finished one costs nothing until what it was made from changes.
$(INSTALLED): requirements.lock setup.py pyproject.toml tools/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s: make PYTHON=python3.11 …" % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python tools/install_detectron2.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/python tools/demo.py

test: setup
	$(BIN)/python -m pytest

# DETECTRON2: a clone of github.com/facebookresearch/detectron2, compiled or not; nothing is written into it.
test-upstream: setup
	$(BIN)/python tests/helpers/upstream.py $(DETECTRON2)

lint: setup
	$(BIN)/ruff check .

# PEER_DEEPKD, PEER_MDISTILLER, IMAGES_JSON, IMAGES_DIR: benchmarks/run.py says what they are.
bench: setup
	$(BIN)/python benchmarks/run.py

# On a machine with a GPU: which keys that change only speed are safe there, and what they gain. At most 20 minutes.
verify-gpu: setup
	$(BIN)/python tools/verify_gpu.py

clean:
	rm -rf .venv build *.egg-info
