# The developer's verbs. PYTHON is the interpreter of the environment to use.
PYTHON ?= .venv/bin/python

.PHONY: help environment quickstart test thorough lint type golden indexed notebooks

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

environment: .venv/.made ## make .venv with jaxft and the developer's tools

.venv/.made: pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install --quiet --editable '.[dev]'
	touch $@

quickstart: environment ## fine-tune the embedded base in under three minutes
	$(PYTHON) -m jaxft quickstart

test: environment ## the tests; TESTS=tests/weights for a part
	$(PYTHON) -m pytest -n 2 --dist loadfile $(TESTS)

thorough: environment ## the cases that others stand for in `make test`; those of TPUs need the extra `tpu`
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest -n 2 --dist loadfile -m thorough $(TESTS)

lint: environment ## format and lint
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

type: environment ## the type checker
	$(PYTHON) -m mypy jaxft

golden: ## make the golden files again; PYTHON needs the extra `reference`
	$(PYTHON) tests/golden/make_models.py
	$(PYTHON) tests/golden/make_families.py
	$(PYTHON) tests/golden/make_packed.py
	$(PYTHON) tests/golden/make_gguf.py
	$(PYTHON) tests/golden/make_adapters.py
	$(PYTHON) tests/golden/make_mixed.py
	$(PYTHON) tests/golden/make_combined.py
	$(PYTHON) tests/golden/make_trl.py
	$(PYTHON) tests/golden/make_family_curves.py
	$(PYTHON) tests/golden/make_preferences.py
	$(PYTHON) tests/golden/make_rollouts.py
	$(PYTHON) tests/data/golden/make_chat.py
	$(PYTHON) tests/data/golden/make_styles.py
	$(PYTHON) tests/data/golden/make_special_tokens.py
	$(PYTHON) tests/models/golden/make_rope.py
	$(PYTHON) tests/weights/golden/make_quantized.py
	$(PYTHON) tests/objectives/golden/make_policy.py

indexed: ## make tests/golden/indexed again; PYTHON needs torch and compressed-tensors 0.10.2, too old for `reference`
	$(PYTHON) tests/golden/make_indexed.py
