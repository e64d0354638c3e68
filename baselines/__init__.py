"""Strong baselines: one module and one YAML each. They import bayesq.quant, never the BayesQ method."""
