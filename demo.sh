#!/usr/bin/env bash
# The four rows of Table 1. For each of the two training sets, two teachers are trained, of which the
# first is a row, and a student, which is another. Then all four are evaluated.
#
#   ./demo.sh                            on miniature data, in five to seven minutes on two cores
#   SEEDS="0 1 2 3 4" ./demo.sh          with several seeds: means and standard deviations
#   DATA=data PRESET=report ./demo.sh    on the real data in data/, with the report's settings
#
# The same command resumes an interrupted demo.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=$(ls .venv/bin/python 2>/dev/null || echo python3)
DATA=${DATA:-data/miniature}
PRESET=${PRESET:-tiny}
SEEDS=${SEEDS:-0}
if [ "$PRESET" = tiny ]; then
    RUNS=runs/demo
    SMALL="--batch-size 32 --captions-per-clip 3 --workers 0"
    TEACHER="--preset tiny --epochs 6 --decay-epochs 5 $SMALL"
    STUDENT="--epochs 5 --decay-epochs 4 --max-lr 5e-4 $SMALL"
    # Let glibc keep freed memory: getting it from the system again takes a sixth of the time.
    export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000
else
    RUNS=runs/$PRESET
    TEACHER="--preset $PRESET"
    STUDENT=""
fi

# However the script ends, runs in the background are told to save and end, and it waits for that.
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start NAME SCRIPT OPTIONS...: tiny runs share the cores and write to NAME.txt; others run alone.
start() {
    local name=$1
    shift
    set -- "$@" --data-dir "$DATA" --out "$RUNS/$name"
    if [ "$PRESET" = tiny ]; then
        echo "$ python $* > $RUNS/$name.txt"
        # In a session of its own a run does not get Ctrl-C, but only the SIGTERM that follows: two
        # signals would end it at once, unsaved.
        OMP_NUM_THREADS=$((($(nproc) + 1) / 2)) setsid "$PYTHON" "$@" &> "$RUNS/$name.txt" &
        pids+=($!)
        logs+=("$RUNS/$name.txt")
    else
        echo "$ python $*"
        "$PYTHON" "$@"
    fi
}

# Wait for the runs that were started and show how they ended; where one fails, exit.
finish() {
    # Wait until each has ended, or one has failed. (`wait -n` says 127 where it has missed an end.)
    for _ in "${pids[@]}"; do
        wait -n || [ $? = 127 ] || fail
    done
    # Ask for the status of each, since one whose end was missed may have failed.
    for pid in "${pids[@]}"; do
        wait "$pid" || fail
    done
    for log in "${logs[@]}"; do
        tail -n 2 "$log"
    done
    pids=()
    logs=()
}

# Show the ends of the runs' logs and exit.
fail() {
    tail -v -n 20 "${logs[@]}"
    exit 1
}

mkdir -p "$RUNS"
pids=()
logs=()
if [[ $DATA == *miniature ]]; then
    "$PYTHON" -m dualenc.miniature "$DATA"
fi
rows=()
for seed in $SEEDS; do
    # Student 0 learns from teachers 0 and 1, student 1 from 2 and 3: no two share a teacher.
    a=$((2 * seed))
    b=$((2 * seed + 1))
    start clotho-teacher$a train.py --datasets clotho --seed $a $TEACHER
    start clotho-teacher$b train.py --datasets clotho --seed $b $TEACHER
    finish
    start clotho-audiocaps-teacher$a train.py --datasets clotho audiocaps --seed $a $TEACHER
    start clotho-audiocaps-teacher$b train.py --datasets clotho audiocaps --seed $b $TEACHER
    finish
    for row in clotho clotho-audiocaps; do
        teachers=("$RUNS/$row-teacher$a/best.pt" "$RUNS/$row-teacher$b/best.pt")
        start $row-student$seed distill.py --teachers "${teachers[@]}" --seed $seed $STUDENT
        rows+=("${teachers[0]}" "$RUNS/$row-student$seed/best.pt")
    done
    finish
done

echo "$ python evaluate.py --split test --data-dir $DATA --checkpoint ${rows[*]}"
"$PYTHON" evaluate.py --split test --data-dir "$DATA" --checkpoint "${rows[@]}"
echo "$((SECONDS / 60)) min $((SECONDS % 60)) s. Search the sounds: python -m dualenc.search" \
    "\"a dog barks\" --audio $DATA --checkpoint ${rows[-1]}"
