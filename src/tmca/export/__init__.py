"""Trained models for other runtimes, behind a gate: what does not give the model's masks is not written."""
