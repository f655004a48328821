#!/usr/bin/env bash
# From nothing to derained photographs, then to a network of your own: environment, built-in data set, a few minutes of
# training, test, gallery. It can be run again: finished steps are not repeated.
set -euo pipefail
cd "$(dirname "$0")"

step() { printf '\n== %s\n' "$*"; }

step "1/4 environment"
bash config/setup.sh

step "2/4 removing synthetic rain from photographs with the pretrained weights models/photographs.pth"
.venv/bin/python config/show.py -m models/photographs.pth --data_dir data/builtin

echo
echo "look at them, now, in another terminal:    bash explore.sh"
echo "your own photograph:                       .venv/bin/python config/show.py -i PHOTO.jpg"

step "3/4 training a small S-DSEN (two stages, 6 channels) on the built-in set for a few minutes"
.venv/bin/python config/main.py -a train -p sdsen_s2 --run quickstart --channel 6 --batch_size 4 --lr 1e-3 \
    --clip_norm 0.1 --steps 500 --milestones 350 450 --save_steps 100 --log_steps 20

step "4/4 testing it on photographs that it was not trained on, into showdir/quickstart"
.venv/bin/python config/main.py -a test -m quickstart
.venv/bin/python config/show.py -m quickstart --all-stages

step "done"
echo "look at the pictures:  bash explore.sh (the output of the small network is on the page quickstart)"
echo "look at the curves:    bash config/tensorboard.sh"
