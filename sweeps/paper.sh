#!/usr/bin/env bash
# Redoes the tables and figures of README.md and analysis/README.md.
#
#   sweeps/paper.sh                 all sections, one after the other
#   sweeps/paper.sh main entropy    these sections
#   sweeps/paper.sh --list [...]    prints the commands and runs nothing
#
# Finished runs are skipped: after a stop, the same line continues. A failed run does not stop the others; the exit
# code is then 1. Runs of a section are in $RESULTS/SECTION, its tables and figures in $PAPER/SECTION. Sections may run at
# the same time. They need '.[vision,glue,lm,analysis]', the data and the weights (conf/README.md).
# Variables: DATA, MODELS, RESULTS, PAPER, PYTHON; OPTIONS: more keys for every run, as OPTIONS=wandb.mode=disabled.
# Hours beside a section are estimates: the number of runs times 163 s (MiniLM), 195 s (ResNet-56, EfficientNet-Lite0),
# 79 s (ResNet-20) or 40 s (RTN alone). The first, the second for ResNet-56, and the third are means of 10, 7 and 3 runs
# on one thread of a busy AMD EPYC (2026-11-29). Those of demo and cost follow from the READMEs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DATA=${DATA:-../shared/data}          # cifar10/, glue/, imagenet_nips2017/, wikitext-2-raw/, lm_calibration/
MODELS=${MODELS:-../shared/models}    # cifar10/*.th, glue/sst2/, glue/mrpc/
RESULTS=${RESULTS:-results/paper}
PAPER=${PAPER:-paper}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
SECTIONS=(demo main lm cost ablation rivals entropy)
GPTQ_LIKE_BAYESQ=(method=gptq allocator=knapsack inputs=paired correction=moments rotate=true)
SEEDS=seed=0,1,2
list= failed=

# The keys of a workload, as an array W.
workload() {
  case $1 in
    resnet56) W=(experiment=cifar_resnet56 "model.checkpoint=$MODELS/cifar10/resnet56-4bfd9763.th"
      "dataset.root=$DATA/cifar10") ;;
    resnet20 | resnet20_all) W=(model=cifar_resnet20 dataset=cifar10 calibration.examples=512 "dataset.root=$DATA/cifar10"
      "model.checkpoint=$MODELS/cifar10/resnet20-12fca82f.th")
      [[ $1 == resnet20_all ]] || W+=(dataset.limit=2000 dataset.subset=first) ;;
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
  local all='resnet56 resnet20_all lite0 mrpc sst2 film'
  runs main "$all" method=rtn,gptq,awq,bayesq bits=3,3.5,4 $SEEDS
  runs main "$all" method=bayesq bits=2.5 $SEEDS
  runs main "$all" "${GPTQ_LIKE_BAYESQ[@]}" bits=3,3.5,4 $SEEDS
  tables main   # compact_table is README's table
  go "$PYTHON" -m bayesq.suite.report "$RESULTS/main" --html "$PAPER/main/page.html"
}

lm() {          # analysis/README.md, "A causal language model". 4 h (887 s for BayesQ at 3 bits, two threads)
  W=(experiment=smollm2_wikitext "dataset.root=$DATA/wikitext-2-raw" "calibration.source=$DATA/lm_calibration/c4.txt"
    dataset.limit=32 calibration.examples=64)
  local zeroshot=('evaluation.zeroshot=[piqa,arc_easy,lambada_openai]' "evaluation.zeroshot_root=$DATA/zeroshot")
  sweep lm "${W[@]}" "${zeroshot[@]}" evaluation.zeroshot_limit=100 method=rtn,awq,gptq,gptaq,bayesq bits=3,3.5,4 seed=0
  sweep lm "${W[@]}" "${GPTQ_LIKE_BAYESQ[@]}" bits=3,3.5,4 seed=0
  tables lm
}

cost() {        # Seconds of each method: an empty cache for each run, nothing beside it. 0.6 h
  local name method W
  for name in resnet56 film; do
    workload "$name"
    for method in rtn hqq squeezellm awq gptq qtip lnq qronos gptaq bayesq adaround brecq; do
      THREADS=1 timed cost method=$method bits=3 seed=0 dataset.limit=32 "${W[@]}"
    done
  done
  go "$PYTHON" -m analysis "$RESULTS/cost" --cost
}

ablation() {    # Components. 0.3 h
  local names=full,codebook_lloyd,codebook_uniform,codebook_mean,codebook_noise,allocator_uniform,refits_0,refits_2
  names+=,refits_4,states_256,rotate_false,rounding_nearest,correction_none,correction_mean,inputs_full,inputs_prefix
  names+=,gptq_paired,gptq_paired_knapsack,gptq_rotated,posterior_diag,posterior_ekfac,posterior_lowrank,prior_none
  names+=,prior_evidence,prior_factored,prior_global,draws_labels,backward_all,proxy_mc,block_layer
  runs ablation resnet20 bits=3 seed=0 "ablation=$names"
  go "$PYTHON" -m analysis "$RESULTS/ablation" --ablation
}

rivals() {      # Every method, with its defaults and with what BayesQ has; groups of 128 columns. 1.5 h
  local layers=(allocator=knapsack allocation.block=layer)
  runs rivals resnet20 method=rtn,hqq,awq,squeezellm,lnq,gptq,gptaq,qronos,adaround,brecq,qtip bits=3 $SEEDS
  runs rivals resnet20 method=bayesq method.states=256,1024,4096 bits=3 $SEEDS
  runs rivals resnet20 method=gptq allocator=knapsack inputs=paired correction=moments rotate=false,true bits=3 $SEEDS
  runs rivals resnet20 method=gptaq,qronos allocator=knapsack correction=moments rotate=true bits=3 $SEEDS
  runs rivals resnet20 method=qtip inputs=paired correction=moments "${layers[@]}" method.levels=hash,congruential bits=3 $SEEDS
  runs rivals 'resnet56 film sst2' method=qtip inputs=paired correction=moments "${layers[@]}" bits=3 seed=0
  runs rivals sst2 method=rtn,hqq,awq,gptq,gptaq method.group_size=128 bits=3,4 seed=0
  tables rivals
}

entropy() {     # Entropy-coded codes. 1 h
  runs entropy resnet20 method=bayesq codec=fixed,entropy bits=2,3,4 $SEEDS
  runs entropy resnet20 "${GPTQ_LIKE_BAYESQ[@]}" codec=entropy bits=2,3,4 $SEEDS
  runs entropy 'resnet56 mrpc sst2 film' method=bayesq codec=entropy bits=3 seed=0
  runs entropy 'resnet56 mrpc sst2 film' "${GPTQ_LIKE_BAYESQ[@]}" codec=entropy bits=3 seed=0
  tables entropy
}

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
