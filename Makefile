# The commands people type; what they do is in scripts/.
.PHONY: setup demo test check test-long

setup:
	@scripts/setup

demo:
	@scripts/setup demo
	@.venv/bin/tunesmith demo
	@echo "(the commands above want: source .venv/bin/activate)"

check: setup
	scripts/check

test: setup
	scripts/test

test-long: setup
	scripts/test-long
