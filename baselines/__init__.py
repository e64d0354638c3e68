"""Strong baselines: one module and one YAML each. They use bayesq.quant and never the BayesQ method itself."""
