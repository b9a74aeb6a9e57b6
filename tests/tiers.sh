#!/usr/bin/env bash
# Runs the tiers of checks named on the command line, or all of them, each in an environment of its own below .envs/.
# Needs Python 3.10 or newer, a C compiler and a package index, Chromium for the tier browser; no GPU. Exit code: the number of tiers that failed.
#
#     tests/tiers.sh              everything (see TIERS)
#     tests/tiers.sh lint quick   what `make test` runs
#
# A new tier is one line in TIERS: name | minutes at most | environment | command.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

OTHERS="matrix or verl or areal or tpu or fuzz or neighbours or browser or peers or megatron"
TIERS=(
  "lint   |  5 | quick | ruff check . && ruff format --check . && mypy"
  "quick  | 10 | quick | python -m pytest -n 2 -m 'not (slow or $OTHERS)'"
  "validate | 5 | quick | PYTHONPATH=tests:. python -m support.validate"
  "slow   | 15 | quick | python -m pytest -n 2 -m 'slow and not ($OTHERS)'"
  "fuzz   | 25 | quick | python -m pytest -n 2 -m fuzz"
  "atheris | 5 | atheris | PYTHONPATH=tests:. python -m support.fuzz_diagnosis -max_total_time=60"
  "matrix | 15 | quick | python -m pytest -m matrix"
  "neighbours | 10 | neighbours | python -m pytest -n 2 -m neighbours"
  "browser| 10 | browser | python -m pytest -m browser"
  "verl   | 30 | verl  | python -m pytest -m verl"
  "areal  | 15 | areal | python -m pytest -m areal"
  "tpu    | 15 | tpu   | python -m pytest -m tpu"
  "peers  |  5 | peers | python -m pytest -m peers"
  "megatron | 15 | megatron | TORCHDYNAMO_DISABLE=1 python -m pytest -m megatron"
)

# What each environment holds besides memfit and its test tools, one pip call a line. Where stored traces and answers are
# made again, versions are theirs: with others those tests would be skipped.
env_quick() { :; }
env_verl() {
  pip install -q torch==2.13.0
  pip install -q verl==0.9.1 transformers==5.10.4 peft==0.21.2
  pip install -q --no-deps fla-core==0.5.2 einops==0.8.2
}
env_areal() {
  pip install -q torch==2.13.0 hydra-core==1.4.0.dev1 omegaconf==2.4.0.dev2 "transformers>=5.0.0,<=5.3.0" torchdata ray \
    aiohttp aiofiles httpx flask uvloop orjson openai pillow numba einops lark colorlog tenacity \
    swanlab==0.6.12 wandb tensorboardX trackio tabulate
  pip install -q --no-deps areal==1.0.4
}
env_neighbours() {
  pip install -q hydra-core==1.3.8 hydra-zen==0.17.2 hydra-colorlog==1.2.0 hydra-joblib-launcher==1.2.0 \
    hydra-optuna-sweeper==1.3.0 hydra-submitit-launcher==1.2.0 hydra-ray-launcher==1.2.2
}
env_browser() { pip install -q playwright==1.65.2 plotly==7.1.0 jinja2==3.1.6; }
env_atheris() { pip install -q atheris==3.0.0; }
env_megatron() {
  pip install -q torch==2.13.0
  pip install -q megatron-core==0.16.1
}
env_tpu() { pip install -q jax==0.8.2 libtpu==0.0.32; }

env_peers() {
  pip install -q torch==2.13.0 setuptools wheel
  pip install -q transformers==5.10.4 accelerate==1.15.0
  DS_BUILD_OPS=0 pip install -q --no-build-isolation deepspeed==0.19.8
}

environment() { # name: make it if its recipe changed, then enter it
  local dir=".envs/$1" recipe
  recipe="$(declare -f "env_$1"; cat pyproject.toml)"
  if [ "$(cat "$dir/recipe" 2>/dev/null)" != "$recipe" ]; then
    rm -rf "$dir"
    "${PYTHON:-python3}" -m venv "$dir" || return 1
  fi
  # shellcheck disable=SC1091
  source "$dir/bin/activate"
  [ -f "$dir/recipe" ] && return 0
  (set -e; "env_$1"; pip install -q -e ".[test,lint]") || return 1
  printf '%s\n' "$recipe" > "$dir/recipe"
}

run_tier() { # minutes environment command
  (
    environment "$2" || { echo "the environment $2 could not be made"; exit 1; }
    timeout --kill-after=30 "$1m" bash -c "$3"
  )
}

field() { printf '%s' "$1" | cut -d'|' -f"$2" | sed 's/^ *//; s/ *$//'; }

failed=0
summary=()
names=("$@")
[ $# -eq 0 ] && for line in "${TIERS[@]}"; do names+=("$(field "$line" 1)"); done
export PIP_DISABLE_PIP_VERSION_CHECK=1 MEMFIT_VERL_WHEELS="$PWD/.envs/wheels"
mkdir -p .envs/logs
for name in "${names[@]}"; do
  tier=""
  for line in "${TIERS[@]}"; do [ "$(field "$line" 1)" = "$name" ] && tier="$line"; done
  if [ -z "$tier" ]; then
    echo "unknown tier: $name" >&2
    exit 2
  fi
  echo "== $name"
  start=$SECONDS
  run_tier "$(field "$tier" 2)" "$(field "$tier" 3)" "$(printf '%s' "$tier" | cut -d'|' -f4-)" 2>&1 | tee ".envs/logs/$name.log"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || failed=$((failed + 1))
  verdict=$([ "$code" -eq 0 ] && echo ok || echo "FAILED ($code)")
  summary+=("$(printf '%-7s %-13s %4ds  %s' "$name" "$verdict" $((SECONDS - start)) "$(grep -E '[0-9]+ (passed|failed|error|deselected)|Success:|no issues' ".envs/logs/$name.log" | tail -n 1)")")
done
printf '%s\n' "" "== summary" "${summary[@]}"
exit "$failed"
