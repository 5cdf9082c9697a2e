# The commands people type; what they do is in scripts/.
.PHONY: setup demo test check test-long

setup:
	@scripts/setup

demo: setup
	.venv/bin/tunesmith demo

check: setup
	scripts/check

test: setup
	scripts/test

test-long: setup
	scripts/test-long
