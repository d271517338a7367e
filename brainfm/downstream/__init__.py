"""Evaluation of encoders: probes, fine-tuning, and the paper's tables and figures (Kaczmarek et al. 2025)."""
