"""Evaluation of models: evaluators, measures, baselines, and pictures of examples."""
