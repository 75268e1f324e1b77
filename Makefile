TIER ?= ci
# runs: make them; reference: show the committed ones
FROM ?= runs
# e.g. madtd: its figures alone, one paper of a large tier at a time; a target of the Snakefile
PAPER ?=
ONLY = $(if $(PAPER),--paper $(PAPER))
SHOWN = $(if $(filter reference,$(FROM)),--from reference)
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: reproduce test test-slow test-browser test-slurm audit plan report bench bench-peers clean

reproduce: .venv/ready ## set up, run the tier, print claims and where everything is
	@$(if $(SHOWN),true,$(BIN)/dynarep plan --tier $(TIER) $(ONLY)) & \
	$(BIN)/snakemake --profile experiments/profiles/default $(PAPER) --config tier=$(TIER) from=$(FROM); \
	made=$$?; wait; exit $$made
	@$(BIN)/dynarep claims --tier $(TIER) $(SHOWN) $(or $(ONLY),--kept) || true # a verdict is a result, not a failure; .ci/run asks for the exit code

test: .venv/ready ## the tests, a few minutes
	$(BIN)/pytest -n 2 --dist worksteal

test-slow: .venv/ready ## the long ones
	$(BIN)/pytest -n 2 --dist worksteal -m slow

test-browser: .venv/ready ## the report in Chromium, which must be installed
	$(BIN)/pip install --quiet --require-hashes --no-deps -r requirements-browser.txt
	$(BIN)/pytest -m browser

test-slurm: .venv/ready ## the DAG through a SLURM of one node: root, and Debian's slurm-wlm and munge
	$(BIN)/pip install --quiet --require-hashes --no-deps -r requirements-slurm.txt
	timeout -s INT -k 30 900 $(BIN)/pytest -m slurm # what it started ends with it

audit: .venv/ready ## do results, figures, verdicts and report follow from the runs?
	$(BIN)/dynarep audit

plan: .venv/ready ## what the tier would run and cost
	$(BIN)/dynarep plan --tier $(TIER)

report: .venv/ready ## write the page again
	$(BIN)/dynarep report --tier $(TIER) $(SHOWN)

bench: .venv/ready ## how close the updates come to the machine's matrix-multiply rate
	$(BIN)/dynarep bench

bench-peers: .venv/ready ## the same beside other people's SAC, which is installed for it (JAX: 0.5 GB)
	$(BIN)/pip install --quiet --require-hashes --no-deps -r requirements-bench.txt
	$(BIN)/dynarep bench --peers

# torch stands apart: a hash would name one build of it and refuse the CPU or CUDA build that fits this machine.
.venv/ready: requirements.lock requirements-torch.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet -r requirements-torch.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv .snakemake .mypy_cache .pytest_cache .ruff_cache
