"""Measures the ops against their baselines (`run`) and writes what the README shows (`report`)."""
