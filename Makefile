# Every target prepares what it needs; a fresh machine needs Python 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv model demo demo-vllm test test-all check format clean

venv:  ## .venv with attnhook, Transformers and the test tools; reused while its lock hash matches
	@PYTHON="$(PYTHON)" bash tools/venv.sh $(VENV)

model: venv  ## the default model, converted once into the cache
	@$(BIN)/attnhook model-path

demo: venv  ## a real model's real answer, where each token looked, and an HTML report
	@mkdir -p demo
	$(BIN)/attnhook run --layers auto --top-k 16 --prompt-rows --html demo/report.html --out demo/records.jsonl
	@echo "Open demo/report.html in a browser."

demo-vllm: venv  ## the same from a vLLM server, which is started and stopped
	@$(BIN)/python tools/demo_vllm.py demo

check: venv  ## the inner loop: lint, format, types, unit tests without the model
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not model and not slow"

test: venv  ## check, and the tests, with the real model and both servers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/attnhook model-path
	@bash tools/test.sh $(BIN)

test-all: venv  ## test, and what takes minutes: older engines, soaks, thousands of aborted requests
	@bash tools/venv_all.sh $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/attnhook model-path
	@TEST_ALL=1 bash tools/test.sh $(BIN)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
