# shellcheck shell=bash
# Sourced by the scripts beside it: strict mode, where the repository is, and how to speak.
set -Eeuo pipefail
CI_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034 # used by the scripts that source this file
ROOT=$(dirname "$CI_DIR")
# Integration tests that need an RDMA device have these names, and `test = false` in their Cargo.toml: cargo leaves them out
# unless they are named. ci/soft-roce-suite runs them.
# shellcheck disable=SC2034
DEVICE_TESTS=(--test 'rdma*' --test 'soft_roce*')
: "${HOME:=/root}"
# A shell opened before Rust was installed does not have cargo in its path; sbin is missing for many users.
export HOME PATH="$PATH:$HOME/.cargo/bin:/usr/sbin:/sbin"

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
	say "$*"
	exit 1
}
# The comment at the top of a script is its help text.
usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${1:-$0}"; }

# Builds the program that runs seeds of the checker (client/tests/seeds.rs), and runs it.
run_seeds() {
	local program
	"$CI_DIR/deps" build
	program=$(
		cargo test --manifest-path "$ROOT/Cargo.toml" --locked -p fervor-client --no-default-features --features mutants \
			--test seeds --no-run --message-format json-render-diagnostics |
			sed -n 's/.*"name":"seeds".*"executable":"\([^"]*\)".*/\1/p'
	)
	[ -x "$program" ] || die 'cargo did not say where it built the seeds'
	# Servers say who is gone: in these jobs that happens thousands of times.
	"$program" "$@" 2> >(grep -v '^fervor-server: client ' >&2)
}
