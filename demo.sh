#!/usr/bin/env bash
# The four rows of Table 1: for each training set two teachers and a student, then one evaluation.
#
#   ./demo.sh                            on miniature data, in five minutes on two cores
#   SEEDS="0 1 2 3 4" ./demo.sh          with several seeds: means and standard deviations
#   DATA=data PRESET=report ./demo.sh    on the real data in data/, with the report's settings
# Repeated, it goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=$(ls .venv/bin/python 2>/dev/null || echo python3)
DATA=${DATA:-data/miniature} PRESET=${PRESET:-tiny} SEEDS=${SEEDS:-0}
RUNS=runs/$PRESET JOBS=1 ALL=(--data-dir "$DATA") TEACHER=(--preset "$PRESET") STUDENT=() rows=()
if [ "$PRESET" = tiny ]; then  # two runs at a time, with half of the cores each
    RUNS=runs/demo JOBS=2 ALL+=(--batch-size 32 --captions-per-clip 3 --workers 0)
    TEACHER+=(--epochs 6 --decay-epochs 5) STUDENT=(--epochs 5 --decay-epochs 4 --max-lr 5e-4)
    # To glibc: keep freed memory. To get it anew from the system takes a sixth of the time.
    export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000
fi
declare -A names=()  # of the runs under way, by process id
trap 'kill "${!names[@]}" 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT TERM

start() {  # NAME SCRIPT OPTIONS...; of two runs at a time only the epochs are shown
    local name=$1 threads=$((($(nproc) + 1) / 2))
    set -- "${@:2}" "${ALL[@]}" --out "$RUNS/$name"
    finish $((JOBS - 1))
    echo "$ python $*"
    if [ $JOBS = 1 ]; then "$PYTHON" "$@" & else
        OMP_NUM_THREADS=$threads "$PYTHON" -u "$@" 2> "$RUNS/$name.txt" \
            > >(trap '' INT; sed -un "s/^epoch/  $name: &/p") &
    fi
    names[$!]=$name
}

finish() {  # wait until no more than $1 runs are left; where one fails, all end
    while [ ${#names[@]} -gt "$1" ]; do
        wait -np id "${!names[@]}" || { tail -vn 20 "$RUNS/${names[$id]}.txt" 2>/dev/null; exit 1; }
        unset "names[$id]"
    done
}

mkdir -p "$RUNS"
if [[ $DATA == *miniature ]]; then "$PYTHON" -m dualenc.miniature "$DATA"; fi
for sets in clotho "clotho audiocaps"; do
    for seed in $(for seed in $SEEDS; do seq "$seed" $((seed + 1)); done | sort -nu); do
        start "${sets/ /-}-teacher$seed" train.py --datasets $sets --seed $seed "${TEACHER[@]}"
    done
done
finish 0
for sets in clotho clotho-audiocaps; do
    for seed in $SEEDS; do
        two=("$RUNS/$sets-teacher"{$seed,$((seed + 1))}/best.pt)
        start $sets-student$seed distill.py --teachers "${two[@]}" --seed $seed "${STUDENT[@]}"
        rows+=("${two[0]}" "$RUNS/$sets-student$seed/best.pt")
    done
done
finish 0

set -- evaluate.py --split test --data-dir "$DATA" --checkpoint "${rows[@]}"
echo "$ python $*"
"$PYTHON" "$@"
echo "$((SECONDS / 60)) min $((SECONDS % 60)) s. Search the sounds: python -m dualenc.search" \
    "\"a dog barks\" --audio $DATA --checkpoint ${rows[-1]}"
