"""What the paper claims, to stand beside what was measured."""

# Percentage points of BayesQ over the strongest baseline, by the modality of the workload and the budget: top-1 of
# ResNet-50 on ImageNet, and the GLUE score of BERT-base.
CLAIMED_DELTAS = {
    "image": {3.0: 1.5, 3.5: 0.7, 4.0: 0.3},
    "text": {3.0: 1.1, 3.5: 0.4, 4.0: 0.2},
}
CLAIMED_FOR = {"image": "ResNet-50 on ImageNet", "text": "BERT-base on GLUE"}
BUDGETS = (3.0, 3.5, 4.0)
METHODS = ("rtn", "gptq", "awq", "bayesq")
