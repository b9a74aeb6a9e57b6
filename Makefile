.PHONY: test quick lint validate test-all clean

test:      ## what to run before a commit: style, types, and the quick tests (two minutes after the first time)
	tests/tiers.sh lint quick

quick:     ## the quick tests alone
	tests/tiers.sh quick

lint:      ## style and types alone
	tests/tiers.sh lint

validate:  ## every claim about accuracy, computed again: the pages of docs/validation and the bounds of their figures
	tests/tiers.sh validate

test-all:  ## everything, with the real frameworks (an hour and several GB of downloads the first time)
	.ci/run

clean:     ## remove the environments that the above made
	rm -rf .envs
