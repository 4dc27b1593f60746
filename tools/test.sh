#!/usr/bin/env bash
# The tests on three workers, since many wait; tools/test.sh BIN, where BIN is the venv's bin folder. TEST_ALL=1: the
# long ones too.
#
# Most of these tests time real servers and processes, and the machine is shared. So where one to five tests fail, each
# is run once more with the machine to itself. What fails again fails the run. What passes then fails it too, since a
# test that needs a quiet machine is a defect, unless tools/flaky-tests.txt lists it: with a date, for 60 days.
# What a whole run must not leave out, tests/full_run.py tells.
set -uo pipefail
bin=$1
tools=$(dirname "$0")
list=$tools/flaky-tests.txt
failed=.pytest_cache/v/cache/lastfailed
"$bin/python" "$tools/flaky.py" check "$list" "$bin/pytest" || exit 1
rm -f "$failed"
left_out=$(mktemp)
trap 'rm -f "$left_out"' EXIT
chosen=()
if [ "${TEST_ALL:-}" = 1 ]; then
  export FRESH_ENGINES=1 # each engine starts an interpreter of its own: tests/backends/forking.py
else
  chosen=(-m "not long")
fi
FULL_RUN=$left_out "$bin/pytest" "${chosen[@]}" -n 3 --dist loadfile --no-loadscope-reorder --durations 40
code=$?
[ $code -eq 1 ] && [ -f "$failed" ] || exit $code
mapfile -t tests < <("$bin/python" -c "import json, sys; print(*json.load(open(sys.argv[1])), sep='\n')" "$failed")
[ ${#tests[@]} -le 5 ] || exit $code
echo "Failed beside other tests; once more, alone:"
printf '  %s\n' "${tests[@]}"
for test in "${tests[@]}"; do
  RUN_AGAIN=1 "$bin/pytest" "$test" || exit
done
echo "NOT STABLE: failed beside other tests and passed alone:"
printf '  %s\n' "${tests[@]}"
code=0
if ! unlisted=$(printf '%s\n' "${tests[@]}" | "$bin/python" "$tools/flaky.py" unlisted "$list"); then
  echo "FAILED: these are not in ${list#./}. Mend them; or list them there with a date and the reason:"
  echo "$unlisted"
  code=1
fi
if [ -s "$left_out" ]; then
  echo "FAILED: LEFT OUT: $(cat "$left_out")"
  code=1
fi
exit $code
