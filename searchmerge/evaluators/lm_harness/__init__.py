"""The ``lm_harness`` evaluator: any task of lm-eval, scored fast on the resident model."""
