#!/usr/bin/env bash
# Every test on two workers; tools/test.sh BIN, where BIN is the venv's bin folder.
#
# Most of these tests time real servers and processes, and the machine is shared. So where one to five fail, each is
# run once more with the machine to itself: what fails again fails the run; what passes then is named at the end, since
# a test that needs a quiet machine is a defect of the test, to be mended.
set -uo pipefail
bin=$1
failed=.pytest_cache/v/cache/lastfailed
rm -f "$failed"
"$bin/pytest" -n 2 --dist loadfile --no-loadscope-reorder --durations 40
code=$?
[ $code -eq 1 ] && [ -f "$failed" ] || exit $code
mapfile -t tests < <("$bin/python" -c "import json, sys; print(*json.load(open(sys.argv[1])), sep='\n')" "$failed")
[ ${#tests[@]} -le 5 ] || exit $code
echo "Failed beside other tests; once more, alone:"
printf '  %s\n' "${tests[@]}"
"$bin/pytest" "${tests[@]}" || exit
echo "NOT STABLE: failed beside other tests and passed alone:"
printf '  %s\n' "${tests[@]}"
