"""Statistics of RV against the adversarial gap: correlations, resampling, reliability, agreement."""
