# One verb per thing a person wants to do. `make setup` needs Python 3.11 or 3.12 and the package registry, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
CORENLP ?= $(or $(RLGF_CORENLP),$(or $(RLGF_SHARED),../shared)/corenlp)
STAMP := $(VENV)/.installed

.PHONY: results setup quickstart quickstart-seeds imdb-small test test-slow test-data test-server gpu lint types bench bench-prefetch bench-rewards docs clean

setup: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

quickstart: setup  ## every algorithm on the embedded task, one table, minutes on two cores
	$(BIN)/rlgf compare quickstart --jobs 2 --out runs/quickstart

quickstart-seeds: setup  ## the same over five seeds; the committed table comes from this
	$(BIN)/rlgf compare quickstart --seeds 0,1,2,3,4 --jobs 2 --out runs/quickstart-seeds

imdb-small: setup  ## the five algorithms on real reviews, three seeds, about two hours on two cores
	$(BIN)/rlgf compare imdb-small --data $(DATA)/imdb --seeds 0,1,2 --jobs 2 --out runs/imdb-small

results:  ## keep the small files of a comparison under docs/results: make results NAME=imdb-small
	mkdir -p docs/results/$(NAME)
	cd runs/$(NAME) && cp -r --parents $$(ls -d results.json table.md curves.png baselines \
	  runs/*/config.yaml runs/*/metrics.jsonl runs/*/results.json 2>/dev/null) ../../docs/results/$(NAME)/

test: setup  ## the fast suite: no network, under a minute
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: setup
	RLGF_CORENLP=$(CORENLP) $(BIN)/python -m pytest -m slow

test-data: setup
	RLGF_CORENLP=$(CORENLP) $(BIN)/python -m pytest -m 'data and not slow'

test-server: setup
	$(BIN)/python -m pytest -m server

gpu: setup
	$(BIN)/python -m pytest -m gpu || test $$? -eq 5

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

bench: setup
	$(BIN)/python -m bench.iteration

bench-prefetch: setup  ## a slow guide asked ahead, beside cached rollins
	PYTHONPATH=tests $(BIN)/python -m bench.prefetch

bench-rewards: setup  ## what text metrics cost as rewards
	RLGF_CORENLP=$(CORENLP) $(BIN)/python -m bench.text_rewards

docs: setup  ## the reference pages that are made from the code
	$(BIN)/python docs/make.py

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
