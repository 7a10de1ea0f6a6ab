#!/bin/sh
# study.sh SEED [train|figures]: the main table of docs/evidence/results.md for one seed, from the project's folder.
# Four trainings (about three quarters of an hour on one CPU core), then figures on the test split. Interrupted, it continues.
set -e
seed=${1:?which seed?} part=${2:-all}
runs=runs/seed$seed figures=docs/evidence/results/camvid
data="--data camvid --data-root data/camvid --split test --precision bf16"
thresholds="0.98 0.9/0.7/0.5 0.95/0.8/0.65 0.98/0.8/0.65 0.98/0.9/0.8"

train() {  # train CONFIG FOLDER [OPTION ...]
    config=$1 folder=$2
    shift 2
    tokenexit train --config "$config" --seed "$seed" --out "$runs/$folder" "$@"
}

figures() {  # figures NAME FOLDER [OPTION ...]
    file=$figures/$1_seed$seed.json folder=$2
    shift 2
    [ -f "$file" ] || tokenexit evaluate "$runs/$folder" $data --json "$file" "$@"
}

if [ "$part" != figures ]; then
    train camvid_vit_tiny dense
    for method in dtop dovit; do
        train "camvid_${method}_finetune" "$method-finetune" --model.init_from "$runs/dense"
    done
    train camvid_dovit_heads_only dovit-heads-only --model.init_from "$runs/dense"
fi
[ "$part" != train ] || exit 0
figures dense dense --method dense dtop --threshold $thresholds
figures dtop_finetune dtop-finetune --method dense dtop --threshold $thresholds
figures dovit_finetune dovit-finetune --method dense dovit --threshold $thresholds
figures dovit_heads_only dovit-heads-only --method dense dovit --threshold 0.98/0.9/0.8 0.98 0.99 0.998 --input-scale 0.9 1
figures dense_smaller_input dense --method dense --input-scale 0.9 0.8 0.7
for exit in 1 2 3; do figures "dense_truncated$exit" dense --method truncated --after $exit; done
figures dense_references dense --method dtop --threshold 0.98/0.8/0.65 --references
figures dtop_finetune_smaller_input dtop-finetune --method dtop --threshold 0.98/0.9/0.8 0.99/0.95/0.9 --input-scale 0.9 0.8
