# What this repository can do, from a fresh checkout on a Debian machine. Each target installs what it needs.

PYTHON := .venv/bin/python

.PHONY: help demo run test lint critest bench fuzz docs protos prepare

help:
	@echo "make demo     a pod from pull to removal on an embedded Porto, every step shown (root)"
	@echo "make run      the shim in the foreground on /run/portoshim.sock, on an embedded Porto (root)"
	@echo "make test     all tests (root: also those that make pods)"
	@echo "make lint     ruff and mypy"
	@echo "make bench    this shim, containerd and bare Porto calls side by side (root)"
	@echo "make critest  the CRI conformance suite against this shim (root); CRITEST='--focus Networking'"
	@echo "make fuzz     a million damaged streams for what reads streaming clients; FUZZ='--cases N'"
	@echo "make docs     the pages of docs/ that are rendered from code"
	@echo "make protos   generate the protobuf modules anew from the .proto files"

prepare:
	@tools/prepare.sh

demo: prepare
	@$(PYTHON) -m tools.stage $(PYTHON) -m tools.demo

run: prepare
	@$(PYTHON) -m tools.run

# As root two at a time, each worker on a stage of its own; on a Porto that is there, one after the other beside it.
WORKERS := 2
STAGED := popen//python=$(PYTHON) -m tools.stage $(PYTHON)

test: prepare
	@if [ "$$(id -u)" = 0 ] && [ -z "$$PORTO_SOCKET" ]; then \
		$(PYTHON) -m pytest --dist=loadfile --no-loadscope-reorder --tx="$(WORKERS)*$(STAGED)"; \
	else \
		$(PYTHON) -m pytest; \
	fi

lint: prepare
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m mypy

bench:
	@tools/prepare.sh containerd conmon
	@if [ -z "$$PORTO_SOCKET" ]; then $(PYTHON) -m tools.stage $(PYTHON) -m tools.bench $(BENCH); \
	else $(PYTHON) -m tools.bench $(BENCH); fi

critest: prepare
	@$(PYTHON) -m tools.stage $(PYTHON) -m tools.critest $(CRITEST)

fuzz: prepare
	@$(PYTHON) -m tests.streaming.fuzz $(FUZZ)

docs: prepare
	@$(PYTHON) -m tools.docs

protos: prepare
	@$(PYTHON) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. shim_core/cri/v1/api.proto
	@$(PYTHON) -m grpc_tools.protoc -Iporto_api/src --python_out=porto_api/src --pyi_out=porto_api/src \
		porto_api/rpc.proto porto_api/seccomp.proto
