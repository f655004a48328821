#!/usr/bin/env bash
# From nothing to derained pictures: environment, built-in data, a few minutes of training, test, gallery.
# Can be run again: what is done already is not done twice.
set -euo pipefail
cd "$(dirname "$0")"

step() { printf '\n== %s\n' "$*"; }

step "1/4 environment"
bash config/setup.sh

step "2/4 training a small S-DSEN (two stages, 6 channels) on the built-in set for a few minutes"
.venv/bin/python config/main.py -a train -p sdsen_s2 --run quickstart --channel 6 --batch_size 4 --lr 1e-3 \
    --clip_norm 0.1 --steps 500 --milestones 350 450 --save_steps 100 --log_steps 20

step "3/4 testing it on photographs that it has not seen"
.venv/bin/python config/main.py -a test -m quickstart

step "4/4 deraining them into showdir/"
.venv/bin/python config/show.py -m quickstart --all-stages

step "done"
echo "look at the pictures:  bash explore.sh"
echo "look at the curves:    bash config/tensorboard.sh"
echo "your own photograph:   .venv/bin/python config/show.py -m quickstart -i PHOTO.jpg"
