#!/usr/bin/env bash
# Redoes the tables and figures of README.md and analysis/README.md.
#
#   sweeps/paper.sh                 all sections, one after the other
#   sweeps/paper.sh main entropy    these sections
#   sweeps/paper.sh --list [...]    prints the commands and runs nothing
#
# Finished runs are skipped: after a stop, the same line continues. A failed run leaves the others alone, and the exit
# code is 1. Runs of a section are in $RESULTS/SECTION, its tables and figures in $PAPER/SECTION. Sections may run at
# the same time. They need '.[vision,glue,lm,analysis]', the data and the weights (conf/README.md).
# Variables: DATA, MODELS, RESULTS, PAPER, PYTHON; OPTIONS: more keys for every run, as OPTIONS=wandb.mode=disabled.
# Hours beside a section are estimates: the number of runs times 163 s (MiniLM), 195 s (ResNet-56, EfficientNet-Lite0),
# 79 s (ResNet-20) or 40 s (RTN alone). The first, the second for ResNet-56, and the third are means of 10, 7 and 3 runs
# on one thread of a busy AMD EPYC (2026-11-29). demo, cost and large: from the seconds in the READMEs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DATA=${DATA:-../shared/data}          # cifar10/, glue/, imagenet_nips2017/, wikitext-2-raw/, lm_calibration/
MODELS=${MODELS:-../shared/models}    # cifar10/*.th, glue/sst2/, glue/mrpc/
RESULTS=${RESULTS:-results/paper}
PAPER=${PAPER:-paper}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
SECTIONS=(demo main budgets lm earlier clip cost switches refits backward ablation components step tried rivals entropy bounds grids
  large)
EARLIER=(inputs=full correction=none)   # BayesQ's defaults before 2026-11-29
KNAPSACK=(method=gptq allocator=knapsack inputs=paired correction=moments)
SEEDS=seed=0,1,2
list= failed=

# The keys of a workload, as an array W.
workload() {
  case $1 in
    resnet56) W=(experiment=cifar_resnet56 "model.checkpoint=$MODELS/cifar10/resnet56-4bfd9763.th"
      "dataset.root=$DATA/cifar10") ;;
    first2000) W=(model=cifar_resnet56 dataset=cifar10 "model.checkpoint=$MODELS/cifar10/resnet56-4bfd9763.th"
      "dataset.root=$DATA/cifar10" dataset.limit=2000 dataset.subset=first) ;;
    resnet20) W=(model=cifar_resnet20 dataset=cifar10 "model.checkpoint=$MODELS/cifar10/resnet20-12fca82f.th"
      "dataset.root=$DATA/cifar10" dataset.limit=2000 dataset.subset=first calibration.examples=512) ;;
    lite0) W=(experiment=efficientnet_lite0 "dataset.root=$DATA/imagenet_nips2017") ;;
    mrpc | sst2) W=(model=minilm dataset=glue "dataset.task=$1" "model.checkpoint=$MODELS/glue/$1"
      "dataset.root=$DATA/glue") ;;
    film) W=(model=minilm dataset=movie_snippets) ;;
  esac
}

# Print a command; run it unless --list.
go() {
  local word code=0 line="OMP_NUM_THREADS=$OMP_NUM_THREADS "
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./=,:@%+-]+$ ]] || printf -v word %q "$word"
    line+="$word "
  done
  echo "${line% }"
  [[ -n $list ]] || "$@" || code=$?
  ((code < 128)) || exit "$code"   # stopped by a signal
  ((code == 0)) || failed=1
}

# sweep SECTION KEY=VALUE ...
sweep() {
  # shellcheck disable=SC2086
  go "$PYTHON" run.py -m "results_dir=$RESULTS/$1" "${@:2}" ${OPTIONS:-}
}

# runs SECTION 'WORKLOAD ...' KEY=VALUE ...: a sweep of each workload.
runs() {
  local name W
  for name in $2; do
    workload "$name"
    sweep "$1" "${W[@]}" "${@:3}"
  done
}

# timed SECTION ARGUMENT ...: a command with $THREADS or two threads, and an empty cache.
timed() {
  go rm -rf "$RESULTS/empty_cache"
  # shellcheck disable=SC2086
  OMP_NUM_THREADS=${THREADS:-2} go "$PYTHON" run.py "${@:2}" "results_dir=$RESULTS/$1" "cache_dir=$RESULTS/empty_cache" ${OPTIONS:-}
}

# tables SECTION: all tables and figures of its runs.
tables() { go "$PYTHON" -m analysis "$RESULTS/$1" --output "$PAPER/$1"; }

demo() {        # README.md, "Two commands". 0.1 h
  OMP_NUM_THREADS=2 runs demo film method=bayesq,gptq bits=3,3.5,4
}

main() {        # README.md, "Results", and main_figure. 11 h
  local all='resnet56 lite0 mrpc sst2 film'
  runs main "$all" method=rtn,awq,gptq,bayesq bits=3,3.5,4 $SEEDS
  runs main "$all" "${KNAPSACK[@]}" bits=3,3.5,4 $SEEDS
  tables main   # compact_table is README's table
  go "$PYTHON" -m bayesq.suite.report "$RESULTS/main" --html "$PAPER/main/page.html"
}

budgets() {     # analysis/README.md, main table: half a bit fewer. 0.2 h
  runs budgets 'resnet56 lite0 film sst2' method=bayesq bits=2.5 seed=0
  tables budgets
}

lm() {          # analysis/README.md, "A causal language model". 2 h (seconds of these runs)
  W=(experiment=smollm2_wikitext "dataset.root=$DATA/wikitext-2-raw" "calibration.source=$DATA/lm_calibration/c4.txt"
    dataset.limit=32 calibration.examples=64)
  sweep lm "${W[@]}" method=rtn,gptq,bayesq bits=3 seed=0
  sweep lm "${W[@]}" "${KNAPSACK[@]}" bits=3 seed=0
  tables lm
}

earlier() {     # analysis/README.md, the earlier defaults. 11 h
  local all='resnet56 lite0 mrpc sst2 film'
  runs earlier "$all" method=rtn,awq bits=3,3.5,4 $SEEDS
  runs earlier "$all" method=bayesq "${EARLIER[@]}" bits=3,3.5,4 $SEEDS
  runs earlier "$all" method=gptq inputs=prefix,full bits=3,3.5,4 $SEEDS
  tables earlier
}

clip() {        # RTN with its other clip rule. 0.1 h
  runs clip 'resnet56 lite0' method=rtn method.clip=minmax bits=3,3.5,4 seed=0
}

cost() {        # Cost: an empty cache for each run, nothing beside it. 1.5 h
  local seed name method W
  for name in resnet56 lite0 sst2 mrpc; do
    workload "$name"
    for seed in 0 1 2 3 4; do
      timed cost method=gptq inputs=full bits=3 seed=$seed dataset.limit=32 "${W[@]}"
      timed cost method=bayesq "${EARLIER[@]}" distill=true bits=3 seed=$seed dataset.limit=32 "${W[@]}"
    done
  done
  go "$PYTHON" -m analysis "$RESULTS/cost" --cost
  for name in resnet56 film; do
    workload "$name"
    for method in rtn hqq squeezellm awq gptq qtip lnq qronos gptaq bayesq adaround brecq; do
      THREADS=1 timed cost_all method=$method bits=3 seed=0 dataset.limit=32 "${W[@]}"
    done
  done
  go "$PYTHON" -m analysis "$RESULTS/cost_all" --cost
  timed cost_demo -m method=rtn,gptq,awq,bayesq bits=3,3.5,4
}

switches() {    # Distillation, correction, fewer bits. 6 h
  local all='resnet56 lite0 sst2 mrpc'
  runs switches "$all" method=bayesq "${EARLIER[@]}" distill=true bits=3 $SEEDS
  runs switches "$all" method=gptq inputs=full distill=true bits=3 $SEEDS
  runs switches 'resnet56 lite0' method=bayesq inputs=full correction=moments bits=3,3.5,4 $SEEDS
  runs switches 'resnet56 lite0' method=gptq inputs=full correction=moments bits=3,3.5,4 $SEEDS
  runs switches 'resnet56 sst2 mrpc' method=bayesq "${EARLIER[@]}" bits=2 method.refits=2 $SEEDS
  runs switches "$all" method=bayesq "${EARLIER[@]}" bits=2,2.5 $SEEDS
  runs switches "$all" method=gptq inputs=full bits=2,2.5 $SEEDS
  tables switches
}

refits() {      # Refits. 4.4 h
  runs refits 'resnet56 lite0 mrpc sst2 film' method=bayesq "${EARLIER[@]}" method.refits=1,2 bits=3,3.5,4 $SEEDS
  tables refits
}

backward() {    # Backward passes. 0.5 h
  runs backward 'sst2 mrpc' method=bayesq "${EARLIER[@]}" bits=3 $SEEDS posterior.examples=128,null
  tables backward
}

ablation() {    # Components with today's defaults. 0.4 h
  local names=full,codebook_lloyd,codebook_uniform,codebook_mean,allocator_uniform,refits_0,refits_2,states_256
  names+=,rounding_nearest,correction_none,correction_mean,inputs_full,inputs_prefix,gptq_paired,gptq_paired_knapsack
  names+=,posterior_diag,posterior_ekfac,prior_none,block_layer
  runs ablation resnet20 bits=3 seed=0 "ablation=$names"
  go "$PYTHON" -m analysis "$RESULTS/ablation" --ablation
}

components() {  # Components with the earlier defaults. 6 h
  local names=full,gptq,gptq_knapsack,gptq_distill,allocator_uniform,block_layer,block_group,codebook_lloyd
  names+=,codebook_uniform,codebook_mean,codebook_noise,rounding_nearest,states_256,refits_0,refits_2,refits_4
  names+=,posterior_diag,posterior_lowrank,posterior_ekfac,prior_none,prior_eigenvalues,prior_evidence,prior_factored
  names+=,prior_global,draws_labels,backward_64,backward_all,examples_64,examples_128,examples_512,examples_1024
  names+=,proxy_mc,distill
  runs components first2000 bits=3 $SEEDS "${EARLIER[@]}" "ablation=$names"
  runs components first2000 bits=3 $SEEDS inputs=full correction=moments ablation=full,gptq
  go "$PYTHON" -m analysis "$RESULTS/components" --ablation
}

step() {        # Inputs in step and kept moments. 1.6 h
  runs step resnet20 method=gptq inputs=full,prefix,paired bits=3 $SEEDS
  runs step resnet20 method=gptq allocator=knapsack inputs=full,prefix,paired bits=3 $SEEDS
  runs step resnet20 "${KNAPSACK[@]}" bits=3 $SEEDS
  runs step resnet20 method=gptaq,qronos bits=3 $SEEDS
  runs step resnet20 method=qronos method.damping=1e-6 bits=3 $SEEDS
  runs step 'resnet20 film' method=bayesq inputs=full,paired correction=none,moments bits=3 $SEEDS
  runs step resnet20 method=bayesq inputs=paired correction=mean bits=3 $SEEDS
  runs step resnet20 method=bayesq inputs=paired correction=moments method.states=256 bits=3 $SEEDS
  runs step resnet20 method=bayesq inputs=paired correction=moments method.refits=2 bits=3 $SEEDS
  tables step
}

tried() {       # "Nothing else that was tried". 0.4 h
  local key
  for key in proxy=mc posterior.examples=512 posterior.shrinkage=.2 posterior=ekfac method.damping=.001 distill=true; do
    runs tried resnet20 method=bayesq $key bits=3 $SEEDS
  done
  tables tried
}

rivals() {      # Every method with its defaults; groups of 128 columns; the exact allocation. 2 h
  runs rivals resnet20 method=rtn,hqq,awq,squeezellm,lnq,gptq,gptaq,qronos,adaround,brecq,qtip,bayesq bits=3 $SEEDS
  runs rivals 'resnet20 sst2' method=bayesq allocator=knapsack,ilp bits=3,4 seed=0
  runs rivals resnet20 method=gptq allocator=knapsack,ilp bits=3,4 seed=0
  runs rivals 'resnet56 sst2 film' method=gptaq,qronos allocator=knapsack correction=moments bits=3 seed=0
  local layers='allocator=knapsack allocation.block=layer'
  # shellcheck disable=SC2086
  runs rivals resnet20 method=qtip inputs=paired correction=moments $layers bits=3 $SEEDS
  # shellcheck disable=SC2086
  runs rivals 'resnet56 film sst2' method=qtip inputs=paired correction=moments $layers bits=3 seed=0
  runs rivals resnet20 method=bayesq rotate=true bits=3 $SEEDS
  runs rivals 'resnet56 film sst2' method=bayesq rotate=true bits=3 seed=0
  runs rivals resnet20 "${KNAPSACK[@]}" rotate=true bits=3 $SEEDS
  runs rivals 'resnet56 film sst2' "${KNAPSACK[@]}" rotate=true bits=3 seed=0
  runs rivals sst2 method=rtn,hqq,awq,gptq,gptaq method.group_size=128 bits=3,4 seed=0
  runs rivals sst2 method=bayesq budget.count=stored bits=3.1875,4.1875 seed=0
  runs rivals sst2 "${KNAPSACK[@]}" budget.count=stored bits=3.1875,4.1875 seed=0
  tables rivals
}

entropy() {     # Entropy-coded codes and further rivals. 1.1 h
  runs entropy resnet20 method=bayesq codec=fixed,entropy bits=2,3,3.5,4 $SEEDS
  runs entropy resnet20 "${KNAPSACK[@]}" codec=fixed,entropy bits=2,3,3.5,4 $SEEDS
  runs entropy sst2 method=bayesq codec=entropy bits=2,3,3.5,4 seed=0
  runs entropy sst2 "${KNAPSACK[@]}" codec=entropy bits=2,3,3.5,4 seed=0
  runs entropy resnet20 method=adaround bits=3 $SEEDS
  tables entropy
}

bounds() {      # Bits above the rate-distortion bound. 0.6 h
  runs bounds resnet20 method=bayesq "${EARLIER[@]}" codec=fixed,entropy bits=2,3,3.5,4 $SEEDS
  runs bounds resnet20 method=gptq inputs=full codec=fixed,entropy bits=2 seed=0,1
  go "$PYTHON" -m analysis.bounds "$RESULTS/bounds"
  tables bounds   # with the figure rate_distortion
}

grids() {       # First grids and levels: GPTQ with BayesQ's column weights. 0.6 h
  runs grids 'sst2 resnet56' method=gptq inputs=full method.clip=curvature bits=3,4 $SEEDS
  tables grids
}

large() {       # ResNet-50 and BERT-base with weights made here, and ResNet-50 at 224 pixels. 0.5 h, and the training
  local made=$RESULTS/weights
  local -a rest=(method=rtn,awq,gptq,bayesq "${EARLIER[@]}" bits=4,3)
  go mkdir -p "$made"
  make resnet50 "$made/resnet50.safetensors" --data "$DATA/cifar10" --epochs 5 --image-size 32
  make bert_base "$made/bert_base"
  make resnet50 "$made/imagenet.safetensors" --classes 1000
  W=(model=resnet50 "model.checkpoint=$made/resnet50.safetensors" model.image_size=32 dataset=cifar10)
  sweep large "${W[@]}" "dataset.root=$DATA/cifar10" dataset.limit=1000 "${rest[@]}"
  W=(model=bert_base "model.checkpoint=$made/bert_base" dataset=glue dataset.task=sst2)
  sweep large "${W[@]}" "dataset.root=$DATA/glue" dataset.limit=200 "${rest[@]}"
  W=(model=resnet50 "model.checkpoint=$made/imagenet.safetensors" dataset=imagenet)
  sweep large "${W[@]}" "dataset.root=$DATA/imagenet_nips2017" method=bayesq "${EARLIER[@]}" bits=4
  tables large
}

# make KIND FILE OPTION ...: a checkpoint, unless it is there.
make() { [[ -e $2 ]] || go "$PYTHON" tests/checkpoints.py "$@"; }

[[ ${1:-} != --list ]] || { list=1; shift; }
(($#)) || set -- "${SECTIONS[@]}"
for section; do
  [[ " ${SECTIONS[*]} " == *" $section "* ]] || { echo "$section: choose from ${SECTIONS[*]}" >&2; exit 2; }
done
for section; do
  echo "# $section"
  "$section"
done
exit "${failed:-0}"
