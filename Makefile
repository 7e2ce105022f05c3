PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH_DATA := $(CURDIR)/.bench-data
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo try serve ui test faults sweeps cluster soak bench results install check clean

help:
	@echo "make demo    install, train digits with 2 Ray Train workers, show what came of it"
	@echo "make try     install, draw images with the model that comes with the project, ask it of others, put it in MLflow"
	@echo "make serve   answer requests on port 5001 with that model, or with MODEL=jem-digits"
	@echo "make ui      MLflow's pages of the runs in ./runs, on http://127.0.0.1:5000"
	@echo "make test    install what the tests need and run them"
	@echo "make faults  real faults: processes killed and stopped, nodes lost, full disks, damaged files, MLflow away"
	@echo "make sweeps  sweeps on a real Ray: crashes, divergence, a killed driver, trials of several workers"
	@echo "make cluster submitted jobs and clusters of several nodes on this machine"
	@echo "make soak    20 kills at random times, the same final bits each time (half an hour)"
	@echo "make bench   how fast everything is, on an idle machine (over an hour; 13 GB of disk for a while)"
	@echo "make results the tables of README and docs, from the runs' figures in docs/results"
	@echo "make check   ruff, types, import contracts"
	@echo "make clean   remove the environment; runs stay"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (PyTorch is several GB; a few minutes)"
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	@touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/python jobs/train.py digits
	@echo
	@echo "MLflow: make ui, then open http://127.0.0.1:5000 (Model training, top left)"

try: install
	$(BIN)/python jobs/sample.py fashion_mnist class=all
	test -e runs/try/mnist5k/manifest.json || $(BIN)/python jobs/prepare.py mnist5k runs/try/mnist5k
	$(BIN)/python jobs/score.py fashion_mnist runs/try/mnist5k runs/try/scores
	$(BIN)/python jobs/register.py fashion_mnist
	@echo
	@echo "Scored were handwritten digits, which it has never seen: in_distribution is the share of them that it takes for clothes."
	@echo "Its own images (Debian's dataset-fashion-mnist, or 30 MB are downloaded):"
	@echo "  $(BIN)/python jobs/evaluate.py fashion_mnist evaluate.suite=fast"
	@echo "As a server on port 5001: make serve"

serve: MODEL ?= jem-fashion_mnist
serve: install
	@test -n "$$MLFLOW_TRACKING_URI" -o -e runs/mlflow.db || { echo "no model is in runs/mlflow.db yet: make try" >&2; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" MLFLOW_TRACKING_URI="$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/runs/mlflow.db}" \
		mlflow models serve -m models:/$(MODEL)@champion --env-manager local -p 5001

ui: install
	@case "$$MLFLOW_TRACKING_URI" in http*) echo "runs are on $$MLFLOW_TRACKING_URI (MLFLOW_TRACKING_URI): open that" >&2; exit 1;; esac
	$(BIN)/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/runs/mlflow.db}" --host 127.0.0.1 --port 5000

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/faults

sweeps: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/sweeps

cluster: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/cluster

soak: install
	$(BIN)/python benchmarks/soak.py --out docs/results/soak.json

bench: KIND = $(shell $(BIN)/python -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")
bench: install
	$(BIN)/python benchmarks/step.py --out benchmarks/results/step_$(KIND).json
	$(BIN)/python benchmarks/scaling.py --out benchmarks/results/scaling.json
	$(BIN)/python benchmarks/evaluation.py --out benchmarks/results/evaluation_$(KIND).json
	$(BIN)/python benchmarks/memory.py --out benchmarks/results/memory_$(KIND).json
	$(BIN)/python benchmarks/start.py --out benchmarks/results/start.json
	$(BIN)/python benchmarks/stream.py --folder $(BENCH_DATA) --out benchmarks/results/stream.json
	rm -r $(BENCH_DATA)
	$(BIN)/python benchmarks/orchestration.py --out benchmarks/results/orchestration.json
	rm -f benchmarks/results/numerics.json
	$(BIN)/python benchmarks/numerics.py --out benchmarks/results/numerics.json

results: install
	$(BIN)/python benchmarks/results.py

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV)
